# TEMP facade
"""Moved to manifest.py, resolve.py, loading.py and writing.py."""

from edgeprune.artefact.loading import (
    load,
    load_pipeline,
    load_transformer,
    open_transformer,
    quiet,
    readable,
)
from edgeprune.artefact.manifest import HALF, INT4, MANIFEST, SCHEMA_VERSION, Manifest
from edgeprune.artefact.resolve import BUILTIN, read_config, resolve
from edgeprune.artefact.writing import (
    complete_tokenizer,
    copy_surroundings,
    noted,
    save_transformer,
    write_transformer,
)

__all__ = [
    "BUILTIN",
    "HALF",
    "INT4",
    "MANIFEST",
    "SCHEMA_VERSION",
    "Manifest",
    "complete_tokenizer",
    "copy_surroundings",
    "load",
    "load_pipeline",
    "load_transformer",
    "noted",
    "open_transformer",
    "quiet",
    "read_config",
    "readable",
    "resolve",
    "save_transformer",
    "write_transformer",
]
