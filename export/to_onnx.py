"""An artefact, or any SD3 diffusers folder, becomes an optimum-style folder of ONNX models.

    export(Path("compressed"), Path("onnx"))

Each network is traced, written, checked by onnx.checker and compared with torch (parity.py) before the next is loaded.
All happens in `OUT.partial`, renamed at the end; whatever goes wrong, no half-made folder stays and a previous export
is untouched. What it leaves out: T5, FLUX, the VAE's encoder, and transformers larger than memory.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from transformers import AutoTokenizer, CLIPTextModelWithProjection

from edgeprune.checkpoint import MANIFEST, load_transformer, no_bars
from edgeprune.errors import EdgepruneError, InputError, ParityError
from edgeprune.export import graph, parity
from edgeprune.files import read_json, sha256_file, write_json
from edgeprune.generation import Generation

FILE = "edgeprune_export.json"
SCHEMA_VERSION = 1
TARGET = "onnx"

Progress = Callable[[str], None]
"""Called with one line of text as each part begins."""


def _silent(_: str) -> None:
    """No progress."""


def export(artefact: Path, out: Path, *, progress: Progress = _silent) -> dict[str, Any]:
    """Write the folder `out`; with `artefact/transformer_int4` its integers are kept, else weights are float32.

    Returns the content of edgeprune_export.json.

    Raises:
        InputError: `artefact` is not an SD3 folder or is damaged, or `out` holds something that is not an export.
        ParityError: a model does not compute what its checkpoint computes.
        EdgepruneError: the disk is full, or `out` cannot be written.
    """
    index = _index(artefact)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: found a file, expected a folder or nothing")
    if out.exists() and any(out.iterdir()) and not (out / FILE).is_file():
        raise InputError(f"{out}: found a folder without {FILE}, expected an empty or new folder, or a previous export")
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir(parents=True)
        errors = _networks(artefact, partial, index, progress)
        _small_files(artefact, partial, index)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        record = {
            "schema_version": SCHEMA_VERSION,
            "target": TARGET,
            "opset": graph.OPSET,
            "quantized": _quantized(artefact),
            "source": read_json(artefact / MANIFEST)["source"]
            if (artefact / MANIFEST).is_file()
            else str(artefact.resolve()),
            "parity": errors,
            "files": {path.relative_to(partial).as_posix(): sha256_file(path) for path in files},
        }
        write_json(partial / FILE, record)
        _put(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise EdgepruneError(f"{out}: cannot be written: {error}") from error
        raise
    return record


def _put(partial: Path, out: Path) -> None:
    """Rename over a previous export, which comes back if that fails."""
    old = out.with_name(out.name + ".old")
    if not out.exists():
        partial.rename(out)
        return
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _quantized(artefact: Path) -> bool:
    return (artefact / "transformer_int4").is_dir()


def _index(artefact: Path) -> dict[str, Any]:
    """model_index.json, if this is a pipeline that can be exported."""
    path = artefact / "model_index.json"
    if not artefact.is_dir():
        raise InputError(f"{artefact}: no such folder")
    index = read_json(path)
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise InputError(
            f"{path}: _class_name: found {index.get('_class_name')!r}, expected 'StableDiffusion3Pipeline'"
        )
    if _present(index, "text_encoder_3"):
        raise InputError(
            f"{path}: text_encoder_3: found {index['text_encoder_3']}, expected null: T5 cannot be exported yet; "
            "save the pipeline without it (text_encoder_3=None, tokenizer_3=None)"
        )
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        if not _present(index, name):
            raise InputError(f"{path}: {name}: found {index.get(name)!r}, expected a library and a class")
        if not (artefact / name).is_dir():
            raise InputError(f"{artefact / name}: no such folder, though {path.name} lists it")
    return index


def _present(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry) and entry[0] is not None


def _from_pretrained(load: Callable[..., Any], folder: Path) -> Any:
    """A vendor's loader, its many exceptions mapped to one that names the folder."""
    try:
        with no_bars():
            return load(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded: {' '.join(str(error).split())}") from error


# ------------------------------------------------------------------------------------- the networks


def _networks(artefact: Path, partial: Path, index: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Write and compare one model after the other; their parity by folder name."""
    errors = {}
    quantized = _quantized(artefact)
    source = artefact / ("transformer_int4" if quantized else "transformer")
    transformer = graph.Transformer(load_transformer(artefact, quantized=quantized, dtype=torch.float32))
    limit = int(transformer.model.config.pos_embed_max_size)
    tokens = read_json(artefact / "tokenizer" / "tokenizer_config.json").get("model_max_length", 77)
    tokens = tokens if isinstance(tokens, int) and 2 < tokens < 100_000 else 77
    # Sizes are patches. An odd number of them takes another path through the crop of the position table.
    sizes = [(1, 8, 8, tokens), (3, 5, 7, 3), (2, 12, 9, 2 * tokens)]
    examples = [
        transformer.example(batch=b, height=min(h, limit), width=min(w, limit), tokens=m, seed=i)
        for i, (b, h, w, m) in enumerate(sizes)
    ]
    traced = transformer.example(batch=2, height=min(4, limit), width=min(6, limit), tokens=5)
    progress("transformer")
    errors["transformer"] = _network("transformer", transformer, traced, examples, partial)
    write_json(partial / "transformer" / "config.json", read_json(source / "config.json"))
    del transformer

    for name in ("text_encoder", "text_encoder_2"):
        encoder = graph.TextEncoder(_from_pretrained(CLIPTextModelWithProjection.from_pretrained, artefact / name))
        longest = encoder.config.max_position_embeddings
        examples = [encoder.example(batch=b, tokens=m) for b, m in ((1, longest), (3, max(2, longest // 2 - 1)))]
        progress(name)
        traced = encoder.example(batch=2, tokens=min(7, longest))
        errors[name] = _network(name, encoder, traced, examples, partial)
        write_json(partial / name / "config.json", read_json(artefact / name / "config.json"))
        del encoder

    vae = graph.VaeDecoder(_from_pretrained(AutoencoderKL.from_pretrained, artefact / "vae"))
    examples = [vae.example(batch=b, height=h, width=w) for b, h, w in ((1, 8, 8), (3, 5, 7))]
    progress("vae_decoder")
    errors["vae_decoder"] = _network("vae_decoder", vae, vae.example(batch=2, height=4, width=6), examples, partial)
    # The class's defaults too, as a runtime reads no Python.
    factors = {key: vae.config[key] for key in ("scaling_factor", "shift_factor")}
    write_json(partial / "vae_decoder" / "config.json", read_json(artefact / "vae" / "config.json") | factors)

    generation = Generation.load(artefact)
    if not (artefact / "generation.json").exists():
        config = read_json(source / "config.json")
        side = int(config["sample_size"]) * 2 ** (len(vae.config.block_out_channels) - 1)
        generation = dataclasses.replace(generation, height=side, width=side)
    generation.save(partial)
    return errors


def _network(
    name: str,
    module: graph.Transformer | graph.TextEncoder | graph.VaeDecoder,
    traced: Mapping[str, torch.Tensor],
    examples: Sequence[Mapping[str, torch.Tensor]],
    partial: Path,
) -> dict[str, Any]:
    """Trace, write, check and compare one network."""
    module.eval().to(torch.float32)
    path = partial / name / "model.onnx"
    path.parent.mkdir()
    graph.save(graph.to_ir(module, traced, module.inputs, module.outputs), path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParityError(f"{name}: not valid ONNX: {error}") from error
    return parity.check(name, parity.session(path), module, examples, list(module.outputs))


# ------------------------------------------------------------------------------------- the other files


def _small_files(artefact: Path, partial: Path, index: Mapping[str, Any]) -> None:
    """Index, scheduler and tokenizers."""
    kept = {key: value for key, value in index.items() if key != "_name_or_path"}
    write_json(partial / "model_index.json", kept)
    shutil.copytree(artefact / "scheduler", partial / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        _tokenizer(artefact / name, partial / name)


def _tokenizer(source: Path, target: Path) -> None:
    """Copy a CLIP tokenizer; complete it for both worlds.

    The `tokenizers` package alone reads tokenizer.json, which hub folders of SD3 lack; optimum with transformers 4
    reads vocab.json and merges.txt, which transformers 5 no longer writes.
    """
    shutil.copytree(source, target)
    if not (target / "tokenizer.json").exists():
        _from_pretrained(AutoTokenizer.from_pretrained, source).save_pretrained(target)
    model = read_json(target / "tokenizer.json").get("model", {})
    if not (target / "vocab.json").exists() and model.get("type") == "BPE":
        pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (target / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (target / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), encoding="utf-8")
