"""The torch reference: runs a diffusers or artefact folder behind the common interface; only this file imports torch.

The other runtimes are compared with it: it has the same noise, schedule and guidance. It dequantises each layer of an
INT4 transformer at each call, which is exact but slow. On a machine with a GPU it runs there, so that `bench` compares
like with like. One model on several GPUs, and compilation, are not supported.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.threads import usable
from edgeprune.runtimes.base import GROUP, Array, Settings, precision_of
from edgeprune.runtimes.gpu import with_overhead
from edgeprune.runtimes.memory import Meter, Reading

with needs("compress"):
    import torch

    from edgeprune.artefact.checks import check_pipeline
    from edgeprune.artefact.loading import load_pipeline, open_transformer, quiet
    from edgeprune.artefact.manifest import INT4
    from edgeprune.artefact.staged import StagedPipeline, can_stage
    from edgeprune.families import Family, family_of_model
    from edgeprune.families.encoders import LONG, tokenizer_of
    from edgeprune.residency.compute import DTYPES, Compute, is_small, name_of
    from edgeprune.residency.running import check_room, dtype_of, running, within
    from edgeprune.sampling.denoising import Conditioning, at_once, batches_of, encode_prompts, evaluate, groups
    from edgeprune.sampling.generation import longest_prompt
    from edgeprune.sampling.latents import decoded, scale_of
    from edgeprune.sampling.prompts import cut_words

    with quiet():
        # Loads what all pipelines use. Importing it later would count as a pipeline's weights and load time.
        from diffusers import StableDiffusion3Pipeline  # noqa: F401

Rows = Callable[[], dict[str, Reading]]


class EagerBackend:
    """The `Backend` in plain torch; created by `open_backend`."""

    name = "eager"

    def __init__(
        self,
        opener: Callable[[], Any],
        settings: Settings,
        *,
        device: torch.device,
        why: str,
        dtype: str,
        quantized: bool,
    ) -> None:
        self.provider, self.why, self._device = str(device), why, device
        self._opener: Callable[[], Any] | None = opener
        """Loads the pipeline; None once the runtime is closed."""
        self._pipeline: Any | None = None
        self._meter = Meter()
        self._rows: Rows = self._meter.rows
        self._t5_tokens = settings.generation.max_sequence_length
        self.precision = precision_of(dtype, quantized=quantized)

    @property
    def pipeline(self) -> Any:
        """The underlying diffusers pipeline."""
        self.open()
        return self._pipeline

    def open(self) -> None:
        """Load the pipeline, unless it is there."""
        if self._opener is None:
            raise InputError("the runtime is closed; load the folder again")
        if self._pipeline is None:
            with self._meter.opening():
                self._pipeline = self._opener()
            self._rows = rows_of(self._device, self._meter)

    def prepare(self, height: int, width: int) -> None:
        """Do nothing: parts of the pipeline make room for each other as they run."""

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Encode text to (hidden (B, M, K), pooled (B, P)) with diffusers' own encode_prompt."""
        self._say_what_is_cut(family_of_model(self.pipeline.transformer), prompts)
        text = encode_prompts(self.pipeline, prompts, self._t5_tokens)
        return _numpy(text.hidden), _numpy(text.pooled)

    @torch.inference_mode()
    def encode_ahead(self, prompts: list[str]) -> None:
        """Encode prompts that `encode` gets next, where text encoders are not in memory all the time."""
        if isinstance(self.pipeline, StagedPipeline):
            self.pipeline.encode_ahead(prompts, self._t5_tokens)

    def _say_what_is_cut(self, family: Family, prompts: list[str]) -> None:
        first = None
        for encoder in family.encoders:
            tokenizer = self._tokenizer(encoder.name)
            # diffusers pads the prompts of both CLIPs to the first tokenizer's length.
            first = first or tokenizer.model_max_length
            if tokenizer is None:
                continue
            most = encoder.length(self._t5_tokens) if encoder.kind in LONG else first
            before, after = (encoder.chat.prefix, encoder.chat.suffix) if encoder.chat else ("", "")
            count, until = (functools.partial(_count, tokenizer, before, end) for end in (after, ""))
            with quiet():  # transformers warns of long texts in its own words
                line = cut_words(encoder.name, prompts, count, most, until)
            if line:
                warnings.warn(line, stacklevel=3)

    def _tokenizer(self, encoder: str) -> Any:
        if isinstance(self.pipeline, StagedPipeline):
            return self.pipeline.tokenizer_of(encoder)
        return getattr(self.pipeline, tokenizer_of(encoder), None)

    def modulate(self, pooled: Array, sigma: Array, guidance: float) -> bool:
        """Do nothing: the transformer computes its modulation in each step."""
        return False

    @torch.inference_mode()
    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float) -> Array:
        """Compute one velocity (B, C, h, w)."""
        condition = Conditioning(self._tensor(text), self._tensor(pooled))
        transformer, level = self.pipeline.transformer, self._tensor(sigma)
        return _numpy(evaluate(transformer, self._tensor(latents), condition, level, guidance))

    def largest_batch(self) -> int | None:
        """Return None: torch takes any batch that fits into memory."""
        return None

    def images_together(self, height: int, width: int, rows: int) -> int:
        """Return how many images of this size run together.

        Where blocks are read when they run, these pass through each block before the next is read: as many as there is
        room for, but no more than GROUP, which an interrupted run loses. In a block, rows still run a few at a time.
        """
        pipe, factor = self.pipeline, self.pipeline.vae_scale_factor
        family = family_of_model(pipe.transformer)
        shape = family.latents(pipe.transformer.config).channels, height // factor, width // factor
        size = at_once(pipe.transformer, shape)
        if not isinstance(pipe, StagedPipeline):
            return size
        text = family.text_tokens(longest_prompt(pipe.folder), self._t5_tokens)
        group = next(groups(pipe, batches_of(max(size, GROUP), size), shape, text, passes=rows))
        return int(group[-1].stop)

    @torch.inference_mode()
    def decode(self, latents: Array) -> Array:
        """Decode latents (B, C, h, w) to pixels (B, 3, H, W)."""
        if isinstance(self.pipeline, StagedPipeline):
            self.pipeline.make_room(*(side * self.pipeline.vae_scale_factor for side in latents.shape[-2:]))
        vae = self.pipeline.vae
        scaled = scale_of(vae).to_vae(self._tensor(latents))
        return _numpy(decoded(vae, scaled.to(vae.dtype)))

    def memory(self) -> dict[str, Reading]:
        """Return the rows of memory.SPLIT, for this process or for the GPU."""
        return self._rows()

    def close(self) -> None:
        """Drop the pipeline, which releases the weights."""
        if self._pipeline is not None:
            self.memory()  # records the rows that are a maximum
        self._pipeline = self._opener = None

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.tensor(array).to(self._device)


def _count(tokenizer: Any, before: str, after: str, text: str) -> int:
    return len(tokenizer(before + text + after).input_ids)


def _numpy(tensor: Any) -> Array:
    array: Array = tensor.float().cpu().numpy()
    return array


def gpu_rows(cuda: Any, device: torch.device, weights: int) -> dict[str, Reading]:
    """Return the rows of memory.SPLIT for the GPU; the runtime's overhead is there only if NVML reports it.

    Args:
        cuda: `torch.cuda`, torch's module of another kind of GPU with the same functions, or a test's stand-in.
        device: the GPU.
        weights: bytes that torch had allocated once the model was on the GPU.
    """
    peak, how = cuda.max_memory_reserved(device), "peak of torch's allocator (max_memory_reserved)"
    rows = {
        "weights_bytes": Reading(weights, "on the GPU once the model was there (torch, memory_allocated)", "gpu"),
        "activations_bytes": Reading(max(0, peak - weights), f"on the GPU: {how} less weights", "gpu"),
    }
    overhead_how = "CUDA's own on the GPU: this process now (NVML) less memory_reserved"
    return with_overhead(rows, peak, how, cuda.memory_reserved(device), overhead_how)


def rows_of(device: torch.device, meter: Meter) -> Rows:
    """Return what reads the rows of memory.SPLIT: of the GPU, or of the process where the GPU shares its memory (mps).

    Args:
        device: where a model was loaded just now.
        meter: measured the process around it.
    """
    if device.type in ("cpu", "mps"):
        return meter.rows
    cuda: Any = torch.get_device_module(device)
    return functools.partial(gpu_rows, cuda, device, cuda.memory_allocated(device))


def _planned(
    folder: Path, dtype: str | None, variant: str | None, compute: Compute, *, quantized: bool
) -> tuple[Callable[[], Any], torch.dtype]:
    """Return what loads a folder's pipeline, and the dtype that its transformer computes in.

    The pipeline is diffusers' own if the model is small, else one whose parts are in memory in turn.
    """
    check_pipeline(folder, variant)
    stored = open_transformer(folder, quantized=quantized, variant=variant)
    chosen = DTYPES[dtype] if dtype else dtype_of(stored, compute)
    small = is_small(stored.numbers)
    if (small and compute.memory is None) or not can_stage(folder):

        def whole() -> Any:
            pipe = load_pipeline(folder, stored.load(chosen), chosen, variant=variant, quantized=quantized)
            within(pipe.to(compute.device).transformer, compute)
            return pipe

        return whole, chosen
    check_room(stored, compute, chosen)

    def in_turn() -> Any:
        return StagedPipeline(folder, running(stored, compute, chosen), compute, variant, quantized=quantized)

    return in_turn, chosen


def _why(asked: str, device: torch.device) -> str:
    if asked != "auto":
        return f"device={asked}"
    return "torch finds no GPU" if device.type == "cpu" else "torch finds a GPU"


def open_backend(
    folder: Path,
    settings: Settings,
    *,
    dtype: str | None = None,
    threads: int = 0,
    device: str = "auto",
    variant: str | None = None,
    memory: int | None = None,
    quantized: bool | None = None,
) -> EagerBackend:
    """Open a diffusers or artefact folder.

    Of a large model, text encoders, transformer and VAE are in memory one after the other, and blocks of the
    transformer that do not fit are read when they run.

    Args:
        folder: the folder.
        settings: that folder's settings.
        dtype: `fp32`, `bf16` or `fp16`; None for the one that `Compute.dtype` chooses, float32 for a small model.
        threads: torch's threads; 0 keeps its default, or fewer if affinity, quota and cores allow fewer.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps` or `xpu`; auto takes a GPU that torch finds, else the processor.
        variant: of an original's weights, such as fp16; None for the full ones, or the only ones that there are.
        memory: most bytes of the process, on a GPU of the GPU; None takes most of what is free.
        quantized: use an artefact's INT4 transformer; None does if there is one.

    Raises:
        InputError: the dtype is unknown, threads are below 0, the device is not present, or the folder is not a usable
            pipeline.
    """
    compute = Compute.of(ComputeOptions(device, memory))
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
    if threads < 0:
        raise InputError(f"threads: found {threads}, expected 0 or more")
    torch.set_num_threads(threads or min(torch.get_num_threads(), usable()))
    quantized = (folder / INT4).is_dir() if quantized is None else quantized
    opener, chosen = _planned(folder, dtype, variant, compute, quantized=quantized)
    return EagerBackend(
        opener, settings, device=compute.device, why=_why(device, compute.device), dtype=name_of(chosen),
        quantized=quantized,
    )  # fmt: skip
