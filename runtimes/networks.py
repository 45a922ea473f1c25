"""A `Backend` made of exported networks, each a function from named arrays to named arrays.

A runtime gives one function, which opens a network's folder (`OUT/transformer`); how networks are used is here once,
and what of it differs between models (which hidden state, packing) is the family's. Low-memory mode opens a network
when it is needed and closes it before one of the next stage is, so that the peak is the largest stage, not the sum:
CLIPs, T5, transformer, VAE. CLIPs one at a time would leave holes in the heap: 24 MB more in tests/test_memory.py, not
32 less.
What it leaves out: the vendors' own options (each runtime's `open_backend`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.fields import real
from edgeprune.common.files import read_json
from edgeprune.families.encoders import T5, check_tokens, text_encoders, tokenizer_of
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.memory import Meter, Reading
from edgeprune.runtimes.text import PromptTokenizer


class Network(Protocol):
    """One opened network."""

    provider: str
    """Where it computes, in the runtime's own word."""
    why: str
    """Why there."""

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Outputs by name, float32; inputs are cast to what the file wants.

        Raises:
            InputError: the vendor's error, on one line.
        """
        ...

    def close(self) -> None:
        """Give the weights back. Calling it twice is allowed."""
        ...


Open = Callable[[Path], Network]
"""Opens the network of a folder like OUT/transformer."""


class NetworkBackend:
    """The `Backend` of an export folder.

    Args:
        name: the runtime's.
        folder: the export.
        settings: what its small files say.
        open_network: opens one network's folder.
        low_memory: hold one stage's networks at a time.
        memory: rows of a device's own memory, where it has one.

    Raises:
        InputError: a file is missing, damaged or not what the export writes.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Settings,
        open_network: Open,
        *,
        low_memory: bool,
        memory: Callable[[], dict[str, Reading]] = dict,
    ) -> None:
        self._meter = Meter()
        self.name, self.provider, self.why = name, "", ""
        self._device_memory = memory
        self._folder, self._open, self._low_memory = folder, open_network, low_memory
        self._t5_tokens = settings.generation.max_sequence_length
        check_tokens(folder, self._t5_tokens)
        self._family, self._config = settings.family, settings.config
        vae = read_json(folder / "vae_decoder" / "config.json")
        where = folder / "vae_decoder" / "config.json"
        given = {"scaling_factor": vae.get("scaling_factor") or 1.0, "shift_factor": vae.get("shift_factor") or 0.0}
        self._scaling = real(given, "scaling_factor", where, least=1e-6, most=1e6)
        self._shift = real(given, "shift_factor", where, least=-1e6, most=1e6)
        self._encoders = text_encoders(folder)
        first = PromptTokenizer(folder / "tokenizer")
        # diffusers pads the prompts of both CLIPs to the first tokenizer's length.
        lengths = {n: self._t5_tokens if kind == T5 else first.max_length for n, kind in self._encoders.items()}
        self._tokenizers = {
            n: PromptTokenizer(folder / tokenizer_of(n), max_length=length) for n, length in lengths.items()
        }
        quantized = read_json(folder / "edgeprune_export.json").get("quantized")
        self.precision = "fp32" if quantized is False else "int4"
        self.times: dict[str, dict[str, float]] = {}
        """By network, seconds of opening it, where a runtime tells its parts apart."""
        self._closed = False
        self._networks: dict[str, Network] = {}
        if not low_memory:
            try:
                for network in (*self._encoders, "transformer", "vae_decoder"):
                    self._network(network)
            except BaseException:
                self.close()  # nobody else holds those that were opened
                raise

    def _network(self, name: str) -> Network:
        """A network, opened if it is not; in low-memory mode those of other stages are closed before."""
        if self._closed:
            raise InputError("runtime: found it closed, expected an open one")
        if self._low_memory:
            for other in [n for n in self._networks if self._stage(n) != self._stage(name)]:
                self._meter.note()
                self._networks.pop(other).close()
        if name not in self._networks:
            with self._meter.opening():
                self._networks[name] = self._open(self._folder / name)
            if name == "transformer":
                self.provider, self.why = self._networks[name].provider, self._networks[name].why
        return self._networks[name]

    def _stage(self, name: str) -> str:
        """What a network shares with those that low-memory mode holds together with it: an encoder's class."""
        return self._encoders.get(name, name)

    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Text to (hidden (B, M, K), pooled (B, P))."""
        outputs = {}
        for name in self._encoders:
            network = self._network(name)
            # One prompt at a time: the NPU compiles for a batch.
            rows = [network(input_ids=row[None]) for row in self._tokenizers[name](prompts)]
            outputs[name] = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        return self._family.join(self._config, outputs, self._t5_tokens)

    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float) -> Array:
        """One velocity (B, C, h, w)."""
        inputs = self._family.inputs(self._config, latents, text, pooled, sigma, guidance)
        outputs = self._network("transformer")(**inputs)
        velocity: Array = self._family.velocity(self._config, next(iter(outputs.values())), latents.shape)
        return velocity

    def decode(self, latents: Array) -> Array:
        """Latents (B, C, h, w) to pixels (B, 3, H, W)."""
        decoder = self._network("vae_decoder")
        scaled = latents / np.float32(self._scaling) + np.float32(self._shift)
        return next(iter(decoder(latent_sample=scaled).values()))

    def memory(self) -> dict[str, Reading]:
        """The rows of memory.SPLIT: the device's own where it has them, not a mixture."""
        own = self._device_memory()
        return own if "peak_bytes" in own else self._meter.rows() | own

    def close(self) -> None:
        """Close every network."""
        if not self._closed:
            self._meter.note()
        self._closed = True
        for network in self._networks.values():
            network.close()
        self._networks.clear()
