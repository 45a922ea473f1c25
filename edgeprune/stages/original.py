"""The original model of an artefact: its folder, and what of it is in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.artefact.loading import load_pipeline, load_transformer
from edgeprune.artefact.manifest import HALF
from edgeprune.artefact.resolve import read_config
from edgeprune.planning.modulation import embedder_alone
from edgeprune.residency.weights import Weights


class Original:
    """A model's folder, and what has been loaded from it. Each network is loaded on first use and kept."""

    def __init__(self, source: Path) -> None:
        """Load nothing yet.

        Args:
            source: the pipeline's folder.
        """
        self.source = source
        self.loaded: dict[str, Any] = {}
        """What is in memory, under the name of the property that loads it."""

    @property
    def transformer(self) -> Any:
        """The transformer in float32."""
        return self._once("transformer", lambda: load_transformer(self.source, quantized=False))

    @property
    def pipe(self) -> Any:
        """The whole pipeline in float32, around `transformer`."""
        return self._once("pipe", lambda: load_pipeline(self.source, self.transformer))

    @property
    def encoders(self) -> Any:
        """The pipeline around a transformer that has only the embedder of timestep and prompt."""
        return self._once("encoders", lambda: load_encoders(self.source))

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self.loaded:
            self.loaded[name] = load()
        return self.loaded[name]

    def shared(self) -> Original:
        """Return a second holder of the same transformer and pipeline, which releases them for itself alone."""
        other = Original(self.source)
        other.loaded = {"pipe": self.pipe, "transformer": self.transformer}
        return other

    def release(self) -> None:
        """Drop the transformer and the pipeline; the next use loads them again."""
        for name in ("pipe", "transformer"):
            self.loaded.pop(name, None)


def load_encoders(source: Path) -> Any:
    """Load a folder's pipeline around a transformer that has only the embedder of timestep and prompt."""
    config, family = read_config(source)
    return load_pipeline(source, embedder_alone(family, config, Weights(source / HALF).__getitem__))
