"""CLIP as metrics use it: texts and images to unit vectors. Images are prepared by PIL, torchvision or not.

What it leaves out: long prompts; what is beyond CLIP's 77 tokens is cut off.
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

    try:  # transformers 5 calls by the plain name what needs torchvision
        from transformers import CLIPImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import CLIPImageProcessor as ImageProcessor

from edgeprune.metrics.pretrained import load

BATCH = 16


def _vectors(found: Any) -> torch.Tensor:
    # transformers 5 wraps them.
    values: torch.Tensor = found if isinstance(found, torch.Tensor) else found.pooler_output
    return torch.nn.functional.normalize(values.float(), dim=-1).cpu()


class Clip:
    """A CLIP with its tokenizer and image processor.

    Args:
        source: folder or hub id.
        name: of the weights, as --weights has it.
    """

    def __init__(self, source: str, name: str) -> None:
        self.model = load(CLIPModel, source, name)
        self.tokenizer = load(CLIPTokenizer, source, name)
        self.processor = load(ImageProcessor, source, name)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(T, K), each of length 1."""
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
        """(B, K), each of length 1, of images (H, W, 3)."""
        parts = []
        for i in range(0, len(images), BATCH):
            # Said, or an image of 3 rows would be taken for one with its channels first.
            pixels = self.processor(
                images=list(images[i : i + BATCH]), input_data_format="channels_last", return_tensors="pt"
            )["pixel_values"]
            parts.append(_vectors(self.model.get_image_features(pixel_values=pixels.to(self.model.device))))
        return torch.cat(parts)

    def similarity(self, images: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> list[float]:
        """Cosine of each image with its own text."""
        return [float(v) for v in (self.images(images) * self.texts(texts)).sum(-1)]
