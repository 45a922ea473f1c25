"""An export folder in ONNX Runtime: text encoders, transformer, VAE decoder; numpy in and out.

Needs onnxruntime and tokenizers, not torch. The INT4 weights are DequantizeLinear + MatMul pairs that ONNX
Runtime fuses to MatMulNBits. What it leaves out: a T5 encoder, I/O binding, prepacked weights on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as vendor

from edgeprune.errors import InputError
from edgeprune.files import read_json
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.text import PromptTokenizer

_VENDOR_ERRORS = (
    vendor.EPFail,
    vendor.Fail,
    vendor.InvalidArgument,
    vendor.InvalidGraph,
    vendor.InvalidProtobuf,
    vendor.NoModel,
    vendor.NoSuchFile,
    vendor.NotImplemented,
    vendor.RuntimeException,
)
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class OrtBackend:
    """The `Backend` of ONNX Runtime; made by `open_backend`."""

    name = "ort"

    def __init__(self, folder: Path, settings: Settings, *, accuracy_level: int, threads: int) -> None:
        if (folder / "text_encoder_3").exists():
            raise InputError(f"{folder / 'text_encoder_3'}: found a T5 encoder, expected none; ort does not run it yet")
        self._zero_tokens = settings.generation.max_sequence_length
        config_path = folder / "transformer" / "config.json"
        self._width = read_json(config_path).get("joint_attention_dim")
        if not isinstance(self._width, int):
            raise InputError(f"{config_path}: joint_attention_dim: found {self._width!r}, expected a whole number")
        vae = read_json(folder / "vae_decoder" / "config.json")
        self._scaling, self._shift = vae.get("scaling_factor") or 1.0, vae.get("shift_factor") or 0.0
        first = PromptTokenizer(folder / "tokenizer")
        # diffusers pads both prompts to the first tokenizer's length.
        self._tokenizers = first, PromptTokenizer(folder / "tokenizer_2", max_length=first.max_length)
        options = session_options(accuracy_level=accuracy_level, threads=threads)
        self._encoders = [
            _Session(folder / name / "model.onnx", options) for name in ("text_encoder", "text_encoder_2")
        ]
        self._transformer: _Session | None = _Session(folder / "transformer" / "model.onnx", options)
        self._decoder: _Session | None = _Session(folder / "vae_decoder" / "model.onnx", options)
        self.provider = self._transformer.provider
        manifest = folder / "edgeprune_export.json"
        self.precision = "fp32" if manifest.exists() and read_json(manifest).get("quantized") is False else "int4"

    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Text to (hidden (B, M, K), pooled (B, P))."""
        if not self._encoders:
            raise InputError("runtime: found it closed, expected an open one")
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self._tokenizers, self._encoders, strict=True):
            outputs = encoder(input_ids=tokenizer(prompts))
            # hidden_states.0 is the embedding, .n the last layer: SD3 reads the one before the last.
            states = sorted((int(k.rpartition(".")[2]), k) for k in outputs if k.startswith("hidden_states."))
            hidden.append(outputs[states[-2][1]])
            pooled.append(outputs["text_embeds"])
        joined = np.concatenate(hidden, axis=-1)
        beyond = (0, self._zero_tokens), (0, self._width - joined.shape[-1])
        return np.pad(joined, ((0, 0), *beyond)), np.concatenate(pooled, axis=-1)

    def step(self, latents: Array, text: Array, pooled: Array, timestep: Array) -> Array:
        """One velocity (B, C, h, w)."""
        if self._transformer is None:
            raise InputError("runtime: found it closed, expected an open one")
        outputs = self._transformer(
            hidden_states=latents, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep
        )
        return next(iter(outputs.values()))

    def decode(self, latents: Array) -> Array:
        """Latents (B, C, h, w) to pixels (B, 3, H, W)."""
        if self._decoder is None:
            raise InputError("runtime: found it closed, expected an open one")
        scaled = latents / np.float32(self._scaling) + np.float32(self._shift)
        return next(iter(self._decoder(latent_sample=scaled).values()))

    def close(self) -> None:
        """Drop the sessions; ONNX Runtime frees their memory."""
        self._encoders, self._transformer, self._decoder = [], None, None


class _Session:
    """One ONNX file, called by input name, answering by output name, its errors mapped to ours."""

    def __init__(self, path: Path, options: onnxruntime.SessionOptions) -> None:
        if not path.exists():
            raise InputError(f"{path}: found no file, expected an ONNX model; export again")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=providers())
        except _VENDOR_ERRORS as error:
            raise InputError(f"{path}: found {_line(error)}, expected a whole ONNX model; export again") from None
        self._path = path
        self._inputs = {i.name: _TYPES.get(i.type, np.float32) for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self.provider: str = self._session.get_providers()[0]

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        missing = set(self._inputs) - set(arrays)
        if missing:
            raise InputError(f"{self._path}: inputs: found also {sorted(missing)}, expected {sorted(arrays)}")
        feed = {name: np.asarray(arrays[name], dtype) for name, dtype in self._inputs.items()}
        try:
            values = self._session.run(None, feed)
        except _VENDOR_ERRORS as error:
            shapes = {k: v.shape for k, v in feed.items()}
            raise InputError(f"{self._path}: found {_line(error)}; inputs were {shapes}") from None
        return {k: np.asarray(v, np.float32) for k, v in zip(self._outputs, values, strict=True)}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def providers() -> list[str]:
    """CUDA if this onnxruntime has it, then CPU."""
    return [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in onnxruntime.get_available_providers()]


def session_options(*, accuracy_level: int = 1, threads: int = 0) -> onnxruntime.SessionOptions:
    """Options that favour exactness and little memory.

    On random SD3.5-Large weights level 4 had a relative error of 4.5e-3 against 2.6e-7 at level 1, and was not faster.

    Args:
        accuracy_level: of MatMulNBits: 1 computes in float32, 4 in int8.
        threads: inside one operator; 0 lets ONNX Runtime take one per core.

    Raises:
        InputError: the accuracy level is none of 0 to 4.
    """
    if accuracy_level not in range(5):
        raise InputError(f"accuracy_level: found {accuracy_level}, expected 0 to 4")
    options = onnxruntime.SessionOptions()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    # An arena keeps the largest step's activations for good; image sizes change, so a pattern would not be reused.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    return options


def open_backend(folder: Path, settings: Settings, *, accuracy_level: int = 1, threads: int = 0) -> OrtBackend:
    """Open an export folder.

    Raises:
        InputError: a file is missing, truncated or not what the export writes.
    """
    return OrtBackend(folder, settings, accuracy_level=accuracy_level, threads=threads)
