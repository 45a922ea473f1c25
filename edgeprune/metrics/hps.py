"""HPS v2.1, human preference (Wu et al., arXiv 2306.09341): 100 times the cosine in a fine-tuned CLIP ViT-H/14.

hps_convert.py makes the CLIP folder that the metric reads from the published weights:

    python -m edgeprune.metrics.hps HPS_v2.1_compressed.pt --clip laion/CLIP-ViT-H-14-laion2B-s32B-b79K -o hpsv2.1

HPS v2's own prompts are not included: pass them with --prompts. Images that are not square are padded to squares, as
HPSv2's own code does (`resize_longest_max`); CLIP crops them instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeprune.metrics import Images
from edgeprune.metrics.clip_model import Clip


def padded(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return an image (H, W, 3) resized so that its longer side fits, with zeros around it: (side, side, 3)."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    out = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    out[top : top + height, left : left + width] = np.asarray(resized)
    return out


class Hps:
    """HPS v2.1; needs the weights `hpsv2`."""

    def __init__(self, weights: Mapping[str, str], device: str) -> None:
        self.clip = Clip(weights["hpsv2"], "hpsv2", device)

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return about 20 to 35 per image."""
        side = self.clip.model.config.vision_config.image_size
        return [100 * v for v in self.clip.similarity([padded(image, side) for image in images], prompts)]


METRIC = Hps

if __name__ == "__main__":
    import sys

    from edgeprune.metrics.hps_convert import main

    sys.exit(main())
