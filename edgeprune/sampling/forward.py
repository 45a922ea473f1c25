"""A transformer's forward pass by the pieces of its family, for passes without data: no tensor is asked for values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgeprune.families import Family


def forward(family: Family, model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a transformer's output before `Network.velocity`; on the meta device or of fake tensors, shapes alone."""
    text: torch.Tensor | None
    (image, text, modulation), positions = family.embed(model, inputs), family.positions(model, inputs)
    for block in family.blocks(model):
        assert text is not None  # only the last block drops the text stream
        image, text = family.run(block, image, text, modulation, positions)
    return family.unembed(model, image, modulation, family.grid(model, inputs))
