"""Scores images by any metric, alone or paired with the original model's images: the work of `edgeprune score`.

Images come from a folder with `metadata.jsonl`, or a model generates them into one. Each image is saved as soon as it
is finished, so an interrupted run resumes. Metrics run one after another, a few images at a time. The bench room
measures memory and latency.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import metrics, reference, runtimes
from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, sha256_file, whole_lines
from edgeprune.common.images import open_image
from edgeprune.common.intervals import Interval, mean_interval, paired_drop
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.common.tables import interval_text
from edgeprune.data.imagefolder import METADATA, Sample
from edgeprune.sampling import prompts as shipped
from edgeprune.shapes import World

CAPTIONS = 100
"""Held-out captions that are scored without other prompts."""
BATCH = 8
"""The number of images in memory at a time."""


@dataclass(frozen=True)
class Wish:
    """An image to generate."""

    text: str
    seed: int


@dataclass(frozen=True)
class Score:
    """The result of one metric. Intervals are 95 %, over prompts (common/intervals.py); seeds are averaged."""

    metric: str
    score: Interval
    tasks: dict[str, float]
    """Means by task, if the metric has tasks; `score` is then the mean of these means."""
    images: int
    prompts: list[str]
    values: list[float]
    """One value per prompt."""
    original: Interval | None = None
    """The original model's score, unless the metric itself compares the two models."""
    original_values: list[float] | None = None
    drop: Interval | None = None
    """The original's score minus this one, paired by prompt."""
    relative_drop: Interval | None = None
    """The drop as a fraction of the original's score."""


def wishes(
    names: Sequence[str],
    *,
    prompts: Path | None = None,
    per_task: int | None = None,
    seeds: int = 1,
    split: Split = Split.HELD_OUT,
    captions: int = CAPTIONS,
    world: World | None = None,
) -> list[Wish]:
    """Return the images to generate for these metrics, with seeds of a split.

    The prompts are the lines of a file, or else the prompts of the one metric that has its own, or else captions of
    edgeprune.

    Args:
        names: the names of the metrics.
        prompts: a text file with one prompt per line.
        per_task: the number of prompts of each task, for a metric with prompts of its own; None for all.
        seeds: the number of images per prompt.
        split: of the seeds, and of prompts that are no file's.
        captions: the number of captions of edgeprune.
        world: that the model draws, see `metrics.tasks_of`.

    Raises:
        InputError: the file is not readable, several metrics have prompts of their own, or a metric does not support a
            prompt.
    """
    with_prompts = {name: tasks for name in names if (tasks := metrics.tasks_of(name, world))}
    if prompts is None and len(with_prompts) > 1:
        raise InputError(
            f"--metric: {' and '.join(with_prompts)} each have prompts of their own; score them one by one"
        )
    if per_task is not None and (prompts is not None or not with_prompts):
        raise InputError("--per-task is for metrics with prompts of their own (geneval, shapes), without --prompts")
    if prompts is None and with_prompts:
        (tasks,) = with_prompts.values()
        every = tasks.evaluation_prompts(split=split, **{} if per_task is None else {"per_task": per_task})
        texts = [p.text for p in every]
    else:
        texts = shipped.read_prompts(prompts) if prompts else shipped.prompts(split, captions)
    check_prompts(names, texts, world)
    numbers = split.seeds(len(texts) * seeds)
    return [Wish(text, seed) for text, seed in zip([t for t in texts for _ in range(seeds)], numbers, strict=True)]


def check_prompts(names: Sequence[str], texts: Sequence[str], world: World | None) -> None:
    """Check that the metrics support all prompts, before hours of image generation.

    Raises:
        InputError: a metric does not support a prompt.
    """
    for name in names:
        if tasks := metrics.tasks_of(name, world):
            for text in texts:
                tasks.parse(text)


def draw(
    model: Path,
    out: Path,
    wanted: Sequence[Wish],
    *,
    runtime: str | None = None,
    steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
    variant: str | None = None,
    loading: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Generate a model's images with any runtime into a folder with metadata. Existing images are kept.

    Args:
        model: an exported, artefact or diffusers folder, or a reference, which its own pipeline draws.
        out: the folder to create or resume.
        wanted: the images to generate, in this order.
        runtime: the runtime's name; None to choose by the folder.
        steps: the number of denoising steps; None for the folder's default.
        settings: of the images besides steps, see `Runtime.draw`.
        variant: of an original's weights, see residency/model_files.py.
        loading: further options of `runtimes.load`, on which the images do not depend.
        own: those on which they may.
        progress: called after each image.

    Raises:
        InputError: `out` holds images of another model, other prompts or settings; or `model` is not usable.
    """
    foreign = reference.is_reference(model)
    chosen = reference.PIPELINE if foreign else runtimes.choose(model, runtime)
    options: dict[str, Any] = ({} if variant is None else {"variant": variant}) | dict(own or {})
    asked = {"steps": steps, **(settings or {})}
    made = {"model": identity(model), "runtime": chosen} | asked | options
    lines = [
        json.dumps({"file_name": f"{i:05}.png", "text": w.text, "seed": w.seed} | made) for i, w in enumerate(wanted)
    ]
    metadata = out / METADATA
    # An incomplete last line has no newline; its image is generated again.
    done = whole_lines(metadata) if metadata.exists() else []
    if done != lines[: len(done)]:
        raise InputError(
            f"{metadata}: found images of another model, prompts or settings; give another --out, or remove it"
        )
    if len(done) == len(lines):
        return
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if foreign:
            from edgeprune.reference.drawing import open_drawer  # imports torch

            opened: Any = stack.enter_context(open_drawer(model, **options, **(loading or {})))
        else:
            opened = stack.enter_context(runtimes.load(model, chosen, **options, **(loading or {})))
        file = stack.enter_context(metadata.open("a", encoding="utf-8"))
        left = wanted[len(done) :]
        images = opened.draw([wish.text for wish in left], [wish.seed for wish in left], **asked)
        for i, image in enumerate(images, len(done)):
            image.save(out / f"{i:05}.png")
            file.write(f"{lines[i]}\n")
            file.flush()
            progress(f"images of {model.name}", i + 1, len(lines))


def count_drawn(out: Path) -> int:
    """Return how many images `draw` has finished in a folder."""
    return len(whole_lines(out / METADATA)) if (out / METADATA).exists() else 0


def identity(model: Path) -> str:
    """Return a digest of the names, sizes and modification times of a model's files."""
    files = [p for p in sorted(model.rglob("*")) if p.is_file() and p.parent != model]
    stats = [(p.relative_to(model).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    kept = [row for row in stats if not row[0].startswith(("cache/", "."))]
    top = [sha256_file(p) for name in ("model_index.json", "generation.json") if (p := model / name).is_file()]
    return digest([kept, top])[:16]


def pair(samples: Sequence[Sample], originals: Sequence[Sample]) -> None:
    """Check that both sets of images have the same prompts and seeds in the same order.

    Raises:
        InputError: they differ.
    """
    if len(samples) != len(originals):
        raise InputError(f"--against: found {len(originals)} images, expected {len(samples)}, one for each to score")
    for number, (one, other) in enumerate(zip(samples, originals, strict=True), 1):
        if one.text != other.text:
            raise InputError(f"--against: image {number}: found the prompt {other.text!r}, expected {one.text!r}")
        if None not in (one.seed, other.seed) and one.seed != other.seed:
            raise InputError(f"--against: image {number}: found seed {other.seed}, expected {one.seed}")


def score(
    samples: Sequence[Sample],
    names: Sequence[str],
    *,
    against: Sequence[Sample] | None = None,
    weights: Mapping[str, str] | None = None,
    world: World | None = None,
    device: str = "auto",
    progress: Progress = silent,
) -> list[Score]:
    """Score images by each metric.

    Args:
        samples: the images to score.
        names: the names of the metrics.
        against: the original's images of the same prompts and seeds.
        weights: the metrics' weights by name, see metrics.KNOWN.
        world: that the model draws, see `metrics.tasks_of`.
        device: where the metrics' networks compute.
        progress: called after each batch.

    Raises:
        InputError: see `check`, `pair` and each metric.
        MissingExtraError: a package that a metric imports is not installed.
    """
    weights = weights or {}
    check(names, weights, against is not None)
    check_prompts(names, [s.text for s in samples], world)
    if against is not None:
        pair(samples, against)
    texts = list(dict.fromkeys(s.text for s in samples))
    out = []
    for name in names:
        known, metric = metrics.KNOWN[name], metrics.of_images(name, weights, device)
        own = metrics.tasks_of(name, world)
        tasks = [own.parse(text).task for text in texts] if own else None
        values = _by_prompt(metric, samples, against if known.paired else None, texts, name, progress)
        comparison: dict[str, Any] = {}
        if against is not None and not known.paired:
            first = _by_prompt(metric, against, None, texts, f"{name}, original", progress)
            drop = paired_drop(first, values, tasks)
            comparison = {"original": mean_interval(first, tasks), "original_values": first}
            comparison |= {"drop": drop.difference, "relative_drop": drop.relative}
        means: dict[str, float] = {}
        if tasks:
            pairs = list(zip(tasks, values, strict=True))
            means = {t: float(np.mean([v for task, v in pairs if task == t])) for t in dict.fromkeys(tasks)}
        out.append(
            Score(
                metric=name,
                score=mean_interval(values, tasks),
                tasks=means,
                images=len(samples),
                prompts=texts,
                values=values,
                **comparison,
            )
        )
    return out


def check(names: Sequence[str], weights: Mapping[str, str], against: bool) -> None:
    """Check the metrics before any image is generated.

    Raises:
        InputError: there is no metric, or one is unknown, repeated, lacks weights, or needs the original's images.
        MissingExtraError: a package that a metric imports is not installed.
    """
    if not names or len(set(names)) != len(names):
        raise InputError(
            f"--metric: found {list(names)}, expected at least one of {', '.join(metrics.KNOWN)}, each once"
        )
    for name in names:
        if metrics.require(name, weights).paired and not against:
            raise InputError(f"--metric {name} compares with the original's images; give --against ORIGINAL")


def _by_prompt(
    metric: metrics.ImageMetric,
    samples: Sequence[Sample],
    against: Sequence[Sample] | None,
    texts: Sequence[str],
    what: str,
    progress: Progress,
) -> list[float]:
    """Return the mean over the images of each prompt, in the order of `texts`."""
    values: dict[str, list[float]] = {text: [] for text in texts}
    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        originals = _pixels(against[start : start + BATCH]) if against is not None else None
        scores = metric.score(_pixels(batch), [s.text for s in batch], originals)
        for sample, value in zip(batch, scores, strict=True):
            if not np.isfinite(value):
                raise InputError(f"{sample.path}: {what}: found {value}, expected a finite number")
            values[sample.text].append(float(value))
        progress(what, start + len(batch), len(samples))
    return [float(np.mean(values[text])) for text in texts]


def _pixels(samples: Sequence[Sample]) -> metrics.Images:
    return [np.asarray(open_image(s.path)) for s in samples]


def to_json(scores: Sequence[Score]) -> dict[str, Any]:
    """Return plain values for json.dump; docs/metrics.md describes them."""
    return {"schema_version": 1, "scores": [{k: v for k, v in asdict(s).items() if k != "prompts"} for s in scores]} | {
        "prompts": scores[0].prompts if scores else []
    }


def rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """Return the rows of a table: metric, score and, if compared, the original's score and the drops."""
    compared = any(s.original for s in scores)
    out: list[tuple[str, ...]] = [("", "score", *(("original", "drop", "relative drop") if compared else ()))]
    for s in scores:
        known = metrics.KNOWN[s.metric]
        note = " (against the original's images)" if known.paired else ""
        note += ", lower is better" if known.lower_is_better else ""
        rest = (_shown(s.original), _shown(s.drop), _shown(s.relative_drop, percent=True)) if compared else ()
        out.append((s.metric + note, _shown(s.score), *rest))
        out += [(f"- {task}", f"{mean:.3f}", *("",) * len(rest)) for task, mean in s.tasks.items()]
    return out


def _shown(interval: Interval | None, *, percent: bool = False) -> str:
    return "" if interval is None else interval_text(interval, ".1%" if percent else ".4g")
