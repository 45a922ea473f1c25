"""Exports an artefact to a folder of Core ML packages (mlprogram for iOS 18 and macOS 15), with INT4 weights kept.

    export(Path("compressed"), Path("coreml"), device=load("macbook-m"))

Weights are the checkpoint's integers with half-precision scales (mil_conversion.py). Everything else is stored and
computed in half precision, except the timestep's angles, which half precision cannot hold. An export has one image
size; its transformer takes the device's batch sizes. A device's `chunks` splits the transformer between blocks
(coreml_chunks.py); a large transformer, and a large T5 or Qwen3 between its layers (coreml_text.py), are split in any
case. Each network is compared with torch before the next one is loaded (coreml_packages.py).
A T5 or Qwen3 keeps its integers (precision.py) and half-precision tables but computes in float32, because T5-XXL's
values exceed half precision, and Qwen3's were never tried in it; so does a transformer that overflows. The VAE's
encoder is not exported, and packages are not compiled (.mlmodelc): the device does that.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.manifest import HALF, INT4
from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.progress import Progress, silent
from edgeprune.export import coreml_text, loaders, modules, text
from edgeprune.export.coreml_chunks import TrimmedTextEncoder, loaded, split
from edgeprune.export.coreml_packages import convert_network
from edgeprune.export.folder import is_quantized, write
from edgeprune.export.sizes import factor_of, generation_for
from edgeprune.export.unfinished import Unfinished
from edgeprune.families.encoders import CLIP, LONG, text_encoders
from edgeprune.sampling.generation import longest_prompt
from edgeprune.targets import Target

with needs("coreml"):
    import coremltools as ct

CHUNK_BYTES = 400e6
"""Weights in one package. Converting one of SD3.5 Large's nine such chunks takes up to 3.3 GB of memory."""
_LEAST = {"macOS": 15, "iOS": 18, "iPadOS": 18}


def export(artefact: Path, out: Path, *, device: Target, progress: Progress = silent) -> dict[str, Any]:
    """Write the folder `out` for a device.

    If the artefact has `transformer_int4`, its integers are kept; otherwise weights are float16.

    Returns:
        The content of edgeprune_export.json.

    Raises:
        InputError: `artefact` is not a pipeline of a family or is damaged, the device cannot run it, or `out` holds
            something other than an export.
        ParityError: a package does not compute what its checkpoint computes, or overflows in half precision.
        EdgepruneError: coremltools cannot convert a network.
        DiskError: the disk is full, or `out` cannot be written; the next call resumes.
    """
    options = {"device": dataclasses.asdict(device), "coremltools": ct.__version__}
    return write(artefact, out, "coreml", options, lambda work: networks(artefact, work, device, progress))


def refuse(device: Target) -> None:
    """Refuse a system that is too old. accepts.py checks the weights, for every format.

    Raises:
        InputError: the device's system is older than macOS 15, iOS 18 or iPadOS 18, or another one.
    """
    system = re.fullmatch(r"(\w+) (\d+)(?:\.\d+)*", device.requires)
    if system is None or int(system[2]) < _LEAST.get(system[1], sys.maxsize):
        raise InputError(
            f"{device.name}.toml: requires: found {device.requires!r}, expected macOS 15, iOS 18, iPadOS 18 or newer: "
            "older systems lack 4-bit weights in blocks and fused attention"
        )


def networks(artefact: Path, work: Unfinished, device: Target, progress: Progress) -> dict[str, Any]:
    """Write and compare one network after the other; return further content of edgeprune_export.json.

    Raises: as `export`.
    """
    refuse(device)
    generation = generation_for(artefact, device)
    generation.save(work.folder)
    tokens = longest_prompt(artefact)
    factor = factor_of(artefact)
    height, width = generation.height // factor, generation.width // factor

    if not work.has(name := "transformer"):
        progress(name)
        # Packages are tried in half precision; values of real text overflow first. The encoders go before the
        # transformer comes.
        prompts = text.encoded(artefact, progress)
        stored = open_transformer(artefact, quantized=is_quantized(artefact))
        whole = modules.Transformer(stored.running())
        patch = whole.family.latents(whole.model.config).patch
        count = whole.family.text_tokens(tokens, generation.max_sequence_length)
        sizes = {"height": height // patch, "width": width // patch, "tokens": count}
        batches = range(device.batch[0], device.batch[1] + 1)
        examples = [whole.example(batch=b, **sizes, seed=b, text=prompts) for b in batches]
        count = max(device.chunks, math.ceil(_stored_bytes(artefact) / CHUNK_BYTES))
        chunks = split(modules.Transformer(stored.model), count, examples[0])
        count, filled, half = len(chunks), loaded(chunks, stored), not whole.family.overflows
        record = convert_network(
            name, filled, whole, examples, work.begin(name), chunks=count, half=half, progress=progress
        )
        work.finish(name, {"parity": record, "chunks": count})
        del whole, chunks, filled, stored

    for name, kind in text_encoders(artefact).items():
        if not work.has(name):
            progress(name)
            work.finish(name, _text_encoder(artefact, name, kind, work.begin(name), progress))

    if not work.has(name := "vae_decoder"):
        progress(name)
        vae, checkpoint = (loaders.vae_decoder(artefact, load) for load in (loaders.by_vendor, loaders.by_name))
        examples = [vae.example(batch=1, height=height, width=width)]
        record = convert_network(name, [vae], checkpoint, examples, work.begin(name), progress=progress)
        work.finish(name, {"parity": record})
    recorded = {key: work.recorded(key) for key in ("chunks", "parity")}
    return {"device": device.name, "batch": list(device.batch), **recorded}


def _text_encoder(artefact: Path, name: str, kind: str, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write and compare a text encoder; return what is recorded of it."""
    examples = [{key: value[:1] for key, value in text.tokens(artefact, name, kind).items()}]
    if kind in LONG:
        stored = loaders.stored_encoder(artefact, name, kind)
        chunks = coreml_text.split(stored, CHUNK_BYTES)
        count, filled, checkpoint = len(chunks), coreml_text.loaded(chunks, stored), stored.checkpoint()
        record = convert_network(
            name, filled, checkpoint, examples, folder, chunks=count, half=False, progress=progress
        )
        return {"parity": record, "chunks": count}
    both: list[Any] = [loaders.clip(artefact, name, kind, load) for load in (loaders.by_vendor, loaders.by_name)]
    if kind == CLIP:
        both = [TrimmedTextEncoder(encoder) for encoder in both]
    return {"parity": convert_network(name, both[:1], both[1], examples, folder, progress=progress)}


def _stored_bytes(artefact: Path) -> int:
    """Return the bytes of the transformer's weight files that the export reads."""
    weights = artefact / (INT4 if is_quantized(artefact) else HALF)
    return sum(path.stat().st_size for path in weights.glob("*.safetensors"))
