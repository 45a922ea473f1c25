"""The original model of an artefact: its folder, and what of it is in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.artefact.loading import load_pipeline, load_transformer
from edgeprune.artefact.manifest import HALF
from edgeprune.artefact.resolve import read_config
from edgeprune.planning.modulation import embedder_alone
from edgeprune.residency.weights import Weights


class Original:
    """A model's folder, and what has been loaded from it. Each network is loaded on first use, once, and kept."""

    def __init__(self, source: Path, variant: str | None = None) -> None:
        """Load nothing yet.

        Args:
            source: the pipeline's folder.
            variant: of the weights, see residency/model_files.py.
        """
        self.source, self.variant = source, variant
        self.loaded: dict[str, Any] = {}
        """What is in memory, under the name of the property that loads it."""

    @property
    def transformer(self) -> Any:
        """The transformer in float32."""
        return self._once("transformer", lambda: load_transformer(self.source, quantized=False, variant=self.variant))

    @property
    def pipe(self) -> Any:
        """The whole pipeline in float32, around `transformer`."""
        return self._once("pipe", lambda: self._around(self.transformer, "encoders"))

    @property
    def encoders(self) -> Any:
        """The pipeline for its text encoders; its transformer may have only the embedder of timestep and prompt."""
        return self._once("encoders", lambda: self._around(self._embedder(), "pipe"))

    def _embedder(self) -> Any:
        return self.loaded["transformer"] if "transformer" in self.loaded else load_embedder(self.source, self.variant)

    def _around(self, transformer: Any, other: str) -> Any:
        """Return the pipeline around `transformer`, with the text encoders of the pipeline `other` if it is loaded."""
        if other not in self.loaded:
            return load_pipeline(self.source, transformer, variant=self.variant)
        pipe = copy.copy(self.loaded[other])
        pipe.transformer = transformer
        return pipe

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self.loaded:
            self.loaded[name] = load()
        return self.loaded[name]

    def shared(self) -> Original:
        """Return a second holder of the same transformer and pipeline, which releases them for itself alone."""
        other = Original(self.source, self.variant)
        other.loaded = {"pipe": self.pipe, "transformer": self.transformer}
        return other

    def release_surroundings(self) -> None:
        """Drop text encoders and VAE, and keep the transformer; the next use of a pipeline loads them again."""
        for name in ("pipe", "encoders"):
            self.loaded.pop(name, None)

    def release(self) -> None:
        """Drop all networks; the next use loads them again."""
        self.loaded.clear()


def load_embedder(source: Path, variant: str | None = None) -> Any:
    """Load a folder's transformer reduced to the embedder of timestep and prompt."""
    config, family = read_config(source)
    return embedder_alone(family, config, Weights(source / HALF, variant).__getitem__)


def load_encoders(source: Path, variant: str | None = None) -> Any:
    """Load a folder's pipeline around a transformer that has only the embedder of timestep and prompt."""
    return load_pipeline(source, load_embedder(source, variant), variant=variant)
