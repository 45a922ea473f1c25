"""What a conversion will write: which part comes from where, with every tensor accounted for. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeprune.artefact.checks import check_settings, part_weights
from edgeprune.artefact.convert.identity import LONG_PARTS, MODELS, part_of
from edgeprune.artefact.convert.layouts import (
    NEVER,
    Piece,
    encoder_targets,
    pieces,
    transformer_targets,
    vae_targets,
)
from edgeprune.artefact.convert.opening import Source
from edgeprune.artefact.convert.safetensors import Safetensors
from edgeprune.artefact.convert.stored import FLOATS, Stored, byte_size
from edgeprune.artefact.manifest import HALF
from edgeprune.artefact.resolve import read_original
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json
from edgeprune.families import Config, Family, family_of
from edgeprune.families.encoders import text_encoders
from edgeprune.families.parts import VAE, part_shapes
from edgeprune.residency.model_files import weights_of

_FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "vae": "vae"}
"""Of parts whose folder is the same in all pipelines."""


@dataclass(frozen=True)
class Part:
    """One network of the pipeline that is written tensor by tensor."""

    name: str
    """Its folder."""
    pieces: dict[str, Piece]
    config: Config
    """The content of its config.json."""

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor in the new folder."""
        return {name: byte_size(piece.shape, piece.kind) for name, piece in self.pieces.items()}

    @property
    def widened(self) -> list[str]:
        """The dtypes that become bfloat16."""
        return sorted({piece.kind for piece in self.pieces.values()} - FLOATS.keys())


def networks(config: Path) -> dict[str, str]:
    """Return the class of each part of a pipeline that has weights.

    Raises:
        InputError: the pipeline is not usable, whatever its weights; see `check_settings`.
    """
    check_settings(config)
    settings, family = read_original(config)
    return {HALF: str(settings["_class_name"]), **text_encoders(config), "vae": family.vae}


def from_file(source: Source, config: Path) -> tuple[list[Part], dict[str, int]]:
    """Return the parts that the file holds, and how many of its tensors are not needed, by what they are.

    Args:
        source: the file, or a transformer's folder.
        config: a pipeline's folder; needs no weights.

    Raises:
        InputError: the config is another model's; a tensor is missing, unknown or of another shape.
    """
    kinds = networks(config)
    path = source.config or config / HALF / "config.json"
    settings = read_json(path)
    family = family_of(settings, str(path))
    family.tensor_shapes(settings)  # raises if a field is missing or out of range
    check_facts(source, settings, path)
    prefixes = {HALF: source.identity.prefix, **_prefixes(source, family)}
    names: dict[str, dict[str, str]] = {part: {} for part in prefixes}
    folders = {prefix: part for part, prefix in prefixes.items() if part != HALF}
    unneeded = dict(source.stored.rules)
    for name in source.stored.shapes:
        other = source.identity.parts.get(part_of(name, source.identity.parts), "")
        part = folders.get(other, HALF)
        if name.startswith(prefixes[part]):
            names[part][name] = name.removeprefix(prefixes[part])
        elif NEVER.match(name):
            unneeded["training states"] = unneeded.get("training states", 0) + 1
        else:
            raise InputError(
                f"{source.path}: {shown(name)}: found {source.stored.shapes[name]}, expected no such tensor"
            )
    out = []
    for part, mine in names.items():
        path = source.config if source.config and part == HALF else config / part / "config.json"
        found = _pieces(source.stored, mine, path, kinds[part], source.path)
        if extra := len(mine) - len({name for piece in found.values() for name in piece.names}):
            unneeded[f"not part of {part}"] = extra
        out.append(Part(part, found, read_json(path)))
    return out, unneeded


def from_config(config: Path, name: str, kind: str) -> Part | None:
    """Return a part of the config folder that has to be written tensor by tensor; None for one that is copied.

    Raises:
        InputError: it has no weights; a tensor is missing, unknown or of another shape.
    """
    folder = config / name
    found = weights_of(folder)
    if found is None:
        raise InputError(f"{folder}: found no weights, expected safetensors, since the file does not have this part")
    stored = Safetensors([folder / file for file in found.files])
    if all(kind in FLOATS for kind in stored.kinds.values()) and not stored.rules:
        if name != HALF:
            part_weights(folder, kind)
        return None
    path = folder / "config.json"
    return Part(name, _pieces(stored, {n: n for n in stored.shapes}, path, kind, folder), read_json(path))


def check_facts(source: Source, config: Config, where: Path) -> None:
    """Check that a transformer's config says what the shapes of the file say.

    Args:
        where: the config's file.

    Raises:
        InputError: the config is another model's.
    """
    identity = source.identity
    said: Config = {
        **config,
        "guidance_embeds": bool(config.get("guidance_embeds")),
        "qk_norm": config.get("qk_norm") is not None,
        "dual": len(config.get("dual_attention_layers") or ()),
        "width": family_of(config, str(where)).width(config),
    }
    for name, expected in {"_class_name": identity.network, **identity.facts}.items():
        if said.get(name) != expected:
            hint = (
                f"give --config {identity.model.hub}" if identity.model else "give the config of the file's own model"
            )
            raise InputError(
                f"{where}: {name}: found {shown(said.get(name))}, but {source.path} is {source.text}, which has "
                f"{shown(expected)}; {hint}"
            )


def _prefixes(source: Source, family: Family) -> dict[str, str]:
    """Return the prefix of each part in the file besides the transformer, by the part's folder."""
    kinds = {encoder.name: encoder.kind for encoder in family.encoders}
    out = {}
    for part, prefix in source.identity.parts.items():
        if part in LONG_PARTS:
            name = next((name for name, kind in kinds.items() if kind == LONG_PARTS[part]), "")
        else:
            name = _FOLDERS[part]
        fits = name == "vae" or (name in kinds and (kinds[name] in LONG_PARTS.values()) == (part in LONG_PARTS))
        if not fits:
            raise InputError(f"{source.path}: {shown(prefix)}: found {part}, but {family.pipeline} has no such part")
        out[name] = prefix
    return out


def _pieces(stored: Stored, names: Mapping[str, str], path: Path, kind: str, where: Path) -> dict[str, Piece]:
    """Return where each tensor of one part lies.

    Args:
        names: the tensors without their prefix, by their name in the file.
        path: the part's config.json.
        kind: its class.
        where: the file, for errors.
    """
    config = read_json(path)
    if kind in MODELS:
        family = family_of(config, str(path))
        return pieces(stored, names, family.tensor_shapes(config), transformer_targets(family, config), where)
    expected = part_shapes(kind, config, path)
    if expected is None:
        raise InputError(f"{path}: {kind}: cannot be converted, expected CLIP, T5, Qwen3 or {VAE}")
    targets = vae_targets(len(config.get("block_out_channels", [0]))) if kind == VAE else encoder_targets(kind)
    return pieces(stored, names, expected, targets, where)
