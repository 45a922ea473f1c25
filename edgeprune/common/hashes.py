"""SHA-256 of files, each computed once: while the file is written or copied, or when it is first asked for.

A process remembers the hash of every file that it has written or read as a whole. Hashes of large files of originals
are also kept for the user's later processes, in `~/.cache/edgeprune/hashes.json` (`$XDG_CACHE_HOME`, if it is set).

A file is the same as long as its inode, size and times are. Times are compared for equality only, so setting the clock
back cannot make a stale entry look valid. The inode's change time is included because a copy can preserve the
modification time but not that one; another hard link changes it too, which costs one reading.

The blobs of huggingface_hub's cache are named by what should be their hash. Nothing has checked that they have it, so
they are read like any other file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.common.errors import DiskError, InputError
from edgeprune.common.files import inside, read_json, sha256_file, write_text
from edgeprune.common.progress import Progress, silent

KEPT_FROM = 2**24
"""Bytes. Smaller files are hashed in less time than the store takes to write."""
_MOST_KEPT = 4096
_HEX = frozenset("0123456789abcdef")

_known: dict[tuple[int, ...], str] = {}
"""By `_identity`."""


def sha256(path: Path) -> str:
    """Return a file's SHA-256; it is read unless this process has written or read it as it is.

    Raises:
        OSError: the file cannot be read.
    """
    identity = _identity(path)
    if identity not in _known:
        _known[identity] = sha256_file(path)
    return _known[identity]


def known(path: Path) -> str | None:
    """Return a file's SHA-256 if this process knows it; nothing is read."""
    return _known.get(_identity(path))


def note(path: Path, digest: str) -> None:
    """Remember the hash of a file that this process has written."""
    _known[_identity(path)] = digest


def kept_sha256(path: Path) -> str:
    """Return the SHA-256 of a file of an original; it is read once by all of the user's processes.

    Raises:
        OSError: the file cannot be read.
    """
    identity, real = _identity(path), str(path.resolve())
    if identity[1] < KEPT_FROM or identity in _known:
        return sha256(path)
    entry = _read_store().get(real)
    if entry and entry[:-1] == list(identity):
        _known[identity] = entry[-1]
    else:
        keep(path, sha256(path))
    return _known[identity]


def keep(path: Path, digest: str) -> None:
    """Remember the hash of an original's file, also for later processes if the file is large.

    Nothing happens where the store cannot be written: it only saves time.
    """
    note(path, digest)
    identity, real = _identity(path), str(path.resolve())
    if identity[1] < KEPT_FROM:
        return
    entries = {name: entry for name, entry in _read_store().items() if name != real}
    entries = dict(list(entries.items())[-_MOST_KEPT + 1 :]) | {real: [*identity, digest]}
    store = _store()
    own = store.with_name(f"{store.name}.{os.getpid()}")  # others may be writing theirs; the last one stays
    with contextlib.suppress(DiskError, OSError):
        try:
            write_text(own, json.dumps(entries, indent=0))
            os.replace(own, store)
        finally:
            own.unlink(missing_ok=True)


def verify(folder: Path, listed: Mapping[str, str], listed_in: str, progress: Progress = silent) -> None:
    """Compare files with the hashes that were written down for them. A process reads each file once.

    Args:
        folder: the folder that the names are relative to.
        listed: SHA-256 by name.
        listed_in: the name of the file in `folder` that lists them, for the error.
        progress: called after each file.

    Raises:
        InputError: a file is missing or changed, or a name leads out of the folder.
    """
    for done, (name, expected) in enumerate(listed.items(), 1):
        path = inside(folder, name, f"{folder / listed_in}: files")
        if not path.is_file():
            raise InputError(f"{path}: no such file, but {listed_in} lists it; make the folder again")
        if sha256(path) != expected:
            raise InputError(f"{path}: its SHA-256 is not the one in {listed_in}; the file is damaged or was changed")
        progress("checking files", done, len(listed))


def _identity(path: Path) -> tuple[int, ...]:
    """Return what tells a file from another, and from itself after a change; the size is second."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _store() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "edgeprune" / "hashes.json"


def _read_store() -> dict[str, list[Any]]:
    """Return the entries of the store that are whole; a missing or damaged store has none."""
    try:
        entries = read_json(_store())
    except InputError:
        return {}
    return {name: entry for name, entry in entries.items() if _is_whole(entry)}


def _is_whole(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 5:
        return False
    *numbers, digest = entry
    return all(type(n) is int for n in numbers) and isinstance(digest, str) and len(digest) == 64 and {*digest} <= _HEX
