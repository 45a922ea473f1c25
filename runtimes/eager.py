"""The torch reference: a diffusers or artefact folder behind the same interface; the one file here that imports torch.

It exists to compare with: same noise, same schedule, same guidance as the other runtimes. An artefact's INT4
transformer computes by dequantising each layer at each call: exact, slow. On a machine with a GPU it runs there, so
that `bench` compares like with like. What it leaves out: several GPUs, compilation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.gpu import with_overhead
from edgeprune.runtimes.memory import Meter, Reading

with needs("compress"):
    import torch

    from edgeprune.artefact import checkpoint
    from edgeprune.families import family_of_model
    from edgeprune.sampling.denoising import Conditioning, velocity

    with checkpoint.quiet():
        # Brings what all pipelines use. Imported when one is opened, it would count as its weights and its load time.
        from diffusers import StableDiffusion3Pipeline  # noqa: F401

Rows = Callable[[], dict[str, Reading]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class EagerBackend:
    """The `Backend` of plain torch; made by `open_backend`."""

    name = "eager"

    def __init__(
        self,
        pipeline: Any,
        settings: Settings,
        rows: Rows,
        *,
        device: str,
        why: str,
        dtype: str,
        quantized: bool,
    ) -> None:
        self.provider, self.why, self._rows = device, why, rows
        self._device = torch.device(device)
        self._pipeline: Any | None = pipeline
        self._dtype = DTYPES[dtype]
        self._t5_tokens = settings.generation.max_sequence_length
        self.precision = "int4" if quantized else dtype

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline behind it."""
        if self._pipeline is None:
            raise InputError("runtime: found it closed, expected an open one")
        return self._pipeline

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Text to (hidden (B, M, K), pooled (B, P)), by diffusers' own encode_prompt."""
        family = family_of_model(self.pipeline.transformer)
        hidden, pooled = family.encode(self.pipeline, prompts, self._t5_tokens)
        return _numpy(hidden), _numpy(pooled)

    @torch.inference_mode()
    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float) -> Array:
        """One velocity (B, C, h, w)."""
        condition = Conditioning(self._tensor(text), self._tensor(pooled))
        # float32: half precision would move the noise level
        level = torch.from_numpy(sigma).to(self._device)
        return _numpy(velocity(self.pipeline.transformer, self._tensor(latents), condition, level, guidance))

    @torch.inference_mode()
    def decode(self, latents: Array) -> Array:
        """Latents (B, C, h, w) to pixels (B, 3, H, W)."""
        vae = self.pipeline.vae
        scaled = latents / np.float32(vae.config.scaling_factor) + np.float32(vae.config.shift_factor or 0.0)
        return _numpy(vae.decode(self._tensor(scaled), return_dict=False)[0])

    def memory(self) -> dict[str, Reading]:
        """The rows of memory.SPLIT, of this process or of the GPU."""
        return self._rows()

    def close(self) -> None:
        """Drop the pipeline."""
        if self._pipeline is not None:
            self.memory()  # a row may be a maximum so far
        self._pipeline = None

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.tensor(array).to(self._device, self._dtype)


def _numpy(tensor: Any) -> Array:
    array: Array = tensor.float().cpu().numpy()
    return array


def cuda_rows(cuda: Any, weights: int) -> dict[str, Reading]:
    """The rows of memory.SPLIT, of the GPU instead of the process; its overhead only where NVML tells.

    Args:
        cuda: `torch.cuda`, or what a test puts in its place.
        weights: what torch had allocated once the model was there, in bytes.
    """
    peak, how = cuda.max_memory_reserved(), "peak of torch's allocator (max_memory_reserved)"
    rows = {
        "weights_bytes": Reading(weights, "on the GPU once the model was there (torch, memory_allocated)", "gpu"),
        "activations_bytes": Reading(max(0, peak - weights), f"on the GPU: {how} less weights", "gpu"),
    }
    own = "CUDA's own on the GPU: this process now (NVML) less memory_reserved"
    return with_overhead(rows, peak, how, cuda.memory_reserved(), own)


def _pick_device(device: str | None) -> tuple[str, str]:
    """Where to compute, and why there."""
    here = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if device is None:
        return here[0], "torch finds a GPU" if here[0] == "cuda" else "torch finds no GPU"
    if device not in here:
        raise InputError(f"device: found {device!r}, expected one of {', '.join(here)}, which torch finds here")
    return device, f"device={device}"


def open_backend(
    folder: Path, settings: Settings, *, dtype: str = "fp32", threads: int = 0, device: str | None = None
) -> EagerBackend:
    """Open a diffusers or artefact folder; an artefact's INT4 transformer is used where there is one.

    Args:
        device: `cuda` or `cpu`; None takes the GPU where there is one.

    Raises:
        InputError: an unknown dtype, a device that is not here, or the folder is not a usable pipeline.
    """
    where, why = _pick_device(device)
    if dtype not in DTYPES:
        raise InputError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if threads:
        torch.set_num_threads(threads)
    meter = Meter()
    with meter.opening():
        pipeline = checkpoint.load(folder, dtype=DTYPES[dtype])
    rows: Rows = meter.rows
    if where == "cuda":
        pipeline.to(where)
        rows = functools.partial(cuda_rows, torch.cuda, torch.cuda.memory_allocated())
    quantized = (folder / "transformer_int4").is_dir()
    return EagerBackend(pipeline, settings, rows, device=where, why=why, dtype=dtype, quantized=quantized)
