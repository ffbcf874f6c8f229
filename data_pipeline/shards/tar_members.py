"""The files in a tar and the samples they form, strictly: what ends early or is no tar is never passed over.

`tarfile` takes a header that is cut off for the end of the archive, so that samples can be lost in silence;
here a tar ends with the empty block that says so, and what follows that is a tar as well.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512
BUFFER = 1 << 20
"""Bytes by which to read a tar, also for its headers alone: on a network a request for each is slower."""
_EMPTY = bytes(BLOCK)
_READ_AT_A_TIME = 1 << 20
_CHECKSUM = re.compile(rb" *[0-7]+[ \0]*")
# A sample is what lies before the first dot of the last path component, as in WebDataset and Energon.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_PAX_LENGTH = re.compile(rb"([0-9]{1,15}) ")
_META = re.compile(r"__[^/]*__($|/)")

DAMAGED_GZIP = (EOFError, zlib.error, gzip.BadGzipFile)
"""What reading a damaged or truncated gzip raises; any other OSError is the storage's, not the file's."""


class TarError(ValueError):
    """A tar that cannot be read further."""

    key: str | None = None
    """The sample inside whose file it breaks off; None if it breaks off between files."""
    unfinished: tuple[str, dict[str, bytes]] | None = None
    """The last sample, as far as it goes, where the tar breaks off after a whole file."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int
    """Of its first header."""
    data_offset: int
    size: int


def iterate_members(stream: IO[bytes], fragment: bool = False) -> Iterator[Member]:
    """Yield the regular files of a tar.

    After a member is yielded the stream stands at its content; the caller has to leave it at its end.

    Args:
        stream: At the first header.
        fragment: The stream is a part of a tar, from header to header, and may end without the empty block.

    Raises:
        TarError: The stream is no tar, is damaged, or ends early.
    """
    at = start = 0
    name: str | None = None
    ended = False
    while True:
        header = stream.read(BLOCK)
        if not header and (fragment or ended):
            return
        if header == _EMPTY[: len(header)] and (ended or len(header) == BLOCK):
            # Up to the end of the file there may be more of them, or another tar, as `tar -i` reads it.
            ended = True
            at = start = at + len(header)
            continue
        if len(header) < BLOCK and not ended:
            raise TarError("truncated: it ends without the empty block that a tar ends with")
        if not _CHECKSUM.fullmatch(header[148:156]) or _checksum(header) != _number(header[148:156]):
            raise TarError(f"{'data after the end of the tar' if ended else 'no tar header'} at byte {at}")
        ended = False
        size, kind = _number(header[124:136]), header[156:157]
        at += BLOCK
        padding = -size % BLOCK
        if kind in (b"0", b"\0"):
            yield Member(name or _name(header), start, at, size)
        elif kind in (b"x", b"L"):
            name = _long_name(_read(stream, size), kind) or name
        else:
            _read(stream, size)
        _read(stream, padding)
        at += size + padding
        if kind not in (b"x", b"L", b"g"):
            start, name = at, None


def _checksum(header: bytes) -> int:
    """Sum of the bytes, those of the checksum itself taken for spaces.

    The lower half of Adler-32 is one more than the sum of so few bytes: several times as fast as `sum`.
    """
    halves = zlib.adler32(header[:256]) % 65536 + zlib.adler32(header[256:]) % 65536 - 2
    return halves - sum(header[148:156]) + 8 * ord(" ")


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise TarError("truncated: it ends inside a file")
    return data


def skip(stream: IO[bytes], size: int) -> None:
    """Leave out the content of a member; where the stream can, without reading it."""
    if stream.seekable():
        stream.seek(size, io.SEEK_CUR)
        return
    while size:
        size -= len(_read(stream, min(size, _READ_AT_A_TIME)))


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # sizes of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise TarError(f"no number in a tar header: {field!r}") from error


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345:346] != b"\0":
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _long_name(content: bytes, kind: bytes) -> str | None:
    if kind == b"L":
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while content:
        match = _PAX_LENGTH.match(content)
        length = int(match[1]) if match else 0
        if match is None or not match.end() < length <= len(content):
            raise TarError(f"damaged pax header: {content[:20]!r} where a length should be")
        key, _, value = content[match.end() : length - 1].partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return None


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and part of a file's name (`a/K.0.JPG` -> `a/K`, `0.jpg`); None for files of no sample."""
    match = _NAME.match(name)
    return None if match is None or _META.match(name) else (match[1], match[2].lower())


def iterate_samples(stream: IO[bytes], fragment: bool = False) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a tar, key and parts, in order.

    Raises:
        TarError: See `iterate_members`; the samples before the last have been given.
        OSError: The stream could not be read, which says nothing about the tar.
    """
    key: str | None = None
    parts: dict[str, bytes] = {}
    reading: str | None = None
    try:
        for member in iterate_members(stream, fragment):
            split = split_name(member.name)
            if split is not None and split[0] != key:
                if key is not None:
                    yield key, parts
                key, parts = split[0], {}
            reading = key
            content = _read(stream, member.size)
            reading = None
            if split is not None:
                parts[split[1]] = content
    except (TarError, *DAMAGED_GZIP) as error:
        failure = TarError(" ".join(str(error).split()) or type(error).__name__)
        failure.key = reading
        if key is not None and reading is None:
            failure.unfinished = key, parts
        raise failure from error
    if key is not None:
        yield key, parts


@dataclass
class SamplePlace:
    """Where a sample lies in its tar."""

    key: str
    offset: int
    parts: list[tuple[str, int, int]]
    """(part, offset of its content, size)."""


def locate_samples(stream: IO[bytes]) -> tuple[list[SamplePlace], int]:
    """Return where the samples of a tar lie, and where its empty last block begins; reads headers only.

    Raises:
        TarError: See `iterate_members`.
    """
    places: list[SamplePlace] = []
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    end = 0
    for member in iterate_members(stream):
        end = member.data_offset + member.size + -member.size % BLOCK
        if end > size:
            raise TarError("truncated: it ends inside a file")
        skip(stream, member.size)
        split = split_name(member.name)
        if split is None:
            continue
        if not places or places[-1].key != split[0]:
            places.append(SamplePlace(split[0], member.offset, []))
        places[-1].parts.append((split[1], member.data_offset, member.size))
    return places, end
