"""A pipeline whose parts are in memory one after the other: each text encoder, then the transformer, then the VAE.

diffusers' pipelines hold all of them at once: 55 GB in float32 for SD3.5 Large. Here a text encoder is read layer by
layer, encodes all prompts, and is gone; the VAE is loaded for the first image. The text is that of diffusers'
`encode_prompt`. Sampling (sampling/denoising.py) takes either kind of pipeline.

Notation: B prompts, M text tokens, K text width, P pooled width.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.artefact.checks import part_weights
from edgeprune.artefact.encoder_layers import OUTPUTS, layers_of, prompts_together, rows_of, said
from edgeprune.artefact.loading import complete, empty_part, load_part, quiet, readable
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.text import packed_text
from edgeprune.artefact.text_store import RunTexts, Texts
from edgeprune.common.files import read_json
from edgeprune.families import Encoder
from edgeprune.families.encoders import KNOWN, LANGUAGE, LONG, text_encoders, tokenizer_of
from edgeprune.families.parts import BY_ROW, VAE_QWEN_IMAGE, VAES, tensor_of
from edgeprune.planning.fit import vae_activations
from edgeprune.quantization.text import prepare_text_encoder, stored_name
from edgeprune.residency.by_rows import by_rows
from edgeprune.residency.compute import Compute, has_bf16
from edgeprune.residency.streaming import PACKED, Read, fitting, release, stream
from edgeprune.residency.table import StoredTable
from edgeprune.sampling.generation import latent_factor, longest_prompt
from edgeprune.sampling.scheduler import FlowMatch

TILES = (64, 32)
"""Sides in latent pixels of the tiles that the VAE may work in: the largest that there is memory for."""
WHOLE = 0
"""Instead of a tile's side: it takes the whole image."""


def can_stage(folder: Path) -> bool:
    """Return whether all text encoders and the VAE of a pipeline's folder are of classes that are read by name here."""
    kinds = set(text_encoders(folder).values())
    return kinds <= set(KNOWN) and read_json(folder / "vae" / "config.json").get("_class_name") in VAES


def encoder_dtype(folder: Path, name: str, compute: Compute, variant: str | None = None) -> torch.dtype:
    """Return the dtype in which a text encoder of a pipeline's folder computes.

    Args:
        folder: the pipeline's.
        name: of the encoder.
        compute: where.
        variant: of the weights, see residency/model_files.py.
    """
    kind = text_encoders(folder)[name]
    weights = part_weights(folder / name, kind, variant)
    assert weights is not None  # `can_stage`
    fits = kind not in LONG  # T5-XXL has activations beyond the largest number of float16; Qwen3 is untested in it
    dtype = compute.dtype(*weights.kind(), fits_half=fits)
    if fits or dtype != torch.float16:
        return dtype
    return torch.bfloat16 if has_bf16(compute.device) else torch.float32


class StagedPipeline:
    """The parts of a pipeline's folder.

    Args:
        folder: the pipeline's.
        transformer: in memory, or streamed; None if only the other parts are used.
        compute: where and in which dtype the other parts compute.
        variant: of the weights, see residency/model_files.py.
        texts: keeps encoded prompts; None keeps those of the last prompts that were encoded together.
        quantized: use a text encoder's INT4, if the folder has it.
    """

    def __init__(
        self,
        folder: Path,
        transformer: Any,
        compute: Compute,
        variant: str | None = None,
        *,
        texts: Texts | None = None,
        quantized: bool = False,
    ) -> None:
        self.folder, self.transformer, self.compute, self.variant = folder, transformer, compute, variant
        self.config, self.family = read_config(folder)
        self.texts: Texts | None = texts or RunTexts()
        self.quantized = quantized
        self._held: dict[str, Any] = {}
        self._tile: int | None = None

    @functools.cached_property
    def scheduler(self) -> Any:
        """The scheduler of diffusers."""
        import diffusers

        kind = getattr(diffusers, FlowMatch.load(self.folder).kind)
        with readable(self.folder / "scheduler"):
            return kind.from_pretrained(self.folder, subfolder="scheduler")

    @functools.cached_property
    def vae_scale_factor(self) -> int:
        """Pixels of an image per side of a latent pixel."""
        path = self.folder / "vae" / "config.json"
        return latent_factor(read_json(path), path)

    @functools.cached_property
    def vae(self) -> Any:
        """The VAE in float32, loaded once, or once after each `free_vae`."""
        vae: Any = load_part(self.folder / "vae", self.family.vae, variant=self.variant)
        if self._tile:
            self._in_tiles(vae, self._tile)
        return vae.to(self.compute.device)

    def free_vae(self) -> None:
        """Free the VAE until it is used again, if memory was given: a transformer that runs meanwhile may need it."""
        if self.compute.memory is not None:
            vars(self).pop("vae", None)

    def make_room(self, height: int, width: int) -> None:
        """Make room for the VAE's activations of one image of this size, if memory is short.

        Blocks of the transformer that are kept are freed; they are read again when they run. If that does not suffice,
        the VAE takes the image in tiles that overlap, with diffusers' blending. Images of one pipeline are made alike:
        that is decided once.
        """

        def fits(tile: int) -> bool:
            sides = (min(side, tile * self.vae_scale_factor or side) for side in (height, width))
            return self.compute.left() >= 4 * vae_activations(self.vae.config, *sides)

        if not fits(self._tile or WHOLE):
            if self.transformer is not None:
                release(self.transformer)
            self.compute.collect()
        if self._tile is not None:
            return
        self._tile = next((tile for tile in (WHOLE, *TILES) if fits(tile)), TILES[-1])
        if self._tile:
            self._in_tiles(self.vae, self._tile)

    def _in_tiles(self, vae: Any, tile: int) -> None:
        side = tile * self.vae_scale_factor
        if self.family.vae == VAE_QWEN_IMAGE:
            vae.enable_tiling(side, side, side * 3 // 4, side * 3 // 4)
        else:
            vae.enable_tiling()
            vae.tile_latent_min_size, vae.tile_sample_min_size = tile, side

    def tokenizer_of(self, encoder: str) -> Any:
        """Return the tokenizer of a text encoder; None if the pipeline has no such encoder."""
        return self._tokenizer(encoder) if encoder in text_encoders(self.folder) else None

    def apart(self, *, hold: bool) -> StagedPipeline:
        """Return the pipeline with text of its own.

        What is encoded depends in its last bits on the batch; the result would depend on what was encoded before.

        Args:
            hold: encoders stay in memory, for many batches of prompts, and no prompt's text is kept.
        """
        other = copy.copy(self)
        other.texts, other._held = None if hold else RunTexts(), {}
        return other

    def encode_ahead(self, prompts: list[str], max_sequence_length: int) -> None:
        """Encode prompts that `encode` is called with next, a few at a time: each encoder is read once for all."""
        if self.texts is not None:
            for name, kind in text_encoders(self.folder).items():
                self.texts.forget(name)
                self._kept(self.texts, name, kind, prompts, max_sequence_length)

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
        """Return only the pooled text (B, P) in float32; T5 and Qwens, which have none, are not read."""
        parts = [torch.zeros(len(prompts), 0)] + [
            torch.from_numpy(self._outputs(name, kind, prompts, 0)[OUTPUTS[kind]])
            for name, kind in text_encoders(self.folder).items()
            if kind not in LONG
        ]
        return torch.cat(parts, dim=-1).to(self.compute.device)

    def _outputs(self, name: str, kind: str, prompts: list[str], max_sequence_length: int) -> dict[str, Any]:
        """Return what one encoder says of the prompts, as numpy arrays under the names that `Network.join` reads."""
        distinct = list(dict.fromkeys(prompts))
        if self.texts is None:
            found = dict(self._encoded(name, kind, distinct, max_sequence_length))
        else:
            keys = self._kept(self.texts, name, kind, distinct, max_sequence_length)
            found = {prompt: self.texts.get(key) for prompt, key in keys.items()}
        return {key: torch.stack([found[p][key] for p in prompts]).float().numpy() for key in found[prompts[0]]}

    def _kept(self, texts: Texts, name: str, kind: str, prompts: list[str], max_sequence_length: int) -> dict[str, str]:
        """Encode the prompts that are not kept; return the key of each.

        Of one run, all of a call are encoded together if one is missing: what is encoded depends in its last bits on
        the batch.
        """
        length, dtype = self.length(name, max_sequence_length), self.dtype_of(name)
        keys = {prompt: texts.key(name, prompt, length, dtype) for prompt in prompts}
        if any(key not in texts for key in keys.values()):
            texts.forget(name)
        missing = [prompt for prompt, key in keys.items() if key not in texts]
        for prompt, tensors in self._encoded(name, kind, missing, max_sequence_length):
            texts.put(keys[prompt], tensors)
        return keys

    def length(self, name: str, max_sequence_length: int) -> int:
        """Return to how many tokens prompts are padded: diffusers takes the first tokenizer's number for both CLIPs."""
        encoder = self._described(name)
        known = encoder is not None and encoder.kind in LONG
        return encoder.length(max_sequence_length) if encoder and known else longest_prompt(self.folder)

    @torch.no_grad()
    def _encoded(
        self, name: str, kind: str, prompts: list[str], max_sequence_length: int
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Load an encoder, and yield its outputs for each prompt, without the batch's axis, on the processor."""
        if not prompts:
            return
        ids, mask = self.tokens(name, prompts, self.length(name, max_sequence_length))
        encoder = self._encoder(name, kind, self.dtype_of(name))
        described = self._described(name)
        padding = described is None or described.padding
        together = prompts_together(encoder, kind, self.compute, len(prompts), ids.shape[1], self.states(name))
        for start in range(0, len(prompts), together):
            few = slice(start, start + together)
            on_device = ids[few].to(self.compute.device), mask[few].to(self.compute.device)
            found = said(encoder, kind, *on_device, states=self.states(name), padding=padding)
            for row, prompt in enumerate(prompts[few]):
                yield prompt, {key: value[row].to("cpu", copy=True) for key, value in found.items()}

    def token_ids(self, name: str, prompts: list[str], length: int) -> torch.Tensor:
        """Return the ids (B, length) of prompts for a text encoder, padded or cut."""
        return self.tokens(name, prompts, length)[0]

    def tokens(self, name: str, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ids (B, length) of prompts for a text encoder, padded or cut, and 1 where they are no padding."""
        tokenizer = self._tokenizer(name)
        with readable(self.folder / tokenizer_of(name)), quiet():
            if (encoder := self._described(name)) and encoder.chat:
                prompts = [encoder.chat.around(prompt) for prompt in prompts]
            found = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids, found.attention_mask

    def states(self, name: str) -> tuple[int, ...]:
        """Return the hidden states of a text encoder that are read, if it is a language model."""
        encoder = self._described(name)
        return encoder.states if encoder else ()

    def _described(self, name: str) -> Encoder | None:
        return next((encoder for encoder in self.family.encoders if encoder.name == name), None)

    def _tokenizer(self, name: str) -> Any:
        from transformers import AutoTokenizer

        folder = self.folder / tokenizer_of(name)
        with readable(folder), quiet():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a text encoder computes."""
        return encoder_dtype(self.folder, name, self.compute, self.variant)

    def _encoder(self, name: str, kind: str, dtype: torch.dtype) -> Any:
        if self.texts is not None:
            return self._streamed(name, kind, dtype)
        if name not in self._held:
            self._held[name] = self._streamed(name, kind, dtype, keep=self.compute.left() // 2)
        return self._held[name]

    def _streamed(self, name: str, kind: str, dtype: torch.dtype, *, keep: int = 0) -> Any:
        """Return a text encoder whose layers are read when they run, beyond `keep` bytes; the rest is in memory."""
        folder = self.folder / name
        packed = packed_text(folder) if self.quantized and kind in LONG else None
        weights = part_weights(folder, kind, self.variant)
        assert weights is not None  # `can_stage`
        with readable(folder), quiet():
            model = empty_part(folder, kind, self.states(name))
            if kind in LANGUAGE and packed is None:
                model.model.embed_tokens = StoredTable(functools.partial(weights.rows, BY_ROW), dtype)
        stored = {n: tensor_of(kind, n) or n for n in model.state_dict()}
        read: Read = weights.__getitem__
        if packed is not None:
            packed.check(prepare_text_encoder(model, packed.precision))
            stored, read = {n: stored_name(n) for n in model.state_dict()}, packed
        layers = list(layers_of(model, kind))
        inside = {f"{prefix}{n}" for prefix, layer in layers for n in layer.state_dict()}
        outside = {n: s for n, s in stored.items() if n not in inside}
        found = {s: read(s).to(self.compute.device) for s in dict.fromkeys(outside.values())}
        found = {s: t if s.endswith(PACKED) else t.to(dtype) for s, t in found.items()}
        model.load_state_dict({n: found[s] for n, s in outside.items()}, strict=False, assign=True)
        complete(folder, kind, model, self.compute.device)
        named = [(layer, {n: stored[f"{prefix}{n}"] for n in layer.state_dict()}) for prefix, layer in layers]
        stream(
            named, read, device=self.compute.device, dtype=dtype,
            stay=fitting(named, (packed or weights).dtype, keep), ahead=(packed or weights).ahead,
        )  # fmt: skip
        for _, layer in layers:
            by_rows(layer, rows_of(kind, model.config, self.compute))
        return model.eval()
