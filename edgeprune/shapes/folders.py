"""Which world a pipeline's folder draws: a teacher of shapes world says so in `world.json`, other models have none."""

from __future__ import annotations

from pathlib import Path

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json, write_json
from edgeprune.shapes.plain import PLAIN
from edgeprune.shapes.rich import RICH
from edgeprune.shapes.world import World

FILE = "world.json"
_BY_NAME = {world.name: world for world in (PLAIN, RICH)}


def world_of(folder: Path) -> World | None:
    """Return the world that a pipeline's folder draws, whose captions it understands; None for other models.

    Raises:
        InputError: its world.json is damaged, or names no world of this version.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    found = read_json(path)
    name = found.get("world")
    if found.keys() != {"world"} or not isinstance(name, str) or name not in _BY_NAME:
        expected = " or ".join(f'{{"world": "{name}"}}' for name in _BY_NAME)
        raise InputError(f"{path}: found {shown(found)}, expected {expected}")
    return _BY_NAME[name]


def save_world(world: World, folder: Path) -> None:
    """Write into a pipeline's folder which world it draws."""
    write_json(folder / FILE, {"world": world.name})
