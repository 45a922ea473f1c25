"""Reading and writing small files without surprises: atomic JSON, hashes, and errors that name the file.

Leaves out weights: see checkpoint.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: no such file, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: found a JSON {type(data).__name__}, expected an object")
    return data


def write_json(path: Path, data: Any) -> None:
    """Write by way of a temporary name, so that a reader sees the old or the new file, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
    """As `sha256_file`, but a file of the size and time noted in `known` is not read again; `known` is kept current."""
    stat = path.stat()
    seen = known.get(str(path))
    if not (isinstance(seen, list) and seen[:2] == [stat.st_size, stat.st_mtime_ns]):
        known[str(path)] = seen = [stat.st_size, stat.st_mtime_ns, sha256_file(path)]
    return str(seen[2])


def digest(data: Any) -> str:
    """Hex digest of a JSON value, key order aside: the identity of a stage's inputs."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
