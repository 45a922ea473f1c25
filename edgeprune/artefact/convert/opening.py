"""What a path is: a file or folder that can be converted, or what else it is and what to do about it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from edgeprune.artefact.convert.gguf_file import MAGIC, Gguf
from edgeprune.artefact.convert.identity import LONG_PARTS, LORA, MODELS, Identity, identify, part_of, refused
from edgeprune.artefact.convert.safetensors import Safetensors
from edgeprune.artefact.convert.stored import FLOATS, Stored, kinds_of
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json
from edgeprune.families import family_of
from edgeprune.residency.model_files import INDEX, weights_of

SINGLE = (".safetensors", ".sft", ".gguf")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_WORDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOAT8 = {"F8_E4M3": "float8 (e4m3fn)", "F8_E5M2": "float8 (e5m2)"}
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"PK\x03\x04")
_TEXTS = (
    ("version https://git-lfs", "a pointer of Git LFS, not the file itself; run `git lfs pull`, or download the file"),
    ("<", "a web page, not a model; download the file itself, with `hf download` if it needs a login"),
    ("", "a text, not a model; download the file itself, with `hf download` if it needs a login"),
)
_HELP = {
    LORA: "for a compressed model: edgeprune lora {file} --model small -o {stem}-small.safetensors",
    "a ControlNet": "it works next to a model; give the model itself",
    "an image adapter": "it works next to a model; give the model itself",
    "FLUX.2": "single files of it are not read; give its diffusers folder or hub id",
    "tensors of an unknown model": "expected a transformer of SD3, SD3.5, FLUX.1 or Z-Image",
}
_FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_ONLY_PART = "it is one part of a model; give the file of the transformer, and the rest with --config"


@dataclass(frozen=True)
class Source:
    """A file or folder that can be converted."""

    path: Path
    stored: Stored
    identity: Identity
    config: Path | None = None
    """The transformer's own config.json, beside its weights."""

    @property
    def text(self) -> str:
        """What it is, in words: the model, its parts and its dtypes."""
        prefixes = self.identity.parts
        own = [n for n in self.stored.shapes if not part_of(n, prefixes)]
        kinds = kinds_of(self.stored, own)
        kind = _WORDS.get(kinds[0]) or _FLOAT8.get(kinds[0]) or f"GGUF ({kinds[0]})"
        rest = f" with {', '.join(sorted(prefixes))}" if prefixes else ""
        return f"a transformer of {self.identity.name}{rest}, in {kind}"

    @property
    def needs_gguf(self) -> bool:
        """Whether the package `gguf` is needed to read it."""
        return isinstance(self.stored, Gguf) and any(kind not in FLOATS for kind in self.stored.kinds.values())

    def lacking(self) -> str:
        """Return what it does not have and where to take it from, in a line."""
        family = family_of({"_class_name": self.identity.network})
        present = {_FOLDERS.get(part, part) for part in self.identity.parts}
        kinds = {LONG_PARTS[part] for part in self.identity.parts if part in LONG_PARTS}
        present |= {encoder.name for encoder in family.encoders if encoder.kind in kinds}
        parts = [name for name in (*(encoder.name for encoder in family.encoders), "vae") if name not in present]
        rest = f"configs and tokenizers, {', '.join(parts)}" if parts else "configs and tokenizers"
        guess = f" ({self.identity.guess})" if self.identity.guess else ""
        return (
            f"{self.path}: {self.text}{guess}; it does not have {rest}: take them from the model's own repository or "
            f"folder: {self.command()}"
        )

    def command(self, config: str = "") -> str:
        """Return the command that converts it."""
        out = self.path.resolve().stem if self.path.is_file() else f"{self.path.resolve().name}-diffusers"
        if not config and self.identity.model:
            config = self.identity.model.hub
        option = f"--config {shlex.quote(config)}" if config else "--config HUB-ID-OR-FOLDER"
        return f"edgeprune convert {shlex.quote(str(self.path))} -o {shlex.quote(out)} {option}"


def open_file(path: Path) -> Source:
    """Return what a single file holds.

    Raises:
        InputError: it is nothing that can be converted; the text says what it is and what to do.
    """
    start = _start(path)
    header = start[8:9] == b"{"  # of safetensors, after its length, whose bytes can be anything
    if path.suffix.lower() in PICKLES or (not header and start.startswith(_PICKLED)):
        raise InputError(f"{path}: a pickle, which can run code and is never read; get the model as .safetensors")
    if start.startswith(MAGIC):
        gguf = Gguf(path)
        return _source(path, gguf, f"{path.name} {gguf.fields.get('general.name', '')}")
    if path.suffix.lower() not in SINGLE:
        raise InputError(f"{path}: found a file, expected a folder, or for `edgeprune convert` a .safetensors or .gguf")
    if not start:
        raise InputError(f"{path}: an empty file; download it again")
    text = start.decode("latin-1").strip()
    if not header and text.isprintable() and text.isascii():
        raise InputError(f"{path}: {next(what for begin, what in _TEXTS if text.startswith(begin))}")
    if path.suffix.lower() == ".gguf":
        raise InputError(f"{path}: not a whole GGUF file (it does not begin with GGUF); download or make it again")
    stored = Safetensors([path])
    return _source(path, stored, f"{path.name} {_title(path)}")


def open_transformer(folder: Path) -> Source:
    """Return what a transformer's folder holds: config.json and weights in diffusers' layout.

    Raises:
        InputError: it is nothing that can be converted.
    """
    config = folder / "config.json"
    found = weights_of(folder)
    if not config.is_file() or found is None:
        single = single_files(folder)
        hint = f"; give a file of it, such as {single[0]}" if single else ""
        raise InputError(f"{folder}: found neither {INDEX} nor a transformer's config.json and weights{hint}")
    if (name := read_json(config).get("_class_name")) not in MODELS:
        raise InputError(f"{config}: _class_name: found {shown(name)}, expected {' or '.join(MODELS)}")
    stored = Safetensors([folder / file for file in found.files])
    return _source(folder, stored, folder.name, config)


def single_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may be whole models."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SINGLE)


def _source(path: Path, stored: Stored, hints: str, config: Path | None = None) -> Source:
    if not stored.shapes:
        raise InputError(f"{path}: found no tensors; download it again")
    identity = identify(stored.shapes, hints)
    if isinstance(identity, str):
        advice = _HELP.get(identity) or (
            _ONLY_PART
            if identity.startswith("a ") and "DiT" not in identity
            else "edgeprune compresses SD3, SD3.5, FLUX and Z-Image"
        )
        advice = advice.format(file=shlex.quote(str(path)), stem=path.stem)
        raise InputError(f"{path}: {identity}; {advice}")
    if name := refused(identity, hints):
        raise InputError(f"{path}: {name}, which takes more than a prompt (an image, a mask) and is not supported")
    return Source(path, stored, identity, config)


def refuse_file(path: Path) -> InputError:
    """Return the error for a file where a diffusers folder is expected: what it is, and how to convert it."""
    try:
        source = open_file(path)
    except InputError as error:
        return error
    return InputError(f"{path}: {source.text}, expected a diffusers folder; convert it first: {source.command()}")


def _start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(24).replace(b"\n", b" ").replace(b"\r", b" ")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _title(path: Path) -> str:
    """Return the names in a file's own description."""
    try:
        with safe_open(path, framework="np") as file:
            said = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not whole safetensors ({error}); download or make it again") from error
    return " ".join(said.get(key, "") for key in ("modelspec.title", "modelspec.architecture"))
