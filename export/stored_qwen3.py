"""A Qwen3 text encoder whose weights stay on disk, see stored_encoder.py: those up to the last state that is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeprune.export.language_model import SPEEDS, LanguageModel, speeds_of
from edgeprune.export.stored_encoder import StoredEncoder
from edgeprune.families.encoders import QWEN3


class StoredQwen3(StoredEncoder[LanguageModel]):
    """Structure and weights of one Qwen3; what is written computes its positions from a table of speeds."""

    kind = QWEN3
    exact = (SPEEDS,)  # in half precision a late token would turn by another angle

    def module(self, model: Any) -> LanguageModel:
        """Return the hidden states as they are exported, without transformers' own positions."""
        model.model.rotary_emb = nn.Identity()
        return LanguageModel(model, self.states, padding=self.padding)

    def made(self, name: str) -> torch.Tensor | None:
        """Return the speeds of the rotary positions."""
        return speeds_of(self._packed.config) if name == SPEEDS else None

    def one_layer(self) -> dict[str, Any]:
        """Return the number of layers, and that of their kinds."""
        return {"num_hidden_layers": 1, "layer_types": ["full_attention"]}

    def running(self, dtype: torch.dtype = torch.float32) -> LanguageModel:
        """Return the network that is written, see StoredEncoder.running; `reference` has transformers' positions."""
        return self._with_positions(super().running(dtype))

    def checkpoint(self) -> LanguageModel:
        """Return what an export is compared with, see StoredEncoder.checkpoint; it has transformers' positions."""
        return self._with_positions(super().checkpoint())

    def _with_positions(self, module: LanguageModel) -> LanguageModel:
        module.inner.rotary_emb = type(self._empty.model.rotary_emb)(module.inner.config)
        return module
