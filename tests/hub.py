"""A hub without a network: a cache made by hand, as huggingface_hub leaves it, and what an upload calls."""

from __future__ import annotations

import hashlib
import os
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


class FakeHub:
    """Stands in for HfApi, and takes note of its calls. Repositories are public unless they are created as private."""

    endpoint = "https://hub.example"
    private: dict[str, bool] = {}
    calls: list[tuple[Any, ...]] = []

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("token", token))

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        name = repo if "/" in repo else f"me/{repo}"
        self.private.setdefault(name, private)
        return SimpleNamespace(repo_id=name)

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private[name])

    def create_branch(self, name: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("branch", name, branch))

    def upload_folder(self, *, folder_path: Path, ignore_patterns: list[str], **rest: Any) -> Any:
        paths = (p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file())
        kept = {p for p in paths if not any(fnmatch(p, pattern) for pattern in ignore_patterns)}
        self.calls.append(("upload", kept, rest))
        return SimpleNamespace(oid="c" * 40)
