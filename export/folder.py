"""The folder around exported networks: index, scheduler, tokenizers, generation defaults, manifest; written atomically.

    write(artefact, out, "onnx", lambda partial: {...})

All happens in `OUT.partial`, renamed at the end; whatever goes wrong, no half-made folder stays and a previous export
is untouched. What it leaves out: the networks, which each format's to_*.py writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from transformers import AutoTokenizer

from edgeprune.checkpoint import MANIFEST, complete_tokenizer, quiet, read_config
from edgeprune.encoders import EXPORTED, check_tokens, is_present, text_encoders, tokenizer_of
from edgeprune.errors import InputError
from edgeprune.files import cannot_write, copy_folder, read_json, replace_folder, sha256_file, write_json
from edgeprune.generation import FILE as GENERATION
from edgeprune.generation import Generation
from edgeprune.plan import stock_config

FILE = "edgeprune_export.json"
SCHEMA_VERSION = 1

Networks = Callable[[Path], dict[str, Any]]
"""Writes the networks into a folder, and generation.json if its sizes are not the artefact's; returns what else
edgeprune_export.json shall say."""


class Progress(Protocol):
    """Told what begins, or with a total how far it is; the same text for the same part."""

    def __call__(self, what: str, done: int = 0, total: int = 0, /) -> None:
        """`done` of `total` steps; a line of text alone where there are none."""


def silent(what: str, done: int = 0, total: int = 0, /) -> None:
    """No progress."""


def write(artefact: Path, out: Path, target: str, networks: Networks) -> dict[str, Any]:
    """Make the export folder `out` of format `target`; returns the content of edgeprune_export.json.

    Raises:
        InputError: `artefact` is not a pipeline of a family or is damaged, or `out` holds something that is no export.
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
        said = networks(partial)
        _small_files(artefact, partial, index)
        _configs(artefact, partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        record = {
            "schema_version": SCHEMA_VERSION,
            "target": target,
            "quantized": is_quantized(artefact),
            "source": read_json(artefact / MANIFEST)["source"]
            if (artefact / MANIFEST).is_file()
            else str(artefact.resolve()),
            **said,
            "files": {path.relative_to(partial).as_posix(): sha256_file(path) for path in files},
        }
        write_json(partial / FILE, record)
        replace_folder(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise cannot_write(out, error) from error
        raise
    return record


def is_quantized(artefact: Path) -> bool:
    """Whether the artefact holds INT4 weights."""
    return (artefact / "transformer_int4").is_dir()


def _index(artefact: Path) -> dict[str, Any]:
    """model_index.json, if this is a pipeline that can be exported."""
    path = artefact / "model_index.json"
    if not artefact.is_dir():
        raise InputError(f"{artefact}: no such folder")
    index = read_json(path)
    _, family = read_config(artefact)
    if index.get("_class_name") != family.pipeline:
        raise InputError(f"{path}: _class_name: found {index.get('_class_name')!r}, expected {family.pipeline!r}")
    wanted = {e.name: e.kind for e in family.encoders if not e.optional or is_present(index, e.name)}
    if foreign := [(name, kind) for name, kind in wanted.items() if kind not in EXPORTED]:
        raise InputError(f"{path}: {foreign[0][0]}: found {foreign[0][1]}, which cannot be exported yet")
    for name in ("transformer", "vae", *wanted, *map(tokenizer_of, wanted), "scheduler"):
        if not is_present(index, name):
            raise InputError(f"{path}: {name}: found {index.get(name)!r}, expected a library and a class")
        if index[name][-1] != wanted.get(name, index[name][-1]):
            raise InputError(f"{path}: {name}: found {index[name][-1]!r}, expected {wanted[name]!r}")
    for name in ("transformer", "vae", *wanted, *map(tokenizer_of, wanted), "scheduler"):
        if not (artefact / name).is_dir():
            raise InputError(f"{artefact / name}: no such folder, though {path.name} lists it")
    check_tokens(artefact, Generation.load(artefact).max_sequence_length)
    return index


def from_pretrained(load: Callable[..., Any], folder: Path) -> Any:
    """A vendor's loader, its many exceptions mapped to one that names the folder.

    Raises:
        InputError: the folder cannot be loaded.
    """
    try:
        with quiet():
            return load(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded: {' '.join(str(error).split())}") from error


def _configs(artefact: Path, partial: Path) -> None:
    """Each network's config.json, and generation.json."""
    config = read_json(artefact / ("transformer_int4" if is_quantized(artefact) else "transformer") / "config.json")
    # The network is whole in its file, and optimum reads the config.
    write_json(partial / "transformer" / "config.json", stock_config(config))
    for name in text_encoders(artefact):
        write_json(partial / name / "config.json", read_json(artefact / name / "config.json"))
    vae = read_json(artefact / "vae" / "config.json")
    # AutoencoderKL's own default; a runtime reads no Python.
    write_json(partial / "vae_decoder" / "config.json", {"scaling_factor": 0.18215, "shift_factor": None} | vae)
    if not (partial / GENERATION).exists():  # a format of fixed sizes says its own
        Generation.load(artefact).save(partial)


def _small_files(artefact: Path, partial: Path, index: Mapping[str, Any]) -> None:
    """Index, scheduler and tokenizers."""
    kept = {key: value for key, value in index.items() if key != "_name_or_path"}
    write_json(partial / "model_index.json", kept)
    copy_folder(artefact / "scheduler", partial / "scheduler")
    for encoder in text_encoders(artefact):
        _tokenizer(artefact / tokenizer_of(encoder), partial / tokenizer_of(encoder))


def _tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer; complete it for the `tokenizers` package alone, and for optimum with transformers 4.

    The first reads tokenizer.json, which CLIP's in hub folders of SD3 lack.
    """
    copy_folder(source, target)
    if not (target / "tokenizer.json").exists():
        from_pretrained(AutoTokenizer.from_pretrained, source).save_pretrained(target)
    complete_tokenizer(target)
