"""Webdataset: tar shards in which files of one name belong together, `0001.jpg` with `0001.txt` or `0001.json`.

grouping.py says what belongs together, in any order of the files. Nothing is unpacked to disk, so names in an archive
cannot lead out of it. A shard is read twice: first the names and the captions, then the images, one at a time.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from edgeprune.common.errors import InputError
from edgeprune.common.files import files_digest
from edgeprune.common.texts import decoded_text
from edgeprune.data.grouping import Group, grouped, is_hidden
from edgeprune.data.sources import NO_IMAGE, Entry, Skipped, caption_of

MAX_BYTES = 2**26
"""A larger image is skipped."""
_MAX_TEXT_BYTES = 2**20
STREAMED = False
_SHARDS = (".tar", ".tar.gz", ".tgz")
_TEXTS = (".json", ".txt", ".caption")
"""In order of preference."""


def fits(given: str) -> bool:
    """Return whether this is a .tar file or a folder of them."""
    return bool(_shards(given))


def _shards(given: str) -> list[Path]:
    path = Path(given)
    found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return [p for p in found if p.name.lower().endswith(_SHARDS) and not is_hidden(p.name) and p.is_file()]


def identity(given: str) -> str:
    """Return a digest of the name, size and modification time of every file."""
    return files_digest(Path(given))


def count(given: str) -> int | None:
    """Count the entries from the tar headers; the content is not read."""
    total = 0
    for shard in _shards(given):
        with _whole(shard):
            total += len(grouped((member.name for _, member in _members(shard)), _TEXTS))
    return total


def read(given: str) -> Iterator[Entry | Skipped]:
    """Yield the entries shard by shard, in the order of the shards' names and of the images in each.

    Raises:
        InputError: a shard is not a tar archive or is truncated.
    """
    for shard in _shards(given):
        with _whole(shard):
            yield from _entries(shard)


def _entries(shard: Path) -> Iterator[Entry | Skipped]:
    texts, names = dict[str, bytes](), list[str]()
    for archive, member in _members(shard):
        names.append(member.name)
        if PurePosixPath(member.name).suffix.lower() in _TEXTS and member.size <= _MAX_TEXT_BYTES:
            texts[member.name] = _content(archive, member)
    # An entry is yielded at its image, or at the first of its texts if it has none.
    groups = {g.image or next(iter(g.texts.values())): g for g in grouped(names, _TEXTS)}
    for archive, member in _members(shard):
        group = groups.pop(member.name, None)  # a second file of this name is not read
        if group:
            yield _entry(f"{shard.name}/{group.name}", group, texts, archive, member)


def _members(shard: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the regular files of an archive; each can be read until the next is asked for."""
    with tarfile.open(shard) as archive:
        for member in archive:
            if member.isfile():
                yield archive, member
            archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
        # tarfile takes a truncated header for the end of the archive.
        if shard.suffix.lower() == ".tar" and shard.stat().st_size % tarfile.BLOCKSIZE:
            raise tarfile.TarError("it ends within a block")


@contextmanager
def _whole(shard: Path) -> Iterator[None]:
    """Turn what reading a damaged archive raises into one line."""
    try:
        yield
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{shard}: not a complete tar archive ({error}); download or create it again") from error


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _entry(
    name: str, group: Group, texts: dict[str, bytes], archive: tarfile.TarFile, member: tarfile.TarInfo
) -> Entry | Skipped:
    if group.image is None:
        return Skipped(name, NO_IMAGE)
    if member.size > MAX_BYTES:
        return Skipped(name, f"found {member.size} bytes, expected at most {MAX_BYTES}")
    text: object = None
    for kind in _TEXTS:
        content = texts.get(group.texts.get(kind, ""))
        if text is not None or content is None:
            continue
        try:
            text = decoded_text(content)
            if kind == ".json":
                data = json.loads(decoded_text(content))
                text = caption_of(data) if isinstance(data, dict) else None
        except (ValueError, RecursionError):
            return Skipped(name, f"its {kind} is not readable as {'JSON' if kind == '.json' else 'text'}")
    return Entry(name, _content(archive, member), text)
