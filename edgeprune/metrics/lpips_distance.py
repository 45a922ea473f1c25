"""LPIPS (Zhang et al., arXiv 1801.03924), version 0.1 on AlexNet: the distance to the original's image, 0 if equal.

Implemented here because the package `lpips` needs torchvision and downloads pickles. The weights are those of that
package; the command in docs/metrics.md saves them as safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.metrics import Images
from edgeprune.metrics.paired import matched

with needs("lpips"):
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch.nn import functional

from edgeprune.metrics.pretrained import placed

# AlexNet's convolutions as lpips names them: shape, stride, padding, and whether 3x3 max pooling comes before.
_LAYERS = {
    "net.slice1.0": ((64, 3, 11, 11), 4, 2, False),
    "net.slice2.3": ((192, 64, 5, 5), 1, 2, True),
    "net.slice3.6": ((384, 192, 3, 3), 1, 1, True),
    "net.slice4.8": ((256, 384, 3, 3), 1, 1, False),
    "net.slice5.10": ((256, 256, 3, 3), 1, 1, False),
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # normalisation of pixels in -1..1
_SMALLEST = 31  # the smallest side in pixels of which both poolings leave one number


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight that is read, by lpips's names."""
    out: dict[str, tuple[int, ...]] = {}
    for index, (name, (shape, *_)) in enumerate(_LAYERS.items()):
        out |= {f"{name}.weight": shape, f"{name}.bias": shape[:1], f"lin{index}.model.1.weight": (1, shape[0], 1, 1)}
    return out


class Lpips:
    """LPIPS; needs the weights `lpips`."""

    def __init__(self, weights: Mapping[str, str], device: str) -> None:
        path = Path(weights["lpips"])
        where = f"--weights lpips={path}"
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{where}: not a safetensors file ({error}); docs/metrics.md says how to make it"
            ) from error
        for name, shape in shapes().items():
            found = tuple(state[name].shape) if name in state else "nothing"
            if found != shape:
                raise InputError(f"{where}: {name}: found {found}, expected {shape}")
        self.device = placed(device)
        self.state = {name: state[name].float().to(self.device) for name in shapes()}

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return each layer's features of images (B, 3, H, W) in -1..1; each pixel's vector has length 1."""
        shift, scale = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        x, out = (images - shift) / scale, []
        for name, (_, stride, padding, pooled) in _LAYERS.items():
            x = functional.max_pool2d(x, 3, 2) if pooled else x
            x = functional.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], stride, padding).relu()
            out.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return out

    @torch.no_grad()
    def distance(self, first: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
        """Return the distance of two images (H, W, 3).

        Raises:
            InputError: the images are too small for AlexNet.
        """
        if min(first.shape[:2]) < _SMALLEST:
            found = f"{first.shape[1]}x{first.shape[0]}"
            raise InputError(f"--metric lpips: found an image of {found}, expected at least {_SMALLEST} pixels a side")
        pixels = torch.from_numpy(np.stack([first, other])).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        total = 0.0
        for index, (a, b) in enumerate(f.split(1) for f in self._features(pixels)):
            weighed = functional.conv2d((a - b).square(), self.state[f"lin{index}.model.1.weight"])
            total += float(weighed.mean())
        return total

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return one distance per image.

        Raises:
            InputError: two images differ in size or are too small.
        """
        return [self.distance(a, b) for a, b in matched(images, originals)]


METRIC = Lpips
