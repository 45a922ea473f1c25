"""Named tensors, and writing them atomically to a safetensors file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from edgeprune.common.files import cannot_write

Tensors = dict[str, torch.Tensor]
"""A state dict."""


def save_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it.

    Raises:
        DiskError: the disk is full or the folder is not writable; the old file at `path` is untouched.
    """
    # In a temporary folder: safetensors creates a temporary file of its own there, which a kill would leave behind.
    folder = path.with_name(path.name + ".partial")
    temporary = folder / path.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as umask says; safetensors makes its files readable by their owner only
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
