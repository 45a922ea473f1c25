"""The shapes-world score: 1 if the checker of edgeprune.shapes finds in an image what its prompt asks for, else 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeprune import shapes
from edgeprune.common.errors import InputError
from edgeprune.metrics import Images


class ShapesScore:
    """The shapes-world score; needs no weights."""

    def __init__(self, weights: Mapping[str, str]) -> None:
        pass

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return 1 or 0 per image.

        Raises:
            InputError: a prompt does not describe shapes world, or an image has another size.
        """
        for image in images:
            if image.shape != (shapes.SIZE, shapes.SIZE, 3):
                raise InputError(
                    f"--metric shapes: found an image of {image.shape[1]}x{image.shape[0]}, "
                    f"expected {shapes.SIZE}x{shapes.SIZE}"
                )
        return [float(shapes.check(i, shapes.parse(p))) for i, p in zip(images, prompts, strict=True)]


METRIC = ShapesScore
