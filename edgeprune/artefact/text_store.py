"""Encoded prompts, so that no encoder reads a prompt twice: T5-XXL takes minutes and 10 GB of reading.

`TextStore` keeps them in a folder, under everything that their numbers depend on: the encoder's files, its tokenizer's,
the length to which prompts are padded, and the dtype of the computation. `RunTexts` keeps those of one run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.common.files import digest
from edgeprune.common.tensors import Tensors, load_tensors, save_tensors
from edgeprune.families.encoders import tokenizer_of
from edgeprune.residency.model_files import model_files
from edgeprune.residency.spill import Spill

_IN_MEMORY = 2**26
"""Most bytes of `RunTexts` in memory; the rest is on disk. A prompt of SD3.5 has 3 MB in bf16, 6 MB in float32."""


class Texts(Protocol):
    """Where encoded prompts are kept."""

    def key(self, encoder: str, prompt: str, length: int, dtype: torch.dtype) -> str:
        """Return what a prompt's tensors are kept under, for a length in tokens and the dtype of the computation."""
        ...

    def __contains__(self, key: str) -> bool:
        """Return whether they are there, and whole."""
        ...

    def get(self, key: str) -> Tensors:
        """Return them."""
        ...

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep them."""
        ...

    def forget(self, encoder: str) -> None:
        """Drop what there is of an encoder, if it is of no use to other runs."""
        ...


class RunTexts:
    """Encoded prompts of one run: in memory as far as they are few, else in a temporary folder."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="edgeprune-text-"))
        self._kept = Spill(folder, room=_IN_MEMORY)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._keys: dict[str, set[str]] = {}

    def key(self, encoder: str, prompt: str, length: int, dtype: torch.dtype) -> str:
        """Return what a prompt's tensors are kept under."""
        return f"{encoder}.{digest([prompt, length, str(dtype)])}"

    def __contains__(self, key: str) -> bool:
        """Return whether they are there."""
        return key in self._kept

    def get(self, key: str) -> Tensors:
        """Return them."""
        return self._kept.get(key)

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep them."""
        self._kept.put(key, tensors)
        self._keys.setdefault(key.partition(".")[0], set()).add(key)

    def forget(self, encoder: str) -> None:
        """Drop what there is of an encoder."""
        for key in self._keys.pop(encoder, set()):
            self._kept.drop(key)


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

    def key(self, encoder: str, prompt: str, length: int, dtype: torch.dtype) -> str:
        """Return what a prompt's tensors are kept under: where they are in the folder."""
        if encoder not in self._encoders:
            parts = (encoder, tokenizer_of(encoder))
            files = [p for p in model_files(self.source, self.variant) if p.relative_to(self.source).parts[0] in parts]
            self._encoders[encoder] = digest(sorted(self.sha256(file) for file in files))
        name = digest([self._encoders[encoder], prompt, length, str(dtype)])
        return f"{encoder}/{name[:32]}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Return whether `put` wrote them, and the file is whole."""
        try:
            with safe_open(self.folder / key, "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def get(self, key: str) -> Tensors:
        """Read what `put` wrote."""
        return load_tensors(self.folder / key)

    def forget(self, encoder: str) -> None:
        """Do nothing: other runs may need what is kept."""

    def put(self, key: str, tensors: Tensors) -> None:
        """Write a prompt's tensors; a killed process leaves no half of a file."""
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        own = path.with_name(f"{path.stem}.{os.getpid()}.tmp")  # several processes may encode the same prompts
        save_tensors(own, tensors)
        os.replace(own, path)
