"""Reading, decoding, encoding and writing at the same time, as if one was done after the other.

Each stage has a thread, encoding that of the caller, and takes the items in their order. What is on its way
is bounded: `READ_AHEAD` items that are read or decoded but not encoded, `DECODED_AHEAD` of them decoded, and
`WRITTEN_BEHIND` that are encoded but not written, besides the one that each stage is at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Decoded = TypeVar("Decoded")
Encoded = TypeVar("Encoded")
Written = TypeVar("Written")

DECODED_AHEAD = 2
READ_AHEAD = 8
WRITTEN_BEHIND = 2
_END: Any = object()


def overlapped(
    items: Iterable[Item],
    decode: Callable[[Item], Decoded],
    encode: Callable[[Decoded], Encoded],
    write: Callable[[Encoded], Written],
) -> Iterator[Written]:
    """Yield `write(encode(decode(item)))` of each item in order; later items are on their way meanwhile.

    An error of any stage comes where it would come if nothing overlapped: what is before it is written first,
    nothing that is behind it is. At the start fewer items are read ahead, one more with each that is encoded.

    Args:
        items: Read in a thread of its own.
        decode: Called in a second thread.
        encode: Called in the caller's thread, between two results.
        write: Called in a third thread.
    """
    iterator = iter(items)
    reader, decoder, writer = (
        ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("reading", "decoding", "writing")
    )
    reading = deque[Future[Any]]()
    decoding = deque[Future[Any]]()
    writing = deque[Future[Written]]()

    def decode_read(read: Future[Any]) -> Any:
        item = read.result()
        return item if item is _END else decode(item)

    def write_after(previous: Future[Written] | None, encoded: Encoded) -> Written:
        if previous is not None:
            previous.result()  # after an error nothing more is written
        return write(encoded)

    def look_ahead(most: int) -> None:
        while len(reading) + len(decoding) < most:
            reading.append(reader.submit(next, iterator, _END))
        while len(decoding) < DECODED_AHEAD:
            decoding.append(decoder.submit(decode_read, reading.popleft()))

    error: Exception | None = None
    most, previous = DECODED_AHEAD, None
    try:
        try:
            look_ahead(most)
            while (decoded := decoding.popleft().result()) is not _END:
                look_ahead(most)
                previous = writer.submit(write_after, previous, encode(decoded))
                del decoded
                writing.append(previous)
                most = min(most + 1, READ_AHEAD)
                while len(writing) > WRITTEN_BEHIND:
                    yield writing.popleft().result()
        except Exception as raised:
            error = raised
        while writing:
            yield writing.popleft().result()
        if error is not None:
            raise error
    finally:
        for pool in (reader, decoder, writer):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (reader, decoder, writer):
            pool.shutdown()
        if isinstance(iterator, Generator):
            iterator.close()
