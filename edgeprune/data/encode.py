"""Makes a cache (cache.py) of a source, shard by shard; an interrupted run resumes after the last finished shard.

Each shard covers a fixed number of the source's entries, however many of them are usable. So a resumed run needs only
the list of finished shards. One process makes a cache at a time.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.common.fields import shown
from edgeprune.common.files import digest, parse_json, read_json, write_json
from edgeprune.common.hashes import sha256
from edgeprune.common.lock import is_free
from edgeprune.common.tensors import save_tensors
from edgeprune.data.cache import INDEX, SKIPPED, Index, Settings, Shard
from edgeprune.data.encoder import Encoder, entries_of
from edgeprune.data.settings import (
    WORKERS,
    CacheOptions,
    entry_count,
    images_of,
    sizes_of,
)
from edgeprune.data.sources import Skipped, none_usable
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import world_of

EntriesDone = Callable[[int, int, str], None]
"""Called with the number of entries done, their total, and a note on speed."""


@dataclass
class Made:
    """The result of a run: the cache's index, and what this run itself encoded and wrote."""

    index: Index
    samples: int = 0
    written_bytes: int = 0
    seconds: float = 0.0


def make_cache(
    load: Callable[[], Any],
    model: Path,
    folder: Path,
    settings: Settings,
    generation: Generation,
    options: CacheOptions,
    *,
    workers: int = WORKERS,
    progress: EntriesDone = lambda done, total, note: None,
) -> Made:
    """Make the missing shards of a cache; do nothing if the cache is complete.

    Args:
        load: returns the pipeline; called only if there is something to encode.
        model: the pipeline's folder.
        settings: the result of `settings_of`.
        workers: the number of threads that decode and resize images.

    Raises:
        StaleStageError: the folder holds a cache with other settings.
        InputError: the folder holds something else, or no entry of the source is usable.
    """
    made = Made(_begun(folder, settings))
    shards = made.index.shards
    if made.index.complete and all((folder / shard.file).is_file() for shard in shards):
        return made
    settings, began = made.index.settings, time.monotonic()
    layout = images_of(options.source)
    encoder = Encoder(load, generation, options, layout, sizes_of(model, generation, options), workers)
    total, done, per_shard = entry_count(options, layout), 0, int(settings["samples_per_shard"])
    skipped, entries = list[Skipped](), entries_of(options, layout, world_of(model))

    def report(more: int = 0) -> None:
        speed = (made.samples + more) / max(1e-6, time.monotonic() - began)
        known = total or options.samples
        progress(min(done + more, known), known, f"{speed:.1f} samples/s, {made.written_bytes / 1e6:,.0f} MB written")

    for number in itertools.count():
        remaining = options.samples - sum(shard.samples for shard in shards[:number])
        first = next(entries, None) if remaining > 0 or "samples" not in settings else None
        if first is None:
            break
        shard_entries = itertools.chain([first], itertools.islice(entries, per_shard - 1))
        unusable = _make_shard(made, folder, number, shard_entries, encoder, remaining, report)
        skipped += unusable
        done += shards[number].samples + len(unusable)
        report()
    del shards[number:]
    _complete(made, folder, options.source, skipped)
    made.seconds = time.monotonic() - began
    return made


def _make_shard(
    made: Made,
    folder: Path,
    number: int,
    entries: Iterator[Any],
    encoder: Encoder,
    most: int,
    report: Callable[[int], None],
) -> list[Skipped]:
    """Make a shard unless it is finished, add it to the index, and return the entries that it skipped."""
    path, settings, shards = folder / f"shard-{number:05}.safetensors", made.index.settings, made.index.shards
    skipped = _finished(path, settings)
    if is_new := skipped is None:
        encoded = encoder.encode(entries, most, report)
        skipped = encoded.skipped
        about = {"settings": digest(settings), "skipped": [[s.name, s.why] for s in skipped]}
        # A single entry of metadata: safetensors writes several in random order.
        save_tensors(path, encoder.tensors(encoded), {"meta": json.dumps(about)}, hashed=True)
        made.samples += encoded.samples
        made.written_bytes += path.stat().st_size
    else:
        deque(entries, maxlen=0)  # advance the source past them
    if is_new or number >= len(shards):
        shards[number : number + 1] = [Shard(path.name, sha256(path), _counts(path), len(skipped))]
        made.index.save(folder)
    return skipped


def _complete(made: Made, folder: Path, source: str, skipped: list[Skipped]) -> None:
    """List the skipped entries and mark the cache as complete.

    Raises:
        InputError: no entry of the source is usable.
    """
    used = sum(shard.samples for shard in made.index.shards)
    if not used:
        raise InputError(none_usable(source, skipped[0] if skipped else None))
    write_json(folder / SKIPPED, {"used": used, "skipped": [[s.name, s.why] for s in skipped]})
    made.index.complete = True
    made.index.save(folder)


def check_folder(folder: Path, source: str) -> None:
    """Refuse a folder that holds something else, or that is inside the source.

    Raises:
        InputError: the folder is neither new, empty nor a cache; or writing it would change the source.
    """
    if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
        raise InputError(f"{folder}: is inside the source {source}; use another -o")
    if not (folder / INDEX).is_file() and not is_free(folder, INDEX):
        raise InputError(f"{folder}: exists and is not a cache (no {INDEX}); use another -o")


def _begun(folder: Path, settings: Settings) -> Index:
    """Return the index of a cache that was begun with these settings, or write a new one."""
    index = _found(folder, settings)
    if index is None:
        index = Index(settings)
        index.save(folder)
    return index


def remaining(folder: Path, settings: Settings, total: int | None) -> int | None:
    """Return how many entries of its source a cache lacks; None if that is not known. Nothing is written.

    Args:
        folder: the cache, which need not exist.
        settings: the result of `settings_of`.
        total: the entries of the source, if they are known.

    Raises:
        StaleStageError: the folder holds a cache with other settings.
        InputError: the folder holds something else.
    """
    index = _found(folder, settings)
    if index is None:
        return total
    entries = [(shard.samples + shard.skipped, (folder / shard.file).is_file()) for shard in index.shards]
    if index.complete:
        total = sum(count for count, _ in entries)
    return None if total is None else max(0, total - sum(count for count, made in entries if made))


def _found(folder: Path, settings: Settings) -> Index | None:
    """Return the index of a cache that was begun with these settings; None if there is none."""
    check_folder(folder, str(settings["source"]))
    if not (folder / INDEX).is_file():
        return None
    index = Index.load(folder)
    for name in sorted((index.settings.keys() | settings.keys()) - {"source"}):  # one path can be written in many ways
        before, now = index.settings.get(name, "none"), settings.get(name, "none")
        if before != now:
            raise StaleStageError(
                f"{folder}: begun with {shown(name)} {shown(before)}, found {shown(now)}; use another -o"
            )
    return index


def _finished(path: Path, settings: Settings) -> list[Skipped] | None:
    """Return what a finished shard of these settings skipped; None if there is no such shard."""
    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json(file.metadata()["meta"])
        if about["settings"] != digest(settings):
            return None
        return [Skipped(str(name), str(why)) for name, why in about["skipped"]]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _counts(path: Path) -> dict[str, int]:
    """Return the samples by size of a shard that this run or an earlier one wrote."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("rows.")]  # noqa: SIM118
        return {name.removeprefix("rows."): int(file.get_slice(name).get_shape()[0]) for name in sorted(names)}


def summary(made: Made) -> dict[str, Any]:
    """Return the figures of a run, with units in the names."""
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


def skip_report(folder: Path) -> str:
    """Return how many entries of a finished cache were skipped, with the three most frequent reasons.

    Raises:
        InputError: the list of skipped entries is missing or damaged.
    """
    path = folder / SKIPPED
    data = read_json(path)
    try:
        used, reasons = int(data["used"]), [str(why) for _, why in data["skipped"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: expected used and skipped ({error})") from error
    said = f"{len(reasons):,} of {used + len(reasons):,} skipped"
    # Reasons that differ only in numbers or in the text that was found are one.
    kinds = Counter(re.sub(r"'.*'|\".*\"|\d[\d.]*", "…", why) for why in reasons).most_common(3)
    return f"{said}: {'; '.join(f'{count:,} {why}' for why, count in kinds)} (listed in {path})" if reasons else said
