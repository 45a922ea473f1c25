"""Qwen2.5-VL as pipelines read it: its language model alone, without the vision tower and the head.

With text alone, the three axes of its positions are equal, and its rotary positions are the plain ones.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel


class TextOfQwen(Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]
    """The language model under the class that diffusers expects; `config` is that of text."""

    def __init__(self, config: Qwen2_5_VLConfig) -> None:
        PreTrainedModel.__init__(self, config.text_config)
        self.model = Qwen2_5_VLTextModel(config.text_config)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        """Return what the language model says of ids (B, M); the last of its hidden states is normed."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **options)
