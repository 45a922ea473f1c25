"""The shapes-world score: 1 where an image shows what its prompt means by the checker, else 0. See demo/shapes.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeprune import shapes
from edgeprune.common.errors import InputError
from edgeprune.metrics import Images


class ShapesScore:
    """Needs no weights."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        pass

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """1 or 0 per image.

        Raises:
            InputError: a prompt is not of shapes world, or an image not of its size.
        """
        for image in images:
            if image.shape != (shapes.SIZE, shapes.SIZE, 3):
                raise InputError(
                    f"--metric shapes: found an image of {image.shape[1]}x{image.shape[0]}, "
                    f"expected {shapes.SIZE}x{shapes.SIZE}"
                )
        return [float(shapes.check(i, shapes.parse(p))) for i, p in zip(images, prompts, strict=True)]


METRIC = ShapesScore
