"""CLIPScore: 100 times the cosine of image and prompt in CLIP's space, 0 where that is negative.

The form that torchmetrics and diffusers' evaluation guide use; Hessel et al. (arXiv 2104.08718) scale by 2.5 instead.
Values of different CLIPs cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeprune.metrics import Images
from edgeprune.metrics.clip_model import Clip


class ClipScore:
    """Takes the weights `clip`."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        self.clip = Clip(weights["clip"], "clip")

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """0 to 100 per image."""
        return [max(0.0, 100 * v) for v in self.clip.similarity(images, prompts)]


METRIC = ClipScore
