"""Where the teachers are: the built-in model is part of the package, the others are in `assets/` of a source tree."""

from __future__ import annotations

from pathlib import Path

from edgeprune.artefact.resolve import BUILTIN
from edgeprune.common.errors import InputError

SHAPES = "shapes"
"""The built-in model's name as a teacher."""
_ASSETS = Path(__file__).parents[2] / "assets"
TEACHERS = {SHAPES: BUILTIN, "rich-sd3": _ASSETS / "rich-sd3", "rich-flux": _ASSETS / "rich-flux"}
"""Pipeline folders by name."""


def teacher(name: str) -> Path:
    """Return a teacher's folder.

    Raises:
        InputError: there is no such teacher, or it is not in this tree.
    """
    if name not in TEACHERS:
        raise InputError(f"--teacher: found {name!r}, expected one of {', '.join(TEACHERS)}")
    folder = TEACHERS[name]
    if not (folder / "model_index.json").is_file():
        raise InputError(
            f"--teacher {name}: {folder} is missing; train it in a source tree, which takes hours: "
            f"make assets ONLY={name}"
        )
    return folder


def model_of(name: str) -> str | None:
    """Return a teacher as commands name a model: its folder, None for the built-in one.

    Raises:
        InputError: see `teacher`.
    """
    folder = teacher(name)
    return None if name == SHAPES else str(folder)
