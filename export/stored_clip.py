"""A CLIP text encoder whose weights stay on disk and are not rounded, see stored_encoder.py."""

from __future__ import annotations

from typing import Any

import torch

from edgeprune.export import modules
from edgeprune.export.stored_encoder import StoredEncoder
from edgeprune.families.encoders import CLIP, CLIP_POOLED

_POSITIONS = "embeddings.position_ids"


class StoredClip(StoredEncoder[modules.TextEncoder]):
    """Structure and weights of one CLIP of which all hidden states and the projected text are read."""

    kind = CLIP
    rounded = False
    exact = (_POSITIONS,)

    def module(self, model: Any) -> modules.TextEncoder:
        """Return the CLIP as it is exported."""
        return modules.TextEncoder(model)

    def made(self, name: str) -> torch.Tensor | None:
        """Return the numbers of all positions (1, M)."""
        return torch.arange(self._packed.config.max_position_embeddings)[None] if name.endswith(_POSITIONS) else None

    def one_layer(self) -> dict[str, Any]:
        """Return the number of layers."""
        return {"num_hidden_layers": 1}


class StoredPooledClip(StoredClip):
    """Structure and weights of one CLIP of which only the text before projection is read."""

    kind = CLIP_POOLED
