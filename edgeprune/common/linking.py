"""Put an unchanged file into another folder without writing its bytes again, where the file system allows that.

    reflink     Btrfs, XFS, bcachefs: a file of its own that shares the bytes on the disk until one of the two changes
    hard link   most others, on one disk: a second name of the same file
    copy        everywhere else

A hard link shares every later change that is made in place. edgeprune makes none: it writes a new file and renames it.
Another program might; linked files are therefore only those that nobody edits by hand, see artefact/writing.py.
Permissions stay as they are: they belong to the file, not to its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from edgeprune.common import hashes, traffic

_FICLONE = 0x40049409
"""The request in Linux's <linux/fs.h>."""
_CHUNK = 1 << 20
LINKED_FROM = 2**24
"""Bytes. Smaller files are copied: that costs next to nothing, and each stays a file of its own."""


def place(source: Path, target: Path) -> None:
    """Make `target`, which must not exist, a reflink, a hard link or a copy of `source`, whichever works first.

    The hash of what was linked is known wherever that of `source` is; a copy is hashed on the way.

    Raises:
        OSError: `source` cannot be read or `target` not written.
    """
    real = source.resolve()  # a link of huggingface_hub's cache: the file itself is meant
    if real.stat().st_size < LINKED_FROM or not (_reflink(real, target) or _hard_link(real, target)):
        copy(real, target)


def is_linked(source: Path, folder: Path) -> bool:
    """Return whether `place` would link a file into a folder, which need not exist.

    Both ways are tried in the folder, with a hard link of a file of our own: one of `source` would change its change
    time, by which its hash is kept.
    """
    real = source.resolve()
    existing = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if real.stat().st_size < LINKED_FROM:
        return False
    try:
        with tempfile.TemporaryDirectory(prefix=".edgeprune-", dir=existing) as trials:
            return _reflink(real, Path(trials, "reflink")) or _could_hard_link(real, Path(trials))
    except OSError:
        return False


def _could_hard_link(source: Path, folder: Path) -> bool:
    """Return whether a file could get a hard link in a folder: on the same disk and mount, and with its owner's rights.

    Linux refuses links to what somebody else owns unless one may write it (fs.protected_hardlinks).
    """
    ours = not hasattr(os, "geteuid") or source.stat().st_uid == os.geteuid() or os.access(source, os.W_OK)
    (folder / "file").touch()
    return ours and _disk(source) == _disk(folder / "file") and _hard_link(folder / "file", folder / "link")


def _disk(path: Path) -> tuple[int, str]:
    """Return the number of a file's disk, and of its mount if the system tells: a hard link leads to no other."""
    with path.open("rb") as file:
        told = Path(f"/proc/self/fdinfo/{file.fileno()}")
        lines = told.read_text().splitlines() if told.exists() else []
        return os.fstat(file.fileno()).st_dev, next((line for line in lines if line.startswith("mnt_id:")), "")


def copy(source: Path, target: Path) -> None:
    """Copy a file's bytes and remember their hash.

    Raises:
        OSError: `source` cannot be read or `target` not written.
    """
    state = hashlib.sha256()
    with source.open("rb") as original, target.open("wb") as made:
        while chunk := original.read(_CHUNK):
            state.update(chunk)
            made.write(chunk)
            traffic.add(read=len(chunk), written=len(chunk))
    hashes.note(target, state.hexdigest())


def _reflink(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    import fcntl

    digest = hashes.known(source)
    try:
        with source.open("rb") as original, target.open("xb") as made:
            fcntl.ioctl(made.fileno(), _FICLONE, original.fileno())
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
        return False
    if digest and digest == hashes.known(source):  # it has not changed meanwhile
        hashes.note(target, digest)
    return True


def _hard_link(source: Path, target: Path) -> bool:
    try:
        before = hashes.identity(source)
        os.link(source, target)
    except (OSError, NotImplementedError):  # another disk, a file system without links, somebody else's file
        return False
    hashes.follow_link(source, before)
    return True
