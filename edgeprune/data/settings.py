"""What identifies a cache of encoded data, and how large it will be: from options, configs and hashes alone.

A cache is used again only if all of its settings are the same: the source's content, the hashes of everything that
encodes, image size, and how samples are stored.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.common import threads
from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, read_json, sha256_file
from edgeprune.common.splits import Split
from edgeprune.data.buckets import Size, bucket_sizes
from edgeprune.data.cache import Index, Settings, is_cache, made_by
from edgeprune.data.grouping import IMAGES
from edgeprune.data.imagefolder import TABLES
from edgeprune.data.sources import Layout, check_first, layout_of
from edgeprune.families import Config, Family, family_of
from edgeprune.sampling.generation import Generation, latent_factor, longest_prompt
from edgeprune.sampling.prompts import prompts, read_prompts
from edgeprune.shapes import PLAIN, World, world_of

SHAPES, CAPTIONS = WORDS = ("shapes", "captions")
"""Sources that come with edgeprune, always the training split: scenes of shapes world, and captions whose images the
model generates."""
SHARD_BYTES = 2**28
"""The approximate size of a shard."""
WORKERS = min(8, threads.usable())
"""The default number of threads that decode and resize images."""
_ROUND = 64
"""The number of entries in a shard is a multiple of this, so that batches of images and texts are full."""
_SOURCES = (
    "an imagefolder with metadata.jsonl, .csv or .parquet, images with .txt or .caption files beside them, "
    ".tar shards, YE-POP's JSON files, datasets:NAME, a text file of prompts"
)


@dataclass(frozen=True)
class CacheOptions:
    """Which samples a cache holds, and how it stores them."""

    source: str
    """One of WORDS, images in a layout of sources/, or a file of prompts."""
    samples: int = 1024
    """How many samples to make (WORDS, prompts) or to take from a stream; a folder is always used completely."""
    buckets: bool = False
    """Several image sizes by aspect ratio instead of one."""
    half: bool = False
    """Store float16 instead of float32."""


def is_drawn(source: str) -> bool:
    """Return whether the model itself generates the images, from captions or from a file of prompts."""
    return source == CAPTIONS or not (source == SHAPES or is_cache(source) or layout_of(source))


def texts_of(source: str) -> list[str]:
    """Return the prompts of a source whose images the model generates.

    Raises:
        InputError: the file cannot be used.
    """
    return prompts(Split.TRAINING) if source == CAPTIONS else read_prompts(Path(source))


def images_of(source: str) -> Layout | None:
    """Return the layout of a source of images; None for the other sources."""
    return None if source in WORDS else layout_of(source)


def source_digest(source: str, world: World | None) -> str:
    """Return the identity of a source's content; for images, from names, sizes and modification times.

    Args:
        source: of the data.
        world: that the model draws, see `entries_of`.

    Raises:
        InputError: this is not a known source.
    """
    path = Path(source)
    if source == SHAPES:
        other = f"{world.name}, " if world not in (None, PLAIN) else ""  # caches are older than the other worlds
        return f"{source}, {other}{Split.TRAINING.value}"
    if source == CAPTIONS:
        return digest(texts_of(source))
    if is_cache(source):
        return Index.load(path).identity
    if layout := layout_of(source):
        return layout.identity(source)
    if path.is_file():
        return sha256_file(path)
    raise _unknown(source, "--data")


def check_source(source: str, option: str = "--data") -> None:
    """Check that this is a source of data that begins with something usable, before anything is downloaded or computed.

    A file of prompts is read; of images, entries up to the first that can be used.

    Args:
        option: what the user typed it for; messages begin with it.

    Raises:
        InputError: this is not a known source, or a file without prompts, or its entries cannot be used.
    """
    if source in WORDS or is_cache(source):
        return
    if layout := layout_of(source):
        check_first(layout, source)
        return
    if Path(source).name in TABLES:
        raise InputError(
            f"{option} {source}: found the table of an imagefolder, expected the folder: {Path(source).parent}"
        )
    if not Path(source).is_file():
        raise _unknown(source, option)
    read_prompts(Path(source))


def _unknown(source: str, option: str) -> InputError:
    place = Path(source)
    found = "not a known source" if place.exists() else "no such file or folder"
    if place.is_dir() and any(place.glob("**/*.parquet")):
        return InputError(f"{option} {source}: found Parquet files; expected datasets:{source}")
    if place.is_dir() and any(path.suffix.lower() in IMAGES for path in place.rglob("*")):
        found = "found images without captions"
    last = ", captions, shapes, or a folder made by `edgeprune cache`" if option == "--data" else ", captions or shapes"
    return InputError(f"{option} {source}: {found}; expected {_SOURCES}{last}")


def settings_of(
    folder: Path,
    generation: Generation,
    options: CacheOptions,
    variant: str | None = None,
    *,
    computed_in: str,
) -> Settings:
    """Return everything that the bytes of a cache depend on.

    Args:
        folder: the pipeline's folder.
        variant: of the weights, see residency/model_files.py.
        computed_in: dtypes of what encodes and draws other than float32, see `Original.computed_in`.

    Raises:
        InputError: the source is unknown or is a cache itself, or buckets are requested for images that the model
            generates.
    """
    layout, drawn = images_of(options.source), is_drawn(options.source)
    content = source_digest(options.source, world_of(folder))
    if is_cache(options.source):
        raise InputError(f"{options.source}: is a cache already; pass it to distill or compress as --data")
    if drawn and options.buckets:
        raise InputError("--buckets: images that the model makes are of one size; omit it, or give images")
    complete = layout is not None and not layout.STREAMED
    size = sample_bytes(folder, generation, half=options.half)
    return made_by(folder, generation, drawn=drawn, variant=variant) | {
        "source": options.source,
        "content": content,
        **({} if complete else {"samples": options.samples}),
        "buckets": options.buckets,
        "dtype": "float16" if options.half else "float32",
        **({"computed_in": computed_in} if computed_in else {}),  # caches of float32 are older than this setting
        "samples_per_shard": max(1, SHARD_BYTES // size // _ROUND) * _ROUND,
    }


def forecast(folder: Path, generation: Generation, options: CacheOptions, out: Path) -> dict[str, Any]:
    """Return the size of a cache before it is made; units are in the names, null where the source must be read first.

    Args:
        folder: the pipeline's folder.
        out: where the cache will be.

    Raises:
        InputError: the source is unknown.
    """
    source_digest(options.source, world_of(folder))
    per_sample = sample_bytes(folder, generation, half=options.half)
    samples = entry_count(options, images_of(options.source))
    existing = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    return {
        "samples": samples,
        "sample_bytes": per_sample,
        "cache_bytes": None if samples is None else samples * per_sample,
        "free_bytes": shutil.disk_usage(existing).free,
    }


def sample_bytes(folder: Path, generation: Generation, *, half: bool) -> int:
    """Return the bytes of a sample that has a caption of its own, from the model's configs alone."""
    config, family = _transformer(folder)
    latents = family.latents(config)
    factor = _token_side(folder, family, config) // latents.patch
    tokens = family.text_tokens(longest_prompt(folder), generation.max_sequence_length)
    hidden, pooled = family.text_widths(config)
    numbers = latents.channels * (generation.height // factor) * (generation.width // factor) + tokens * hidden + pooled
    return numbers * (2 if half else 4)


def sizes_of(folder: Path, generation: Generation, options: CacheOptions) -> list[Size]:
    """Return the image sizes of a cache: all buckets, or the one size that the model generates."""
    base = (generation.height, generation.width)
    if not options.buckets:
        return [base]
    config, family = _transformer(folder)
    unit, largest = _token_side(folder, family, config), family.latents(config).largest
    return bucket_sizes(base, unit, None if largest is None else largest * unit)


def entry_count(options: CacheOptions, layout: Layout | None) -> int | None:
    """Return the number of entries of a source; None if the source must be read to know."""
    return options.samples if layout is None else layout.count(options.source)


def most_samples(options: CacheOptions) -> int | None:
    """Return the most samples that a cache will have; None if the source must be read to know."""
    layout = images_of(options.source)
    return options.samples if layout and layout.STREAMED else entry_count(options, layout)


def _transformer(folder: Path) -> tuple[Config, Family]:
    path = folder / "transformer" / "config.json"
    config = read_json(path)
    return config, family_of(config, str(path))


def _token_side(folder: Path, family: Family, config: Config) -> int:
    """Return the side of an image token in pixels."""
    vae = folder / "vae" / "config.json"
    return latent_factor(read_json(vae), vae) * family.latents(config).patch
