"""What FLUX.1 and FLUX.2 share: joint blocks, then single-stream blocks, counted with one index."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from edgeprune.common.errors import InputError
from edgeprune.common.fields import MOST_BLOCKS
from edgeprune.families.architecture import WHERE, Config, config_number
from edgeprune.families.joint import BLOCK

if TYPE_CHECKING:
    from torch import nn

SINGLE = re.compile(r"single_transformer_blocks\.(\d+)\.(.+)")


def block_count(config: Config) -> int:
    """Return `num_layers` joint blocks plus `num_single_layers` single ones.

    Raises:
        InputError: a number is out of range, or there is no block.
    """
    total = sum(config_number(config, n, least=0, most=MOST_BLOCKS) for n in ("num_layers", "num_single_layers"))
    if not total:
        raise InputError(f"{WHERE}: num_layers and num_single_layers: found 0, expected a block")
    return total


def kinds(config: Config) -> dict[str, range]:
    """Return the indices of the joint blocks and of the single ones."""
    count = block_count(config)
    return {"joint": range(config["num_layers"]), "single": range(config["num_layers"], count)}


def in_block(name: str) -> bool:
    """Return True for names below one of the two lists of blocks."""
    return bool(BLOCK.match(name) or SINGLE.match(name))


def shorter_config(config: Config, kept: list[int]) -> Config:
    """Return the config with only the blocks `kept`, of both kinds."""
    joint = sum(i < config["num_layers"] for i in kept)
    return config | {"num_layers": joint, "num_single_layers": len(kept) - joint}


def context_noops(config: Config, components: Sequence[str]) -> frozenset[tuple[int, str]]:
    """Return the context components without effect: all of a single block, and the MLP of a last joint block."""
    joint, count = config["num_layers"], block_count(config)
    single = {(i, c) for i in range(joint, count) for c in components}
    return frozenset(single if count > joint else {(joint - 1, "context_mlp")})


def prefix(index: int, joint: int) -> str:
    """Return the name prefix of a block's tensors, in a model with `joint` joint blocks."""
    return f"transformer_blocks.{index}." if index < joint else f"single_transformer_blocks.{index - joint}."


def block_prefix(model: nn.Module, index: int) -> str:
    """Return `transformer_blocks.N.` or `single_transformer_blocks.N.`."""
    return prefix(index, len(cast("Any", model).transformer_blocks))


def blocks(model: nn.Module) -> Sequence[nn.Module]:
    """Return `transformer_blocks`, then `single_transformer_blocks`."""
    loaded = cast("Any", model)
    return [*loaded.transformer_blocks, *loaded.single_transformer_blocks]
