"""The shapes-world score: 1 if the checker of edgeprune.shapes finds in an image what its prompt asks for, else 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgeprune import shapes
from edgeprune.common.errors import InputError
from edgeprune.metrics import Images


class ShapesScore:
    """The shapes-world score; needs no weights."""

    def __init__(self, weights: Mapping[str, str], device: str) -> None:
        pass

    def score(self, images: Images, prompts: Sequence[str], originals: Images | None) -> list[float]:
        """Return 1 or 0 per image.

        Raises:
            InputError: a prompt does not describe shapes world, or an image has another size.
        """
        sizes = {image.shape[:2] for image in images}
        worlds = [world for size, world in shapes.WORLDS.items() if sizes == {(size, size)}]
        if not worlds:
            found = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
            expected = " or ".join(f"{size}x{size}" for size in shapes.WORLDS)
            raise InputError(f"--metric shapes: found images of {found}, expected all of {expected}")
        (world,) = worlds
        return [float(world.check(i, world.grammar.parse(p))) for i, p in zip(images, prompts, strict=True)]


METRIC = ShapesScore
