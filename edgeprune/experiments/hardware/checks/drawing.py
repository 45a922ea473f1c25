"""An image of the small SD3, drawn by a runtime and by torch on the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.experiments.hardware.place import Place
from edgeprune.experiments.hardware.registry import Failed


def compare_image(place: Place, folder: Path, runtime: str, *, least: float, **options: Any) -> tuple[float, Any]:
    """Return the PSNR in dB against torch's image, and the runtime, closed.

    Args:
        place: where.
        folder: the model, or an export of it.
        runtime: that draws it.
        least: the least dB.
        options: of the runtime.

    Raises:
        Failed: the images differ more.
    """
    import numpy as np

    from edgeprune.metrics.psnr import decibels
    from edgeprune.runtimes import load

    images = []
    for where, name, chosen in ((place.small("sd3"), "eager", {"device": "cpu"}), (folder, runtime, options)):
        with load(where, name, **chosen) as opened:
            images.append(np.asarray(opened.generate("a red circle", seed=0)[0]))
            opened.backend.memory()
    found = decibels(images[1], images[0])
    if found < least:
        raise Failed(f"{runtime} {options}: the image is {found:.1f} dB from torch's, at least {least:g} expected")
    return found, opened
