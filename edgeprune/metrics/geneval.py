"""GenEval: 1 if an image shows what its prompt asks for, else 0. geneval_rules.py has the prompts and rules.

Mask2Former finds objects: the benchmark's own detector, in transformers' implementation instead of mmdetection's. CLIP
names their colours, on crops whose background is painted grey.
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
    import scipy  # noqa: F401  (Mask2Former needs it)
    import torch
    from transformers import Mask2FormerForUniversalSegmentation

    try:  # in transformers 5 the plain name needs torchvision
        from transformers import Mask2FormerImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import Mask2FormerImageProcessor as ImageProcessor

from edgeprune.metrics.clip_model import Clip
from edgeprune.metrics.pretrained import load

_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_GREY = 0x99


class GenEval:
    """GenEval; needs the weights `geneval` (detector) and `clip` (colours)."""

    def __init__(self, weights: Mapping[str, str], device: str) -> None:
        source = weights["geneval"]
        self.detector = load(Mask2FormerForUniversalSegmentation, source, "geneval", device)
        self.processor = load(ImageProcessor, source, "geneval")
        labels = self.detector.config.id2label
        ends = [str(labels.get(i)) for i in (0, len(NAMES) - 1)]
        if len(labels) != len(NAMES) or ends != [NAMES[0], NAMES[-1]]:
            raise InputError(
                f"--weights geneval={source}: found {len(labels)} classes from {ends[0]!r} to {ends[1]!r}, "
                f"expected COCO's {len(NAMES)} from {NAMES[0]!r} to {NAMES[-1]!r}"
            )
        self.clip = Clip(weights["clip"], "clip", device)
        self._shades: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def detect(self, image: NDArray[np.uint8]) -> list[Detection]:
        """Return every object in an image (H, W, 3) with at least the lower confidence."""
        inputs = self.processor(images=[image], input_data_format="channels_last", return_tensors="pt")
        outputs = self.detector(**{k: v.to(self.detector.device) for k, v in inputs.items()})
        (result,) = self.processor.post_process_instance_segmentation(
            outputs, threshold=CONFIDENCE, target_sizes=[image.shape[:2]], return_binary_maps=True
        )
        out = []
        # Not strict: without any object there is still one empty map.
        for segment, values in zip(result["segments_info"], result["segmentation"], strict=False):
            mask = values.cpu().numpy() > 0
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            out.append(Detection(NAMES[segment["label_id"]], segment["score"], box, mask))
        return out

    def colors_of(self, image: NDArray[np.uint8], detections: Sequence[Detection], name: str) -> list[str]:
        """Return the colour of each detection, all of the class `name`, in an image (H, W, 3)."""
        if name not in self._shades:
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            vectors = self.clip.texts(texts).reshape(len(COLORS), len(_TEMPLATES), -1).mean(1)
            self._shades[name] = torch.nn.functional.normalize(vectors, dim=-1)
        crops = []
        for detection in detections:
            left, top, right, bottom = map(int, detection.box)
            masked = image if detection.mask is None else np.where(detection.mask[..., None], image, np.uint8(_GREY))
            crops.append(masked[top:bottom, left:right])
        return [COLORS[i] for i in (self.clip.images(crops) @ self._shades[name].T).argmax(1).tolist()]

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return 1 or 0 per image.

        Raises:
            InputError: a prompt does not have the form of GenEval's.
        """
        out = []
        for image, prompt in zip(images, prompts, strict=True):
            colors_of = functools.partial(self.colors_of, image)
            out.append(float(verdict(self.detect(image), parse(prompt), colors_of)))
        return out


METRIC = GenEval
