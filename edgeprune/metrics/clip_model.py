"""CLIP for metrics: texts and images to unit vectors. PIL prepares the images, whether or not torchvision is installed.

Prompts are truncated to CLIP's 77 tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.extras import needs

__all__ = ["BATCH", "Clip", "ImageProcessor"]

with needs("clip"):
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    try:  # in transformers 5 the plain name needs torchvision
        from transformers import CLIPImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import CLIPImageProcessor as ImageProcessor

from edgeprune.metrics.pretrained import load

BATCH = 16


def _vectors(output: Any) -> torch.Tensor:
    """Return the unit vectors of a model's output, which transformers 5 wraps in an object."""
    values: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(values.float(), dim=-1).cpu()


class Clip:
    """A CLIP with its tokenizer and image processor.

    Args:
        source: a folder or hub id.
        name: the name of the weights in --weights.
        device: see `placed`.
    """

    def __init__(self, source: str, name: str, device: str = "auto") -> None:
        self.model = load(CLIPModel, source, name, device)
        self.tokenizer = load(CLIPTokenizer, source, name)
        self.processor = load(ImageProcessor, source, name)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return the unit vectors of texts, (T, K)."""
        longest = self.model.config.text_config.max_position_embeddings
        parts = []
        for i in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                list(texts[i : i + BATCH]), padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(self.model.device)
            parts.append(_vectors(self.model.get_text_features(**tokens)))
        return torch.cat(parts)

    @torch.no_grad()
    def images(self, images: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """Return the unit vectors of images (H, W, 3), as (B, K)."""
        parts = []
        for i in range(0, len(images), BATCH):
            # Explicit: otherwise an image of 3 rows is taken for one whose channels come first.
            pixels = self.processor(
                images=list(images[i : i + BATCH]), input_data_format="channels_last", return_tensors="pt"
            )["pixel_values"]
            parts.append(_vectors(self.model.get_image_features(pixel_values=pixels.to(self.model.device))))
        return torch.cat(parts)

    def similarity(self, images: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> list[float]:
        """Return the cosine of each image with its own text."""
        return [float(v) for v in (self.images(images) * self.texts(texts)).sum(-1)]
