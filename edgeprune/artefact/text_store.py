"""Encoded prompts on disk, so that no encoder reads a prompt twice: T5-XXL takes minutes and 10 GB of reading.

A prompt's file is named by everything that its numbers depend on: the encoder's files, its tokenizer's, the length to
which prompts are padded, and the dtype of the computation.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError

from edgeprune.common.files import digest
from edgeprune.common.tensors import Tensors, load_tensors, save_tensors
from edgeprune.families.encoders import tokenizer_of
from edgeprune.residency.model_files import model_files


class TextStore:
    """A folder of encoded prompts of one pipeline.

    Args:
        folder: to create or to use.
        source: the pipeline's folder.
        variant: of the weights, see residency/model_files.py.
        sha256: hashes a file.
    """

    def __init__(self, folder: Path, source: Path, variant: str | None, sha256: Callable[[Path], str]) -> None:
        self.folder, self.source, self.variant, self.sha256 = folder, source, variant, sha256
        self._encoders: dict[str, str] = {}

    def tidy(self) -> None:
        """Remove what killed processes left. Only the process that holds the folder's lock may call it."""
        for left in self.folder.glob("*/*.tmp*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    def path(self, encoder: str, prompt: str, length: int, dtype: torch.dtype) -> Path:
        """Return where a prompt's tensors are, or will be."""
        if encoder not in self._encoders:
            parts = (encoder, tokenizer_of(encoder))
            files = [p for p in model_files(self.source, self.variant) if p.relative_to(self.source).parts[0] in parts]
            self._encoders[encoder] = digest(sorted(self.sha256(file) for file in files))
        name = digest([self._encoders[encoder], prompt, length, str(dtype)])
        return self.folder / encoder / f"{name[:32]}.safetensors"

    def get(self, path: Path) -> Tensors | None:
        """Read what `put` wrote; None if there is nothing, or nothing whole."""
        try:
            return load_tensors(path)
        except (OSError, SafetensorError):
            return None

    def put(self, path: Path, tensors: Tensors) -> None:
        """Write a prompt's tensors; a killed process leaves no half of a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.stem}.{os.getpid()}.tmp")  # several processes may encode the same prompts
        save_tensors(own, tensors)
        os.replace(own, path)
