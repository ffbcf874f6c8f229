"""Claims on shards, as files in a shared folder: no shard is done twice, and a dead worker's by another.

A claim is a file made by a hard link, which succeeds for one worker only, also on network file systems. Its
owner touches it while it works. A claim is void once its owner is gone from this machine, or, where that
cannot be seen because it ran on another, once it was not touched for a while.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import uuid
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetError

_TOUCHES_PER_TIMEOUT = 10
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def _process_start(pid: int) -> str | None:
    """Return when a process of this machine started (in clock ticks), or None if it is gone."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else numbers[18]  # killed, but not yet waited for by its parent


def _identity() -> dict[str, Any]:
    """Describe this process so that another one can tell whether it is still there."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        boot, namespace = "", 0
    pid = os.getpid()
    place = [socket.gethostname(), boot, namespace]
    return {"place": place, "pid": pid, "start": _process_start(pid), "id": uuid.uuid4().hex}


def link_once(own: Path, path: Path) -> bool:
    """Give the file `own` the name `path` too; False if another file has it.

    Raises:
        DatasetError: The file system has no hard links.
    """
    try:
        os.link(own, path)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            return os.path.samefile(own, path)  # made, but the network file system's answer was lost
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise DatasetError(
            f"{path.parent}: its file system makes no hard links ({error.strerror}), by which workers agree "
            "on who does what; write to a local disk or another shared file system, and copy the result"
        ) from error
    return True


class Claims:
    """The claims of one worker in a folder."""

    def __init__(self, folder: Path, timeout: float = 300.0) -> None:
        """Use `folder`; claims of other machines are void when not touched for `timeout` seconds."""
        self.folder = folder
        self.timeout = timeout
        folder.mkdir(parents=True, exist_ok=True)
        self._me = _identity()
        self._held: dict[str, Path] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True, name="claim")
        self._thread.start()

    def acquire(self, name: str) -> bool:
        """Claim `name`; False if another worker holds it."""
        path = self.folder / f"{name}.claim"
        own = self.folder / f".{name}.{self._me['id']}"
        own.write_text(json.dumps(self._me), encoding="utf-8")
        try:
            if not link_once(own, path) and not (self._clear_if_void(path, own) and link_once(own, path)):
                return False
        finally:
            own.unlink()
        self._held[name] = path
        return True

    def __contains__(self, name: str) -> bool:
        """Whether `name` was claimed and not given back, be the claim still ours or not."""
        return name in self._held

    def still_held(self, *names: str) -> bool:
        """Whether these claims, or all there are, are still ours: who sleeps long may be taken for dead."""
        paths = [self._held.get(name) for name in names or list(self._held)]
        return bool(paths) and all(path is not None and self._read(path) == self._me for path in paths)

    def release(self, name: str) -> None:
        """Give a claim back."""
        if self.still_held(name):
            self._held[name].unlink(missing_ok=True)
        del self._held[name]

    def close(self) -> None:
        """Give all claims back and stop touching."""
        for name in list(self._held):
            self.release(name)
        self._stop.set()
        self._thread.join()

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _clear_if_void(self, path: Path, own: Path) -> bool:
        """Take a void claim out of the way; False if it is not void."""
        try:
            untouched = own.stat().st_mtime - path.stat().st_mtime  # both by the file system's clock
        except FileNotFoundError:
            return True
        owner = self._read(path)
        if owner and owner["place"] == self._me["place"] and owner["start"] is not None:
            void = _process_start(owner["pid"]) != owner["start"]
        else:
            void = untouched > self.timeout
        if not void:
            return False
        moved = self.folder / f".void.{uuid.uuid4().hex}"
        try:
            os.rename(path, moved)
        except FileNotFoundError:
            return True
        if self._read(moved) != owner:  # somebody was faster and this is already their claim
            link_once(moved, path)
        moved.unlink()
        return True

    def _touch(self) -> None:
        while not self._stop.wait(self.timeout / _TOUCHES_PER_TIMEOUT):
            for path in list(self._held.values()):
                with contextlib.suppress(OSError):  # taken over; still_held() will tell
                    os.utime(path)
