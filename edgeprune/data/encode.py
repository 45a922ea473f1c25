"""Makes a cache (cache.py): images and captions to latents and text embeddings, a shard at a time, each made once.

A shard is made of a fixed number of entries of the source, whatever of them can be used, so a run that goes on after a
kill needs nothing but the list of finished shards. Images are decoded and resized in threads (Pillow lets others run
meanwhile) a few ahead of the encoders; their order is the source's, so the bytes do not depend on how many threads
there are. What it leaves out: several processes at one cache, and sizes other than one number of pixels.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from edgeprune.common.errors import EdgepruneError, InputError, StaleStageError
from edgeprune.common.fields import shown
from edgeprune.common.files import digest, parse_json, read_json, sha256_file, write_json
from edgeprune.common.lock import is_free
from edgeprune.common.tensors import Tensors, save_tensors
from edgeprune.data.buckets import MOST_ENLARGED, Size, bucket_sizes, enlarged, fitted, nearest
from edgeprune.data.cache import INDEX, SKIPPED, Index, Settings, Shard, is_cache, made_by
from edgeprune.data.sources import Entry, Layout, Pair, Skipped, layout_of, opened
from edgeprune.families import Config, Family, family_of
from edgeprune.sampling.denoising import denoise, encode_images, encode_prompts, latent_shape, noise, sigmas
from edgeprune.sampling.generation import Generation, latent_factor, longest_prompt
from edgeprune.sampling.prompts import read_prompts

Progress = Callable[[int, int, str], None]
"""Called with entries done, how many there are, and a word on speed."""
SHARD_BYTES = 2**28
"""About what a shard takes."""
WORKERS = min(8, os.cpu_count() or 1)
_BATCH = 32
"""Images encoded at once; with as many sizes, as many of each are in memory."""
_ROUND = 64
"""A shard has a multiple of this many entries: whole batches of images and of texts."""
_UNKNOWN = (
    "--data: {}: found none of these, expected an imagefolder with metadata.jsonl, .tar shards, YE-POP's JSON files, "
    "datasets:NAME, a text file of prompts, shapes, or a folder of `edgeprune cache`"
)
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class CacheOptions:
    """Which samples, and how they are kept."""

    source: str
    """`shapes`, images in a layout of sources/, or a file of prompts."""
    samples: int = 1024
    """How many to make (`shapes`, prompts) or to take of a stream; a folder is taken whole."""
    buckets: bool = False
    """Sizes by aspect ratio instead of one."""
    half: bool = False
    """Kept in float16 instead of float32."""


@dataclass
class Made:
    """What a run came to, and how fast: only what it made itself counts."""

    index: Index
    samples: int = 0
    written_bytes: int = 0
    seconds: float = 0.0


def is_drawn(source: str) -> bool:
    """Whether the images are to be the model's own: of a file of prompts."""
    return source != "shapes" and not is_cache(source) and layout_of(source) is None


def source_digest(source: str) -> str:
    """Identity of a source's content: of images, by name, size and time of change.

    Raises:
        InputError: it is none.
    """
    path = Path(source)
    if source == "shapes":
        return source
    if is_cache(source):
        return Index.load(path).identity
    if layout := layout_of(source):
        return layout.identity(source)
    if path.is_file():
        return sha256_file(path)
    raise InputError(_UNKNOWN.format(source))


def settings_of(
    folder: Path, generation: Generation, options: CacheOptions, sha256: Callable[[Path], str] = sha256_file
) -> Settings:
    """Everything that the bytes of a cache depend on.

    Args:
        folder: the pipeline's.
        sha256: of a file; it may remember.

    Raises:
        InputError: the source is none, or buckets were asked for where the images are the model's own.
    """
    layout, drawn, content = layout_of(options.source), is_drawn(options.source), source_digest(options.source)
    if is_cache(options.source):
        raise InputError(f"{options.source}: is a cache already; give it to distill or compress as --data")
    if drawn and options.buckets:
        raise InputError("--buckets: images that the model makes are of one size; leave it out, or give images")
    whole = layout is not None and not layout.STREAMED
    size = sample_bytes(folder, generation, half=options.half)
    return made_by(folder, generation, drawn=drawn, sha256=sha256) | {
        "source": options.source,
        "content": content,
        **({} if whole else {"samples": options.samples}),
        "buckets": options.buckets,
        "dtype": "float16" if options.half else "float32",
        "samples_per_shard": max(1, SHARD_BYTES // size // _ROUND) * _ROUND,
    }


def forecast(folder: Path, generation: Generation, options: CacheOptions, out: Path) -> dict[str, Any]:
    """What a cache would take, units in the names; null where only reading tells.

    Args:
        folder: the pipeline's.
        out: where the cache would be.

    Raises:
        InputError: the source is none.
    """
    source_digest(options.source)
    each = sample_bytes(folder, generation, half=options.half)
    samples = _total(options, layout_of(options.source))
    there = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    return {
        "samples": samples,
        "sample_bytes": each,
        "cache_bytes": None if samples is None else samples * each,
        "free_bytes": shutil.disk_usage(there).free,
    }


def sample_bytes(folder: Path, generation: Generation, *, half: bool) -> int:
    """What a sample with a caption of its own takes, from configs alone."""
    config, family = _model(folder)
    latents = family.latents(config)
    factor = _unit(folder, family, config) // latents.patch
    tokens = family.text_tokens(longest_prompt(folder), generation.max_sequence_length)
    hidden, pooled = family.text_widths(config)
    numbers = latents.channels * (generation.height // factor) * (generation.width // factor) + tokens * hidden + pooled
    return numbers * (2 if half else 4)


def make_cache(
    load: Callable[[], Any],
    model: Path,
    folder: Path,
    settings: Settings,
    generation: Generation,
    options: CacheOptions,
    *,
    workers: int = WORKERS,
    progress: Progress = lambda done, total, note: None,
) -> Made:
    """Make what is missing of a cache; nothing at all where it is complete.

    Args:
        load: gives the pipeline; called if there is something to encode.
        model: its folder.
        settings: of `settings_of`.
        workers: threads that decode and resize.

    Raises:
        StaleStageError: the folder holds a cache with other settings.
        InputError: the folder holds something else, or nothing of the source can be used.
    """
    made = Made(_begun(folder, settings))
    if made.index.complete and all((folder / shard.file).is_file() for shard in made.index.shards):
        return made
    settings, began = made.index.settings, time.monotonic()
    layout = layout_of(options.source)
    encoder = _Encoder(load, generation, options, layout, _sizes(model, generation, options), workers)
    total, done, per_shard = _total(options, layout), 0, int(settings["samples_per_shard"])
    listed, items, shards = list[Skipped](), _items(options, layout), made.index.shards

    def tell(more: int = 0) -> None:
        speed = (made.samples + more) / max(1e-6, time.monotonic() - began)
        known = total or options.samples
        progress(min(done + more, known), known, f"{speed:.1f} samples/s, {made.written_bytes / 1e6:,.0f} MB written")

    for number in itertools.count():
        left = options.samples - sum(shard.samples for shard in shards[:number])
        first = next(items, None) if left > 0 or "samples" not in settings else None
        if first is None:
            break
        entries = itertools.chain([first], itertools.islice(items, per_shard - 1))
        path = folder / f"shard-{number:05}.safetensors"
        skipped = _finished(path, settings)
        if new := skipped is None:
            collected = encoder.collect(entries, left, tell)
            skipped = collected.skipped
            about = {"settings": digest(settings), "skipped": [[s.name, s.why] for s in skipped]}
            # One entry of metadata: safetensors writes several in an order of chance.
            save_tensors(path, encoder.tensors(collected), {"meta": json.dumps(about)})
            made.samples += collected.samples
            made.written_bytes += path.stat().st_size
        else:
            deque(entries, maxlen=0)  # go past them
        if new or number >= len(shards):
            shards[number : number + 1] = [Shard(path.name, sha256_file(path), _counts(path), len(skipped))]
            made.index.save(folder)
        listed += skipped
        done += shards[number].samples + len(skipped)
        tell()
    del shards[number:]
    used = sum(shard.samples for shard in shards)
    if not used:
        why = f": {listed[0].name}: {listed[0].why}" if listed else ""
        raise InputError(f"--data {options.source}: no image with a caption that can be used{why}")
    write_json(folder / SKIPPED, {"used": used, "skipped": [[s.name, s.why] for s in listed]})
    made.index.complete = True
    made.index.save(folder)
    made.seconds = time.monotonic() - began
    return made


def check_folder(folder: Path, source: str) -> None:
    """Refuse a folder that holds something else, or that is in the source, which it would change.

    Raises:
        InputError: it is neither new nor empty nor a cache, or not beside the source.
    """
    if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(f"{folder}: found it in the source {source}, expected a folder outside of it; use another -o")
    if not (folder / INDEX).is_file() and not is_free(folder, INDEX):
        raise InputError(f"{folder}: exists and is not a cache (no {INDEX}); use another -o")


def _begun(folder: Path, settings: Settings) -> Index:
    """The index of a folder, a new one where there is none."""
    check_folder(folder, str(settings["source"]))
    if not (folder / INDEX).is_file():
        index = Index(settings)
        index.save(folder)
        return index
    index = Index.load(folder)
    for name in sorted((index.settings.keys() | settings.keys()) - {"source"}):  # that may be written in several ways
        before, now = index.settings.get(name, "none"), settings.get(name, "none")
        if before != now:
            raise StaleStageError(
                f"{folder}: begun with {shown(name)} {shown(before)}, found {shown(now)}; use another -o"
            )
    return index


def _finished(path: Path, settings: Settings) -> list[Skipped] | None:
    """What a finished shard of these settings skipped; None where there is no such shard."""
    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["meta"])
        if about["settings"] != digest(settings):
            return None
        return [Skipped(str(name), str(why)) for name, why in about["skipped"]]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _counts(path: Path) -> dict[str, int]:
    """Samples by size of a shard that we have written."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("rows.")]  # noqa: SIM118
        return {name.removeprefix("rows."): int(file.get_slice(name).get_shape()[0]) for name in sorted(names)}


def _model(folder: Path) -> tuple[Config, Family]:
    path = folder / "transformer" / "config.json"
    config = read_json(path)
    return config, family_of(config, str(path))


def _unit(folder: Path, family: Family, config: Config) -> int:
    """Pixels of a token's side."""
    vae = folder / "vae" / "config.json"
    return latent_factor(read_json(vae), vae) * family.latents(config).patch


def _sizes(folder: Path, generation: Generation, options: CacheOptions) -> list[Size]:
    base = (generation.height, generation.width)
    if not options.buckets:
        return [base]
    config, family = _model(folder)
    unit, largest = _unit(folder, family, config), family.latents(config).largest
    return bucket_sizes(base, unit, None if largest is None else largest * unit)


def _total(options: CacheOptions, layout: Layout | None) -> int | None:
    """How many entries there are, where that can be told."""
    return options.samples if layout is None else layout.count(options.source)


def _items(options: CacheOptions, layout: Layout | None) -> Iterator[Any]:
    """The source's entries: images with captions, or seeds and prompts for what the model is to draw."""
    if layout:
        return layout.read(options.source)
    if options.source == "shapes":
        from edgeprune.shapes import training_scenes

        scenes = zip(*training_scenes(options.samples, seed=7), strict=True)
        return (Pair(f"scene {i}", Image.fromarray(pixels), text) for i, (pixels, text) in enumerate(scenes))
    prompts = read_prompts(Path(options.source))
    return ((i, prompts[i % len(prompts)]) for i in range(options.samples))


@dataclass
class _Collected:
    """A shard on its way."""

    latents: dict[Size, list[torch.Tensor]] = field(default_factory=dict)
    texts: dict[Size, list[str]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return sum(map(len, self.texts.values()))


@dataclass
class _Encoder:
    """Entries to the content of a shard; the pipeline is loaded when there is a first one."""

    load: Callable[[], Any]
    generation: Generation
    options: CacheOptions
    layout: Layout | None
    sizes: list[Size]
    workers: int

    @cached_property
    def pipe(self) -> Any:
        return self.load()

    def collect(self, entries: Iterator[Any], most: int, tell: Callable[[int], None]) -> _Collected:
        """Latents of entries, and their texts; `tell` hears of samples. Of a stream at most so many."""
        collected = _Collected()
        if self.layout or self.options.source == "shapes":
            self._encode(entries, most, collected, tell)
        else:
            self._draw(list(entries), collected, tell)
        return collected

    def tensors(self, collected: _Collected) -> Tensors:
        """As the shard has them; each text is encoded once."""
        unique = ["", *sorted({text for texts in collected.texts.values() for text in texts} - {""})]
        places = {text: row for row, text in enumerate(unique)}
        encoded = encode_prompts(self.pipe, unique, self.generation.max_sequence_length)
        out = {"hidden": self._kept(encoded.hidden), "pooled": self._kept(encoded.pooled)}
        for size, latents in collected.latents.items():
            name = f"{size[0]}x{size[1]}"
            out[f"latents.{name}"] = torch.cat(latents)
            out[f"rows.{name}"] = torch.tensor([places[text] for text in collected.texts[size]])
        return out

    def _encode(self, entries: Iterator[Any], most: int, collected: _Collected, tell: Callable[[int], None]) -> None:
        """Images, a batch of one size at a time."""
        streamed = self.layout is not None and self.layout.STREAMED
        waiting: dict[Size, list[NDArray[np.uint8]]] = {}

        def flush(size: Size) -> None:
            pixels = torch.from_numpy(np.stack(waiting.pop(size))).permute(0, 3, 1, 2).contiguous()
            collected.latents.setdefault(size, []).append(self._kept(encode_images(self.pipe, pixels)))
            tell(collected.samples)

        prepare = partial(_prepared, sizes=self.sizes, limited=self.options.buckets)
        for found in _ahead(prepare, entries, self.workers):
            if isinstance(found, Skipped):
                collected.skipped.append(found)
                continue
            size, pixels, text = found
            collected.texts.setdefault(size, []).append(text)
            waiting.setdefault(size, []).append(pixels)
            if len(waiting[size]) == _BATCH:
                flush(size)
            if streamed and collected.samples == most:
                break
        for size in list(waiting):
            flush(size)

    def _draw(self, wanted: list[tuple[int, str]], collected: _Collected, tell: Callable[[int], None]) -> None:
        """The model's own images of (seed, prompt), as latents."""
        pipe, generation, (size,) = self.pipe, self.generation, self.sizes
        condition = encode_prompts(pipe, [text for _, text in wanted], generation.max_sequence_length)
        empty = encode_prompts(pipe, [""], generation.max_sequence_length)
        shape = latent_shape(pipe, generation)
        levels = sigmas(pipe, generation.num_inference_steps, shape)
        for start in range(0, len(wanted), _BATCH):
            rows = slice(start, start + _BATCH)
            x = noise([seed for seed, _ in wanted[rows]], shape).to(condition.hidden)
            *_, (latents, _) = denoise(pipe.transformer, x, levels, condition[rows], empty, generation.guidance_scale)
            collected.texts.setdefault(size, []).extend(text for _, text in wanted[rows])
            collected.latents.setdefault(size, []).append(self._kept(latents))
            tell(collected.samples)

    def _kept(self, tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.cpu().float()
        kept = found.half() if self.options.half else found
        if not found.isfinite().all():
            raise EdgepruneError("cache: the encoders give numbers that are not finite")
        if not kept.isfinite().all():
            raise InputError("--half: some numbers are too large for float16; leave it out")
        return kept


def _prepared(
    item: Entry | Pair | Skipped, *, sizes: list[Size], limited: bool
) -> Skipped | tuple[Size, NDArray[np.uint8], str]:
    """The size that an image falls to, its pixels (H, W, 3) and its caption."""
    found = opened(item) if isinstance(item, Entry) else item
    if isinstance(found, Skipped):
        return found
    has = (found.image.height, found.image.width)
    size = nearest(has, sizes)
    if limited and enlarged(has, size) > MOST_ENLARGED:
        why = f"found {has[0]} x {has[1]}, which would grow {enlarged(has, size):.1f} times to {size[0]} x {size[1]}"
        return Skipped(found.name, f"{why}, expected at most {MOST_ENLARGED:g} times")
    return size, fitted(found.image, size), found.text


def _ahead(work: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Iterator[_R]:
    """`work` of each item, in order, done in threads a few items ahead."""
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def summary(made: Made) -> dict[str, Any]:
    """What a run came to, units in the names."""
    shards, seconds = made.index.shards, max(made.seconds, 1e-6)
    return {
        "samples": sum(shard.samples for shard in shards),
        "skipped": sum(shard.skipped for shard in shards),
        "shards": len(shards),
        "sizes": made.index.sizes,
        "made_samples": made.samples,
        "written_bytes": made.written_bytes,
        "seconds": round(made.seconds, 3),
        "samples_per_s": round(made.samples / seconds, 2),
        "written_bytes_per_s": round(made.written_bytes / seconds),
    }
