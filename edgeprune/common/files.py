"""Safe file handling: atomic JSON, names and links that stay inside, and errors that name the file.

Tensors are written by tensors.py; hashes.py and linking.py spare files from being read and written twice.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from edgeprune.common import traffic
from edgeprune.common.errors import DiskError, InputError
from edgeprune.common.fields import shown
from edgeprune.common.hub_cache import stores

UNFINISHED = "unfinished.json"
"""File in a folder of weights that says what they were made from, until whoever wrote them has recorded that they are
complete."""
_LARGEST_JSON = 2**28
"""In bytes. The largest files read are tokenizers and the scores of all pairs; both are several times smaller."""
_LONGEST_NAME = 4096
"""Of a path in a file; Linux knows none longer."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file does not exist, is not JSON, or holds something other than an object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_JSON + 1)
        if len(content) > _LARGEST_JSON:
            raise InputError(
                f"{path}: found more than {_LARGEST_JSON} bytes, expected a JSON file of edgeprune or of a model"
            )
        if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            # diffusers and transformers, which read the same files, refuse it in words of their own after minutes.
            raise InputError(f"{path}: begins with a byte order mark, expected UTF-8 without one; save it again")
        data = parse_json(content.decode())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: found a folder, expected a file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: found a JSON {type(data).__name__}, expected an object")
    return data


def check_schema(path: Path | str, found: Any, known: int | tuple[int, ...], remedy: str) -> None:
    """Refuse a file that another version of edgeprune wrote in another schema.

    Args:
        found: the file's `schema_version`.
        known: the version that this edgeprune reads, or several, the newest last.
        remedy: what the user should do if the file is older.

    Raises:
        InputError: the versions differ.
    """
    versions = known if isinstance(known, tuple) else (known,)
    if found not in versions:
        newer = isinstance(found, int) and found > versions[-1]
        what = "a newer edgeprune wrote it; upgrade" if newer else remedy
        expected = " or ".join(map(str, versions))
        raise InputError(f"{path}: schema_version: found {shown(found)}, expected {expected}; {what}")


def parse_json(text: str) -> Any:
    """Parse JSON whose numbers are finite and whose strings can be encoded.

    Raises:
        ValueError: the text is not such JSON.
    """
    try:
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:  # JSON allows a lone surrogate, which no file or terminal can encode
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"found {text[:40]}, expected a finite number")
    return value


def named(folder: Path, name: str, where: object) -> Path:
    """Return the file in `folder` or below it that another file refers to; links are neither checked nor resolved.

    The name is checked as text, by the rules of every system: relative, without `..`, a drive or a null byte. Data
    that is the user's own needs no more; for other folders, see `inside`.

    Args:
        where: where the name was read, for the error.

    Raises:
        InputError: the name could lead out of the folder, or is not a file name.
    """
    windows = PureWindowsPath(name)  # has both separators
    if not windows.parts or "\0" in name or len(name) > _LONGEST_NAME:
        raise InputError(f"{where}: found {shown(name)}, which is not a file name")
    if windows.anchor or ".." in windows.parts:
        raise InputError(f"{where}: found {shown(name)}, which leads out of the folder {folder}")
    return folder / name


def inside(folder: Path, name: str, where: object) -> Path:
    """Resolve a name by which a file of a model, artefact, export or study refers to another file in its folder.

    In a snapshot of the hub's cache, links into the cache's own stores count as inside; see hub_cache.py.

    Args:
        where: where the name was read, for the error.

    Raises:
        InputError: the name, or a symlink on its path, leads out of the folder.
    """
    return _followed(folder, name, where, _places(folder))


def _places(folder: Path) -> list[Path]:
    """Return where links below a folder may lead."""
    return [folder.resolve(), *stores(folder)]


def _followed(folder: Path, name: str, where: object, places: list[Path]) -> Path:
    given = named(folder, name, where)
    try:
        path = given.resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
    except (OSError, ValueError, RuntimeError) as error:  # too long, or a link to itself
        raise InputError(f"{where}: found {shown(name)}, which is not a file name ({error})") from None
    if not any(path.is_relative_to(place) for place in places):
        raise InputError(
            f"{where}: found {shown(name)}, which leads out of the folder {folder}, to {shown(str(path))}; "
            "put the file itself there"
        )
    return path


def check_links(folder: Path) -> None:
    """Refuse a folder with a symlink that leads out of it: a copy of the folder would include the user's other files.

    Raises:
        InputError: there is such a link.
    """
    places = _places(folder)
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            if path.is_symlink():
                _followed(folder, str(path.relative_to(folder)), "link", places)


def write_json(path: Path, data: Any) -> None:
    """Write a value as indented JSON, atomically; see `write_text`."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary file and rename it, so that readers see the old file or the new one, never half of it.

    Raises:
        DiskError: the disk is full or the folder is not writable; the old file at `path` is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def whole_lines(path: Path) -> list[str]:
    """Return the complete lines of an append-only file; truncate a last line that a kill left incomplete."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return data[:end].decode("utf-8").split("\n")[:-1]


def replace_folder(new: Path, target: Path) -> None:
    """Move a finished folder to `target`. The old folder is deleted only afterwards, and restored if the move fails."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if not target.exists():
        new.rename(target)
        return
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def need_space(folder: Path, size: int) -> None:
    """Check that the disk has room for `size` bytes before writing begins.

    Raises:
        DiskError: the disk has less free space; the message says how much is needed.
    """
    existing = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise DiskError(
            f"{folder}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left; free some space and run again"
        )


def cannot_write(path: Path, error: Exception) -> DiskError:
    """Return the error to raise when a file was not written: why, and what to do if the disk is full."""
    # safetensors gives the error number only in its text.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return DiskError(f"{path}: disk full; free some space and run again")
    return DiskError(f"{path}: cannot be written ({error})")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, PyTorch, Pillow or the operating system raised this error because memory ran out."""
    # Matched by name, since torch may not be installed. On a CPU, torch raises a RuntimeError; Pillow's decoders raise
    # an OSError without a number.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and (error.errno == errno.ENOMEM or str(error).startswith("out of memory")))
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's content, which is read; see hashes.py for what need not be."""
    traffic.add(read=path.stat().st_size)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no file_digest
    state = hashlib.sha256()
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return state.hexdigest()


def files_digest(folder: Path) -> str:
    """Return a digest of the names, sizes and modification times of all files in a folder; no file is read.

    For a file, the digest covers that file; for a missing path, an empty list.
    """
    paths = [folder] if folder.is_file() else sorted(_files_below(folder))
    return digest([(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in paths])


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield all files below a folder, also behind links; a link to a folder above itself is not followed again."""
    above = (*above, folder.resolve())
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_file():
            yield path
        elif path.resolve() not in above:
            yield from _files_below(path, above)


def digest(data: Any) -> str:
    """Return the hex SHA-256 of a JSON value, regardless of key order. Stages identify their inputs by it."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
