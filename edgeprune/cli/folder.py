"""The artefact folder that a command works in, and the settings of the images it draws."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.common import processes
from edgeprune.common.errors import InputError

if TYPE_CHECKING:
    from edgeprune.sampling.generation import Generation
    from edgeprune.stages.workspace import Workspace


def is_begun(out: Path) -> bool:
    """Return whether the folder is an artefact folder already."""
    return (out / "edgeprune.json").is_file()


def check_out(out: Path) -> None:
    """Refuse an output folder that cannot be created, before anything is computed.

    Raises:
        InputError: the path, or a folder above it, is a file.
    """
    for place in (out, *out.parents):
        if place.is_dir():
            return
        if place.exists():
            raise InputError(f"-o {out}: {place} is a file; use another -o")


def check_model(model: str | None) -> None:
    """Refuse a name that is neither a folder nor a hub id nor the built-in model. Nothing is downloaded.

    Raises:
        InputError: there is no such folder.
    """
    if model in (None, "built-in") or Path(str(model)).is_dir():
        return
    from edgeprune.artefact.resolve import is_hub_id, resolve

    if Path(str(model)).exists() or not is_hub_id(str(model)):
        resolve(model)


def check_prompts(prompts: str | None) -> None:
    """Refuse a file of prompts that cannot be used, before anything is computed.

    Raises:
        InputError: the file cannot be read, or holds no prompt.
    """
    from edgeprune.sampling.prompts import read_prompts

    if prompts is not None:
        read_prompts(Path(prompts))


def workspace(
    out: Path,
    model: str | None = None,
    *,
    fresh: bool = False,
    begin: bool = False,
    generation: dict[str, Any] | None = None,
) -> Workspace:
    """Open an artefact folder.

    Args:
        model: as the user named it; None for the folder's own, or the built-in one where the folder is new.
        fresh: redo stages that were done with other inputs.
        begin: create the folder if it does not exist.
        generation: the settings of images that the user set.

    Raises:
        InputError: the folder does not exist and `begin` is False, cannot be created, or is not usable.
    """
    check_out(out)
    begun = is_begun(out)
    if not begun and not begin:
        raise InputError(f"{out / 'edgeprune.json'}: no such file; begin with: edgeprune analyze MODEL -o {out}")
    from edgeprune.stages.workspace import Workspace  # imports torch, which takes seconds

    with processes.main_first():
        ws = Workspace(out, model, model_given=model is not None or not begun, fresh=fresh, generation=generation or {})
    ws.command = shlex.join(["edgeprune", *sys.argv[1:]])
    return ws


def images_of(source: Path, ws: Workspace | None, chosen: dict[str, Any]) -> Generation:
    """Return the settings of images: the folder's or else the model's own, with the user's on top.

    Raises:
        InputError: a setting is out of range, or the model cannot draw this size.
    """
    from dataclasses import asdict

    from edgeprune.sampling.generation import Generation

    start = ws.generation if ws else Generation.load(source)
    images = Generation.checked(asdict(start) | chosen, "options")
    images.check_size(source, chosen)
    return images


def source_of(folder: Path) -> str | None:
    """Return the model that an export or artefact was made from; None for the built-in one.

    Raises:
        InputError: the folder does not name it.
    """
    from edgeprune.common.files import read_json

    for name in ("edgeprune_export.json", "edgeprune.json"):
        if (folder / name).is_file():
            source = read_json(folder / name).get("source")
            if isinstance(source, str):
                return None if source == "built-in" else source
    raise InputError(f"{folder}: does not say what it was made from; give --baseline")
