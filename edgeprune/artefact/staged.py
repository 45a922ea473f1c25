"""A pipeline whose parts are in memory one after the other: each text encoder, then the transformer, then the VAE.

diffusers' pipelines hold all of them at once: 55 GB in float32 for SD3.5 Large. Here a text encoder is read layer by
layer, encodes all prompts, and is gone; the VAE is loaded for the first image. The text is that of diffusers'
`encode_prompt`. Sampling (sampling/denoising.py) takes either kind of pipeline.

Notation: B prompts, M text tokens, K text width, P pooled width.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeprune.artefact.checks import part_weights
from edgeprune.artefact.loading import complete, empty_part, load_part, quiet, readable
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.text_store import TextStore
from edgeprune.common.files import read_json
from edgeprune.families.encoders import CLIP, CLIP_POOLED, EXPORTED, T5, text_encoders, tokenizer_of
from edgeprune.families.parts import VAE, tensor_of
from edgeprune.planning.fit import vae_activations
from edgeprune.residency.compute import Compute
from edgeprune.residency.streaming import fitting, release, stream
from edgeprune.sampling.generation import latent_factor, longest_prompt

_AT_ONCE = 64
"""Most prompts that pass through a text encoder together."""
_RECENT = 8
"""Most prompts, of all encoders together, whose text stays in memory where none is kept on disk."""
_TILE = 64
"""Sides of a tile in latent pixels, if the VAE works in tiles."""
_OUTPUTS = {CLIP: "text_embeds", CLIP_POOLED: "pooler_output", T5: "last_hidden_state"}
"""What is read of an encoder's result."""


def can_stage(folder: Path) -> bool:
    """Return whether all text encoders and the VAE of a pipeline's folder are of classes that are read by name here."""
    kinds = set(text_encoders(folder).values())
    return kinds <= set(EXPORTED) and read_json(folder / "vae" / "config.json").get("_class_name") == VAE


class StagedPipeline:
    """The parts of a pipeline's folder.

    Args:
        folder: the pipeline's.
        transformer: in memory, or streamed; None if only the other parts are used.
        compute: where and in which dtype the other parts compute.
        variant: of the weights, see residency/model_files.py.
        texts: keeps encoded prompts on disk; None encodes them again each time.
    """

    def __init__(
        self,
        folder: Path,
        transformer: Any,
        compute: Compute,
        variant: str | None = None,
        *,
        texts: TextStore | None = None,
    ) -> None:
        self.folder, self.transformer, self.compute, self.variant = folder, transformer, compute, variant
        self.config, self.family = read_config(folder)
        self.texts = texts
        self._held: dict[str, Any] | None = None
        self._tiled: bool | None = None
        self._recent: dict[tuple[str, str, int], dict[str, torch.Tensor]] = {}

    @functools.cached_property
    def scheduler(self) -> Any:
        """The scheduler of diffusers."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        with readable(self.folder / "scheduler"):
            return FlowMatchEulerDiscreteScheduler.from_pretrained(self.folder, subfolder="scheduler")

    @functools.cached_property
    def vae_scale_factor(self) -> int:
        """Pixels of an image per side of a latent pixel."""
        path = self.folder / "vae" / "config.json"
        return latent_factor(read_json(path), path)

    @functools.cached_property
    def vae(self) -> Any:
        """The VAE in float32, loaded once."""
        part: Any = load_part(self.folder / "vae", VAE, variant=self.variant)
        return part.to(self.compute.device)

    def make_room(self, height: int, width: int) -> None:
        """Make room for the VAE's activations of one image of this size, if memory is short.

        Blocks of the transformer that are kept are freed; they are read again when they run. If that does not suffice,
        the VAE takes the image in tiles that overlap, with diffusers' blending. Images of one pipeline are made alike:
        that is decided once.
        """
        if self._tiled:
            height = width = _TILE * self.vae_scale_factor
        needed = 4 * vae_activations(self.vae.config, height, width)
        if self.compute.left() < needed:
            if self.transformer is not None:
                release(self.transformer)
            self.compute.collect()
        if self._tiled is not None:
            return
        self._tiled = self.compute.left() < needed
        if self._tiled:
            self.vae.enable_tiling()
            self.vae.tile_latent_min_size, self.vae.tile_sample_min_size = _TILE, _TILE * self.vae_scale_factor

    def tokenizer_of(self, encoder: str) -> Any:
        """Return the tokenizer of a text encoder; None if the pipeline has no such encoder."""
        return self._tokenizer(encoder) if encoder in text_encoders(self.folder) else None

    def holding(self) -> StagedPipeline:
        """Return the pipeline for many batches of prompts: encoders stay in memory, and no prompt's text is kept.

        What is encoded depends in its last bits on the batch; the result would depend on what was encoded before.
        """
        other = copy.copy(self)
        other.texts, other._held, other._recent = None, {}, {}
        return other

    def encode(self, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden (B, M, K) and pooled (B, P) text in float32, one encoder after the other."""
        return self.join(self.outputs(prompts, max_sequence_length), max_sequence_length)

    def outputs(self, prompts: list[str], max_sequence_length: int) -> dict[str, dict[str, NDArray[np.float32]]]:
        """Return what each encoder says of the prompts, under the names that `Network.join` reads."""
        return {
            name: self._outputs(name, kind, prompts, max_sequence_length)
            for name, kind in text_encoders(self.folder).items()
        }

    def join(
        self, outputs: dict[str, dict[str, NDArray[np.float32]]], max_sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden (B, M, K) and pooled (B, P) text of what `outputs` returned."""
        hidden, pooled = self.family.join(self.config, outputs, max_sequence_length)
        return torch.from_numpy(hidden).to(self.compute.device), torch.from_numpy(pooled).to(self.compute.device)

    def pooled(self, prompts: list[str]) -> torch.Tensor:
        """Return only the pooled text (B, P) in float32; T5, which has none, is not read."""
        parts = [
            torch.from_numpy(self._outputs(name, kind, prompts, 0)[_OUTPUTS[kind]])
            for name, kind in text_encoders(self.folder).items()
            if kind != T5
        ]
        return torch.cat(parts, dim=-1).to(self.compute.device)

    def _outputs(self, name: str, kind: str, prompts: list[str], max_sequence_length: int) -> dict[str, Any]:
        """Return what one encoder says of the prompts, as numpy arrays under the names that `Network.join` reads."""
        # diffusers pads the prompts of both CLIPs to the first tokenizer's length.
        length = max_sequence_length if kind == T5 else longest_prompt(self.folder)
        dtype = self.dtype_of(name)
        paths = {p: self.texts.path(name, p, length, dtype) for p in dict.fromkeys(prompts)} if self.texts else {}
        found = {p: t for p, path in paths.items() if self.texts and (t := self.texts.get(path)) is not None}
        found |= {p: self._recent[name, p, length] for p in prompts if (name, p, length) in self._recent}
        missing = [p for p in dict.fromkeys(prompts) if p not in found]
        for prompt, tensors in self._encoded(name, kind, missing, length, dtype):
            found[prompt] = tensors
            if self.texts is None and self._held is None and len(prompts) <= _RECENT:
                self._recent = dict(list(self._recent.items())[-_RECENT:]) | {(name, prompt, length): tensors}
            if self.texts:
                self.texts.put(paths[prompt], tensors)
        keys = found[prompts[0]]
        return {key: torch.stack([found[p][key] for p in prompts]).float().numpy() for key in keys}

    @torch.no_grad()
    def _encoded(
        self, name: str, kind: str, prompts: list[str], length: int, dtype: torch.dtype
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Load an encoder, and yield its outputs for each prompt, without the batch's axis, on the processor."""
        if not prompts:
            return
        ids, encoder = self._token_ids(name, prompts, length), self._encoder(name, kind, dtype)
        for start in range(0, len(prompts), _AT_ONCE):
            batch = ids[start : start + _AT_ONCE].to(self.compute.device)
            out = encoder(batch, output_hidden_states=kind == CLIP)
            found = {_OUTPUTS[kind]: out[_OUTPUTS[kind]]}
            if kind == CLIP:  # `join` reads the last state but one
                count = len(out.hidden_states)
                found |= {f"hidden_states.{i}": out.hidden_states[i] for i in (count - 2, count - 1)}
            for row, prompt in enumerate(prompts[start : start + _AT_ONCE]):
                yield prompt, {key: value[row].cpu() for key, value in found.items()}

    def _token_ids(self, name: str, prompts: list[str], length: int) -> torch.Tensor:
        tokenizer = self._tokenizer(name)
        with readable(self.folder / tokenizer_of(name)), quiet():
            found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: torch.Tensor = found.input_ids
        return ids

    def _tokenizer(self, name: str) -> Any:
        from transformers import AutoTokenizer

        folder = self.folder / tokenizer_of(name)
        with readable(folder), quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a text encoder computes."""
        kind = text_encoders(self.folder)[name]
        weights = part_weights(self.folder / name, kind, self.variant)
        assert weights is not None  # `can_stage`
        dtype = self.compute.dtype(*weights.kind())
        # T5-XXL has activations beyond the largest number of float16.
        return torch.bfloat16 if kind == T5 and dtype == torch.float16 else dtype

    def _encoder(self, name: str, kind: str, dtype: torch.dtype) -> Any:
        if self._held is None:
            return self._streamed(name, kind, dtype)
        if name not in self._held:
            self._held[name] = self._streamed(name, kind, dtype, keep=self.compute.left() // 2)
        return self._held[name]

    def _streamed(self, name: str, kind: str, dtype: torch.dtype, *, keep: int = 0) -> Any:
        """Return a text encoder whose layers are read when they run, beyond `keep` bytes; the rest is in memory."""
        folder = self.folder / name
        weights = part_weights(folder, kind, self.variant)
        assert weights is not None  # `can_stage`
        with readable(folder), quiet():
            model = empty_part(folder, kind)
        stored = {n: tensor_of(kind, n) or n for n in model.state_dict()}
        layers = list(_layers(model, kind))
        inside = {f"{prefix}{n}" for prefix, layer in layers for n in layer.state_dict()}
        outside = {n: weights[s].to(self.compute.device, dtype) for n, s in stored.items() if n not in inside}
        model.load_state_dict(outside, strict=False, assign=True)
        complete(folder, kind, model, self.compute.device)
        named = [(layer, {n: stored[f"{prefix}{n}"] for n in layer.state_dict()}) for prefix, layer in layers]
        stream(
            named, weights.__getitem__, device=self.compute.device, dtype=dtype,
            stay=fitting(named, weights.dtype, keep), ahead=weights.ahead,
        )  # fmt: skip
        return model.eval()


def _layers(model: nn.Module, kind: str) -> Iterable[tuple[str, nn.Module]]:
    """Return a text encoder's layers in their order, with the prefix of their tensors' names."""
    of = "encoder.block" if kind == T5 else "encoder.layers"
    found = next(name for name, _ in model.named_modules() if name.endswith(of))
    for index, layer in enumerate(model.get_submodule(found).children()):
        yield f"{found}.{index}.", layer
