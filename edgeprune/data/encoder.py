"""Encodes entries of a source to the tensors of a shard: images and captions to latents and text embeddings.

Threads decode and resize images a few entries ahead of the encoders (Pillow releases the GIL while it does). Results
keep the source's order, so the number of threads changes no byte.

Notation: as in pairs.py.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.splits import Split
from edgeprune.common.tensors import Tensors
from edgeprune.data.buckets import MOST_ENLARGED, Size, enlarged, fitted, nearest
from edgeprune.data.settings import SHAPES, CacheOptions, is_drawn, texts_of
from edgeprune.data.sources import MOST_UNUSABLE, Entry, Layout, Pair, Skipped, opened
from edgeprune.sampling.denoising import (
    Start,
    at_once,
    batches_of,
    denoise_all,
    encode_images,
    encode_once,
    encode_prompts,
    groups,
    latent_shape,
    noise,
    passes_of,
    sigmas,
)
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import PLAIN, World

_BATCH = 32
"""Images encoded at once. With several sizes, up to this many images of each size are in memory."""
_T = TypeVar("_T")
_R = TypeVar("_R")


def entries_of(options: CacheOptions, layout: Layout | None, world: World | None) -> Iterator[Any]:
    """Return the source's entries: images with captions, or (seed, prompt) for images that the model generates.

    Args:
        options: which samples.
        layout: of a source of images.
        world: that the model draws, whose scenes SHAPES is; of a model that draws none, the plain one's.
    """
    if layout:
        return layout.read(options.source)
    if options.source == SHAPES:
        scenes = zip(*(world or PLAIN).training_scenes(options.samples, seed=Split.TRAINING.seed(7)), strict=True)
        return (Pair(f"scene {i}", Image.fromarray(pixels), text) for i, (pixels, text) in enumerate(scenes))
    prompts = texts_of(options.source)
    return ((Split.TRAINING.seed(i), prompts[i % len(prompts)]) for i in range(options.samples))


@dataclass
class Encoded:
    """The content of a shard: latents and captions of the usable entries, and the skipped entries."""

    latents: dict[Size, list[torch.Tensor]] = field(default_factory=dict)
    """By image size in pixels; batches (B, C, h, w)."""
    texts: dict[Size, list[str]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def samples(self) -> int:
        """The number of usable entries."""
        return sum(map(len, self.texts.values()))


@dataclass
class Encoder:
    """Encodes entries with a pipeline that is loaded when the first entry needs it."""

    load: Callable[[], Any]
    generation: Generation
    options: CacheOptions
    layout: Layout | None
    sizes: list[Size]
    workers: int
    _unusable: int = 0
    """The number of entries in a row that could not be used."""

    @cached_property
    def pipe(self) -> Any:
        """The pipeline."""
        return self.load()

    def encode(self, entries: Iterator[Any], most: int, report: Callable[[int], None]) -> Encoded:
        """Encode the images of some entries and collect their captions.

        Args:
            most: stop after this many samples if the source is a stream.
            report: called with the number of samples encoded so far.
        """
        encoded = Encoded()
        if not is_drawn(self.options.source):
            self._encode_images(entries, most, encoded, report)
        else:
            self._draw(list(entries), encoded, report)
        return encoded

    def tensors(self, encoded: Encoded) -> Tensors:
        """Return the tensors of a shard as cache.py describes them; each distinct text is encoded once."""
        unique = ["", *sorted({text for texts in encoded.texts.values() for text in texts} - {""})]
        places = {text: row for row, text in enumerate(unique)}
        condition = encode_prompts(self.pipe, unique, self.generation.max_sequence_length)
        out = {"hidden": self._stored(condition.hidden), "pooled": self._stored(condition.pooled)}
        for size, latents in encoded.latents.items():
            name = f"{size[0]}x{size[1]}"
            out[f"latents.{name}"] = torch.cat(latents)
            out[f"rows.{name}"] = torch.tensor([places[text] for text in encoded.texts[size]])
        return out

    def _encode_images(
        self, entries: Iterator[Any], most: int, encoded: Encoded, report: Callable[[int], None]
    ) -> None:
        """Encode images in batches of one size."""
        streamed = self.layout is not None and self.layout.STREAMED
        waiting: dict[Size, list[NDArray[np.uint8]]] = {}

        def flush(size: Size) -> None:
            pixels = torch.from_numpy(np.stack(waiting.pop(size))).permute(0, 3, 1, 2).contiguous()
            encoded.latents.setdefault(size, []).append(self._stored(encode_images(self.pipe, pixels)))
            report(encoded.samples)

        prepare = partial(_prepared, sizes=self.sizes, limited=self.options.buckets)
        for prepared in _ahead(prepare, entries, self.workers):
            if isinstance(prepared, Skipped):
                encoded.skipped.append(prepared)
                self._check(prepared)
                continue
            self._unusable = 0
            size, pixels, text = prepared
            encoded.texts.setdefault(size, []).append(text)
            waiting.setdefault(size, []).append(pixels)
            if len(waiting[size]) == _BATCH:
                flush(size)
            if streamed and encoded.samples == most:
                break
        for size in list(waiting):
            flush(size)

    def _check(self, skipped: Skipped) -> None:
        """Count an entry that cannot be used, and stop when there were too many in a row."""
        self._unusable += 1
        if self._unusable == MOST_UNUSABLE:
            raise InputError(
                f"--data {self.options.source}: {MOST_UNUSABLE:,} entries in a row cannot be used, the last one "
                f"{skipped.name}: {skipped.why}"
            )

    def _draw(self, wanted: list[tuple[int, str]], encoded: Encoded, report: Callable[[int], None]) -> None:
        """Let the model generate the latents of (seed, prompt) entries."""
        pipe, generation, (size,) = self.pipe, self.generation, self.sizes
        # As `tensors` needs them: the text of a shard is encoded together, whatever was encoded before.
        text_of = encode_once(pipe, ["", *sorted({text for _, text in wanted} - {""})], generation.max_sequence_length)
        empty, shape = text_of([""]), latent_shape(pipe, generation)
        levels, passes = sigmas(pipe, generation, shape), passes_of(pipe.transformer, generation)
        batches = batches_of(len(wanted), at_once(pipe.transformer, shape))
        for group in groups(pipe, batches, shape, empty.hidden.shape[1], passes=passes):
            starts = []
            for rows in group:
                text = text_of([prompt for _, prompt in wanted[rows]])
                starts.append(Start(noise([seed for seed, _ in wanted[rows]], shape).to(text.hidden), text))
            steps, taken = len(group) * (len(levels) - 1), itertools.count(1)

            def step(group: Sequence[slice] = group, steps: int = steps, taken: Iterator[int] = taken) -> None:
                report(encoded.samples + (group[-1].stop - group[0].start) * next(taken) // steps)

            for reached in denoise_all(pipe.transformer, starts, levels, empty, generation, step=step):
                last = reached
            for rows, one in zip(group, last, strict=True):
                encoded.texts.setdefault(size, []).extend(prompt for _, prompt in wanted[rows])
                encoded.latents.setdefault(size, []).append(self._stored(one.latents))

    def _stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the CPU in the dtype that the cache stores."""
        full = tensor.cpu().float()
        stored = full.half() if self.options.half else full
        if not full.isfinite().all():
            raise EdgepruneError("cache: the encoders give numbers that are not finite")
        if not stored.isfinite().all():
            raise InputError("--half: some numbers are too large for float16; omit it")
        return stored


def _prepared(
    item: Entry | Pair | Skipped, *, sizes: list[Size], limited: bool
) -> Skipped | tuple[Size, NDArray[np.uint8], str]:
    """Return an image's bucket, its pixels (H, W, 3) and its caption; or why the entry is skipped."""
    pair = opened(item) if isinstance(item, Entry) else item
    if isinstance(pair, Skipped):
        return pair
    actual = (pair.image.height, pair.image.width)
    size = nearest(actual, sizes)
    if limited and enlarged(actual, size) > MOST_ENLARGED:
        grown = f"{enlarged(actual, size):.1f} times to {size[0]} x {size[1]}"
        why = f"found {actual[0]} x {actual[1]}, which would grow {grown}"
        return Skipped(pair.name, f"{why}, expected at most {MOST_ENLARGED:g} times")
    return size, fitted(pair.image, size), pair.text


def _ahead(work: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Iterator[_R]:
    """Yield `work(item)` for each item in order; threads compute a few items ahead."""
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
