"""What a plan leaves of a model: where each remaining tensor comes from, its shape, and the config. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from edgeprune.common.errors import InputError
from edgeprune.families import CHANGED, Config, Family, Shape, Source
from edgeprune.families.architecture import STAND_IN
from edgeprune.planning.plan import PrunePlan, followers

HINT = "edgeprune: not stock diffusers; load the folder with edgeprune.load(folder), of the Python package edgeprune"
"""The quantisation method that the config of a changed model names. diffusers quotes an unknown one in its error, which
is the only text that a user of `DiffusionPipeline.from_pretrained(folder)` gets to read. Folders of earlier versions
say `edgeprune`; no reader of edgeprune looks at it."""


def modulation_width(family: Family, config: Config) -> int:
    """Return D, the width of the input that the modulation layers read.

    Raises:
        InputError: the family's blocks have no modulation layer that can be projected.
    """
    for name, shape in family.tensor_shapes(config).items():
        if len(shape) == 2 and family.modulates(name):
            return shape[1]
    raise InputError(f"--modulation-rank: found a model of {family.name}, which has no modulation layer in its blocks")


def tensor_sources(
    family: Family, config: Config, kept: list[int], removed: frozenset[tuple[int, str]], rank: int | None
) -> dict[str, Source]:
    """Return for every tensor of the smaller model what it is made from.

    Args:
        kept: original indices of the blocks that stay.
        removed: removed components.
        rank: see `PrunePlan.modulation_rank`.
    """
    sources = family.tensor_sources(config, kept, removed)
    if rank is None:
        return sources
    out, embedder = {}, f"{family.embedder}."
    for name, source in sources.items():
        if name.startswith(embedder):
            if rank:
                out[f"{embedder}embedder.{name.removeprefix(embedder)}"] = source
        elif not family.modulates(name):
            out[name] = source
        elif name.endswith(".bias"):
            out[name] = replace(source, constant=True)
        elif rank:
            out[name] = replace(source, projected=True)
    if rank:
        out |= {f"{embedder}{made}": Source(made, calibrated=True) for made in ("mean", "basis")}
    return out


def remaining_shapes(
    family: Family,
    config: Config,
    blocks: Iterable[int],
    components: Iterable[tuple[int, str]],
    rank: int | None = None,
    stand_in_rank: int | None = None,
) -> dict[str, Shape]:
    """Return the tensor shapes of the model that is left.

    Args:
        blocks: original indices of the removed blocks.
        components: the removed components.
        rank: see `PrunePlan.modulation_rank`.
        stand_in_rank: see `PrunePlan.stand_in_rank`.
    """
    removed_blocks = set(blocks)
    kept = [i for i in range(family.block_count(config)) if i not in removed_blocks]
    original = family.tensor_shapes(config)
    sources = tensor_sources(family, config, kept, frozenset(components), rank)
    width = 0 if rank is None else modulation_width(family, config)
    shapes: dict[str, Shape] = {}
    for name, source in sources.items():
        if source.calibrated:
            shapes[name] = (width,) if source.name == "mean" else (rank or 0, width)
            continue
        shape = original[source.name]
        for axis, ranges in enumerate((source.rows, source.columns)):
            if ranges is not None:
                shape = (*shape[:axis], sum(b - a for a, b in ranges), *shape[axis + 1 :])
        shapes[name] = (shape[0], rank or 0) if source.projected else shape
    if stand_in_rank is not None:
        for new in followers(removed_blocks, family.block_count(config)):
            shapes |= _stand_in_shapes(family, config, kept, new, stand_in_rank, shapes)
    return shapes


def _stand_in_shapes(
    family: Family, config: Config, kept: list[int], new: int, rank: int, names: Iterable[str]
) -> dict[str, Shape]:
    """Return the shapes of the maps before a block; `names` are those of the tensors that are left."""
    shorter, d = family.shorter_config(config, kept), family.width(config)
    name = next(n for n in names if (place := family.place(shorter, n)) is not None and place[0] == new)
    prefix = f"{'.'.join(name.split('.')[:2])}.{STAND_IN}"
    return {
        f"{prefix}.{stream}.{tensor}": shape
        for stream in streams_of(family, config, kept[new])
        for tensor, shape in (("down.weight", (rank, d)), ("up.weight", (d, rank)), ("up.bias", (d,)))
    }


def streams_of(family: Family, config: Config, block: int) -> tuple[str, ...]:
    """Return the names of the streams that a block reads, given its original index."""
    return next(family.streams[kind] for kind, blocks in family.kinds(config).items() if block in blocks)


def shorter_config(family: Family, config: Config, plan: PrunePlan) -> Config:
    """Return the config of the model that a plan leaves.

    Stock diffusers must refuse the model if its own class does not fit. It ignores a `_class_name` that it does not
    know and fills missing weights at random, but however it loads, it refuses a quantisation method that it does not
    know. So the config of such a model names one, whose name says how to load it.
    """
    shorter = family.shorter_config(config, plan.kept)
    if plan.stock:  # an empty quantisation, which diffusers does not load, is none
        return {k: v for k, v in shorter.items() if k != "quantization_config"}
    return shorter | {
        "_class_name": f"{CHANGED}{config['_class_name']}",
        "quantization_config": {"quant_method": HINT},
    }


def stock_config(config: Config) -> Config:
    """Return a shorter model's config with diffusers' own class name, for readers that do not load weights by it."""
    stock = {k: v for k, v in config.items() if k != "quantization_config"}
    return stock | {"_class_name": config["_class_name"].removeprefix(CHANGED)}
