"""A `Backend` made of exported networks, each a function from named arrays to named arrays.

A runtime provides a function that opens a network's folder (`OUT/transformer`). This file decides when each network
runs; the family handles what differs between models (which hidden state, packing). Low-memory mode opens a network when
it is needed and closes it before the next stage, so the peak is the largest stage, not the sum. The stages are CLIPs,
T5, transformer, VAE. Opening CLIPs one at a time would fragment the heap: that measured 24 MB more, not 32 MB less.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json
from edgeprune.families.encoders import T5, check_tokens, text_encoders, tokenizer_of
from edgeprune.runtimes.base import Array, Settings, precision_of
from edgeprune.runtimes.memory import Meter, Reading
from edgeprune.runtimes.text import PromptTokenizer
from edgeprune.sampling.generation import latent_scale
from edgeprune.sampling.prompts import cut_words


class Network(Protocol):
    """One opened network."""

    provider: str
    """Where it computes, in the runtime's own term."""
    why: str
    """Why it computes there."""

    def largest_batch(self, name: str) -> int | None:
        """Return the most rows that the input of this name takes in one call, or None if there is no limit."""
        ...

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32; inputs are cast to the types of the file.

        Raises:
            InputError: the vendor reports an error; its text is on one line.
        """
        ...

    def close(self) -> None:
        """Release the weights; a second call does nothing."""
        ...


Open = Callable[[Path], Network]
"""Opens the network in a folder like OUT/transformer."""


class NetworkBackend:
    """The `Backend` of an export folder.

    Args:
        name: the runtime's name.
        folder: the export.
        settings: that folder's settings.
        open_network: opens one network's folder.
        activations: what the transformer computes in, apart from INT4 weights; see `precision_of`.
        low_memory: hold the networks of one stage at a time.
        memory: returns rows for the memory of a device that has its own.

    Raises:
        InputError: a file is missing, damaged or not as the export wrote it.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Settings,
        open_network: Open,
        *,
        activations: str = "fp32",
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
        vae = folder / "vae_decoder" / "config.json"
        self._scaling, self._shift = latent_scale(read_json(vae), vae)
        self._encoders = text_encoders(folder)
        first = PromptTokenizer(folder / "tokenizer")
        # diffusers pads the prompts of both CLIPs to the first tokenizer's length.
        lengths = {n: self._t5_tokens if kind == T5 else first.max_length for n, kind in self._encoders.items()}
        self._tokenizers = {
            n: PromptTokenizer(folder / tokenizer_of(n), max_length=length) for n, length in lengths.items()
        }
        quantized = read_json(folder / "edgeprune_export.json").get("quantized") is not False
        self.precision = precision_of(activations, quantized=quantized)
        self.times: dict[str, dict[str, float]] = {}
        """Seconds it took to open each network, for runtimes that report the parts of that."""
        self._closed = False
        self._networks: dict[str, Network] = {}
        if not low_memory:
            try:
                for network in (*self._encoders, "transformer", "vae_decoder"):
                    self._network(network)
            except BaseException:
                self.close()  # nobody else could close those that are open
                raise

    def _network(self, name: str) -> Network:
        """Return a network, opened if necessary; low-memory mode first closes the networks of other stages."""
        if self._closed:
            raise InputError("the runtime is closed; load the folder again")
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
        """Return a network's stage: a text encoder's class, else its name. Low-memory mode holds only one stage."""
        return self._encoders.get(name, name)

    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Encode text to (hidden (B, M, K), pooled (B, P))."""
        outputs = {}
        for name in self._encoders:
            tokenizer = self._tokenizers[name]
            if line := cut_words(name, prompts, tokenizer.count, tokenizer.max_length):
                warnings.warn(line, stacklevel=2)
            network = self._network(name)
            # One prompt at a time: the NPU compiles for one batch size.
            rows = [network(input_ids=row[None]) for row in tokenizer(prompts)]
            outputs[name] = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        return self._family.join(self._config, outputs, self._t5_tokens)

    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float) -> Array:
        """Compute one velocity (B, C, h, w)."""
        inputs = self._family.inputs(self._config, latents, text, pooled, sigma, guidance)
        outputs = self._network("transformer")(**inputs)
        velocity: Array = self._family.velocity(self._config, next(iter(outputs.values())), latents.shape)
        return velocity

    def largest_batch(self) -> int | None:
        """Return the most rows that the transformer takes in one call, or None."""
        return self._network("transformer").largest_batch("hidden_states")

    def decode(self, latents: Array) -> Array:
        """Decode latents (B, C, h, w) to pixels (B, 3, H, W)."""
        decoder = self._network("vae_decoder")
        scaled = latents / np.float32(self._scaling) + np.float32(self._shift)
        return next(iter(decoder(latent_sample=scaled).values()))

    def memory(self) -> dict[str, Reading]:
        """Return the rows of memory.SPLIT, for the device if it measures its own memory, else for this process."""
        device = self._device_memory()
        return device if "peak_bytes" in device else self._meter.rows() | device

    def close(self) -> None:
        """Close every network."""
        if not self._closed:
            self._meter.note()
        self._closed = True
        for network in self._networks.values():
            network.close()
        self._networks.clear()
