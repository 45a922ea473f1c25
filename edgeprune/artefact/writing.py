"""Write an artefact: its transformer shard by shard, and the rest of the pipeline as it is. Resumes after a kill.

A subfolder is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from edgeprune.artefact import licensing
from edgeprune.artefact.manifest import HALF
from edgeprune.common import heap
from edgeprune.common.errors import InputError
from edgeprune.common.files import (
    UNFINISHED,
    cannot_write,
    need_space,
    read_json,
    replace_folder,
    write_json,
    write_text,
)
from edgeprune.common.linking import copy, place
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors
from edgeprune.families import Config
from edgeprune.families.encoders import read_index
from edgeprune.residency.model_files import part_files, parts_of, weights_of, without_variant
from edgeprune.residency.shards import ShardWriter, Speed, group_into_shards, has_mark, mark_of
from edgeprune.residency.weights import FILE, Weights


def save_transformer(folder: Path, subfolder: str, config: Config, state: Tensors) -> None:
    """Write `folder/subfolder/` from tensors in memory, and replace what was there.

    Raises:
        EdgepruneError: the disk is full; what was there before is untouched.
    """
    sizes = {n: t.numel() * t.element_size() for n, t in state.items()}
    temporary = folder / f"{subfolder}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_transformer(folder, subfolder, config, [sizes], lambda _: state, inputs="")
        remove_mark(folder, subfolder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_transformer(
    folder: Path,
    subfolder: str,
    config: Config,
    chunks: Sequence[dict[str, int]],
    make: Callable[[int], Tensors],
    *,
    inputs: str,
    found: Callable[[int, Weights], None] = lambda index, weights: None,
    progress: Progress = silent,
    file: str = FILE,
) -> int:
    """Write `folder/subfolder/` shard by shard, replace what was there, and return the bytes of its weights.

    If it is killed or the disk is full, it leaves `subfolder.tmp`, and the next call with the same `inputs` resumes
    from there. Until the caller has recorded that the subfolder is done and called `noted`, the next call with the same
    `inputs` finds it done and writes nothing.

    Args:
        folder: the artefact.
        subfolder: `transformer` or `transformer_int4`.
        config: the content of its config.json.
        chunks: bytes by tensor name of each chunk that is made at once, for example a block.
        make: makes the tensors of a chunk, given its index.
        inputs: digest of everything that the tensors depend on.
        found: called instead of `make` for a chunk that an earlier run has written.
        progress: called with shards done, shards in total, and bytes and speed.
        file: the name of a single shard, see `ShardWriter`.

    Raises:
        EdgepruneError: the disk is full; what was there before is untouched.
    """
    grouped = _grouped(chunks)
    if inputs and has_mark(folder / subfolder, inputs, len(grouped)):
        for leftover in ("tmp", "old"):
            shutil.rmtree(folder / f"{subfolder}.{leftover}", ignore_errors=True)
        return sum(sum(chunk.values()) for chunk in chunks)
    writer = begun(folder, subfolder, chunks, inputs, file)
    sizes = [sum(sum(chunks[i].values()) for i in group) for group in grouped]
    need_space(folder, sum(size for i, size in enumerate(sizes) if not writer.has(i)))
    speed = Speed(subfolder, sizes, progress)
    with heap.returned():
        for index, group in enumerate(grouped):
            if already := writer.has(index):
                for i in group:
                    found(i, Weights(writer.path(index)))
            else:
                writer.put(index, {n: t for i in group for n, t in make(i).items()})
            speed.done(index + 1, found=already)
    writer.finish()
    write_json(writer.folder / "config.json", config)
    replace_folder(writer.folder, folder / subfolder)
    return sum(sizes)


def begun(folder: Path, subfolder: str, chunks: Sequence[dict[str, int]], inputs: str, file: str = FILE) -> ShardWriter:
    """Return what writes the shards of `write_transformer` with these arguments, in the order of the chunks."""
    names = [[name for index in group for name in chunks[index]] for group in _grouped(chunks)]
    return ShardWriter(folder / f"{subfolder}.tmp", names, inputs, file)


def _grouped(chunks: Sequence[dict[str, int]]) -> list[list[int]]:
    return group_into_shards([sum(chunk.values()) for chunk in chunks])


def remove_mark(folder: Path, subfolder: str, recorded: Collection[str] | None = None) -> None:
    """Remove the mark by which `write_transformer` finds a subfolder done, once the caller has recorded that it is.

    Args:
        folder: the artefact.
        subfolder: `transformer` or `transformer_int4`.
        recorded: digests of inputs; a mark that names others stays: a stage that was killed has not recorded it yet.
            None removes any.
    """
    inputs = mark_of(folder / subfolder).get("inputs")
    if recorded is None or inputs is None or inputs in recorded:
        (folder / subfolder / UNFINISHED).unlink(missing_ok=True)


def complete_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt from a BPE tokenizer.json if they are missing; leave other folders unchanged.

    For CLIP, transformers 4 reads only these two files, and transformers 5 no longer writes them.
    """
    if not (folder / "tokenizer.json").is_file() or (folder / "vocab.json").exists():
        return
    model = read_json(folder / "tokenizer.json").get("model", {})
    if model.get("type") == "BPE":
        pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def copy_part(source: Path, target: Path, variant: str | None = None, *, link: bool = False) -> None:
    """Put the files of one part of a pipeline that are the model into a new folder.

    The weights get the names of full weights, so that stock diffusers loads them without being told of a variant.

    Args:
        source: the part's folder.
        target: a new folder.
        variant: of the weights, see model_files.py.
        link: large weights, where that works, see common/linking.py. What people edit by hand is copied.

    Raises:
        InputError: an index of shards is damaged.
        DiskError: a file cannot be written, or the disk is full.
    """
    weights = weights_of(source, variant)
    target.mkdir(parents=True)
    for path in part_files(source, variant):
        to = target / without_variant(path.name)
        try:
            if weights and path.name == weights.index:
                index = read_json(path)
                files = {tensor: without_variant(file) for tensor, file in index["weight_map"].items()}
                write_json(to, index | {"weight_map": files})
            else:
                (place if link and weights and path.name in weights.files else copy)(path, to)
        except OSError as error:
            raise cannot_write(to, error) from error


def copy_surroundings(source: Path, folder: Path, variant: str | None = None) -> None:
    """Copy or link everything of a pipeline but its transformer: encoders, tokenizers, VAE, scheduler, license files.

    Raises:
        InputError: a component that the index lists is missing.
        EdgepruneError: a file cannot be read, or the disk is full.
    """
    index = read_index(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name in parts_of(index):
        if name == HALF:
            continue
        if not (source / name).is_dir():
            raise InputError(f"{source / 'model_index.json'}: {name}: no such folder, but the index lists it")
        temporary = folder / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        copy_part(source / name, temporary, variant, link=True)
        complete_tokenizer(temporary)
        replace_folder(temporary, folder / name)
    licensing.copy(source, folder)
    write_text(folder / "model_index.json", (source / "model_index.json").read_text(encoding="utf-8"))
