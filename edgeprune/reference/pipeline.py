"""Loads a reference's pipeline: whole, or where memory is short in parts that take turns."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeprune.artefact.loading import dtype_option, quiet, readable
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.reference.folder import Reference
from edgeprune.reference.staged import Turns
from edgeprune.residency.compute import Compute, name_of
from edgeprune.residency.model_files import INDEX, weights_of

_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INPUTS = {"image", "images", "video", "videos", "frames", "audio"}
"""Words in the names of what a pipeline takes besides a prompt."""
_ROOM = 2
"""The pipeline is loaded whole if this many times its weights are free: the rest is for activations."""


@dataclass(frozen=True)
class Loaded:
    """A pipeline that can draw."""

    pipe: Any
    turns: Turns | None
    """Whose turn it is to be in memory; None if all parts are."""


@contextlib.contextmanager
def vendors(folder: Path, doing: str = "be loaded") -> Iterator[None]:
    """Let diffusers and transformers work on a folder without their advice and their deprecations.

    Raises:
        InputError: they fail, see `readable`.
    """
    with readable(folder, doing), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def pipeline_class(reference: Reference) -> Any:
    """Return the class of a reference's pipeline in the installed diffusers.

    Raises:
        InputError: diffusers has no such pipeline, or it takes more than a prompt.
    """
    import diffusers

    where, name = f"{reference.folder / INDEX}: _class_name", reference.pipeline
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise InputError(f"{where}: found {shown(name)}, which is no pipeline of diffusers {diffusers.__version__}")
    taken = takes(kind)
    free = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [n for n, p in taken.items() if p.default is p.empty and p.kind not in free and n != "prompt"]
    if lacking := {"prompt", "generator", "num_inference_steps", "height", "width"} - taken.keys():
        raise InputError(f"{where}: {name} takes no {sorted(lacking)[0]}, expected a text-to-image pipeline")
    if more := needed or [n for n in taken if _is_input(n)]:
        raise InputError(f"{where}: {name} takes {more[0]}, expected a pipeline that takes a prompt and nothing else")
    return kind


def takes(kind: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call by name."""
    return {name: p for name, p in inspect.signature(kind.__call__).parameters.items() if name != "self"}


def _is_input(parameter: str) -> bool:
    """Return whether a parameter of a pipeline's call is a picture, a video or a sound, or the length of one."""
    counts = parameter == "num_images_per_prompt"
    return not counts and "ip_adapter" not in parameter and bool(_INPUTS & set(parameter.split("_")))


def dtype_of(reference: Reference, compute: Compute) -> torch.dtype:
    """Return the dtype that the whole pipeline computes in: parts of different dtypes do not fit all pipelines."""
    denoiser = reference.parts[reference.denoiser]
    return compute.dtype(_STORED[denoiser.stored], denoiser.numbers, fits_half=False)  # who knows what exceeds it


def is_short(reference: Reference, compute: Compute) -> bool:
    """Return whether parts have to take turns: a limit was given, or all together leave little room for activations."""
    return compute.memory is not None or _ROOM * sum(_bytes(reference, compute).values()) > compute.left()


def check_room(reference: Reference, compute: Compute) -> None:
    """Refuse memory that is too little for the largest part.

    Raises:
        InputError: says which part it is.
    """
    sizes = _bytes(reference, compute)
    name = max(sizes, key=lambda part: sizes[part])
    if sizes[name] > compute.left():
        dtype = name_of(dtype_of(reference, compute))
        raise InputError(
            f"{reference.folder / name}: {sizes[name] / 1e9:.1f} GB in {dtype}, but {compute.left() / 1e9:.1f} GB are "
            "left; a reference's part is read whole: give more --memory, or free some"
        )


def load(reference: Reference, compute: Compute) -> Loaded:
    """Load a reference's pipeline on its device.

    Raises:
        InputError: its class takes more than a prompt, a file cannot be loaded or lacks a tensor, or memory is too
            little for the largest part.
    """
    kind = pipeline_class(reference)
    check_room(reference, compute)
    if not is_short(reference, compute):
        parts = {name: load_part(reference, name, compute) for name in reference.parts}
        return Loaded(_assemble(kind, reference, compute, parts).to(compute.device), None)
    if kind.model_cpu_offload_seq is None:  # how diffusers says that the parts run one after the other
        whole = sum(_bytes(reference, compute).values())
        warnings.warn(
            f"{reference.folder}: {reference.pipeline} has no parts that take turns, so all are in memory: "
            f"{whole / 1e9:.1f} GB",
            stacklevel=2,
        )
        parts = {name: load_part(reference, name, compute) for name in reference.parts}
        return Loaded(_assemble(kind, reference, compute, parts).to(compute.device), None)
    if compute.device.type not in ("cpu", "mps"):  # diffusers' own way, from the host's memory
        pipe = _assemble(
            kind, reference, compute, {name: load_part(reference, name, compute) for name in reference.parts}
        )
        pipe.enable_model_cpu_offload(device=compute.device)
        return Loaded(pipe, None)
    turns = Turns(compute, lambda name: load_part(reference, name, compute).to(compute.device))
    # In the opposite order, so that the text encoder, which runs first, is the one that stays.
    order = sorted(reference.parts, key=lambda name: name.startswith("text_encoder"))
    pipe = _assemble(kind, reference, compute, {name: turns.first(name) for name in order})
    turns.begin(pipe, reference.denoiser)
    return Loaded(pipe, turns)


def load_part(reference: Reference, name: str, compute: Compute) -> Any:
    """Load one network by its own class.

    Raises:
        InputError: a file cannot be loaded or lacks a tensor, which the class would fill with random numbers.
    """
    import diffusers
    import transformers

    library, kind = reference.index[name]
    folder, dtype = reference.folder / name, dtype_of(reference, compute)
    found = weights_of(folder, reference.variant)
    with vendors(folder):
        network = getattr(diffusers if library == "diffusers" else transformers, kind)
        model, info = network.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True,
            variant=found.variant if found else None, **dtype_option(dtype),
        )  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{folder}: {shown(missing[0])}: found no such tensor; download or make the files again")
    return model.eval()


def _assemble(kind: Any, reference: Reference, compute: Compute, parts: dict[str, Any]) -> Any:
    """Return the pipeline around loaded networks; the rest is small."""
    with vendors(reference.folder):
        dtype = dtype_option(dtype_of(reference, compute))
        pipe = kind.from_pretrained(reference.folder, use_safetensors=True, local_files_only=True, **parts, **dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _bytes(reference: Reference, compute: Compute) -> dict[str, int]:
    """Return the bytes of each network in the dtype that it computes in."""
    size = dtype_of(reference, compute).itemsize
    return {name: size * part.numbers for name, part in reference.parts.items()}
