"""SHA-256 of files, each computed once: while the file is written or copied, or when it is first asked for.

A process remembers the hash of every file that it has written or read as a whole. Hashes of large files of originals
are also kept for the user's later processes, in `~/.cache/edgeprune/hashes.json` (`$XDG_CACHE_HOME`, if it is set).

A file is the same as long as its disk, inode, size and times are; the hash of one that changes while it is read is not
remembered. Times are compared for equality only, so setting the clock back cannot make a stale entry look valid. The
inode's change time is included because a copy can preserve the modification time but not that one. A hard link that
comes or goes changes it too. Links that edgeprune makes are followed; any other, and each that is deleted, costs one
reading. Entries for later processes are listed by path and lack the disk's number, which changes whenever NFS or Btrfs
is mounted.

The blobs of huggingface_hub's cache are named by what should be their hash. Nothing has checked that they have it, so
they are read like any other file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from edgeprune.common.errors import DiskError, InputError
from edgeprune.common.files import inside, read_json, sha256_file, write_text
from edgeprune.common.progress import Progress, silent

KEPT_FROM = 2**24
"""Bytes. Smaller files are hashed in less time than the store takes to write."""
_MANY = 4096
"""Entries of the store. Above it, those of files that are gone are dropped."""
_HEX = frozenset("0123456789abcdef")

Identity = tuple[int, ...]
"""What tells a file from another, and from itself after a change: disk, inode, size, modification and change time."""
_known: dict[Identity, str] = {}


def identity(path: Path) -> Identity:
    """Return what is compared, see `Identity`.

    Raises:
        OSError: there is no such file.
    """
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def sha256(path: Path) -> str:
    """Return a file's SHA-256; it is read unless this process has written or read it as it is.

    Raises:
        OSError: the file cannot be read.
    """
    found = identity(path)
    if found not in _known:
        digest = sha256_file(path)
        if identity(path) != found:
            return digest
        _known[found] = digest
    return _known[found]


def known(path: Path) -> str | None:
    """Return a file's SHA-256 if this process knows it; nothing is read."""
    return _known.get(identity(path))


def note(path: Path, digest: str) -> None:
    """Remember the hash of a file that this process has written."""
    _known[identity(path)] = digest


def follow_link(path: Path, before: Identity) -> None:
    """Remember the hash of a file that this process has given another hard link, unless more than that has changed.

    Args:
        path: the file.
        before: its identity before the link, which has changed the last number.
    """
    now = identity(path)
    if before in _known and now[:-1] == before[:-1]:
        _known[now] = _known[before]
        _keep({str(path.resolve()): (now, _known[now])})


def kept_sha256(path: Path) -> str:
    """Return the SHA-256 of a file of an original; it is read once by all of the user's processes.

    Raises:
        OSError: the file cannot be read.
    """
    with keeping() as sha256_of:
        return sha256_of(path)


@contextlib.contextmanager
def keeping() -> Iterator[Callable[[Path], str]]:
    """Give `kept_sha256` of many files: what is kept is read at most once, and written once, also after an error.

    Nothing is kept where it cannot be written: it only saves time.
    """
    stored: dict[str, list[Any]] | None = None
    new: dict[str, tuple[Identity, str]] = {}

    def sha256_of(path: Path) -> str:
        nonlocal stored
        found, real = identity(path), str(path.resolve())
        if found in _known or found[2] < KEPT_FROM:
            return sha256(path)
        stored = _read_store() if stored is None else stored
        entry = stored.get(real)
        if entry and entry[:-1] == list(found[1:]):
            _known[found] = entry[-1]
            return _known[found]
        digest = sha256(path)
        if found in _known:  # it did not change meanwhile
            new[real] = found, digest
        return digest

    try:
        yield sha256_of
    finally:
        _keep(new)


def _keep(new: Mapping[str, tuple[Identity, str]]) -> None:
    """Write hashes of large files to the store, by the path of the file."""
    large = {real: [*found[1:], digest] for real, (found, digest) in new.items() if found[2] >= KEPT_FROM}
    if not large:
        return
    entries = _read_store() | large
    if len(entries) > _MANY:
        entries = {real: entry for real, entry in entries.items() if os.path.exists(real)}
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
