"""Files by address through fsspec, errors of the network tried again; everything that is not a local path."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import IO, Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = (0.5, 2.0, 8.0)
"""Waits before another try."""
BLOCK, BLOCKS_KEPT = 1 << 20, 4
_BUFFER = 1 << 20
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)
_MISSING_STATUS = (404, 410)
_FINAL_STATUS = (401, 403, *_MISSING_STATUS)
_HTTP = ("http://", "https://")


def is_remote(path: object) -> bool:
    """Whether a file or folder is named by an address (`https://...`) and not by a path."""
    return "://" in str(path)


def with_retries(function: Callable[[], T]) -> T:
    """Call `function`, again after a while where it fails for a reason that may pass.

    Raises:
        OSError: It failed too often, or what it wants is not there or not allowed.
        ValueError, ImportError: From the function, at once.
    """
    for wait in (*RETRY_SECONDS, None):
        try:
            return function()
        except (ValueError, ImportError):
            raise
        except Exception as error:  # each of fsspec's backends has its own errors
            cause = _first_cause(error)
            words = dict.fromkeys(" ".join(str(one).split()) or type(one).__name__ for one in (error, cause))
            reason = ": ".join(words)
            if wait is None or _is_final(cause):
                if isinstance(error, _FINAL) and isinstance(cause, _FINAL):
                    raise
                raise (FileNotFoundError if _status(cause) in _MISSING_STATUS else OSError)(reason) from error
            logger.warning("%s; another try in %.1f s", reason, wait)
            time.sleep(wait)
    raise AssertionError("the last try has returned or raised")


def _first_cause(error: BaseException) -> BaseException:
    # fsspec calls every failure to open an address a missing file; what it was is the cause.
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_final(cause: BaseException) -> bool:
    return isinstance(cause, _FINAL) or _status(cause) in _FINAL_STATUS


def _status(cause: BaseException) -> int | None:
    """What a server answered, as aiohttp's errors have it (https) or botocore's (s3)."""
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(cause, "status", None)


def _find(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address and the path in it; fsspec keeps them for each process."""
    import fsspec

    settings = {}
    if address.startswith(_HTTP):
        from aiohttp import ClientTimeout

        # By default the whole download has five minutes, however slowly it is consumed.
        settings["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=30, sock_read=60)}
    return fsspec.url_to_fs(address, **settings)


class RemoteBlocks:
    """A file of known size of which pieces are read: in blocks, the last few of which are kept."""

    def __init__(self, address: str, size: int) -> None:
        """Read the first `size` bytes of a file."""
        self._address, self._size = address, size
        self._block = lru_cache(maxsize=BLOCKS_KEPT)(self._fetch)

    def _fetch(self, number: int) -> bytes:
        filesystem, path = _find(self._address)
        start = number * BLOCK
        end = min(start + BLOCK, self._size)
        data = filesystem.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            raise ValueError(
                f"got {len(data)} bytes for a range of {end - start}: the file is shorter than its index "
                "says, or its server does not answer range requests"
            )
        return data

    def read(self, start: int, size: int) -> bytes:
        """Read `size` bytes from `start`, once; errors are those of fsspec, or ValueError."""
        first, last = start // BLOCK, (start + size - 1) // BLOCK
        data = b"".join(self._block(number) for number in range(first, last + 1))
        at = start - first * BLOCK
        return data[at : at + size]


def fetch_remote(address: str) -> bytes:
    """Read a small file whole, once; errors are those of fsspec."""
    filesystem, path = _find(address)
    return filesystem.cat_file(path)


def read_remote(address: str) -> bytes:
    """Read a small file whole.

    Raises:
        OSError: It cannot be read, also after some tries; the message names the address.
    """
    try:
        return with_retries(lambda: fetch_remote(address))
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{address}: {error}") from error


def stream_remote(address: str) -> IO[bytes]:
    """Open a file to read it from start to end; a broken connection goes on at the same byte.

    Raises:
        OSError: It cannot be opened, also after some tries; reading raises the same.
    """
    stream = _Stream(address)
    with_retries(stream.reopen)
    return io.BufferedReader(stream, _BUFFER)


class _Stream(io.RawIOBase):
    """The bytes of a remote file in their order."""

    def __init__(self, address: str) -> None:
        self._address, self._at = address, 0
        self._options: dict[str, Any] = {}
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def reopen(self) -> None:
        """Open the file at the byte reached so far."""
        filesystem, path = _find(self._address)
        file = filesystem.open(path, "rb", **self._options)
        try:
            file.seek(self._at)
        except ValueError:  # it comes from the beginning, or not at all
            left = self._at
            while left:
                left -= len(file.read(min(left, _BUFFER))) or left
        self._file = file

    def readinto(self, buffer: Any) -> int:
        data = with_retries(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self.reopen()
        try:
            return self._file.read(size)
        except ValueError:
            if self._options or not self._address.startswith(_HTTP):
                raise
            self._options = {"block_size": 0}  # the server does not answer requests for a part of a file
            self.reopen()
            return self._file.read(size)
        except Exception:
            self._file = None
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
