"""Published pipelines: the configs of their networks, and how their model cards run them. Torch-free.

architectures.json has the transformers, encoders.json the text encoders and VAEs, and pipelines.json what each pipeline
is made of. An entry names the place where its facts are published.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.common.files import read_json
from edgeprune.families.architecture import Config

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PublishedPipeline:
    """What a published pipeline is made of."""

    source: str
    """Its repository."""
    transformer: str
    """A name of `transformers()`."""
    networks: dict[str, str]
    """Names of `networks()` by folder: the text encoders and the VAE."""
    text_dtype: str
    """In which its text encoders are stored; the other networks are in bfloat16."""
    scheduler: dict[str, Any]
    """The fields of scheduler_config.json that differ from diffusers' defaults."""
    generation: dict[str, Any]
    """Steps, guidance scale, size and tokens of its model card, as in `Generation`."""
    index: dict[str, Any]
    """Settings in model_index.json besides the names of its parts."""


@dataclass(frozen=True)
class PublishedNetwork:
    """A text encoder or a VAE."""

    source: str
    parameters: int
    """How many it has."""
    config: Config
    """Its config.json."""


def transformers() -> dict[str, Config]:
    """Return the transformers' configs by name."""
    return read_json(_HERE / "architectures.json")


def networks() -> dict[str, PublishedNetwork]:
    """Return the text encoders and VAEs by name."""
    return {name: PublishedNetwork(**entry) for name, entry in read_json(_HERE / "encoders.json").items()}


def pipelines() -> dict[str, PublishedPipeline]:
    """Return the pipelines by name."""
    return {name: PublishedPipeline(**entry) for name, entry in read_json(_HERE / "pipelines.json").items()}
