"""Which files of a pipeline's folder or repository are the model: its index, its parts, one set of weights for each.

    model_index.json
    scheduler/scheduler_config.json
    tokenizer_3/spiece.model
    text_encoder_3/model-00001-of-00002.safetensors            the weights in shards, and their index
    text_encoder_3/model.safetensors.index.json
    text_encoder_3/model.fp16-00001-of-00002.safetensors       the same weights as variant fp16
    text_encoder_3/model.safetensors.index.fp16.json
    text_encoder_3/pytorch_model.bin                           not read: a pickle
    flux1-dev.safetensors                                      not read: the same weights in a single file

Repositories hold up to four times the model. Only what is listed here is fetched, hashed, loaded and copied.

Without a wish, a part's weights are the full ones, or the only variant that there is. With one, they are that variant,
or the full ones where a part does not have it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import inside, read_json
from edgeprune.families.encoders import is_present, read_index

UNSAFE = ("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack")
"""Patterns of code and pickles, which are neither downloaded nor copied."""
INDEX, GENERATION = "model_index.json", "generation.json"
_SMALL = (".json", ".txt", ".model", ".jinja")
"""Suffixes of configs and tokenizers."""
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(rf"(diffusion_pytorch_model|model)(\.\w+)?({_SHARD})?(\.\w+)?\.safetensors")
"""Stem, variant, shard, and the variant where older versions put it."""
_SHARD_INDEX = re.compile(r"(diffusion_pytorch_model|model)\.safetensors\.index(\.\w+)?\.json")
_ANY_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
_WITHOUT_WEIGHTS = ("tokenizer", "scheduler", "feature_extractor", "image_processor", "processor")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")
_FULL = "full"
"""What messages call weights that are no variant."""


@dataclass(frozen=True)
class PartWeights:
    """The weights of one part of a pipeline, such as its VAE."""

    variant: str | None
    """None for the full weights."""
    files: tuple[str, ...]
    """Names of the safetensors files in the part's folder."""
    index: str | None
    """Name of the file that says which shard holds which tensor; None for a single file."""


def weights_among(names: Iterable[str], variant: str | None, where: object) -> PartWeights | None:
    """Return a part's weights among the names of its files; None if it has none, as a tokenizer.

    Args:
        variant: the user's wish; see above.
        where: the part, for the error.

    Raises:
        InputError: there are several variants, no full weights, and no wish.
    """
    found = _by_variant(names)
    if not found:
        return None
    if variant in found:
        return found[variant]
    if None in found:
        return found[None]
    if len(found) > 1:
        listed = ", ".join(sorted(map(str, found)))
        raise InputError(f"{where}: found no {_FULL} weights, but the variants {listed}; choose one with --variant")
    return next(iter(found.values()))


def _by_variant(names: Iterable[str]) -> dict[str | None, PartWeights]:
    """Group the names of weights and of their indices by variant."""
    files: dict[tuple[str | None, str, bool], list[str]] = {}
    indices: dict[tuple[str | None, str], str] = {}
    for name in sorted(names):
        if match := _SHARD_INDEX.fullmatch(name):
            stem, variant = match.groups()
            indices[variant and variant[1:], stem] = name
        elif (match := _WEIGHTS.fullmatch(name)) and not (match[2] and match[4]) and (match[3] or not match[4]):
            stem, before, shard, after = match.groups()
            variant = before or after
            files.setdefault((variant and variant[1:], stem, shard is not None), []).append(name)
    out: dict[str | None, PartWeights] = {}
    # The first of several is what the part's loader takes: diffusers looks for an index first, transformers for a file.
    for stem, order in (("diffusion_pytorch_model", (True, False)), ("model", (False, True))):
        for sharded in order:
            for variant in {key[0]: None for key in files} | {key[0]: None for key in indices}:
                index, of_variant = indices.get((variant, stem)), _whole(files.get((variant, stem, sharded), []))
                if index if sharded else of_variant:
                    found = PartWeights(variant, tuple(of_variant), index if sharded else None)
                    out.setdefault(variant, found)
    return out


def _whole(names: list[str]) -> list[str]:
    """Return the shards of which all are there, so none of an earlier save in another number; without any, all."""
    totals = [match[0] for name in names if (match := re.search(r"(?<=-of-)\d{5}", name))]
    whole = [total for total in {*totals} if totals.count(total) == int(total)]
    return [name for name in names if any(f"-of-{total}" in name for total in whole)] or names


def weights_of(folder: Path, variant: str | None = None) -> PartWeights | None:
    """Return the weights in the folder of one part; None if it has none.

    Raises:
        InputError: there are several variants and no wish, or an index is damaged or names a file that is missing.
    """
    return _with_shards(folder, weights_among(_names(folder), variant, folder))


def any_weights_of(folder: Path) -> PartWeights | None:
    """Return one set of a part's weights, where only names and shapes matter: these are the same in all variants.

    Raises:
        InputError: an index is damaged or names a file that is missing.
    """
    found = _by_variant(_names(folder))
    return _with_shards(folder, found.get(None, next(iter(found.values()), None)))


def without_weights(folder: Path) -> str:
    """Return what to say of a part's folder in which `weights_of` finds nothing."""
    names = sorted(name for name in _names(folder) if name.endswith((".safetensors", ".gguf", *_PICKLES)))
    if not names:
        return "found no weights, expected safetensors"
    if names[0].endswith(".safetensors"):
        return f"found {names[0]}, expected a file or an index of shards as diffusers and transformers name them"
    return f"found {names[0]}, expected safetensors; pickles are never read"


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []


def _with_shards(folder: Path, found: PartWeights | None) -> PartWeights | None:
    """Return the weights with the files that their index lists; a folder may hold shards of another one."""
    if found is None or found.index is None:
        return found
    listed = sorted(set(read_weight_map(folder / found.index).values()))
    if missing := [name for name in listed if not (folder / name).is_file()]:
        raise InputError(f"{folder / missing[0]}: no such file, but {found.index} lists it; download the model again")
    return PartWeights(found.variant, tuple(listed), found.index)


def without_variant(name: str) -> str:
    """Return the name under which a file of weights or their index is one of the full weights; others keep theirs."""
    if match := _WEIGHTS.fullmatch(name):
        return f"{match[1]}{match[3] or ''}.safetensors"
    match = _SHARD_INDEX.fullmatch(name)
    return f"{match[1]}.safetensors.index.json" if match else name


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the file of each tensor from an index of shards; only files in the index's folder are allowed.

    Raises:
        InputError: it has no such map, or a name is not that of a safetensors file beside it.
    """
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index}: weight_map: found {type(files).__name__}, expected file names by tensor")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: {shown(name)}: found {shown(file)}, expected the name of a .safetensors file beside it"
            )
        inside(index.parent, file, index)
    return files


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """Return the names of a pipeline's parts that are present, which are its folders."""
    return [name for name in index if not name.startswith("_") and is_present(index, name)]


def part_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of one part: weights, configs and tokenizer, sorted.

    Raises:
        InputError: see `weights_of`.
    """
    return [
        folder / name for name in sorted(_of_part(folder.name, _names(folder), weights_of(folder, variant), folder))
    ]


def _of_part(part: str, names: Iterable[str], weights: PartWeights | None, where: object) -> list[str]:
    """Return the names of a part's files, given its weights."""
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if weights is None and pickles and not part.startswith(_WITHOUT_WEIGHTS):
        raise InputError(f"{where}: found {pickles[0]}, expected safetensors; pickles are never read")
    return [
        *_small(names),
        *(weights.files if weights else ()),
        *([weights.index] if weights and weights.index else []),
    ]


def model_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of a pipeline folder that are the model, sorted; licenses are not among them.

    Raises:
        InputError: `model_index.json` is missing or damaged, or see `weights_of`.
    """
    top = [folder / name for name in (INDEX, GENERATION) if (folder / name).is_file()]
    return sorted(
        [*top, *(path for part in parts_of(read_index(folder)) for path in part_files(folder / part, variant))]
    )


def small_files(folder: Path) -> list[Path]:
    """Return the configs and tokenizer files of one part, sorted."""
    return [folder / name for name in sorted(_small(_names(folder)))]


def _small(names: Iterable[str]) -> list[str]:
    return [n for n in names if n.endswith(_SMALL) and not n.startswith(".") and not _ANY_INDEX.search(n)]


def files_among(
    index: Mapping[str, Any],
    names: Iterable[str],
    variant: str | None,
    where: object,
    wanted: Callable[[str], bool] = lambda part: True,
) -> list[str]:
    """Return the files of a repository that are the model, from its index and the paths of all of its files.

    Args:
        variant: of the weights.
        where: the repository, for errors.
        wanted: whether a part's weights are needed; of the others, only configs and tokenizers are.

    Raises:
        InputError: a part has no file, or only weights that are not read; there is no such variant, or see
            `weights_among`.
    """
    paths = sorted(names)
    out, variants = [name for name in (INDEX, GENERATION) if name in paths], set[str | None]()
    for part in parts_of(index):
        below = [p.removeprefix(f"{part}/") for p in paths if p.startswith(f"{part}/")]
        if not below:
            raise InputError(f"{where}: {INDEX} lists {part}, but there is no such folder")
        variants |= _by_variant(below).keys()
        flat = [name for name in below if "/" not in name]
        if not wanted(part):
            out += [f"{part}/{name}" for name in _small(flat)]
            continue
        weights = weights_among(flat, variant, f"{where}: {part}")
        if weights is None and not part.startswith(_WITHOUT_WEIGHTS) and not any(n.endswith(_PICKLES) for n in flat):
            raise InputError(f"{where}: {part}: found no weights, expected safetensors")
        out += [f"{part}/{name}" for name in _of_part(part, flat, weights, f"{where}: {part}")]
    _check_variant(variant, variants, where)
    return sorted(out)


def check_variant(folder: Path, variant: str | None) -> None:
    """Refuse a variant that no part of a pipeline folder has.

    Raises:
        InputError: there is no such variant.
    """
    if variant is not None:
        parts = [folder / part for part in parts_of(read_index(folder))]
        _check_variant(variant, {found for part in parts for found in _by_variant(_names(part))}, folder)


def _check_variant(variant: str | None, found: set[str | None], where: object) -> None:
    if variant is not None and variant not in found:
        listed = ", ".join(sorted(name or _FULL for name in found)) or "none"
        raise InputError(f"--variant {variant}: {where} has no such weights; found {listed}")
