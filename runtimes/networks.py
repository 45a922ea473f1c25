"""A `Backend` made of exported networks, each a function from named arrays to named arrays.

A runtime provides an `Engine`, which opens a network's folder (`OUT/transformer`). This file decides when each network
runs, and in how much memory; the family handles what differs between models (which hidden state, packing). Where all
networks fit into memory, all stay open. Otherwise they are open one after the other: text encoders, transformer, VAE.
One that does not fit alone runs in pieces, if its engine can cut it. The modulation, where an export has it apart, runs
once before the first step. Unless it is small it is then closed again, and runs in pieces in any case, because each of
its weights is used once.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json
from edgeprune.common.heap import trim
from edgeprune.common.memory import allowed, resident
from edgeprune.common.pieces import RESERVE, Needs
from edgeprune.families.encoders import LANGUAGE, LONG, check_tokens, text_encoders, tokenizer_of
from edgeprune.runtimes.base import Array, Settings, precision_of
from edgeprune.runtimes.embeddings import KeptEmbeddings
from edgeprune.runtimes.memory import Meter, Reading
from edgeprune.runtimes.modulation import AT_ONCE, ROOM, ROWS, SMALL, Table, keys_of
from edgeprune.runtimes.text import PromptTokenizer
from edgeprune.sampling.generation import images_at_once, longest_prompt
from edgeprune.sampling.latents import exported_scale
from edgeprune.sampling.prompts import cut_words

_AHEAD = 32
"""Most prompts that pass through the text encoders together where each is opened for them: their text is in memory."""
Shapes = Mapping[str, Sequence[int]]
"""The shape of each input of a network, by name."""
Tokens = Mapping[str, NDArray[np.int64]]
"""What a text encoder reads of prompts, by the name of its input: (B, tokens) each."""


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


@runtime_checkable
class Piecewise(Protocol):
    """A network that runs in pieces."""

    def many(self, feeds: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Array]]:
        """Yield the outputs for each set of inputs; all that fit go through a piece before the next is opened."""
        ...


class Engine(Protocol):
    """A vendor's library, which runs networks."""

    @property
    def name(self) -> str:
        """The runtime's name."""
        ...

    @property
    def activations(self) -> str:
        """What the transformer computes in, apart from INT4 weights; see `precision_of`."""
        ...

    @property
    def text_activations(self) -> str:
        """What the text encoders compute in: other values are other embeddings."""
        ...

    @property
    def counts_values(self) -> bool:
        """Whether `needs` counts the values of one sample, besides weights.

        If not, a network that is opened within a limit streams weights, for all rows of a step at once.
        """
        ...

    def open(self, folder: Path, limit: int | None) -> Network:
        """Open the network in a folder like OUT/transformer.

        Args:
            folder: the network's.
            limit: run it in pieces, so that the process has at most so many bytes; None to open it whole.
        """
        ...

    def needs(self, folder: Path, shapes: Shapes) -> Needs:
        """Return the bytes that a network adds to the process when it runs on inputs of these shapes."""
        ...

    def room(self) -> tuple[int, int]:
        """Return the bytes that the process has now where its networks will be, and may have at most."""
        ...

    def memory(self) -> dict[str, Reading]:
        """Return rows for the memory of a device that has its own."""
        ...


def room_here() -> tuple[int, int]:
    """Return the bytes that the process has now, and may have at most."""
    return resident(), allowed()


def files_of(folder: Path) -> Needs:
    """Return the bytes of a network's files, for one that is opened whole and whose values are not counted."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Needs(size, size)


@dataclass(frozen=True)
class WholeEngine:
    """An engine that opens every network whole; of what it takes, only the bytes of the files are counted."""

    name: str
    opener: Callable[[Path], Network]
    activations: str = "fp32"
    text_activations: str = "fp32"
    rows: Callable[[], dict[str, Reading]] = dict
    counts_values: bool = False

    def open(self, folder: Path, limit: int | None) -> Network:
        """Open a network whole."""
        return self.opener(folder)

    def needs(self, folder: Path, shapes: Shapes) -> Needs:
        """Return the bytes of its files; values are not counted."""
        return files_of(folder)

    def room(self) -> tuple[int, int]:
        """Return the bytes that the process has now, and may have at most."""
        return room_here()

    def memory(self) -> dict[str, Reading]:
        """Return rows for the memory of a device that has its own."""
        return self.rows()


class NetworkBackend:
    """The `Backend` of an export folder.

    Args:
        engine: runs the networks.
        folder: the export.
        settings: that folder's settings.
        memory: most bytes of the process, or of its device; None takes most of what is free.
        keep_embeddings: keeps encoded prompts in this folder.

    Raises:
        InputError: a file is missing, damaged or not as the export wrote it, that folder cannot be written, or the
            memory is too little for any image.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        settings: Settings,
        *,
        memory: int | None = None,
        keep_embeddings: str | Path | None = None,
    ) -> None:
        if memory is not None and (not isinstance(memory, int) or memory <= 0):
            raise InputError(f"memory: found {memory!r}, expected a number of bytes")
        self._base, free = engine.room()
        self._base += RESERVE
        self._meter = Meter()
        self.name, self.provider, self.why = engine.name, "", ""
        self._engine, self._folder, self._settings = engine, folder, settings
        self._memory, self._limit = memory, free if memory is None else memory
        self._needs: dict[tuple[str, str], Needs] = {}
        self._t5_tokens = settings.generation.max_sequence_length
        self._family, self._config = settings.family, settings.config
        check_tokens(folder, self._family.encoders, self._t5_tokens)
        vae = folder / "vae_decoder" / "config.json"
        self._scale = exported_scale(read_json(vae), self._family.vae, vae)
        self._encoders = text_encoders(folder)
        self._tokenizers = {}
        for name, kind in self._encoders.items():
            # diffusers pads the prompts of both CLIPs to the first tokenizer's length.
            if kind in LONG:
                encoder = next(each for each in self._family.encoders if each.name == name)
                length = encoder.length(self._t5_tokens)
            else:
                length = PromptTokenizer(folder / "tokenizer", chat=False).max_length
            where = folder / tokenizer_of(name)
            self._tokenizers[name] = PromptTokenizer(where, chat=kind in LANGUAGE, max_length=length)
        self._keep_embeddings = keep_embeddings
        self._kept = None if keep_embeddings is None else self._kept_in(Path(keep_embeddings))
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        path = folder / "edgeprune_export.json"
        exported = read_json(path)
        self._table = Table.of(exported, path)
        quantized = exported.get("quantized") is not False
        self.precision = precision_of(engine.activations, quantized=quantized)
        self.times: dict[str, dict[str, float]] = {}
        """Seconds it took to open each network, for runtimes that report the parts of that."""
        self._closed = False
        self._networks: dict[str, Network] = {}
        self._prepared: tuple[int, int] | None = None
        self._in_turn = False
        self._brief = False
        """Whether the modulation is opened for each image, and closed before its first step."""
        self._cut: set[str] = set()
        try:
            self.prepare(settings.generation.height, settings.generation.width)
        except InputError as refusal:
            side = 2 * settings.factor * settings.patch
            try:
                self.prepare(side, side)
            except InputError:
                raise refusal from None  # it is too little for any image
            self._in_turn = True  # another size has to be asked for

    def open(self) -> None:
        """Open all networks, if they fit together."""
        if self._in_turn:
            return
        try:
            for network in self._names:
                if network != ROWS or not self._brief:
                    self._network(network)
        except BaseException:
            self.close()  # nobody else could close those that are open
            raise

    @property
    def _names(self) -> tuple[str, ...]:
        """The networks, in the order in which they run."""
        return (*self._encoders, *([ROWS] if self._table else []), "transformer", "vae_decoder")

    def prepare(self, height: int, width: int) -> None:
        """Decide for images of this size which networks are in memory at one time, and which run in pieces.

        Raises:
            InputError: the memory is too little.
        """
        if self._prepared == (height, width):
            return
        shapes = self._shapes(height, width)
        needs = {name: self._need(name, shapes[name]) for name in self._names}
        if ROWS in needs and needs[ROWS].whole > SMALL:
            self._brief, least = True, min(needs[ROWS].least, needs[ROWS].whole)
            needs[ROWS] = Needs(least, least)
        in_turn = self._base + sum(need.whole for need in needs.values()) > self._limit
        over = {name for name, need in needs.items() if in_turn and self._base + need.whole > self._limit}
        cut = {name for name in over if needs[name].least < needs[name].whole}
        most = max(self._names, key=lambda name: needs[name].least if name in over else 0)
        least = self._base + needs[most].least
        if over and least > self._limit:
            if self._memory is not None:
                raise InputError(
                    f"memory: found {self._memory / 1e9:.2f} GB, expected at least {least / 1e9 + 0.015:.2f} GB, "
                    f"which {most} takes for an image of {width}x{height} pixels"
                )
            self._limit = least  # less is free, but the system may still find it
        if (in_turn, cut) != (self._in_turn, self._cut):
            self._close_all()
        self._prepared, self._in_turn, self._cut = (height, width), in_turn, cut

    def _need(self, name: str, shapes: Shapes) -> Needs:
        """Return what a network takes; it is counted once for each set of shapes."""
        key = name, repr(sorted(shapes.items()))
        if key not in self._needs:
            self._needs[key] = self._engine.needs(self._folder / name, shapes)
        return self._needs[key]

    def _shapes(self, height: int, width: int) -> dict[str, Shapes]:
        """Return the shapes of each network's inputs, for one image."""
        factor, channels = self._settings.factor, self._settings.channels
        latents = np.zeros((1, channels, height // factor, width // factor), np.float32)
        wide, pooled = self._family.text_widths(self._config)
        tokens = self._family.text_tokens(longest_prompt(self._folder), self._t5_tokens)
        text = np.zeros((1, tokens, wide), np.float32), np.zeros((1, pooled), np.float32)
        inputs = self._family.inputs(self._config, latents, *text, np.zeros(1, np.float32), 0.0)
        encoders: dict[str, Shapes] = {
            name: dict.fromkeys(self._read_by(name), (1, tokenizer.max_length))
            for name, tokenizer in self._tokenizers.items()
        }
        transformer: dict[str, Sequence[int]] = {name: value.shape for name, value in inputs.items()}
        rows: dict[str, Shapes] = {}
        if self._table is not None:
            read = [name for name in transformer if name in self._family.conditioning_inputs]
            rows[ROWS] = {name: (AT_ONCE, *transformer.pop(name)[1:]) for name in read}
            transformer[ROWS] = (1, self._table.width)
        return {**encoders, **rows, "transformer": transformer, "vae_decoder": {"latent_sample": latents.shape}}

    def _network(self, name: str) -> Network:
        """Return a network, opened if necessary; where they are open in turn, the others are closed first."""
        if self._closed:
            raise InputError("the runtime is closed; load the folder again")
        if self._in_turn and self._networks.keys() - {name}:
            self._close_all()
        if name not in self._networks:
            if name == ROWS and self._brief:  # it is not there when the weights are counted
                held, _ = self._engine.room()
                most = min(self._limit, held + RESERVE + ROOM)
                self._networks[name] = self._engine.open(self._folder / name, most)
                return self._networks[name]
            with self._meter.opening():
                limit = self._limit if name in self._cut else None
                self._networks[name] = self._engine.open(self._folder / name, limit)
            if name == "transformer":
                self.provider, self.why = self._networks[name].provider, self._networks[name].why
        return self._networks[name]

    def _run(self, name: str, feeds: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Array]]:
        """Yield a network's outputs for each set of inputs."""
        network = self._network(name)
        yield from network.many(feeds) if isinstance(network, Piecewise) else (network(**feed) for feed in feeds)

    def encode(self, prompts: list[str]) -> tuple[Array, Array]:
        """Encode text to (hidden (B, M, K), pooled (B, P))."""
        self._forget_rows()
        for name, tokenizer in self._tokenizers.items():
            if line := cut_words(name, prompts, tokenizer.count, tokenizer.max_length, tokenizer.until):
                warnings.warn(line, stacklevel=2)
        tokens = self._tokens(prompts)
        if self._kept is None:
            return self._encode(tokens)
        # What `encode_ahead` keeps is of one run: it does not grow with the prompts of later ones.
        return self._encode_kept(self._kept, tokens, keep=self._scratch is None)

    def _encode_kept(
        self, store: KeptEmbeddings, tokens: Mapping[str, Tokens], *, keep: bool = True
    ) -> tuple[Array, Array]:
        """Encode tokens, by text encoder, of the prompts that are not kept, and keep those if asked."""
        every = [values for inputs in tokens.values() for values in inputs.values()]
        paths = [store.path([values[row] for values in every]) for row in range(len(every[0]))]
        found = {path: kept for path in paths if (kept := store.read(path)) is not None}
        missing = {path: row for row, path in enumerate(paths) if path not in found}
        if missing:
            rows = list(missing.values())
            made = self._encode({n: {key: ids[rows] for key, ids in inputs.items()} for n, inputs in tokens.items()})
            for row, path in enumerate(missing):
                found[path] = made[0][row : row + 1], made[1][row : row + 1]
                if keep:
                    store.write(path, found[path])
        texts = [found[path] for path in paths]
        return np.concatenate([text[0] for text in texts]), np.concatenate([text[1] for text in texts])

    def encode_ahead(self, prompts: list[str]) -> None:
        """Encode prompts that `encode` gets next, where text encoders are not in memory all the time."""
        if not self._in_turn:
            return
        if self._keep_embeddings is None:
            self._forget()
            self._scratch = tempfile.TemporaryDirectory(prefix="edgeprune-text-")
            self._kept = self._kept_in(Path(self._scratch.name))
        assert self._kept is not None
        for start in range(0, len(prompts), _AHEAD):
            self._encode_kept(self._kept, self._tokens(prompts[start : start + _AHEAD]))

    def _forget(self) -> None:
        """Remove what `encode_ahead` has kept for a run."""
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = self._kept = None

    def _kept_in(self, folder: Path) -> KeptEmbeddings:
        settings = self._settings
        joined = settings.family.name, settings.family.text_widths(settings.config), self._t5_tokens
        computed = self._engine.name, self._engine.text_activations
        return KeptEmbeddings(folder, self._folder, list(self._encoders), [*joined, *computed])

    def _read_by(self, encoder: str) -> tuple[str, ...]:
        """Return what a text encoder reads of `PromptTokenizer.masked`: all but language models read padding, too."""
        return ("input_ids", "attention_mask") if self._encoders[encoder] in LANGUAGE else ("input_ids",)

    def _tokens(self, prompts: list[str]) -> dict[str, Tokens]:
        masked = {name: tokenizer.masked(prompts) for name, tokenizer in self._tokenizers.items()}
        return {name: {key: found[key] for key in self._read_by(name)} for name, found in masked.items()}

    def _encode(self, tokens: Mapping[str, Tokens]) -> tuple[Array, Array]:
        """Encode tokens, by text encoder."""
        outputs = {}
        for name, inputs in tokens.items():
            # One prompt at a time: the NPU compiles for one batch size.
            count = len(inputs["input_ids"])
            feeds = [{key: ids[row : row + 1] for key, ids in inputs.items()} for row in range(count)]
            rows = [*self._run(name, feeds)]
            outputs[name] = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        return self._family.join(self._config, outputs, self._t5_tokens)

    def step(self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float) -> Array:
        """Compute one velocity (B, C, h, w)."""
        self._prepare_for(latents)
        self.modulate(pooled, sigma, guidance)
        inputs = functools.partial(self._inputs, guidance=guidance)
        if self._one_by_one:
            rows = [slice(i, i + 1) for i in range(len(latents))]
            feeds = [inputs(latents[row], text[row], pooled[row], sigma[row]) for row in rows]
        else:
            feeds = [inputs(latents, text, pooled, sigma)]
        outputs = [next(iter(output.values())) for output in self._run("transformer", feeds)]
        velocity: Array = self._family.velocity(self._config, np.concatenate(outputs), latents.shape)
        return velocity

    def _inputs(
        self, latents: Array, text: Array, pooled: Array, sigma: Array, guidance: float
    ) -> Mapping[str, NDArray[Any]]:
        """Return the transformer's inputs by name."""
        inputs = self._family.inputs(self._config, latents, text, pooled, sigma, guidance)
        if self._table is None:
            return inputs
        others = {name: value for name, value in inputs.items() if name not in self._family.conditioning_inputs}
        return {**others, ROWS: self._table[keys_of(pooled, sigma, guidance)]}

    def modulate(self, pooled: Array, sigma: Array, guidance: float) -> bool:
        """Make the rows of texts (N, P) at noise levels (N), unless all are there; return whether any were made."""
        if self._table is None:
            return False
        keys = keys_of(pooled, sigma, guidance)
        if self._table.has(keys):
            return False
        different = {key: index for index, key in enumerate(keys)}  # the negative prompt's are the same for all images
        index = [*different.values()]
        # Of latents and text, which the modulation does not read, the least.
        patch, wide = self._settings.patch, self._family.text_widths(self._config)[0]
        latents = np.zeros((len(index), self._settings.channels, patch, patch), np.float32)
        text = np.zeros((len(index), 1, wide), np.float32)
        inputs = self._family.inputs(self._config, latents, text, pooled[index], sigma[index], guidance)
        read = {name: inputs[name] for name in self._family.conditioning_inputs if name in inputs}
        size = min(len(index), self._network(ROWS).largest_batch(next(iter(read))) or AT_ONCE, AT_ONCE)
        # The last call has as many rows as the others: a network is compiled for one number of them.
        groups = [np.arange(start, start + size).clip(max=len(index) - 1) for start in range(0, len(index), size)]
        made = self._run(ROWS, [{name: values[group] for name, values in read.items()} for group in groups])
        self._table.fill([*different], (output[ROWS] for output in made))
        if self._brief:
            self._networks.pop(ROWS).close()
            trim()
        return True

    def _forget_rows(self) -> None:
        if self._table is not None:
            self._table.clear()

    @property
    def _one_by_one(self) -> bool:
        """Whether the rows of a step go through the transformer one by one; guidance has two."""
        together = "transformer" in self._cut and not self._engine.counts_values
        return (self._in_turn or self._memory is not None) and not together

    def _prepare_for(self, latents: Array) -> None:
        self.prepare(*(side * self._settings.factor for side in latents.shape[2:]))

    def largest_batch(self) -> int | None:
        """Return the most rows that the transformer takes in one call, or None."""
        return None if self._one_by_one else self._network("transformer").largest_batch("hidden_states")

    def images_together(self, height: int, width: int, rows: int) -> int:
        """Return how many images of this size run in one batch: what is fast, and what the transformer takes."""
        most, size = self.largest_batch(), images_at_once(self._settings.tokens(height, width))
        return size if most is None else max(1, min(size, most // rows))

    def decode(self, latents: Array) -> Array:
        """Decode latents (B, C, h, w) to pixels (B, 3, H, W)."""
        self._forget_rows()
        self._prepare_for(latents)
        (output,) = self._run("vae_decoder", [{"latent_sample": self._scale.to_vae(latents)}])
        return next(iter(output.values()))

    def memory(self) -> dict[str, Reading]:
        """Return the rows of memory.SPLIT, for the device if it measures its own memory, else for this process.

        Weights that are opened and closed within a step cannot be told from activations: the row has both.
        """
        device = self._engine.memory()
        return device if "peak_bytes" in device else self._meter.rows() | device

    def close(self) -> None:
        """Close every network."""
        if not self._closed:
            self._meter.note()
        self._closed = True
        self._forget_rows()
        self._close_all()
        self._forget()

    def _close_all(self) -> None:
        if self._networks:
            self._meter.note()
        for network in self._networks.values():
            network.close()
        self._networks.clear()
        trim()
