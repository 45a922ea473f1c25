"""Writes the folder around exported networks: index, scheduler, tokenizers, generation defaults and manifest.

    write(artefact, out, "onnx", {}, lambda work: {...})

Everything is written to `OUT.partial`, which is renamed at the end, so a failure leaves a previous export untouched.
After a kill or with a full disk, the next run with the same inputs resumes in `OUT.partial` (unfinished.py). If a
network is wrong, `OUT.partial` is removed. Each format's to_*.py writes the networks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer

from edgeprune.artefact import card, licensing
from edgeprune.artefact.checks import part_weights
from edgeprune.artefact.loading import quiet
from edgeprune.artefact.manifest import EXPORT, MANIFEST, Manifest, packed_encoders
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.text import form_of
from edgeprune.artefact.writing import complete_tokenizer, copy_part
from edgeprune.common.errors import DiskError, EdgepruneError, InputError
from edgeprune.common.files import (
    cannot_write,
    digest,
    is_out_of_memory,
    read_json,
    replace_folder,
    sha256_file,
    write_json,
    write_text,
)
from edgeprune.common.lock import hold
from edgeprune.common.version import VERSION
from edgeprune.export import accepts
from edgeprune.export.unfinished import MARK, Unfinished, is_whole
from edgeprune.families.encoders import LONG, Chat, text_encoders, tokenizer_of
from edgeprune.families.parts import VAE_FLUX2, VAE_QWEN_IMAGE
from edgeprune.planning.remainder import stock_config
from edgeprune.quantization.precision import TEXT_HALF, TEXT_INT4, TEXT_INT4_WO8, TEXT_INT8
from edgeprune.residency.model_files import weights_of
from edgeprune.runtimes import SCHEMA_APART, SCHEMA_VERSION
from edgeprune.runtimes.modulation import WIDTH
from edgeprune.runtimes.text import CHAT
from edgeprune.sampling.generation import FILE as GENERATION
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.latents import MEAN, STD, check_variance

FILE = EXPORT
_TOOLS = ("diffusers", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")
"""Packages whose version may change a graph; a format adds its own."""

_FORMS = {
    TEXT_INT4: "INT4",
    TEXT_INT4_WO8: "INT4, the last layer of each feed-forward part in 8 bits",
    TEXT_INT8: "8 bits",
    TEXT_HALF: "half precision",
}
"""What a card says of a T5 or a Qwen3."""

Networks = Callable[[Unfinished], dict[str, Any]]
"""Writes the networks that are not finished yet, and generation.json if its sizes differ from the artefact's; returns
further content of edgeprune_export.json."""


def write(
    artefact: Path,
    out: Path,
    target: str,
    options: Mapping[str, Any],
    networks: Networks,
    more_files: Callable[[Path], dict[str, Any]] = lambda folder: {},
    measure: Callable[[Path], dict[str, Any]] = lambda folder: {},
) -> dict[str, Any]:
    """Write the export folder `out` in the format `target`.

    Args:
        artefact: the artefact's folder, or a diffusers folder.
        out: the folder to write.
        target: the format.
        options: everything else that the files depend on: the device, the versions of the format's tools.
        networks: writes the networks.
        more_files: adds the format's own small files to the otherwise complete folder, in seconds; an interrupted run
            writes them again. Returns further content of edgeprune_export.json.
        measure: runs the complete folder, and returns further content of edgeprune_export.json; an interrupted run
            measures again.

    Returns:
        The content of edgeprune_export.json.

    Raises:
        InputError: `artefact` is not a pipeline of a family or is damaged, or `out` holds something other than an
            export, or the export of another artefact.
        LockedError: another process is writing this export.
        DiskError: the disk is full, or `out` cannot be written; finished networks are kept.
    """
    index = accepts.pipeline(artefact)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: found a file, expected a folder or nothing")
    if out.exists() and any(out.iterdir()) and not (out / FILE).is_file():
        raise InputError(f"{out}: found a folder without {FILE}, expected a new or empty folder or a previous export")
    place = out.resolve()  # "." has no name to extend
    origin = _origin(artefact, place)
    if out.exists() and (found := _origin_of(out)) not in (None, origin):
        raise InputError(f"{out}: found the export of {found}, expected one of {origin}; give another -o, or remove it")
    above = next(parent for parent in place.parents if parent.exists())
    if os.path.ismount(place) or not os.access(above, os.W_OK | os.X_OK):
        what = "is a mount" if os.path.ismount(place) else f"{above} is not writable"
        raise InputError(f"{out}: {what}, and an export is replaced as a whole; use a folder within: -o {out}/export")
    partial = place.with_name(place.name + ".partial")
    # The lock is outside the folder, which is replaced.
    with hold(place.with_name(f".{place.name}.lock"), out):
        try:
            inputs = _inputs(artefact, target, options)
            if is_whole(out, inputs):  # a run was killed just before this
                (out / MARK).unlink()
                shutil.rmtree(place.with_name(place.name + ".old"), ignore_errors=True)
                return read_json(out / FILE)
            work = Unfinished(partial, inputs)
            more = networks(work)
            _small_files(artefact, partial, index)
            _configs(artefact, partial)
            _card(artefact, partial, target)
            more |= more_files(partial)
            (partial / FILE).unlink(missing_ok=True)  # from a run that was killed just before the end
            files = {p.relative_to(partial).as_posix(): p for p in sorted(partial.rglob("*")) if p.is_file()}
            del files[MARK]
            manifest = read_json(artefact / MANIFEST) if (artefact / MANIFEST).is_file() else {}
            quantized = is_quantized(artefact)
            made_from: dict[str, Any] = {key: manifest[key] for key in ("commit", "variant") if key in manifest}
            if own := Manifest.load(artefact).identity if manifest else None:
                made_from["identity"] = own
            record = {
                "schema_version": SCHEMA_APART if WIDTH in more else SCHEMA_VERSION,
                "target": target,
                "quantized": quantized,
                "group_size": (manifest.get("group_size") or 64) if quantized else None,
                "source": manifest.get("source", str(artefact.resolve())),
                "encoders": _forms(artefact),
                "compressed": bool(manifest),
                "artefact": origin,
                **made_from,
                **more,
                "files": {name: work.hashes.get(name) or sha256_file(path) for name, path in files.items()},
            }
            write_json(partial / FILE, record)
            record |= measure(partial)
            write_json(partial / FILE, record)
            replace_folder(partial, out)
            (out / MARK).unlink()
        except OSError as error:
            raise cannot_write(out, error) from error
        except EdgepruneError as error:
            if not isinstance(error, DiskError):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return record


def _origin(artefact: Path, place: Path) -> str:
    """Return where an artefact is, as seen from the folder that holds its export; they may be moved together."""
    try:
        return Path(os.path.relpath(artefact.resolve(), place.parent)).as_posix()
    except ValueError:  # another drive of Windows
        return artefact.resolve().as_posix()


def _origin_of(out: Path) -> str | None:
    """Return where the artefact was that a previous export was made from; None without one, or of a damaged one."""
    with contextlib.suppress(InputError):
        found: str | None = read_json(out / FILE).get("artefact")
        return found
    return None


def _inputs(artefact: Path, target: str, options: Mapping[str, Any]) -> str:
    """Return a digest of everything that an export depends on. Files count by size and time: reading takes minutes."""
    encoders, licenses = text_encoders(artefact), licensing.files(artefact)
    networks = ("transformer", "transformer_int4", "vae", *encoders, *packed_encoders(artefact))
    parts = (*networks, "scheduler", *map(tokenizer_of, encoders))
    paths = [p for part in parts for p in sorted((artefact / part).rglob("*")) if p.is_file()]
    manifest = read_json(artefact / MANIFEST) if (artefact / MANIFEST).is_file() else {}
    return digest(
        {
            "edgeprune": [VERSION, SCHEMA_VERSION],
            "target": target,
            "options": dict(options),
            "tools": {name: metadata.version(name) for name in _TOOLS},
            "index": read_json(artefact / "model_index.json"),
            "generation": Generation.load(artefact).to_json(),
            "manifest": {key: value for key, value in manifest.items() if key not in ("stages", "tools")},
            "files": {str(p.relative_to(artefact)): [p.stat().st_size, p.stat().st_mtime_ns] for p in paths},
            "license": [licensing.read(artefact), {name: sha256_file(path) for name, path in licenses.items()}],
        }
    )


def _forms(artefact: Path) -> dict[str, str]:
    """Return the form of each T5 and Qwen3 by name."""
    return {name: form_of(artefact / name) for name, kind in text_encoders(artefact).items() if kind in LONG}


def is_quantized(artefact: Path) -> bool:
    """Return whether the artefact holds INT4 weights."""
    return (artefact / "transformer_int4").is_dir()


def from_pretrained(load: Callable[..., Any], folder: Path, *, tokenizer: bool = False) -> Any:
    """Call a vendor's loader without pickle or remote code, and map its exceptions to one that names the folder.

    Raises:
        InputError: the folder cannot be loaded.
    """
    safe: dict[str, Any] = {"trust_remote_code": False} if tokenizer else {"use_safetensors": True}
    if found := None if tokenizer else weights_of(folder):
        safe["variant"] = found.variant
    try:
        with quiet():
            return load(folder, local_files_only=True, **safe)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{folder}: cannot be loaded: {' '.join(str(error).split())}") from error


def _configs(artefact: Path, partial: Path) -> None:
    """Write each network's config.json, and generation.json."""
    config = read_json(artefact / ("transformer_int4" if is_quantized(artefact) else "transformer") / "config.json")
    # The exported network needs no pruning plan, and optimum reads this config.
    write_json(partial / "transformer" / "config.json", stock_config(config))
    for name in text_encoders(artefact):
        write_json(partial / name / "config.json", read_json(artefact / name / "config.json"))
    write_json(partial / "vae_decoder" / "config.json", _vae_config(artefact / "vae"))
    if not (partial / GENERATION).exists():  # a format with fixed sizes has written its own
        Generation.load(artefact).save(partial)


def _vae_config(folder: Path) -> dict[str, Any]:
    """Return a VAE's config with what a runtime needs to scale latents: it imports no diffusers, and reads no weights.

    Raises:
        InputError: a tensor cannot be read, or a variance is below 0.
    """
    config = read_json(folder / "config.json")
    if config.get("_class_name") == VAE_QWEN_IMAGE:
        return config  # has them
    if config.get("_class_name") != VAE_FLUX2:
        return {"scaling_factor": 0.18215, "shift_factor": None} | config  # AutoencoderKL's defaults
    weights = part_weights(folder, VAE_FLUX2)
    assert weights is not None  # its class has a table
    mean, variance = (weights[f"bn.running_{name}"].float() for name in ("mean", "var"))
    check_variance(variance, folder)
    return config | {MEAN: mean.tolist(), STD: (variance + config.get("batch_norm_eps", 1e-4)).sqrt().tolist()}


def _small_files(artefact: Path, partial: Path, index: Mapping[str, Any]) -> None:
    """Write the index, the scheduler, the tokenizers and the license files."""
    kept = {key: value for key, value in index.items() if key != "_name_or_path"}
    write_json(partial / "model_index.json", kept)
    licensing.copy(artefact, partial)
    _copy(artefact / "scheduler", partial / "scheduler")
    _, family = read_config(artefact)
    present = text_encoders(artefact)
    for encoder in (each for each in family.encoders if each.name in present):
        name = tokenizer_of(encoder.name)
        _tokenizer(artefact / name, partial / name, encoder.chat)


def _card(artefact: Path, partial: Path, target: str) -> None:
    """Write README.md: the license, what was changed, and how the folder is used."""
    fields = licensing.read(artefact)
    front = {"pipeline_tag": "text-to-image", "tags": ["edgeprune", target], **card.license_fields(fields)}
    changed = [f"Converted to {target} by edgeprune {VERSION}."]
    changed += [f"Weights of {name} in {_FORMS[form]}." for name, form in _forms(artefact).items()]
    if (artefact / MANIFEST).is_file():
        manifest = Manifest.load(artefact)
        changed = card.changes(manifest, manifest.prune_plan(artefact)) + changed
    lines = "\n".join(f"- {line}" for line in changed)
    text = f"""{card.front_matter(front)}
{card.MARK} `edgeprune export` writes this file again. -->

# Exported by edgeprune: {target}

Run it with `edgeprune generate PROMPT --model FOLDER`.

## What was changed

{lines}

## License

{card.license_text(fields, licensing.files(partial))}
"""
    write_text(partial / "README.md", text)


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)  # from a run that was killed
    copy_part(source, target)


def _tokenizer(source: Path, target: Path, chat: Chat | None) -> None:
    """Copy a tokenizer and complete it, so that the `tokenizers` package and optimum with transformers 4 can read it.

    `tokenizers` needs tokenizer.json, which CLIP's folders in SD3 repositories of the hub lack.

    Args:
        source: its folder.
        target: the folder to write.
        chat: of a language model: it is written, too, and tokenizer.json as transformers reads it, which builds Qwen's
            tokenizer from the vocabulary alone.

    Raises:
        InputError: the folder cannot be loaded.
    """
    _copy(source, target)
    if chat:
        tokenizer = from_pretrained(AutoTokenizer.from_pretrained, source, tokenizer=True)
        tokenizer.save_pretrained(target)
        write_json(target / CHAT, {"prefix": chat.prefix, "suffix": chat.suffix})
    if not (target / "tokenizer.json").exists():
        from_pretrained(AutoTokenizer.from_pretrained, source, tokenizer=True).save_pretrained(target)
    complete_tokenizer(target)
