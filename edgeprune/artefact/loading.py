"""Load the transformer or the pipeline of an artefact or an original folder: strictly, hashed, safetensors only.

Stock diffusers loads `transformer/` of a plan that removes only whole blocks; everything else loads here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from edgeprune.artefact.manifest import HALF, INT4, MANIFEST, Manifest
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.surgery import structure
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import is_out_of_memory
from edgeprune.families import CHANGED, family_of, family_of_model
from edgeprune.families.encoders import read_index
from edgeprune.quantization.quantize import prepare
from edgeprune.residency.model_files import parts_of, weights_of
from edgeprune.residency.stored import StoredTransformer
from edgeprune.residency.weights import Weights


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the many errors of loading libraries over a damaged or missing file into one.

    Raises:
        InputError: `path` cannot be loaded. Out-of-memory errors pass unchanged.
    """
    try:
        yield
    except EdgepruneError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be loaded ({type(error).__name__}: {text[:300]})") from error


def load_transformer(
    folder: Path, *, quantized: bool, dtype: torch.dtype = torch.float32, variant: str | None = None
) -> Any:
    """Return the transformer of an artefact or an original folder, in memory.

    Args:
        quantized: load `transformer_int4/`; packed integers stay integers, everything else becomes `dtype`.
        variant: of an original's weights, see residency/model_files.py.

    Raises:
        InputError: files are missing, damaged or do not fit.
    """
    return open_transformer(folder, quantized=quantized, variant=variant).load(dtype)


def open_transformer(folder: Path, *, quantized: bool, variant: str | None = None) -> StoredTransformer:
    """Return the transformer of an artefact or an original folder, with its weights left on disk.

    Args:
        quantized: open `transformer_int4/`.
        variant: of an original's weights, see residency/model_files.py.

    Raises:
        InputError: files are missing, damaged or do not fit.
    """
    config, family = read_config(folder)
    subfolder, plan, manifest = INT4 if quantized else HALF, None, None
    if (folder / MANIFEST).is_file():
        manifest = Manifest.load(folder)
        if not (folder / subfolder).is_dir():
            stage = "quantize" if quantized else "prune"
            raise InputError(f"{folder / subfolder}: no such folder; run `edgeprune {stage} -o {folder}`")
        manifest.verify(folder, subfolder)
        config, plan = manifest.config, manifest.prune_plan(folder)
        family = family_of(config, f"{folder / MANIFEST}: config")
        family.tensor_shapes(config)  # raises if a field is missing or out of range
        if plan:
            plan.check(config, folder / MANIFEST)
    elif quantized:
        raise InputError(f"{folder}: not quantised (no {MANIFEST}); run `edgeprune quantize {folder}`")
    elif str(config["_class_name"]).startswith(CHANGED):
        raise InputError(f"{folder}: no {MANIFEST}, and without it {HALF}/ cannot be loaded; make the artefact again")
    with readable(folder / subfolder):
        every = list(range(family.block_count(config)))
        model = structure(family, config, plan) if plan else family.build(config, every, frozenset())
    if quantized and manifest:
        prepare(family, model, group_size=manifest.group_size or 64)
    return StoredTransformer(family, model, Weights(folder / subfolder, variant))


def load(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    *,
    quantized: bool | None = None,
    variant: str | None = None,
) -> Any:
    """Return a diffusers pipeline of an artefact or an original folder.

    Args:
        quantized: use the INT4 transformer; by default if there is one.
        variant: of an original's weights, such as fp16; None for the full ones, or the only ones that there are.

    Raises:
        InputError: files are missing, damaged or do not fit.
    """
    root = Path(folder)
    use_int4 = (root / INT4).is_dir() if quantized is None else quantized
    transformer = load_transformer(root, quantized=use_int4, dtype=dtype, variant=variant)
    return load_pipeline(root, transformer, dtype, variant=variant)


def load_pipeline(
    folder: Path, transformer: nn.Module, dtype: torch.dtype = torch.float32, *, variant: str | None = None
) -> Any:
    """Return the folder's pipeline around a loaded transformer. Never runs code or pickles of the folder.

    Args:
        variant: of the other parts' weights, see residency/model_files.py.

    Raises:
        InputError: files are missing, damaged or do not fit the transformer.
    """
    index, family = read_index(folder), family_of_model(transformer)
    if (name := index.get("_class_name")) != family.pipeline:
        where = folder / "model_index.json"
        raise InputError(f"{where}: _class_name: found {shown(name)}, expected {family.pipeline!r}")
    # diffusers needs an explicit None for an absent encoder, though the index lists it as absent.
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    with readable(folder), quiet():
        import diffusers  # here, because transformers logs advice when its pipelines are imported

        pipe = getattr(diffusers, family.pipeline).from_pretrained(
            folder, transformer=transformer, use_safetensors=True, local_files_only=True, **_dtype(dtype), **absent,
            **_variants(folder, index, dtype, variant),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _variants(folder: Path, index: dict[str, Any], dtype: torch.dtype, wish: str | None) -> dict[str, Any]:
    """Load the parts whose weights are a variant. diffusers would need one variant that all parts have."""
    import diffusers
    import transformers

    out = {}
    for name in parts_of(index):
        found = weights_of(folder / name, wish) if name != HALF else None
        if found and found.variant:
            library, kind = index[name]
            load = getattr(diffusers if library == "diffusers" else transformers, kind).from_pretrained
            part = load(folder / name, variant=found.variant, use_safetensors=True, local_files_only=True)
            out[name] = part.to(dtype)
    return out


def _dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype under the argument's name: diffusers 0.42 renamed it, and warns about the old name."""
    version = tuple(int(v) for v in metadata.version("diffusers").split(".")[:2])
    return {"dtype" if version >= (0, 42) else "torch_dtype": dtype}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars of diffusers and transformers, which garble ours, and their advice to developers."""
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
