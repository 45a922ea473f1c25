"""A Qwen2.5-VL text encoder whose weights stay on disk, see stored_encoder.py: its language model alone."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2_5_VLConfig

from edgeprune.export.stored_qwen3 import StoredQwen3
from edgeprune.families.encoders import QWEN2_5_VL


class StoredQwen2VL(StoredQwen3):
    """Structure and weights of one Qwen2.5-VL: what Qwen3 has, but transformers' loader reads a vision tower, too."""

    kind = QWEN2_5_VL

    def one_layer(self) -> dict[str, Any]:
        """Return a config with one layer of the language model and none of the vision tower."""
        config: Any = Qwen2_5_VLConfig.from_pretrained(self.folder, local_files_only=True)
        config.text_config.num_hidden_layers, config.text_config.layer_types = 1, ["full_attention"]
        config.vision_config.depth = 0
        return {"config": config}
