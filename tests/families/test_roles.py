"""A family that plays only one role: what needs only the config takes an `Architecture` without surgery or network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeprune.families import Architecture, Config, Encoder, LatentSpace, Network, Shape, Source, Surgery, family_of
from edgeprune.planning.remainder import remaining_shapes
from edgeprune.quantization.precision import Footprint, Precision, footprint, precision_of

CONFIG = {"layers": 3}
D = 64


class ConfigOnly:
    """An architecture known from its config alone: blocks of an attention and an MLP, and one embedder outside."""

    name = "config-only"
    pipeline = "ConfigOnlyPipeline"
    components: tuple[str, ...] = ("attn", "mlp")
    norms: tuple[str, ...] = ()
    embedder = "embedder"
    encoders: tuple[Encoder, ...] = ()
    tail: tuple[str, ...] = ("out.",)

    def block_count(self, config: Config) -> int:
        return int(config["layers"])

    def kinds(self, config: Config) -> dict[str, range]:
        return {"joint": range(self.block_count(config))}

    def tensor_shapes(self, config: Config) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {"embedder.weight": (D, 32), "table": (10, D)}
        for i in range(self.block_count(config)):
            shapes |= {f"blocks.{i}.attn.weight": (3 * D, D), f"blocks.{i}.mlp.weight": (D, 4 * D)}
        return shapes | {"out.weight": (8, D), "out.bias": (8,)}

    def is_buffer(self, name: str) -> bool:
        return name == "table"

    def in_block(self, name: str) -> bool:
        return name.startswith("blocks.")

    def place(self, config: Config, name: str) -> tuple[int, str | None] | None:
        return (int(name.split(".")[1]), name.split(".")[2]) if self.in_block(name) else None

    def modulates(self, name: str) -> bool:
        return False

    def noops(self, config: Config) -> frozenset[tuple[int, str]]:
        return frozenset()

    def shorter_config(self, config: Config, kept: list[int]) -> Config:
        return config | {"layers": len(kept)}

    def tensor_sources(self, config: Config, kept: list[int], removed: frozenset[tuple[int, str]]) -> dict[str, Source]:
        sources = {}
        for name in self.tensor_shapes(config):
            place = self.place(config, name)
            if place is None:
                sources[name] = Source(name)
            elif place[0] in kept and place not in removed:
                sources[f"blocks.{kept.index(place[0])}.{place[1]}.weight"] = Source(name)
        return sources

    def latents(self, config: Config) -> LatentSpace:
        return LatentSpace(channels=4, patch=2)

    def text_widths(self, config: Config) -> tuple[int, int]:
        return D, 0

    def text_tokens(self, prompt_tokens: int, max_sequence_length: int) -> int:
        return prompt_tokens

    def defaults(self, config: Config) -> dict[str, Any]:
        return {}

    def guided(self, config: Config, scale: float) -> bool:
        return scale > 1

    def levels(self, steps: int) -> NDArray[np.float64] | None:
        return None

    def shift(self, tokens: int, steps: int) -> float | None:
        return None


def members(role: type) -> set[str]:
    """Methods and attributes of a role."""
    own = {name for name in vars(role) if not name.startswith("_")}
    return own | {name for name in role.__annotations__ if not name.startswith("_")}


def test_bytes_are_counted_from_the_config() -> None:
    family: Architecture = ConfigOnly()
    shapes = family.tensor_shapes(CONFIG)
    block = 3 * D * D + 4 * D * D
    outside = 32 * D + 8 * D
    assert footprint(family, shapes) == Footprint(
        parameters=3 * block + outside + 8,
        bf16_bytes=2 * (3 * block + outside + 8 + 10 * D),
        # 4 bits and a scale per 64 weights; outside of blocks 8 bits and a scale per output; the rest in 16 bits.
        int4_bytes=3 * (block // 2 + block // 64 * 2) + outside + 2 * (D + 8) + 2 * (8 + 10 * D),
    )
    assert precision_of(family, "blocks.0.attn.weight", (3 * D, D)) == Precision(4, 64)


def test_a_plan_is_sized_from_the_config() -> None:
    family: Any = ConfigOnly()
    shapes = remaining_shapes(family, CONFIG, blocks=[1], components=[(2, "mlp")])
    assert shapes == {
        name: s for name, s in family.tensor_shapes({"layers": 2}).items() if name != "blocks.1.mlp.weight"
    }


@pytest.mark.parametrize("role", [Surgery, Network])
def test_it_plays_no_other_role(role: type) -> None:
    assert not [name for name in members(role) if hasattr(ConfigOnly, name)]


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_every_family_plays_every_role_without_inheriting(name: str) -> None:
    family = family_of({"_class_name": name})
    roles = [members(role) for role in (Architecture, Surgery, Network)]
    assert len(set.union(*roles)) == sum(map(len, roles))  # no member is of two roles
    assert not [member for member in set.union(*roles) if not hasattr(family, member)]
    assert type(family).__bases__ == (object,)
