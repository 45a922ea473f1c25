"""GenEval: 1 where an image shows what its prompt asks for, else 0; rules and prompts are in geneval_rules.py.

Objects are found by Mask2Former, the benchmark's own detector, in transformers' form instead of mmdetection's; their
colours are named by CLIP, on crops whose surroundings are painted grey. What it leaves out: any detector without masks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.metrics import Images
from edgeprune.metrics.geneval_rules import COLORS, CONFIDENCE, NAMES, Detection, parse, verdict

with needs("geneval"):
    import scipy  # noqa: F401  (Mask2Former asks for it)
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    try:  # transformers 5 calls by the plain name what needs torchvision
        from transformers import Mask2FormerImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import Mask2FormerImageProcessor as ImageProcessor

from edgeprune.metrics.clip_model import Clip
from edgeprune.metrics.pretrained import load

_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_GREY = 0x99


class GenEval:
    """Takes the weights `geneval` (detector) and `clip` (colours)."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        source = weights["geneval"]
        self.detector = load(Mask2FormerForUniversalSegmentation, source, "geneval")
        self.processor = load(ImageProcessor, source, "geneval")
        labels = self.detector.config.id2label
        ends = [str(labels.get(i)) for i in (0, len(NAMES) - 1)]
        if len(labels) != len(NAMES) or ends != [NAMES[0], NAMES[-1]]:
            raise InputError(
                f"--weights geneval={source}: found {len(labels)} classes from {ends[0]!r} to {ends[1]!r}, "
                f"expected COCO's {len(NAMES)} from {NAMES[0]!r} to {NAMES[-1]!r}"
            )
        self.clip = Clip(weights["clip"], "clip")
        self._shades: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Every object in an image (H, W, 3) above the lower confidence."""
        given = self.processor(images=[image], input_data_format="channels_last", return_tensors="pt")
        outputs = self.detector(**{k: v.to(self.detector.device) for k, v in given.items()})
        (found,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=CONFIDENCE, target_sizes=[image.shape[:2]], return_binary_maps=True
        )
        out = []
        for segment, values in zip(found["segments_info"], found["segmentation"], strict=False):  # none: one empty map
            mask = values.cpu().numpy() > 0
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            out.append(Detection(NAMES[segment["label_id"]], segment["score"], box, mask))
        return out

    def colors_of(self, image: NDArray[np.uint8], found: Sequence[Detection], name: str) -> list[str]:
        """The colour of each of some objects of a class in an image (H, W, 3)."""
        if name not in self._shades:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            vectors = self.clip.texts(texts).reshape(len(COLORS), len(_TEMPLATES), -1).mean(1)
            self._shades[name] = torch.nn.functional.normalize(vectors, dim=-1)
        crops = []
        for detection in found:
            left, top, right, bottom = map(int, detection.box)
            shown = image if detection.mask is None else np.where(detection.mask[..., None], image, np.uint8(_GREY))
            crops.append(shown[top:bottom, left:right])
        return [COLORS[i] for i in (self.clip.images(crops) @ self._shades[name].T).argmax(1).tolist()]

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """1 or 0 per image.

        Raises:
            InputError: a prompt is not one of GenEval's.
        """
        out = []
        for image, prompt in zip(images, prompts, strict=True):
            colors_of = functools.partial(self.colors_of, image)
            out.append(float(verdict(self.detect(image), parse(prompt), colors_of)))
        return out


METRIC = GenEval
