"""Affine maps before a block that stand in for the removed blocks before it.

Each stream x becomes x + B A x + b, with A of shape (R, D) and B of shape (D, R): what the removed blocks added to it,
as well as a map of rank R can tell from the stream alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import MethodType
from typing import Any, cast

import torch
from torch import nn


class StandIn(nn.Module):
    """The map of one stream: `down` (R, D), `up` (D, R) with a bias (D)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        """Map a stream (B, N, D) to the same shape."""
        return stream + cast("torch.Tensor", self.up(self.down(stream)))


def put_before(block: Any, streams: Iterable[str], width: int, rank: int) -> None:
    """Put maps before a block, in place.

    The block stays the module that it was, since exports and vendors read its class and its parts. It gets a forward of
    its own, which hooks surround as they surround that of its class.

    Args:
        block: of the shorter model; it takes the streams as its first arguments.
        streams: their names, in the order of the block's arguments; one name where both are one stream.
        width: D.
        rank: R.
    """
    block.stand_in = nn.ModuleDict({stream: StandIn(width, rank) for stream in streams})
    parted = "encoder_hidden_states" in inspect.signature(type(block).forward).parameters
    block.forward = MethodType(_forward if parted else _joined_forward, block)


def _joined_forward(block: Any, joined: torch.Tensor, *args: Any, **named: Any) -> Any:
    """Run the map of the only stream, then the block's own forward."""
    (mapped,) = block.stand_in.values()
    return type(block).forward(block, mapped(joined), *args, **named)


def _forward(
    block: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *args: Any, **named: Any
) -> Any:
    """Run the maps, then the block's own forward. The first map is the image's, the last the text's."""
    maps = list(block.stand_in.values())
    hidden_states = maps[0](hidden_states)
    if encoder_hidden_states is not None:
        encoder_hidden_states = maps[-1](encoder_hidden_states)
    return type(block).forward(block, hidden_states, encoder_hidden_states, *args, **named)
