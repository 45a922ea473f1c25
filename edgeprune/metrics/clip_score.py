"""CLIPScore: 100 times the cosine of image and prompt in CLIP's space, or 0 if the cosine is negative.

torchmetrics and diffusers' evaluation guide use this form; Hessel et al. (arXiv 2104.08718) scale by 2.5 instead.
Values from different CLIP models are not comparable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeprune.metrics import Images
from edgeprune.metrics.clip_model import Clip


class ClipScore:
    """CLIPScore; needs the weights `clip`."""

    def __init__(self, weights: Mapping[str, str], device: str) -> None:
        self.clip = Clip(weights["clip"], "clip", device)

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return 0 to 100 per image."""
        return [max(0.0, 100 * v) for v in self.clip.similarity(images, prompts)]


METRIC = ClipScore
