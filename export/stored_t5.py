"""A T5 text encoder whose weights stay on disk, see stored_encoder.py."""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.export import modules
from edgeprune.export.stored_encoder import StoredEncoder
from edgeprune.families.encoders import T5

_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


class StoredT5(StoredEncoder[modules.T5Encoder]):
    """Structure and weights of one T5 text encoder; what is written has a table of position biases."""

    kind = T5

    def module(self, model: Any) -> modules.T5Encoder:
        """Return the T5 as it is exported."""
        return modules.T5Encoder(model)

    def made(self, name: str) -> torch.Tensor | None:
        """Return the position biases by distance."""
        return self._packed.table(self._stored_tensor(_BIAS)) if name == "bias" else None

    def one_layer(self) -> dict[str, Any]:
        """Return the number of layers."""
        return {"num_layers": 1}

    def tied(self, model: Any) -> None:
        """Give the embedding its two names."""
        model.set_input_embeddings(model.get_input_embeddings())
