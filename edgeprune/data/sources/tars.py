"""Webdataset: tar shards in which files of one name belong together, `0001.jpg` with `0001.txt` or `0001.json`.

Nothing is unpacked to disk, so no name in an archive leads anywhere. What it leaves out: compressed archives.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from edgeprune.common.errors import InputError
from edgeprune.common.files import files_digest
from edgeprune.data.sources import Entry, Skipped, caption_of

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
MAX_BYTES = 2**26
"""A larger member is skipped."""


STREAMED = False


def fits(given: str) -> bool:
    """A .tar file, or a folder of them."""
    return bool(_shards(given))


def _shards(given: str) -> list[Path]:
    path = Path(given)
    return [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar")) if path.is_dir() else []


def identity(given: str) -> str:
    """By name, size and time of change of every file."""
    return files_digest(Path(given))


def count(given: str) -> int | None:
    """By the headers; what is in the files is not read."""
    return sum(1 for shard in _shards(given) for _ in _groups(shard, contents=False))


def read(given: str) -> Iterator[Entry | Skipped]:
    """Shard by shard, in the order of their names.

    Raises:
        InputError: a shard is no tar, or ends early.
    """
    for shard in _shards(given):
        for found in _groups(shard, contents=True):
            yield found if isinstance(found, Skipped) else _pair(*found)


def _groups(shard: Path, *, contents: bool) -> Iterator[tuple[str, dict[str, bytes]] | Skipped]:
    """Name and files, by ending, of what belongs together; without `contents` the files are empty."""
    key, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                stem = member.name.removesuffix(name.suffix)
                if stem != key and parts:
                    yield f"{shard.name}/{key}", parts
                    parts = {}
                key = stem
                if member.isfile() and name.suffix.lower() in (*IMAGES, ".txt", ".json"):
                    if member.size > MAX_BYTES:
                        yield Skipped(f"{shard.name}/{member.name}", f"found {member.size} bytes")
                        continue
                    file = archive.extractfile(member)
                    assert file is not None  # a regular file
                    parts[name.suffix.lower()] = file.read() if contents else b""
                archive.members = []  # type: ignore[attr-defined]  # or all that went by are kept
            # tarfile takes half a header for the end.
            if shard.stat().st_size % tarfile.BLOCKSIZE:
                raise tarfile.TarError("it ends within a block")
            if parts:
                yield f"{shard.name}/{key}", parts
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{shard}: not a whole tar archive ({error}); download or make it again") from error


def _pair(name: str, parts: dict[str, bytes]) -> Entry | Skipped:
    image = next((parts[kind] for kind in IMAGES if kind in parts), None)
    if image is None:
        return Skipped(name, "no image beside it")
    text: object = parts[".txt"].decode("utf-8", errors="replace") if ".txt" in parts else None
    if ".json" in parts:
        try:
            entry = json.loads(parts[".json"])
            text = (caption_of(entry) if isinstance(entry, dict) else None) or text
        except (ValueError, RecursionError):
            return Skipped(name, "its .json is none")
    return Entry(name, image, text)
