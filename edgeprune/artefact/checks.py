"""Checks of a pipeline's folder before any work: everything that a later stage or an export needs from it. Torch-free.

Every command calls `check_pipeline` first, and so does every `--dry-run`. It reads configs and the headers of weight
files, so a folder that would fail after hours fails in the first second, with the name of the file and the tensor or
field.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.artefact.chat import check_chat
from edgeprune.artefact.manifest import HALF, INT4, MANIFEST
from edgeprune.artefact.resolve import read_config
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown, whole_number
from edgeprune.common.files import read_json
from edgeprune.families import CHANGED, Architecture, Config
from edgeprune.families.architecture import Encoder
from edgeprune.families.encoders import CLIP, LANGUAGE, T5, is_present, read_index, text_encoders, tokenizer_of
from edgeprune.families.parts import VAE, VAE_QWEN_IMAGE, part_shapes, tensor_of, text_outputs, vae_channels
from edgeprune.residency.model_files import parts_of
from edgeprune.residency.weights import Weights
from edgeprune.sampling.generation import latent_factor
from edgeprune.sampling.latents import by_channel, factors
from edgeprune.sampling.scheduler import FlowMatch

if TYPE_CHECKING:
    import torch


def check_pipeline(folder: Path, variant: str | None = None) -> dict[str, Any]:
    """Check that edgeprune can compress, run and export a pipeline; return the content of model_index.json.

    Args:
        folder: an original or an artefact. The weights of an artefact's transformer are checked when they are opened.
        variant: of the weights, see residency/model_files.py.

    Raises:
        InputError: a part is missing or of another class, is quantised already, has a setting that is not supported,
            does not fit the other parts, or lacks a tensor.
    """
    index = check_settings(folder)
    config, family = read_config(folder)
    pruned = str(config["_class_name"]).startswith(CHANGED)
    if not (folder / MANIFEST).is_file() and not pruned:
        Weights(folder / HALF, variant).check(family.tensor_shapes(config))
    for name, kind in (*text_encoders(folder).items(), ("vae", family.vae)):
        part_weights(folder / name, kind, variant)
    return index


def check_settings(folder: Path) -> dict[str, Any]:
    """Check what `check_pipeline` does, except weights; return the content of model_index.json.

    Raises:
        InputError: see `check_pipeline`.
    """
    config, family = read_config(folder)
    index = read_index(folder)
    _check_classes(folder, index, config, family)
    encoders = text_encoders(folder)
    pruned = str(config["_class_name"]).startswith(CHANGED)  # diffusers reads of it that it is quantised
    for name in (*(() if pruned else (HALF,)), "vae", *encoders):
        _check_not_quantized(folder / name / "config.json")
    _check_channels(folder, config, family)
    _check_text(folder, config, family, encoders)
    return index


def say_unfinished(folder: Path) -> None:
    """Warn in one line of an artefact that is not quantised: what is drawn or exported is its half precision."""
    if (folder / MANIFEST).is_file() and (folder / HALF).is_dir() and not (folder / INT4).is_dir():
        warnings.warn(
            f"{folder}: is not quantised, so its weights in half precision are used; "
            f"finish it: edgeprune quantize -o {folder}",
            stacklevel=1,  # of one place, so that the same line is shown once
        )


@dataclass(frozen=True)
class StoredPart:
    """The tensors of a text encoder or a VAE, read on request."""

    weights: Weights
    names: dict[str, list[str]]
    """What the files call each tensor of `part_shapes`; T5's embedding may be there under both of its names."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored dtype.

        Raises:
            InputError: it cannot be read, or is another one under its other name.
        """
        first, *others = self.names[name]
        tensor = self.weights[first]
        for other in others:
            if not tensor.equal(self.weights[other]):
                raise InputError(f"{self.weights.folder}: {other}: found other numbers than in {first}, expected equal")
        return tensor

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Read some rows of a table, see `Weights.rows`."""
        return self.weights.rows(self.names[name][0], indices)

    def kind(self) -> tuple[torch.dtype, int]:
        """Return the dtype of the weights, that of the largest tensor, and how many numbers they are."""
        sizes = {name: math.prod(shape) for name, shape in self.weights.shapes.items()}
        return self.weights.dtype(max(sizes, key=lambda name: sizes[name])), sum(sizes.values())

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return self.weights.dtype(self.names[name][0])

    def ahead(self, names: Iterable[str]) -> None:
        """Ask the operating system to read these tensors in the background."""
        self.weights.ahead(stored for name in names for stored in self.names[name])


def part_weights(folder: Path, kind: str, variant: str | None = None) -> StoredPart | None:
    """Open the weights of a text encoder or a VAE, after checking them against its config.

    Args:
        folder: the part's folder, such as `vae`.
        kind: its class.
        variant: of the weights.

    Returns:
        None for a class that has no table in families/parts.py.

    Raises:
        InputError: a tensor is missing, unknown, of another shape or of a dtype that no model is stored in.
    """
    path = folder / "config.json"
    expected = part_shapes(kind, read_json(path), path)
    if expected is None:
        return None
    weights = Weights(folder, variant, needed=lambda name: tensor_of(kind, name) is not None)
    names: dict[str, list[str]] = {}
    for stored, shape in weights.shapes.items():
        name = tensor_of(kind, stored)
        if name is None or name not in expected:
            scale = "scale" in stored or "absmax" in stored
            reason = "it belongs to quantised weights; give the original's" if scale else f"{kind} has no such tensor"
            raise InputError(f"{folder}: {shown(stored)}: found {shape}, expected none: {reason}")
        if shape != expected[name]:
            raise InputError(f"{folder}: {shown(stored)}: found {shape}, expected {expected[name]} by {path.name}")
        names.setdefault(name, []).append(stored)
    if missing := sorted(expected.keys() - names.keys()):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{folder}: {missing[0]}: found no such tensor{more}; download or make the files again")
    return StoredPart(weights, names)


def _check_classes(folder: Path, index: dict[str, Any], config: Config, family: Architecture) -> None:
    """Check the class of the pipeline and of every part, and that each part has a folder."""
    path = folder / "model_index.json"
    if (name := index.get("_class_name")) != family.pipeline:
        raise InputError(
            f"{path}: _class_name: found {shown(name)}, expected {family.pipeline!r}; pipelines that take more than a "
            "prompt (an image, a mask, a control) are not supported"
        )
    wanted: dict[str, str | None] = {
        "transformer": str(config["_class_name"]).removeprefix(CHANGED),
        "vae": family.vae,
        "scheduler": None,  # any that `FlowMatch` reads
        **{e.name: e.kind for e in family.encoders if not e.optional or is_present(index, e.name)},
    }
    encoders = text_encoders(folder)
    tokenizers = [tokenizer_of(e.name) for e in family.encoders if e.name in wanted]
    for part in (*wanted, *tokenizers):
        if not is_present(index, part):
            raise InputError(f"{path}: {part}: found {shown(index.get(part))}, expected a library and a class")
        found, expected = encoders.get(part, index[part][-1]), wanted.get(part)
        if expected is not None and found != expected:
            raise InputError(f"{path}: {part}: found {found!r}, expected {expected!r}{_REMEDIES.get(part, '')}")
    if absent := [part for part in parts_of(index) if not (folder / part).is_dir()]:
        raise InputError(f"{folder / absent[0]}: no such folder, though {path.name} lists it")
    found, expected = index["scheduler"][-1], FlowMatch.load(folder).kind
    if found != expected:
        raise InputError(
            f"{path}: scheduler: found {found!r}, expected {expected!r}, the class of scheduler/scheduler_config.json"
        )
    for part in tokenizers:
        _check_vocabulary(folder / part)
    for encoder in family.encoders:
        if encoder.chat:
            check_chat(folder / tokenizer_of(encoder.name), encoder.chat)


_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
"""The files of which one set makes a tokenizer."""


def _check_vocabulary(folder: Path) -> None:
    """Refuse a tokenizer without its vocabulary: transformers makes one that knows no word."""
    if not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        listed = ", ".join(" with ".join(names) for names in _VOCABULARIES)
        raise InputError(f"{folder}: found no vocabulary, expected one of {listed}; download the folder again")


_REMEDIES = {
    "vae": ": put the model's own VAE there; another one can replace it in the compressed folder",
}
"""What to do about another class of a part."""


def _check_not_quantized(path: Path) -> None:
    """Refuse a part whose config says that its weights are quantised. An empty setting says nothing."""
    if quantization := read_json(path).get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"{path}: quantization_config: found {shown(method)}, expected none: the weights are quantised already; "
            "give the original's, in 16 or 32 bits"
        )


def _check_channels(folder: Path, config: Config, family: Architecture) -> None:
    """Check that the transformer denoises exactly the latents of the VAE, and that these can be scaled."""
    path = folder / HALF / "config.json"
    channels, out, latent = config["in_channels"], config.get("out_channels"), family.latents(config).channels
    if out not in (None, channels, latent):  # of a token, or of a latent pixel
        raise InputError(
            f"{path}: in_channels, out_channels: found {channels} and {out}, expected the same: a model that takes an "
            "image besides the noise (Fill, Control) is not supported"
        )
    where = folder / "vae" / "config.json"
    vae = read_json(where)
    latent_factor(vae, where)
    if family.vae == VAE:  # FLUX.2's has statistics among its tensors
        factors(vae, where)
    if family.vae == VAE_QWEN_IMAGE:
        by_channel(vae, where)
    field, found = vae_channels(family.vae, vae, where)
    if found != latent:
        raise InputError(f"{where}: {field}: found {found}, expected {latent} by the transformer's in_channels")
    for name in ("in_channels", "out_channels"):
        if (colours := vae.get(name, 3)) != 3:
            raise InputError(f"{where}: {name}: found {shown(colours)}, expected 3: red, green and blue")


def _check_text(folder: Path, config: Config, family: Architecture, encoders: dict[str, str]) -> None:
    """Check that the text encoders' outputs have the widths that the transformer reads."""
    path = folder / HALF / "config.json"
    hidden, pooled = family.text_widths(config)
    paths = {name: folder / name / "config.json" for name in encoders}
    for encoder in family.encoders:
        if encoder.kind in LANGUAGE:
            _check_states(encoder, paths[encoder.name], hidden, path)
            return
    widths = [(kind, *text_outputs(kind, read_json(paths[name]), paths[name])) for name, kind in encoders.items()]
    t5, clip = ([width for found, width, _ in widths if found == kind] for kind in (T5, CLIP))
    if t5 and t5[0] != hidden:
        raise InputError(f"{path}: joint_attention_dim: found {hidden}, expected {t5[0]}, the width of T5's text")
    if sum(clip) > hidden:
        raise InputError(f"{path}: joint_attention_dim: found {hidden}, expected the CLIP text encoders' {sum(clip)}")
    if (found := sum(width for _, _, width in widths)) != pooled:
        raise InputError(f"{path}: pooled_projection_dim: found {pooled}, expected {found} by the CLIP text encoders")


def _check_states(encoder: Encoder, config: Path, hidden: int, path: Path) -> None:
    """Check that a language model has the hidden states that are read, and that these are what the transformer reads.

    Args:
        encoder: the language model.
        config: its config.json.
        hidden: width of the transformer's text.
        path: the transformer's config.json.
    """
    found = read_json(config)
    if not encoder.states:  # the last one is read
        wide = text_outputs(encoder.kind, found, config)[0]
        if wide != hidden:
            raise InputError(f"{path}: width of text: found {hidden}, expected {wide}, the width of {encoder.name}")
        return
    # transformers norms what it returns as the last state, which here is never one that is read.
    least = max(encoder.states) + max(1, encoder.after)
    layers = whole_number({"num_hidden_layers": 32} | found, "num_hidden_layers", config, least=least)
    if encoder.after and layers != least:
        raise InputError(f"{config}: num_hidden_layers: found {layers}, expected {least}, as in the published model")
    wide = len(encoder.states) * text_outputs(encoder.kind, found, config)[0]
    if wide != hidden:
        raise InputError(
            f"{path}: width of text: found {hidden}, expected {wide}, the width of {len(encoder.states)} hidden states "
            f"of {encoder.name}"
        )
