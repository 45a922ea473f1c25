"""A hub cache made by hand: the folders and links that huggingface_hub leaves after a download."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from edgeprune.common.hub_cache import SHARED_MARKER

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(
    source: Path,
    cache: Path,
    *,
    shared: bool,
    repository: str = "models--me--m",
    ref: str = "main",
    commit: str = REVISION,
) -> Path:
    """Move the files of `source` into a cache and return the snapshot, a folder of links.

    Args:
        ref: the branch or tag; call this again with another one for a repository of two revisions.
        commit: what `ref` is.
        shared: keep the files in the store that repositories share, as huggingface_hub 2 does with large files.
    """
    root = cache / repository
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    snapshot = root / "snapshots" / commit
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name = hashlib.sha256(path.read_bytes()).hexdigest()
        blob, link = root / "blobs" / name, snapshot / path.relative_to(source)
        if shared:
            stored = cache / "blobs" / name[:2] / name
            stored.parent.mkdir(parents=True, exist_ok=True)
            path.replace(stored)
            _link(blob, stored)
        else:
            path.replace(blob)
        _link(link, blob)
    if shared:
        (cache / "blobs" / SHARED_MARKER).write_text("1\n")
    return snapshot


def _link(at: Path, to: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    if not at.is_symlink():  # two equal files are one blob
        at.symlink_to(os.path.relpath(to, at.parent))
