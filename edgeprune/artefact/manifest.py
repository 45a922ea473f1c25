"""`edgeprune.json`, the manifest of an artefact: what it was made from, by which stages, and the hash of every file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import NoneType
from typing import Any

from edgeprune.common import hashes
from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST, real_number, shown, text, whole_number
from edgeprune.common.files import UNFINISHED, check_schema, read_json, write_json
from edgeprune.common.version import VERSION
from edgeprune.families import Config
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.precision import TEXT_FORMS

SCHEMA_VERSION = 1
MANIFEST = "edgeprune.json"
HALF, INT4 = "transformer", "transformer_int4"
"""Subfolders of an artefact: the pruned weights in half precision, and the quantised ones."""
EXPORT = "edgeprune_export.json"
"""The manifest of an export."""
_LONGEST_S = 1e10


def packed_folder(encoder: Path) -> Path:
    """Return where the INT4 of a text encoder's folder is, such as `text_encoder_3_int4`."""
    return encoder.with_name(f"{encoder.name}_int4")


def packed_encoders(folder: Path) -> list[str]:
    """Return the subfolders of an artefact that hold a text encoder in INT4, those of an interrupted stage included."""
    return sorted(path.name for path in folder.glob(packed_folder(Path("text_encoder*")).name) if path.is_dir())


@dataclass
class Manifest:
    """The content of `edgeprune.json`."""

    source: str
    """The original model as the user named it."""
    fingerprint: str
    """Fingerprint of the original transformer's config."""
    family: str
    config: Config
    """The original transformer's config."""
    generation: dict[str, Any] = field(default_factory=dict)
    """The settings with which every stage makes images, see `Generation`."""
    plan: dict[str, Any] | None = None
    """The plan that `transformer/` follows, as JSON."""
    group_size: int | None = None
    """Group size of the INT4 weights."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By stage: `inputs` (a digest), `seconds`, and what the stage reports."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 by path relative to the folder."""
    tools: dict[str, str] = field(default_factory=dict)
    """Version by package."""
    license: dict[str, Any] = field(default_factory=dict)
    """What the original's card says of its license, see licensing.py."""
    schema_version: int = SCHEMA_VERSION
    revision: str | None = None
    """The branch, tag or commit of a hub model that the user asked for; None for the default."""
    variant: str | None = None
    """The variant of the weights that the user asked for; None for the default."""
    commit: str | None = None
    """The commit of the hub model that it was when the folder was begun."""
    loras: list[dict[str, Any]] = field(default_factory=list)
    """The LoRAs merged into the weights, in order: `file`, `sha256`, `scale`, and the `parts` that they change."""
    half_in_source: bool = False
    """Whether `transformer/` holds a config alone: its weights are the original's, changed as `plan` says."""
    choice: dict[str, Any] | None = None
    """What `compress --time` chose, see stages/choice.py."""
    encoders: str | None = None
    """The form in which a T5 or Qwen3 is exported, see quantization/precision.py; None in older folders, for 8 bits."""

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            InputError: it is missing, damaged, or written by another version of edgeprune.
        """
        path = folder / MANIFEST
        data = read_json(path)
        remedy = "make the artefact again, with another -o or after removing the folder"
        check_schema(path, data.get("schema_version"), SCHEMA_VERSION, remedy)
        try:
            manifest = cls(**data)
        except TypeError as error:
            raise InputError(f"{path}: not a manifest ({error})") from error
        for name in ("config", "stages", "files", "generation", "tools", "license"):
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
            real_number(stage, "seconds", f"{path}: stages: {shown(name)}", least=0, most=_LONGEST_S)
        if manifest.group_size is not None:
            whole_number(data, "group_size", path)
        for name in ("revision", "variant", "commit"):
            if not isinstance(value := getattr(manifest, name), (str, NoneType)):
                raise InputError(f"{path}: {name}: found {shown(value)}, expected text or null")
        if manifest.encoders not in (None, *TEXT_FORMS):
            raise InputError(
                f"{path}: encoders: found {shown(manifest.encoders)}, expected {', '.join(TEXT_FORMS)} or null"
            )
        if not isinstance(manifest.loras, list) or not all(isinstance(lora, dict) for lora in manifest.loras):
            raise InputError(f"{path}: loras: expected a list of objects")
        for number, lora in enumerate(manifest.loras):
            for name in ("file", "sha256"):
                text(lora, name, f"{path}: loras: {number}")
            real_number(lora, "scale", f"{path}: loras: {number}", least=-LARGEST, most=LARGEST)
            if not isinstance(lora.get("parts"), list) or not all(isinstance(part, str) for part in lora["parts"]):
                raise InputError(f"{path}: loras: {number}: parts: expected a list of names")
        if not isinstance(value := data.get("half_in_source", False), bool):
            raise InputError(f"{path}: half_in_source: found {shown(value)}, expected true or false")
        for name in ("plan", "choice"):
            if not isinstance(getattr(manifest, name), (dict, NoneType)):
                raise InputError(f"{path}: {name}: expected an object or null")
        return manifest

    def save(self, folder: Path) -> None:
        """Write the manifest with the versions of the installed tools."""
        names = ("torch", "diffusers", "transformers", "nncf", "safetensors", "numpy")
        self.tools = {"edgeprune": VERSION} | {n: metadata.version(n) for n in names}
        optional = ("revision", "variant", "commit", "loras", "half_in_source", "choice", "encoders")
        absent = {name for name in optional if not getattr(self, name)}
        write_json(folder / MANIFEST, {k: v for k, v in asdict(self).items() if k not in absent})

    def hash_files(self, folder: Path, entry: str) -> None:
        """Hash the files of `entry`, a file or a subfolder of `folder`, in place of the hashes it had."""
        self.files = {k: v for k, v in self.files.items() if k.split("/")[0] != entry}
        root = folder / entry
        paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file() and p.name != UNFINISHED)
        self.files |= {p.relative_to(folder).as_posix(): hashes.sha256(p) for p in paths}

    def verify(self, folder: Path, entry: str) -> None:
        """Check the hashes of `entry`, a file or a subfolder of `folder`.

        Raises:
            InputError: a file is missing or changed.
        """
        hashes.verify(folder, {n: digest for n, digest in self.files.items() if n.split("/")[0] == entry}, MANIFEST)

    def need_half(self, folder: Path) -> None:
        """Refuse a folder without weights in half precision.

        Raises:
            InputError: there are none; says which command writes them.
        """
        if self.half_in_source:
            raise InputError(
                f"{folder / HALF}: found no weights in half precision, which --no-half left in the original; "
                f"write them: edgeprune prune -o {folder}"
            )

    @property
    def identity(self) -> str | None:
        """The digest of all that the INT4 weights were made from; None as long as there are none."""
        found: str | None = self.stages.get("quantize", {}).get("inputs")
        return found

    def prune_plan(self, folder: Path) -> PrunePlan | None:
        """Return the plan that `transformer/` follows; `folder` is named in errors."""
        return PrunePlan.from_json(self.plan, folder / MANIFEST) if self.plan else None


def identity(folder: Path) -> str | None:
    """Return `Manifest.identity` of an artefact, or of the one that an export was made from; None of other folders.

    Raises:
        InputError: the folder's manifest is damaged.
    """
    if (folder / EXPORT).is_file():
        found: str | None = read_json(folder / EXPORT).get("identity")
        return found
    return Manifest.load(folder).identity if (folder / MANIFEST).is_file() else None


def recorded_encoders(folder: Path) -> list[str]:
    """Return those of `packed_encoders` that the folder's manifest lists.

    Raises:
        InputError: the manifest is damaged.
    """
    files = Manifest.load(folder).files if (folder / MANIFEST).is_file() else {}
    recorded = {name.split("/")[0] for name in files}
    return [name for name in packed_encoders(folder) if name in recorded]
