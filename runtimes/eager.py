"""The torch reference: a diffusers or artefact folder behind the same interface; the one file here that imports torch.

It exists to compare with: same noise, same schedule, same guidance as the other runtimes. An artefact's INT4
transformer computes by dequantising each layer at each call: exact, slow. What it leaves out: GPUs, compilation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.extras import needs
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.memory import Meter, Reading

with needs("compress"):
    import torch
    from diffusers import StableDiffusion3Pipeline

    from edgeprune import checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class EagerBackend:
    """The `Backend` of plain torch; made by `open_backend`."""

    name, provider, why = "eager", "cpu", "the only one it has"

    def __init__(
        self, pipeline: StableDiffusion3Pipeline, settings: Settings, meter: Meter, *, dtype: str, quantized: bool
    ) -> None:
        self._meter = meter
        self._pipeline: StableDiffusion3Pipeline | None = pipeline
        self._dtype = DTYPES[dtype]
        self._zero_tokens = settings.generation.max_sequence_length
        self.precision = "int4" if quantized else dtype

    @property
    def pipeline(self) -> StableDiffusion3Pipeline:
        """The diffusers pipeline behind it."""
        if self._pipeline is None:
            raise InputError("runtime: found it closed, expected an open one")
        return self._pipeline

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Text to (hidden (B, M, K), pooled (B, P)), by diffusers' own encode_prompt."""
        hidden, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._zero_tokens,
        )
        return _numpy(hidden), _numpy(pooled)

    @torch.inference_mode()
    def step(self, latents: Array, text: Array, pooled: Array, timestep: Array) -> Array:
        """One velocity (B, C, h, w)."""
        velocity = self.pipeline.transformer(
            hidden_states=self._tensor(latents),
            encoder_hidden_states=self._tensor(text),
            pooled_projections=self._tensor(pooled),
            timestep=torch.from_numpy(timestep),  # float32: half precision would move the noise level
            return_dict=False,
        )[0]
        return _numpy(velocity)

    @torch.inference_mode()
    def decode(self, latents: Array) -> Array:
        """Latents (B, C, h, w) to pixels (B, 3, H, W)."""
        vae = self.pipeline.vae
        scaled = latents / np.float32(vae.config.scaling_factor) + np.float32(vae.config.shift_factor or 0.0)
        return _numpy(vae.decode(self._tensor(scaled), return_dict=False)[0])

    def memory(self) -> dict[str, Reading]:
        """The rows of memory.SPLIT, of this process."""
        return self._meter.rows()

    def close(self) -> None:
        """Drop the pipeline."""
        if self._pipeline is not None:
            self._meter.note()
        self._pipeline = None

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._dtype)


def _numpy(tensor: Any) -> Array:
    array: Array = tensor.float().numpy()
    return array


def open_backend(folder: Path, settings: Settings, *, dtype: str = "fp32", threads: int = 0) -> EagerBackend:
    """Open a diffusers or artefact folder; an artefact's INT4 transformer is used where there is one.

    Raises:
        InputError: an unknown dtype, or the folder is not a usable pipeline.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if threads:
        torch.set_num_threads(threads)
    meter = Meter()
    with meter.opening():
        pipeline = checkpoint.load(folder, dtype=DTYPES[dtype])
    quantized = (folder / "transformer_int4").is_dir()
    return EagerBackend(pipeline, settings, meter, dtype=dtype, quantized=quantized)
