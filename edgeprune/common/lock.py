"""One run at a time in a folder: a lock of the operating system, and beside it a note of who has it.

    self._lock = hold(out / LOCK, out)  # as long as it is referred to
    with hold(out / LOCK, out): ...

The lock is flock's, by way of filelock: it ends with its process, however that ends, so none is ever stale, and what a
killed run held the next one takes over. What it leaves out: threads and children of one process, which share its
locks, and file systems without flock.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import sys
import weakref
from datetime import datetime, timezone
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from edgeprune.common.errors import InputError, LockedError
from edgeprune.common.files import cannot_write, read_json, write_json

LOCK = ".lock"
"""The name of the lock's file in a folder that is gone on with."""


class Lock:
    """A lock that this process has until nothing refers to it. Made by `hold`."""

    def __init__(self, path: Path, folder: Path) -> None:
        """As `hold`."""
        lock, note = FileLock(path, thread_local=False), _note(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            raise LockedError(f"{folder}: in use by {_owner(note)}, or use another -o") from None
        except OSError as error:
            raise cannot_write(path, error) from error
        self._end = weakref.finalize(self, _release, lock, path, os.getpid())
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        try:
            write_json(note, {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since})
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing: with the block goes a reference."""


_held: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()


def hold(path: Path, folder: Path) -> Lock:
    """Take the lock whose file is `path`; the same one again if this process has it.

    Args:
        folder: what is locked, for the message.

    Raises:
        LockedError: another process has it; says who, and what to do.
        DiskError: its file cannot be written.
    """
    key = path.resolve()
    lock = _held.get(key)
    if lock is None:
        _held[key] = lock = Lock(path, folder)
    return lock


def is_free(folder: Path, mark: str) -> bool:
    """Whether a folder is new or empty, but for what a run that was killed before it wrote `mark` leaves."""
    left = {LOCK, _note(folder / LOCK).name, f"{_note(folder / LOCK).name}.tmp", f"{mark}.tmp"}
    return not folder.exists() or (folder.is_dir() and {p.name for p in folder.iterdir()} <= left)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _owner(note: Path) -> str:
    """Who has a lock and how to get it, as far as is known: the note may be a moment late."""
    with contextlib.suppress(InputError):
        said = read_json(note)
        pid, host = said.get("pid"), said.get("host")
        if isinstance(pid, int) and (host != socket.gethostname() or psutil.pid_exists(pid)):
            return (
                f"process {pid} on {host} since {said.get('since')} ({said.get('command')}); "
                f"wait until it is done, or stop it there with `kill {pid}`"
            )
    return "another run, which has just begun; wait until it is done"


def _release(lock: FileLock, path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked child, whose parent goes on
        for file in (_note(path), path):  # before the lock goes: afterwards they may be another's
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)  # whoever gets a lock on a file without a name tries again: filelock
        lock.release()
