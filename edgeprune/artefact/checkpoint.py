"""The artefact on disk: a diffusers folder plus `edgeprune.json`.

Atomic writes, strict and hashed reads, safetensors only.

`transformer/` holds the pruned weights in half precision; `transformer_int4/` the quantised ones. Whole-block plans
load `transformer/` in stock diffusers; everything loads here. What it leaves out: the format of weights (weights.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from edgeprune import __version__
from edgeprune.artefact.surgery import structure
from edgeprune.common import heap
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.fields import real, shown, text, whole
from edgeprune.common.files import (
    check_links,
    check_schema,
    copy_folder,
    inside,
    is_out_of_memory,
    need_space,
    read_json,
    replace_folder,
    sha256_file,
    write_json,
    write_text,
)
from edgeprune.common.tensors import Tensors
from edgeprune.families import Config, Family, family_of, family_of_model
from edgeprune.families.base import CHANGED
from edgeprune.families.encoders import is_present, read_index
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.quantize import prepare
from edgeprune.residency.stored import StoredTransformer
from edgeprune.residency.weights import MARK, ShardWriter, Speed, Weights, is_of, shards

SCHEMA_VERSION = 1
MANIFEST = "edgeprune.json"
HALF, INT4 = "transformer", "transformer_int4"
BUILTIN = Path(__file__).parents[1] / "demo" / "assets" / "teacher"
_LONGEST_S = 1e10
_NEVER = ("*.py", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack")
"""Code and pickles: neither fetched nor copied."""


@dataclass
class Manifest:
    """What `edgeprune.json` says of an artefact."""

    source: str
    """The model as the user named it."""
    fingerprint: str
    """Of the source transformer's config."""
    family: str
    config: Config
    """Of the source transformer."""
    generation: dict[str, Any] = field(default_factory=dict)
    """How images are made in every stage, see `Generation`."""
    plan: dict[str, Any] | None = None
    group_size: int | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: `inputs` (a digest), `seconds`, and what it reports."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 by relative path."""
    tools: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            InputError: none there, or not one that we understand.
        """
        path = folder / MANIFEST
        data = read_json(path)
        remedy = "make the artefact again, with another -o or after removing the folder"
        check_schema(path, data.get("schema_version"), SCHEMA_VERSION, remedy)
        try:
            manifest = cls(**data)
        except TypeError as error:
            raise InputError(f"{path}: not a manifest ({error})") from error
        for name in ("config", "stages", "files", "generation", "tools"):
            if not isinstance(getattr(manifest, name), dict):
                raise InputError(f"{path}: {name}: expected an object")
        for name in ("source", "fingerprint", "family"):
            text(data, name, path)
        for name, kind in (("files", str), ("tools", str), ("stages", dict)):
            if odd := [key for key, value in getattr(manifest, name).items() if not isinstance(value, kind)]:
                raise InputError(f"{path}: {name}: {shown(odd[0])}: expected a {kind.__name__}")
        for name, stage in manifest.stages.items():
            text(stage, "inputs", f"{path}: stages: {shown(name)}")
            text({"command": ""} | stage, "command", f"{path}: stages: {shown(name)}")
            real(stage, "seconds", f"{path}: stages: {shown(name)}", least=0, most=_LONGEST_S)
        if manifest.group_size is not None:
            whole(data, "group_size", path)
        if not isinstance(manifest.plan, (dict, NoneType)):
            raise InputError(f"{path}: plan: expected an object or null")
        return manifest

    def save(self, folder: Path) -> None:
        """Write it, with the versions of the tools in use."""
        names = ("torch", "diffusers", "transformers", "nncf", "safetensors", "numpy")
        self.tools = {"edgeprune": __version__} | {n: metadata.version(n) for n in names}
        write_json(folder / MANIFEST, asdict(self))

    def hash_files(self, folder: Path, part: str) -> None:
        """Take the hashes of every file below `part` anew."""
        self.files = {k: v for k, v in self.files.items() if k.split("/")[0] != part}
        root = folder / part
        found = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file() and p.name != MARK)
        self.files |= {p.relative_to(folder).as_posix(): sha256_file(p) for p in found}

    def verify(self, folder: Path, part: str) -> None:
        """Check the hashes of every file below `part`.

        Raises:
            InputError: a file is missing or changed.
        """
        for name, expected in self.files.items():
            if name.split("/")[0] != part:
                continue
            path = inside(folder, name, f"{folder / MANIFEST}: files")
            if not path.is_file():
                raise InputError(f"{path}: no such file, but {MANIFEST} lists it; make the artefact again")
            if sha256_file(path) != expected:
                raise InputError(
                    f"{path}: its SHA-256 is not the one in {MANIFEST}; the file is damaged or was changed"
                )

    def prune_plan(self, folder: Path) -> PrunePlan | None:
        """The plan that `transformer/` follows."""
        return PrunePlan.from_json(self.plan, folder / MANIFEST) if self.plan else None


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what loading libraries raise over a damaged or missing file into one InputError."""
    try:
        yield
    except EdgepruneError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be loaded ({type(error).__name__}: {text[:300]})") from error


def resolve(model: str | None) -> Path:
    """The local folder of a model: the built-in one for None, a folder as it is, or a hub id's snapshot.

    Raises:
        InputError: no such folder, and not a hub id that can be fetched.
    """
    if model is None:
        if not BUILTIN.is_dir():
            raise InputError(
                f"{BUILTIN}: the built-in model is not there; reinstall, or train it: python -m edgeprune.demo.train"
            )
        return BUILTIN
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.startswith("."):
        raise InputError(f"{model}: no such folder; expected a diffusers folder or a hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, ignore_patterns=list(_NEVER)))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{model}: no such folder, and not available from the hub ({reason})") from error


def read_config(folder: Path) -> tuple[Config, Family]:
    """A pipeline folder's transformer config and its family.

    Raises:
        InputError: not a diffusers folder, or not an MMDiT.
    """
    if not (folder / "model_index.json").is_file():
        raise InputError(f"{folder}: no model_index.json; expected a diffusers pipeline folder")
    check_links(folder)
    path = folder / HALF / "config.json"
    if not path.is_file():
        index = read_json(folder / "model_index.json")
        raise InputError(
            f"{folder}: not an MMDiT pipeline ({shown(index.get('_class_name'))} has no transformer/config.json)"
        )
    config = read_json(path)
    family = family_of(config, str(path))
    family.tensor_shapes(config)
    return config, family


def load_transformer(folder: Path, *, quantized: bool, dtype: torch.dtype = torch.float32) -> Any:
    """The transformer of an artefact or of an original folder, in memory.

    Args:
        quantized: take `transformer_int4/`; packed integers stay as they are, all else becomes `dtype`.

    Raises:
        InputError: missing, damaged or not fitting files.
    """
    return open_transformer(folder, quantized=quantized).load(dtype)


def open_transformer(folder: Path, *, quantized: bool) -> StoredTransformer:
    """The transformer of an artefact or of an original folder, its weights left on disk.

    Args:
        quantized: take `transformer_int4/`.

    Raises:
        InputError: missing, damaged or not fitting files.
    """
    config, family = read_config(folder)
    part, plan, manifest = INT4 if quantized else HALF, None, None
    if (folder / MANIFEST).is_file():
        manifest = Manifest.load(folder)
        if not (folder / part).is_dir():
            stage = "quantize" if quantized else "prune"
            raise InputError(f"{folder / part}: no such folder; run `edgeprune {stage} -o {folder}`")
        manifest.verify(folder, part)
        config, plan = manifest.config, manifest.prune_plan(folder)
        family = family_of(config, f"{folder / MANIFEST}: config")
        family.tensor_shapes(config)
        if plan:
            plan.check(config, folder / MANIFEST)
    elif quantized:
        raise InputError(f"{folder}: not quantised (no {MANIFEST}); run `edgeprune quantize {folder}`")
    elif str(config["_class_name"]).startswith(CHANGED):
        raise InputError(f"{folder}: no {MANIFEST}, and without it {HALF}/ cannot be loaded; make the artefact again")
    with readable(folder / part):
        every = list(range(family.block_count(config)))
        model = structure(family, config, plan) if plan else family.build(config, every, frozenset())
    if quantized and manifest:
        prepare(family, model, group_size=manifest.group_size or 64)
    return StoredTransformer(family, model, Weights(folder / part))


def load(folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32, *, quantized: bool | None = None) -> Any:
    """A diffusers pipeline of an artefact or of an original folder.

    Args:
        quantized: take the INT4 transformer; by default where there is one.

    Raises:
        InputError: missing, damaged or not fitting files.
    """
    root = Path(folder)
    chosen = (root / INT4).is_dir() if quantized is None else quantized
    transformer = load_transformer(root, quantized=chosen, dtype=dtype)
    return load_pipeline(root, transformer, dtype)


def load_pipeline(folder: Path, transformer: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """The rest of a folder's pipeline around a loaded transformer. Never runs code or pickles of the folder."""
    index, family = read_index(folder), family_of_model(transformer)
    if (name := index.get("_class_name")) != family.pipeline:
        where = folder / "model_index.json"
        raise InputError(f"{where}: _class_name: found {shown(name)}, expected {family.pipeline!r}")
    # diffusers wants to be told of an absent encoder, though the index says so.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    with readable(folder), quiet():
        import diffusers  # transformers gives advice when its pipelines are imported

        pipe = getattr(diffusers, family.pipeline).from_pretrained(
            folder, transformer=transformer, use_safetensors=True, local_files_only=True, **_dtype(dtype), **absent
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """diffusers 0.42 renamed the argument, and warns of the old name."""
    version = tuple(int(v) for v in metadata.version("diffusers").split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the vendors' own bars, which run into ours, and their advice, which is for developers."""
    import diffusers.utils.logging
    import transformers.utils.logging

    vendors = (diffusers.utils.logging, transformers.utils.logging)
    levels = [vendor.get_verbosity() for vendor in vendors]
    for vendor in vendors:
        vendor.disable_progress_bar()
        vendor.set_verbosity_error()
    try:
        yield
    finally:
        for vendor, level in zip(vendors, levels, strict=True):
            vendor.enable_progress_bar()
            vendor.set_verbosity(level)


def save_transformer(folder: Path, part: str, config: Config, state: Tensors) -> None:
    """Write `folder/part/` from tensors in memory, then put it in place of what was there.

    Raises:
        EdgepruneError: the disk is full; what was there before is untouched.
    """
    sizes = {n: t.numel() * t.element_size() for n, t in state.items()}
    temporary = folder / f"{part}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write_transformer(folder, part, config, [sizes], lambda _: state, inputs="")
        noted(folder, part)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_transformer(
    folder: Path,
    part: str,
    config: Config,
    parts: Sequence[dict[str, int]],
    make: Callable[[int], Tensors],
    *,
    inputs: str,
    found: Callable[[int, Weights], None] = lambda index, weights: None,
    progress: Callable[[str, int, int, str], None] = lambda what, done, total, note: None,
) -> int:
    """Write `folder/part/` shard by shard, then put it in place of what was there; returns its bytes of weights.

    Killed, or out of disk, it leaves `part.tmp`, and the next call with the same `inputs` goes on from there. Until the
    caller has noted that `part` is done and said so (`noted`), the next call finds it done.

    Args:
        folder: the artefact.
        part: `transformer`, `transformer_int4`.
        config: what its config.json shall be.
        parts: bytes by tensor name of each part that is made at once, a block for example.
        make: makes the tensors of a part.
        inputs: digest of everything that the tensors depend on.
        found: called instead of `make` for a part that a run before has written.
        progress: called with shards done, shards in all, and bytes and speed.

    Raises:
        EdgepruneError: the disk is full; what was there before is untouched.
    """
    grouped = shards([sum(p.values()) for p in parts])
    if inputs and is_of(folder / part, inputs, len(grouped)):
        for left in ("tmp", "old"):
            shutil.rmtree(folder / f"{part}.{left}", ignore_errors=True)
        return sum(sum(p.values()) for p in parts)
    writer = ShardWriter(folder / f"{part}.tmp", [[n for i in g for n in parts[i]] for g in grouped], inputs)
    sizes = [sum(sum(parts[i].values()) for i in group) for group in grouped]
    need_space(folder, sum(size for i, size in enumerate(sizes) if not writer.has(i)))
    speed = Speed(part, sizes, progress)
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
    replace_folder(writer.folder, folder / part)
    return sum(sizes)


def noted(folder: Path, part: str) -> None:
    """What `write_transformer` has made is noted to be done: the mark by which a killed run would find it goes."""
    (folder / part / MARK).unlink(missing_ok=True)


def complete_tokenizer(folder: Path) -> None:
    """Write vocab.json and merges.txt beside a BPE tokenizer.json; other folders are left as they are.

    Transformers 4 reads only these for CLIP, and transformers 5 no longer writes them.
    """
    if not (folder / "tokenizer.json").is_file() or (folder / "vocab.json").exists():
        return
    model = read_json(folder / "tokenizer.json").get("model", {})
    if model.get("type") == "BPE":
        pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")


def copy_surroundings(source: Path, folder: Path) -> None:
    """Copy everything of a pipeline but its transformer: encoders, tokenizers, VAE, scheduler."""
    index = read_index(source)
    folder.mkdir(parents=True, exist_ok=True)
    for name in index:
        if name.startswith("_") or name == HALF or not is_present(index, name):
            continue
        if not (source / name).is_dir():
            raise InputError(f"{source / 'model_index.json'}: {name}: no such folder beside it")
        temporary = folder / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        copy_folder(source / name, temporary, *_NEVER)
        complete_tokenizer(temporary)
        replace_folder(temporary, folder / name)
    write_text(folder / "model_index.json", (source / "model_index.json").read_text(encoding="utf-8"))
