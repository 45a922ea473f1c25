"""The original model of an artefact: its folder, and what of it is in memory.

Everything that runs the original goes through `Original`: it decides where networks compute, in which dtype, and which
weights stay in memory. A transformer that is small or fits is held; of a larger one, blocks are read when they run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.artefact.loading import load_pipeline, open_transformer
from edgeprune.artefact.manifest import HALF
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.staged import StagedPipeline, can_stage, encoder_dtype
from edgeprune.artefact.text_store import TextStore
from edgeprune.families import family_of_model
from edgeprune.families.encoders import text_encoders
from edgeprune.planning.modulation import embedder_alone
from edgeprune.residency.compute import Compute, name_of
from edgeprune.residency.running import dtype_of, running
from edgeprune.residency.stored import StoredTransformer
from edgeprune.residency.streaming import is_streamed, release
from edgeprune.residency.weights import Weights


class Original:
    """A model's folder, and what has been loaded from it. Each network is loaded on first use, once, and kept."""

    def __init__(self, source: Path, variant: str | None = None, compute: Compute | None = None) -> None:
        """Load nothing yet.

        Args:
            source: the pipeline's folder.
            variant: of the weights, see residency/model_files.py.
            compute: where networks compute, and how much memory that may take; None for the processor.
        """
        self.source, self.variant, self.compute = source, variant, compute or Compute()
        self.texts: TextStore | None = None
        """Where encoded prompts are kept, if anywhere."""
        self.loaded: dict[str, Any] = {}
        """What is in memory, under the name of the property that loads it."""

    @cached_property
    def stored(self) -> StoredTransformer:
        """The transformer's structure, and its weights on disk."""
        return open_transformer(self.source, quantized=False, variant=self.variant)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the transformer computes in."""
        return dtype_of(self.stored, self.compute)

    def computed_in(self, *, drawing: bool) -> str:
        """Return the dtypes other than float32 that networks compute in here, by name; empty if there are none.

        Args:
            drawing: with that of the transformer.
        """
        if not can_stage(self.source):
            return ""  # diffusers' pipeline is loaded in float32
        kinds = text_encoders(self.source)
        dtypes = {name: encoder_dtype(self.source, name, self.compute, self.variant) for name in kinds}
        dtypes |= {HALF: self.dtype} if drawing else {}
        found = (f"{name} {name_of(dtype)}" for name, dtype in dtypes.items() if dtype != torch.float32)
        return ", ".join(found)

    @property
    def transformer(self) -> Any:
        """The transformer, ready to run on the device."""
        return self._once("transformer", lambda: running(copy.deepcopy(self.stored), self.compute))

    @property
    def pipe(self) -> Any:
        """The whole pipeline, around `transformer`."""
        return self._once("pipe", lambda: self._around(self.transformer, "encoders"))

    @property
    def encoders(self) -> Any:
        """The pipeline for its text; its transformer may have only the embedder of timestep and prompt."""
        return self._once("encoders", lambda: self._around(self._embedder(), "pipe"))

    def encoding(self, *, drawing: bool) -> Any:
        """Return the pipeline for training data, whose text does not depend on what was encoded before.

        Args:
            drawing: its transformer draws. Otherwise text encoders stay in memory, for many batches of captions.
        """
        pipe = self.pipe if drawing else self.encoders
        return pipe.apart(hold=not drawing) if isinstance(pipe, StagedPipeline) else pipe

    def _embedder(self) -> Any:
        found = self.loaded.get("transformer")
        if found is not None and not is_streamed(family_of_model(found).blocks(found)[0]):
            return found
        return load_embedder(self.source, self.variant).to(self.compute.device)

    def _around(self, transformer: Any, other: str) -> Any:
        """Return the pipeline around `transformer`; it shares what the pipeline `other` has loaded."""
        if other in self.loaded:
            pipe = copy.copy(self.loaded[other])
            pipe.transformer = transformer
            return pipe
        if can_stage(self.source):
            return StagedPipeline(self.source, transformer, self.compute, self.variant, texts=self.texts)
        pipe = load_pipeline(self.source, transformer, variant=self.variant)
        for part in pipe.components.values():
            if isinstance(part, nn.Module) and part is not transformer:
                part.to(self.compute.device)
        return pipe

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self.loaded:
            self.loaded[name] = load()
        return self.loaded[name]

    def shared(self) -> Original:
        """Return a second holder of the same transformer and pipeline, which releases them for itself alone."""
        other = Original(self.source, self.variant, self.compute)
        other.texts = self.texts
        other.loaded = {"pipe": self.pipe, "transformer": self.transformer}
        return other

    def release_surroundings(self) -> None:
        """Drop text encoders and VAE, and keep the transformer; the next use of a pipeline loads them again."""
        for name in ("pipe", "encoders"):
            self.loaded.pop(name, None)

    def release_transformer(self) -> None:
        """Drop a transformer that is read block by block, with what it keeps of them; the next use opens it again."""
        found = self.loaded.get("transformer")
        if found is not None and is_streamed(family_of_model(found).blocks(found)[0]):
            release(found)  # others may still hold the structure
            for name in ("pipe", "transformer"):
                self.loaded.pop(name, None)

    def release(self) -> None:
        """Drop all networks; the next use loads them again."""
        self.release_transformer()
        self.loaded.clear()


def load_embedder(source: Path, variant: str | None = None) -> Any:
    """Load a folder's transformer reduced to the embedder of timestep and prompt."""
    config, family = read_config(source)
    return embedder_alone(family, config, Weights(source / HALF, variant).__getitem__)
