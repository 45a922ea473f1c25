"""Tensors by name, and writing them to a safetensors file atomically."""

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
    """Write a safetensors file by way of a temporary name.

    Raises:
        DiskError: the disk is full or the folder cannot be written; what was at `path` is untouched.
    """
    # a folder, since safetensors itself writes by way of a name of its own beside the file, which a kill leaves there
    folder = path.with_name(path.name + ".partial")
    temporary = folder / path.name
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # as umask has it; safetensors would let nobody else read
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
