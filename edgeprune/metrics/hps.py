"""HPS v2.1, human preference (Wu et al., arXiv 2306.09341): 100 times the cosine in a fine-tuned CLIP ViT-H/14.

hps_convert.py makes the CLIP folder that the metric reads from the published weights:

    python -m edgeprune.metrics.hps HPS_v2.1_compressed.pt --clip laion/CLIP-ViT-H-14-laion2B-s32B-b79K -o hpsv2.1

HPS v2's own prompts are not included: pass them with --prompts. Images that are not square are centre-cropped, as CLIP
does; HPS's own code pads them instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeprune.metrics import Images
from edgeprune.metrics.clip_model import Clip


class Hps:
    """HPS v2.1; needs the weights `hpsv2`."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        self.clip = Clip(weights["hpsv2"], "hpsv2")

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return about 20 to 35 per image."""
        return [100 * v for v in self.clip.similarity(images, prompts)]


METRIC = Hps

if __name__ == "__main__":
    import sys

    from edgeprune.metrics.hps_convert import main

    sys.exit(main())
