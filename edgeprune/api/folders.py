"""Opens the artefact folder that a function works in, and refuses unusable arguments before anything is computed.

Importing this file is cheap, and the checks need no torch: a wrong path is refused at once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.common import extras, heap, processes
from edgeprune.common.errors import InputError

if TYPE_CHECKING:
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.sampling.generation import Generation, GenerationOptions
    from edgeprune.shapes import World
    from edgeprune.stages.workspace import Workspace

AnyPath = str | os.PathLike[str]
"""A path as users give it."""

_RECORDS = ("edgeprune_export.json", "edgeprune.json")
"""Files that say what an export or an artefact was made from."""

GUESSED = {"steps": "--inference-steps", "guidance": "--guidance-scale"}
"""The options of the commands that work in an artefact folder, for `say_guesses`."""


def is_begun(out: AnyPath) -> bool:
    """Return whether the folder is an artefact folder already."""
    return (Path(out) / "edgeprune.json").is_file()


def world_given(out: AnyPath, model: AnyPath | None = None) -> World | None:
    """Return the world of the model that a folder is, or will be, made from; None if it is no teacher of shapes world.

    Args:
        out: the artefact folder, which need not exist.
        model: as for `compress`.

    Raises:
        InputError: the folder's manifest, or the model's world.json, is damaged.
    """
    from edgeprune.artefact.manifest import Manifest
    from edgeprune.artefact.resolve import BUILTIN
    from edgeprune.shapes import world_of

    if model is None and is_begun(out) and (source := Manifest.load(Path(out)).source) != "built-in":
        model = source
    return world_of(BUILTIN if model is None else Path(model))


def world_drawn(folder: Path) -> World | None:
    """Return the world that a folder draws: an export or an artefact draws that of the model that it was made from.

    None for other models, and where that model is not on this machine.

    Raises:
        InputError: the folder's record, or the model's world.json, is damaged.
    """
    from edgeprune.artefact.resolve import BUILTIN
    from edgeprune.common.files import read_json
    from edgeprune.shapes import world_of

    for name in _RECORDS:
        if (folder / name).is_file():
            source = read_json(folder / name).get("source")
            return world_of(BUILTIN if source == "built-in" else Path(source)) if isinstance(source, str) else None
    return world_of(folder)


def check_out(out: AnyPath) -> None:
    """Refuse an output folder that cannot be created or written, before anything is computed. Links are followed.

    Raises:
        InputError: the path, or a folder above it, is a file or a link to nothing, or is not writable.
    """
    for place in (Path(out), *Path(out).parents):
        if place.is_dir():
            if not os.access(place, os.W_OK | os.X_OK):
                what = "this folder" if place == Path(out) else f"the folder {place}"
                raise InputError(f"-o {out}: {what} is not writable here; use another -o, or change its permissions")
            return
        if place.exists():
            raise InputError(f"-o {out}: {place} is a file; use another -o")
        if place.is_symlink():
            raise InputError(f"-o {out}: {place} is a link to nothing; make the folder that it leads to, or remove it")


def check_begun(out: AnyPath) -> None:
    """Refuse a folder that is not an artefact folder.

    Raises:
        InputError: it has no manifest, or is a pipeline's of no known family.
        MissingExtraError: a package that compresses is not installed.
    """
    check_out(out)
    if not is_begun(out):
        if (Path(out) / "model_index.json").is_file():
            from edgeprune.artefact.resolve import read_config

            read_config(Path(out))
        raise InputError(
            f"{Path(out) / 'edgeprune.json'}: no such file; begin with: edgeprune analyze MODEL -o {out}, or name a "
            "folder that was begun"
        )
    extras.require(extras.COMPRESS, "compress")


def check_model(model: AnyPath | None, revision: str | None = None) -> None:
    """Refuse a name that is neither a folder nor a hub id nor the built-in model. Nothing is downloaded.

    Raises:
        InputError: there is no such folder, or a revision of something else than a hub id was given.
    """
    from edgeprune.artefact.resolve import check_revision, resolve
    from edgeprune.common.hub_cache import is_hub_id

    name = None if model in (None, "built-in") else str(model)
    check_revision(name, revision)
    if name is not None and not Path(name).is_dir() and (Path(name).exists() or not is_hub_id(name)):
        resolve(name)


def check_original(model: AnyPath | None, revision: str | None = None) -> None:
    """Refuse what is no model, and a folder that is no pipeline's. Nothing is downloaded.

    Raises:
        InputError: see `check_model`; or the folder holds no pipeline of a known family.
    """
    from edgeprune.artefact.resolve import read_config

    check_model(model, revision)
    if model is not None and Path(model).is_dir():
        read_config(Path(model))


def check_places(out: AnyPath, model: AnyPath | None, revision: str | None) -> None:
    """Refuse an output folder, a model or a revision that cannot be used, before anything is computed.

    Raises:
        InputError: see `check_out` and `check_original`.
        MissingExtraError: a package that compresses is not installed.
    """
    check_out(out)
    if model is not None or not is_begun(out):  # a begun folder knows its model
        check_original(model, revision)
    extras.require(extras.COMPRESS, "compress")


def check_prompts(prompts: AnyPath | None) -> None:
    """Refuse a file of prompts that cannot be used, before anything is computed.

    Raises:
        InputError: the file cannot be read, or holds no prompt.
    """
    from edgeprune.sampling.prompts import read_prompts

    if prompts is not None:
        read_prompts(Path(prompts))


def open_folder(
    out: AnyPath,
    model: AnyPath | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    fresh: bool = False,
    begin: bool = False,
    generation: GenerationOptions | None = None,
    compute: ComputeOptions | None = None,
) -> Workspace:
    """Open an artefact folder. The process holds its lock as long as the result lives.

    Args:
        out: the folder.
        model: as the user named it; None for the folder's own, or the built-in one where the folder is new.
        revision: a branch, tag or commit of a hub id; None for its default, or the folder's own without `model`.
        variant: of the weights, such as fp16; None for the full ones, or the only ones that there are.
        fresh: redo stages that were done with other inputs.
        begin: create the folder if it does not exist.
        generation: settings of images to change; None keeps the folder's, or the model's own.
        compute: where networks run, and in how much memory; None takes what this machine has.

    Raises:
        InputError: the folder does not exist and `begin` is False, cannot be created, or is not usable.
        StaleStageError: the folder was begun with another model, revision or variant or, without `fresh`, with other
            settings.
        LockedError: another process uses the folder.
    """
    heap.large_pages()
    if not begin:
        check_begun(out)
    check_places(out, model, revision)
    begun = is_begun(out)
    from edgeprune.sampling.generation import say_guesses
    from edgeprune.stages.workspace import Workspace  # imports torch, which takes seconds

    with processes.main_first():
        ws = Workspace(
            Path(out),
            None if model is None else os.fspath(model),
            revision=revision,
            variant=variant,
            model_given=model is not None or not begun,
            fresh=fresh,
            generation=generation.given() if generation else {},
            compute=compute,
        )
    if not begun:
        say_guesses(ws.source, generation.given() if generation else (), **(GUESSED if generation else {}))
    return ws


def source_and_images(
    out: AnyPath,
    model: AnyPath | None,
    revision: str | None,
    generation: GenerationOptions | None,
    variant: str | None = None,
) -> tuple[Path, Generation]:
    """Return the original's folder and the settings of its images, for a forecast. A new folder is not created.

    Raises:
        InputError: the model or a setting is not usable, or the model cannot draw this size.
    """
    if model is None and is_begun(out):
        ws = open_folder(out, revision=revision, variant=variant)
        return ws.source, images_of(ws.source, ws.generation, generation)
    check_places(out, model, revision)
    from edgeprune.artefact.checks import check_pipeline
    from edgeprune.artefact.resolve import resolve

    source = resolve(None if model is None else os.fspath(model), revision, variant)
    check_pipeline(source, variant)
    return source, images_of(source, None, generation)


def images_of(source: Path, start: Generation | None, generation: GenerationOptions | None) -> Generation:
    """Return the settings of images: `start` or else the model's own, with the user's on top.

    Raises:
        InputError: a setting is out of range, or the model cannot draw this size.
    """
    from edgeprune.sampling.generation import Generation, GenerationOptions, heed, say_guesses

    chosen = generation or GenerationOptions()
    if start is None:
        say_guesses(source, chosen.given(), **GUESSED)
    chosen = GenerationOptions(**heed(source, chosen.given()))
    images = (start or Generation.load(source)).changed(chosen, "options")
    images.check_size(source, chosen.given())
    return images


def source_of(folder: Path) -> tuple[str | None, str | None, str | None]:
    """Return what an export or artefact was made from: model, commit on the hub, variant of its weights.

    The model is None for the built-in one.

    Raises:
        InputError: the folder does not name it.
    """
    from edgeprune.common.files import read_json

    for name in _RECORDS:
        if (folder / name).is_file():
            record = read_json(folder / name)
            source, *rest = (record.get(name) for name in ("source", "commit", "variant"))
            if isinstance(source, str):
                commit, variant = (value if isinstance(value, str) else None for value in rest)
                return None if source == "built-in" else source, commit, variant
    raise InputError(f"{folder}: does not say what it was made from; give --baseline")
