"""Webdataset: tar shards in which files of one name belong together, `0001.jpg` with `0001.txt` or `0001.json`.

Nothing is unpacked to disk, so names in an archive cannot lead out of it. Compressed archives are not read.
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
    """Return whether this is a .tar file or a folder of them."""
    return bool(_shards(given))


def _shards(given: str) -> list[Path]:
    path = Path(given)
    return [path] if path.suffix == ".tar" and path.is_file() else sorted(path.glob("*.tar")) if path.is_dir() else []


def identity(given: str) -> str:
    """Return a digest of the name, size and modification time of every file."""
    return files_digest(Path(given))


def count(given: str) -> int | None:
    """Count the entries from the tar headers; the content is not read."""
    return sum(1 for shard in _shards(given) for _ in _groups(shard, contents=False))


def read(given: str) -> Iterator[Entry | Skipped]:
    """Yield the entries shard by shard, in the order of the shards' names.

    Raises:
        InputError: a shard is not a tar archive or is truncated.
    """
    for shard in _shards(given):
        for group in _groups(shard, contents=True):
            yield group if isinstance(group, Skipped) else _entry(*group)


def _groups(shard: Path, *, contents: bool) -> Iterator[tuple[str, dict[str, bytes]] | Skipped]:
    """Yield the name of each group of files and its files by suffix; without `contents` the files are empty."""
    key, files = "", dict[str, bytes]()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                stem = member.name.removesuffix(name.suffix)
                if stem != key and files:
                    yield f"{shard.name}/{key}", files
                    files = {}
                key = stem
                if member.isfile() and name.suffix.lower() in (*IMAGES, ".txt", ".json"):
                    if member.size > MAX_BYTES:
                        yield Skipped(f"{shard.name}/{member.name}", f"found {member.size} bytes")
                        continue
                    file = archive.extractfile(member)
                    assert file is not None  # a regular file
                    files[name.suffix.lower()] = file.read() if contents else b""
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
            # tarfile takes a truncated header for the end of the archive.
            if shard.stat().st_size % tarfile.BLOCKSIZE:
                raise tarfile.TarError("it ends within a block")
            if files:
                yield f"{shard.name}/{key}", files
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{shard}: not a complete tar archive ({error}); download or create it again") from error


def _entry(name: str, files: dict[str, bytes]) -> Entry | Skipped:
    image = next((files[kind] for kind in IMAGES if kind in files), None)
    if image is None:
        return Skipped(name, "no image beside it")
    text: object = files[".txt"].decode("utf-8", errors="replace") if ".txt" in files else None
    if ".json" in files:
        try:
            entry = json.loads(files[".json"])
            text = (caption_of(entry) if isinstance(entry, dict) else None) or text
        except (ValueError, RecursionError):
            return Skipped(name, "its .json is none")
    return Entry(name, image, text)
