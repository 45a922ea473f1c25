"""From what the user names as a model to a local folder, and to the config and family in it."""

from __future__ import annotations

from pathlib import Path

from edgeprune.artefact.convert.opening import refuse_file, single_files
from edgeprune.artefact.fetch import Needed, all_parts, fetch
from edgeprune.artefact.manifest import HALF
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import check_links, read_json
from edgeprune.common.hub_cache import is_hub_id
from edgeprune.families import CHANGED, SUPPORTED, Config, Family, family_of, has_family
from edgeprune.residency.model_files import check_variant

BUILTIN = Path(__file__).parents[1] / "demo" / "assets" / "teacher"


def resolve(
    model: str | None, revision: str | None = None, variant: str | None = None, needed: Needed = all_parts
) -> Path:
    """Return the local folder of a model: a hub id's snapshot, a folder itself, or for None the built-in model's.

    Args:
        model: as the user named it.
        revision: a branch, tag or commit of a hub id; None for the repository's default.
        variant: of the weights, such as fp16; None for the full ones, or the only ones that there are.
        needed: which parts' weights a download has to have.

    Raises:
        InputError: there is no such folder, and it is not a hub id that can be downloaded; it is not a hub id, and a
            revision was given; or it has no weights of this variant.
        DiskError: the disk has less room than the download needs.
    """
    check_revision(model, revision)
    if model is None:
        if not BUILTIN.is_dir():
            raise InputError(
                f"{BUILTIN}: the built-in model is missing; reinstall, or train it: "
                f"python -m edgeprune.demo.train shapes --out {BUILTIN}"
            )
        check_variant(BUILTIN, variant)
        return BUILTIN
    folder = Path(model)
    if folder.is_dir():
        check_variant(folder, variant)
        return folder
    if folder.exists():
        if folder.suffix == ".json" and (hint := nearby(folder)):
            raise InputError(f"{model}: found a file, expected a folder{hint}")
        raise refuse_file(folder)
    if not is_hub_id(model):
        raise InputError(f"{model}: no such folder; expected a diffusers folder or a hub id like owner/name")
    return fetch(model, revision, variant, needed)


def check_revision(model: str | None, revision: str | None) -> None:
    """Refuse a revision of something that has none.

    Raises:
        InputError: the model is a local folder or the built-in model.
    """
    if revision is not None and (model is None or Path(model).exists()):
        what = "the built-in model" if model is None else f"{model}, a local folder,"
        raise InputError(f"--revision {revision}: {what} has no revisions; omit it, or name a hub id like owner/name")


def nearby(path: Path) -> str:
    """Return a hint for a path that is not a pipeline's folder, but a level above or below one; empty without one."""
    inner = sorted(place.parent for place in path.glob("*/model_index.json")) if path.is_dir() else []
    found = path.parent if (path.parent / "model_index.json").is_file() else inner[0] if len(inner) == 1 else None
    return f"; did you mean {found}?" if found else ""


def read_original(folder: Path) -> tuple[Config, Family]:
    """Return what `read_config` does, for a model that is to be compressed.

    Raises:
        InputError: see `read_config`; or parts of its blocks are missing already.
    """
    config, family = read_config(folder)
    if str(config["_class_name"]).startswith(CHANGED):
        raise InputError(f"{folder}: already pruned, parts of its blocks are missing; compress the original")
    return config, family


def read_config(folder: Path) -> tuple[Config, Family]:
    """Return the transformer config of a pipeline folder, and its family.

    Raises:
        InputError: it is not a diffusers folder, or not an MMDiT.
    """
    if (folder / "edgeprune_export.json").is_file():
        raise InputError(f"{folder}: is an export, expected a diffusers pipeline folder: what the export was made from")
    if not (folder / "model_index.json").is_file():
        hint = nearby(folder)
        if folder.is_dir() and not hint and (single := single_files(folder)):
            hint = f"; a single file can be converted: edgeprune convert {single[0]}"
            hint = f"; convert the folder: edgeprune convert {folder}" if (folder / "config.json").is_file() else hint
        raise InputError(f"{folder}: no model_index.json; expected a diffusers pipeline folder{hint}")
    check_links(folder)
    index = read_json(folder / "model_index.json")
    if not has_family(index):
        raise InputError(
            f"{folder}: found {shown(index.get('_class_name'))} with {shown(index.get(HALF))}, expected an MMDiT: "
            f"{', '.join(SUPPORTED)}; to add a family, see CONTRIBUTING.md; to compare with this one as it is, see "
            "docs/references.md"
        )
    path = folder / HALF / "config.json"
    if not path.is_file():
        raise InputError(
            f"{folder}: not an MMDiT pipeline ({shown(index.get('_class_name'))} has no transformer/config.json)"
        )
    config = read_json(path)
    family = family_of(config, str(path))
    family.tensor_shapes(config)  # raises if a field is missing or out of range
    return config, family
