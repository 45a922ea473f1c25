"""The networks of a pipeline with random weights: their tensors by name and shape, and writing them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edgeprune.artefact.manifest import HALF
from edgeprune.artefact.synth.drawing import draw
from edgeprune.artefact.writing import remove_mark, write_transformer
from edgeprune.common.files import need_space
from edgeprune.common.progress import Progress
from edgeprune.common.tensors import Tensors
from edgeprune.families import Config, Family, Shape
from edgeprune.families.encoders import LANGUAGE
from edgeprune.families.parts import VAE_FLUX2, part_shapes
from edgeprune.families.published import PublishedNetwork, PublishedPipeline, networks
from edgeprune.residency.shards import Speed, group_into_shards
from edgeprune.residency.weights import FILE

TEXT_FILE = "model.safetensors"
"""The weights' file of a text encoder, as transformers names it; those of other networks are diffusers' `FILE`."""
PIECE_BYTES = 100_000_000
"""A shard is made of pieces of a block of up to this size, so that few tensors are in memory at once."""


@dataclass(frozen=True)
class RandomNetwork:
    """A network to write."""

    folder: str
    config: Config
    pieces: tuple[dict[str, Shape], ...]
    """Its tensors in order; a shard holds whole pieces."""
    draw: Callable[[str, Shape], torch.Tensor]
    """Draws a tensor of two bytes a number."""
    file: str = FILE

    @property
    def sizes(self) -> list[dict[str, int]]:
        """Return the bytes of every tensor, piece by piece."""
        return [{name: 2 * math.prod(shape) for name, shape in piece.items()} for piece in self.pieces]

    @property
    def size(self) -> int:
        """Return the bytes of all weights."""
        return sum(sum(piece.values()) for piece in self.sizes)

    @property
    def shards(self) -> list[int]:
        """Return the bytes of every file."""
        sizes = [sum(piece.values()) for piece in self.sizes]
        return [sum(sizes[i] for i in group) for group in group_into_shards(sizes)]

    def make(self, index: int) -> Tensors:
        """Draw the tensors of a piece."""
        return {name: self.draw(name, shape) for name, shape in self.pieces[index].items()}


def transformer(family: Family, config: Config) -> RandomNetwork:
    """Return a pipeline's transformer, in bfloat16; fixed tables get their real values."""

    def values(name: str, shape: Shape) -> torch.Tensor:
        return family.table(config, name, torch.bfloat16) if family.is_buffer(name) else draw(name, shape)

    blocks: list[dict[str, Shape]] = [{} for _ in range(family.block_count(config) + 1)]
    for name, shape in family.tensor_shapes(config).items():
        place = family.place(config, name)
        blocks[-1 if place is None else place[0]][name] = shape
    return RandomNetwork(HALF, config, _pieces(blocks), values)


def others(family: Family, pipeline: PublishedPipeline) -> list[RandomNetwork]:
    """Return a published pipeline's VAE and text encoders."""
    kinds = {encoder.name: encoder.kind for encoder in family.encoders} | {"vae": family.vae}
    known = networks()
    return [
        _network(folder, kinds[folder], known[name], pipeline.text_dtype)
        for folder, name in sorted(pipeline.networks.items(), key=lambda item: known[item[1]].parameters)
    ]


def _network(folder: str, kind: str, published: PublishedNetwork, text_dtype: str) -> RandomNetwork:
    is_vae = folder == "vae"
    dtype = torch.bfloat16 if is_vae else getattr(torch, text_dtype)
    config = published.config | ({} if is_vae else {"torch_dtype": text_dtype})
    shapes = part_shapes(kind, config, folder)
    assert shapes is not None  # every published network has a table
    if kind in (*LANGUAGE, VAE_FLUX2):  # their tables lack what edgeprune does not read, and vendors' loaders do
        shapes = _shapes_of_class(kind, config)
    pieces = _pieces([shapes])
    return RandomNetwork(folder, config, pieces, lambda n, s: draw(n, s, dtype), FILE if is_vae else TEXT_FILE)


def _shapes_of_class(kind: str, config: Config) -> dict[str, Shape]:
    """Return all tensors of a network from its class, without weights."""
    import diffusers
    import transformers

    with torch.device("meta"):
        if "_class_name" in config:
            return _shapes(getattr(diffusers, kind).from_config(config).state_dict())
        cls = getattr(transformers, kind)
        model = cls(cls.config_class(**config))
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    return {name: shape for name, shape in _shapes(model.state_dict()).items() if name not in tied}


def _shapes(state: Tensors) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _pieces(blocks: Iterable[dict[str, Shape]]) -> tuple[dict[str, Shape], ...]:
    """Cut blocks of tensors into pieces of up to `PIECE_BYTES`; a larger tensor is a piece of its own."""
    pieces: list[dict[str, Shape]] = []
    for block in blocks:
        filled = PIECE_BYTES
        for name, shape in block.items():
            size = 2 * math.prod(shape)
            if filled + size > PIECE_BYTES:
                pieces.append({})
                filled = 0
            pieces[-1][name] = shape
            filled += size
    return tuple(pieces)


def write_all(out: Path, parts: Sequence[RandomNetwork], inputs: str, *, label: str, progress: Progress) -> int:
    """Write networks into the folder of a pipeline, and return the bytes of their weights. Finished shards are kept.

    Args:
        out: the pipeline's folder.
        parts: the networks.
        inputs: digest of everything that they depend on.
        label: the name under which progress is reported.
        progress: called with shards done, of all networks, and bytes and speed.

    Raises:
        DiskError: the disk is too full for all of them; nothing is written.
    """
    missing = [part for part in parts if not (out / part.folder).is_dir()]
    found = {part.folder: sorted((out / f"{part.folder}.tmp").glob("*.safetensors")) for part in missing}
    written = sum(file.stat().st_size for files in found.values() for file in files)
    need_space(out, max(0, sum(part.size for part in missing) - written))
    speed, before = Speed(label, [size for part in missing for size in part.shards], progress), 0
    for part in missing:

        def report(_: str, count: int = 0, *__: object, part: RandomNetwork = part, before: int = before) -> None:
            speed.done(before + count, found=count <= len(found[part.folder]))

        write_transformer(
            out, part.folder, part.config, part.sizes, part.make, inputs=inputs, file=part.file, progress=report
        )
        before += len(part.shards)
    for part in parts:
        remove_mark(out, part.folder)
    for leftover in ("tmp", "old"):
        for part in parts:
            shutil.rmtree(out / f"{part.folder}.{leftover}", ignore_errors=True)
    return sum(part.size for part in parts)
