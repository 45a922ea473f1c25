"""One run at a time in a folder: an operating-system lock, and a note next to it that says who holds it.

    self._lock = hold(out / LOCK, out)  # held for as long as something refers to it
    with hold(out / LOCK, out): ...

The lock is an flock, taken through filelock. It ends with its process, however the process ends, so no lock is ever
stale, and the next run can take over a killed run's folder. Threads and child processes share their process's locks.
File systems without flock are not supported.
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
"""The lock file's name in a folder that a run can resume."""


class Lock:
    """A lock that this process holds until nothing refers to it. Use `hold` to take one."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Take the lock; see `hold` for arguments and errors."""
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
        """Do nothing: the block held a reference, and the lock ends with the last reference."""


_locks: weakref.WeakValueDictionary[Path, Lock] = weakref.WeakValueDictionary()
"""The locks that this process holds."""


def hold(path: Path, folder: Path) -> Lock:
    """Take the lock whose file is `path`; return the existing lock if this process already holds it.

    Args:
        folder: the locked folder, for the error.

    Raises:
        LockedError: another process holds it; the message says which one and what to do.
        DiskError: the lock file cannot be written.
    """
    key = path.resolve()
    lock = _locks.get(key)
    if lock is None:
        _locks[key] = lock = Lock(path, folder)
    return lock


def is_free(folder: Path, mark: str) -> bool:
    """Return whether a folder is new or empty, ignoring the files of a run that was killed before it wrote `mark`."""
    leftovers = {LOCK, _note(folder / LOCK).name, f"{_note(folder / LOCK).name}.tmp", f"{mark}.tmp"}
    return not folder.exists() or (folder.is_dir() and {p.name for p in folder.iterdir()} <= leftovers)


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _owner(note: Path) -> str:
    """Return who holds a lock and how to get it. The note may not be written yet, since the lock comes first."""
    with contextlib.suppress(InputError):
        owner = read_json(note)
        pid, host = owner.get("pid"), owner.get("host")
        if isinstance(pid, int) and (host != socket.gethostname() or psutil.pid_exists(pid)):
            return (
                f"process {pid} on {host} since {owner.get('since')} ({owner.get('command')}); "
                f"wait until it is done, or stop it there with `kill {pid}`"
            )
    return "another run, which has just begun; wait until it is done"


def _release(lock: FileLock, path: Path, pid: int) -> None:
    if os.getpid() == pid:  # not in a forked child: its parent still holds the lock
        for file in (_note(path), path):  # before the release: afterwards the files may belong to another process
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)  # filelock tries again if the file that it locked has been unlinked
        lock.release()
