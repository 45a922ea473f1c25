"""Files without surprises: atomic JSON, copies, hashes, and errors that name the file.

Leaves out weights: see checkpoint.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from edgeprune.common.errors import DiskError, EdgepruneError, InputError
from edgeprune.common.fields import shown
from edgeprune.common.hub_cache import stores

_LARGEST_JSON = 2**28
"""Bytes: several times the largest tokenizer, or scores of all pairs."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: no such file, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_JSON + 1)
        if len(content) > _LARGEST_JSON:
            raise InputError(
                f"{path}: found more than {_LARGEST_JSON} bytes, expected a JSON file of ours or a model's"
            )
        data = parse_json(content.decode())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: found a JSON {type(data).__name__}, expected an object")
    return data


def check_schema(path: Path | str, found: Any, known: int, remedy: str) -> None:
    """Refuse a file whose form another edgeprune has written.

    Args:
        found: its `schema_version`.
        known: the one that this edgeprune reads.
        remedy: what to do if the file's is older.

    Raises:
        InputError: they differ.
    """
    if found != known:
        newer = isinstance(found, int) and found > known
        what = "a newer edgeprune wrote it; upgrade" if newer else remedy
        raise InputError(f"{path}: schema_version: found {shown(found)}, expected {known}; {what}")


def parse_json(text: str) -> Any:
    """A JSON value whose numbers are finite and whose texts can be written.

    Raises:
        ValueError: it is none.
    """
    try:
        data = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:  # half a pair of surrogates is a text in JSON, and in no file or terminal
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"found {text[:40]}, expected a finite number")
    return value


def inside(folder: Path, name: str, where: object) -> Path:
    """Resolve a name that a file gives for another file in the same folder, or below it.

    In a snapshot of the hub's cache, links into the cache's own stores count as inside, see hub_cache.py.

    Args:
        where: what gave the name, for the error.

    Raises:
        InputError: the name, or a link on its way, leads out of the folder.
    """
    try:
        home = folder.resolve()
        path = (home / name).resolve()
        by_name = Path(os.path.normpath(home / name))
        if by_name.is_relative_to(home) and any(path.is_relative_to(place) for place in (home, *stores(home))):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()
            return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a link to itself
        raise InputError(f"{where}: found {shown(name)}, which is no file's name ({error})") from None
    raise InputError(f"{where}: found {shown(name)}, which leads out of the folder {folder}")


def check_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it: a copy would hold some other file of the reader's.

    Raises:
        InputError: there is one.
    """
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            if path.is_symlink():
                inside(folder, str(path.relative_to(folder)), "link")


def write_json(path: Path, data: Any) -> None:
    """As `write_text`."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write by way of a temporary name, so that a reader sees the old or the new file, never a part.

    Raises:
        DiskError: the disk is full or the folder cannot be written; what was at `path` is untouched.
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
    """The lines of a file that is appended to; a last one that a kill has torn is cut off, the others stay."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return data[:end].decode("utf-8").split("\n")[:-1]


def copy_folder(source: Path, target: Path, *leave_out: str) -> None:
    """Copy a folder to a new place, but for files of these patterns. If that fails, nothing is left there.

    Raises:
        EdgepruneError: a file cannot be read, or the disk is full.
    """

    def copy(one: str, to: str) -> str:  # copytree collects OSErrors and goes on; this ends it at the first
        try:
            return shutil.copyfile(one, to)
        except OSError as error:
            raise cannot_write(Path(to), error) from error

    if target.exists():
        raise EdgepruneError(f"{target}: is there already")
    try:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(*leave_out), copy_function=copy)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def replace_folder(new: Path, target: Path) -> None:
    """Move a finished folder to its place; what was there goes only when it is, and comes back if that fails."""
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
    """Refuse to begin writing `size` bytes where they do not fit.

    Raises:
        DiskError: the disk has less; says how much is needed.
    """
    there = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise DiskError(
            f"{folder}: needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left; free some space and run again"
        )


def cannot_write(path: Path, error: Exception) -> DiskError:
    """What to raise when a file was not written: one line that says why, and what to do if the disk is full."""
    # safetensors hides the error number in its text.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return DiskError(f"{path}: disk full; free some space and run again")
    return DiskError(f"{path}: cannot be written ({error})")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python, PyTorch or the system raises when memory is short."""
    # By name, since not everyone has torch; on a CPU it raises a RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no file_digest
    state = hashlib.sha256()
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return state.hexdigest()


def sha256_unless_known(path: Path, known: dict[str, Any]) -> str:
    """As `sha256_file`, but a file of the size and times noted in `known` is not read again; `known` is kept current.

    Times are compared for equality alone, so a clock that was set back makes nothing current. The inode's time is one
    of them: a copy that keeps the time of change does not keep that.
    """
    stat = path.stat()
    now = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    seen = known.get(str(path))
    if not (isinstance(seen, list) and seen[:-1] == now):
        known[str(path)] = seen = [*now, sha256_file(path)]
    return str(seen[-1])


def files_digest(folder: Path) -> str:
    """Changes when a file of a folder does: by name, size and time of change, so that nothing has to be read.

    For a file, its own; where there is nothing, that of nothing.
    """
    paths = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    return digest([(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in paths])


def digest(data: Any) -> str:
    """Hex digest of a JSON value, key order aside: the identity of a stage's inputs."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
