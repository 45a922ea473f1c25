"""How huggingface_hub lays out its cache, read from paths alone.

    CACHE/models--OWNER--NAME/snapshots/REVISION/vae/config.json -> ../../../blobs/HASH
    CACHE/models--OWNER--NAME/blobs/HASH                         a file, or since huggingface_hub 2 a link:
                                                                 -> ../../blobs/ab/HASH
    CACHE/blobs/ab/HASH                                          the file, shared by repositories

Every file of a snapshot is therefore a link that leaves the snapshot, and only ever into one of these two stores.
"""

from __future__ import annotations

import re
from pathlib import Path

SHARED_MARKER = ".huggingface-shared-blobs"
"""huggingface_hub writes this file into CACHE/blobs; a folder without it is not such a store."""
_REPOSITORY = re.compile(r"(models|datasets|spaces)--.+")


def stores(folder: Path) -> list[Path]:
    """Return the folders that links below `folder` may lead into; none unless it is a snapshot, or is inside one.

    Args:
        folder: a resolved path.
    """
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
            shared = repository.parent / "blobs"
            is_shared = (shared / SHARED_MARKER).is_file()
            return [repository / "blobs", *([shared] if is_shared else [])]
    return []
