"""The names of repositories on the hub, and the layout of huggingface_hub's cache, recognised from paths alone.

    CACHE/models--OWNER--NAME/snapshots/REVISION/vae/config.json -> ../../../blobs/HASH
    CACHE/models--OWNER--NAME/blobs/HASH                         a file, or since huggingface_hub 2 a symlink:
                                                                 -> ../../blobs/ab/HASH
    CACHE/blobs/ab/HASH                                          the file, shared by repositories

So every file of a snapshot is a symlink that leaves the snapshot, and it always leads into one of these two stores.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

SHARED_MARKER = ".huggingface-shared-blobs"
"""huggingface_hub writes this file into CACHE/blobs; a folder without it is not a shared store."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")


def stores(folder: Path) -> list[Path]:
    """Return the folders that links below `folder` may lead into; empty unless `folder` is in a snapshot.

    The path counts as it was given and as it resolves: a link may lead to a snapshot, and a repository's folder in the
    cache may be a link to another disk.
    """
    for path in (Path(os.path.abspath(folder)), folder.resolve()):
        for snapshot in (path, *path.parents):
            repository = snapshot.parent.parent
            if snapshot.parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
                # Only the way to a store is resolved: a store that is itself a link could lead anywhere.
                shared = repository.parent.resolve() / "blobs"
                is_shared = (shared / SHARED_MARKER).is_file()
                return [repository.resolve() / "blobs", *([shared] if is_shared else [])]
    return []


def is_hub_id(model: str) -> bool:
    """Return whether a name has the form owner/name. A folder can have such a name, too."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", model) is not None and not model.startswith(".")


def commit_of(folder: Path) -> str | None:
    """Return the commit that a snapshot holds; None for any other folder."""
    repository = folder.parent.parent
    is_snapshot = folder.parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name) is not None
    return folder.name if is_snapshot and _COMMIT.fullmatch(folder.name) else None
