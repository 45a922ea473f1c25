"""Measures variants of a model: each in a fresh process, one after the other, and the others against the reference.

The reference is the first variant, or the faster one of the original in bf16 and in float32 (`originals`): a processor
without bf16 instructions emulates them and computes faster in float32. This module imports no torch: each worker loads
its own runtime.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import runtimes
from edgeprune.artefact.manifest import identity
from edgeprune.bench.disk import disk_bytes, weights_bytes
from edgeprune.bench.machine import machine, memory_bandwidth
from edgeprune.bench.results import MEASURES, BenchResult, Measured, Quality, compare
from edgeprune.common import errors
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.extras import TORCH
from edgeprune.common.memory import SMALL_BYTES
from edgeprune.common.splits import Split
from edgeprune.metrics.psnr import mean_decibels
from edgeprune.reference import PIPELINE
from edgeprune.shapes import PLAIN, Prompt, World, score

PROMPT = "two red circles"
ORIGINAL = "original"
"""Name of the reference; the original in the slower precision is called `original-bf16` or `original-fp32`."""

Log = Callable[[str], None]
"""Receives one line of text at a time while the work goes on."""

TIE = 1.05
"""Steps closer than this are a tie, which bf16 wins: its weights are smaller, so its memory is the harder baseline."""


@dataclass(frozen=True)
class Variant:
    """One model to measure."""

    name: str
    """Shown in the table; unique in a run."""
    folder: Path
    runtime: str | None = None
    """`ort`, `eager`, ...; None chooses one that fits the folder. PIPELINE if the folder is a reference."""
    dtype: str | None = None
    """`bf16` or `fp32`, for `eager`; None for its default."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the runtime, see `runtimes.load`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the images that differ from the folder's own, see `Runtime.generate`."""
    original: bool = False
    """Whether it competes with others to be the reference: the fastest of these is, the first of a tie."""


def originals(folder: Path, weights: str | None = None, **options: Any) -> list[Variant]:
    """Return the original in torch in bf16 and in float32, the candidates for the reference.

    A large one is measured once, in the precision that the processor's instructions make the faster one: two steps of
    SD3.5 Large at 1024x1024 take two processor cores four minutes in bf16 and a quarter of an hour in float32.

    Args:
        weights: the variant of the weights, such as fp16; None for the default.
        **options: of the torch runtime, see `runtimes.load`.
    """
    if weights is not None:
        options["variant"] = weights
    if weights_bytes(folder, "fp32", weights) > SMALL_BYTES:
        return [Variant(ORIGINAL, folder, "eager", options=options, original=True)]
    return [
        Variant(f"{ORIGINAL}-{dtype}", folder, "eager", dtype, options, original=True) for dtype in ("bf16", "fp32")
    ]


def _silent(_: str) -> None:
    """Drop the line."""


def run(
    variants: Sequence[Variant],
    *,
    repeats: int = 20,
    warmup: int = 2,
    steps: int | None = None,
    prompt: str = PROMPT,
    quality: int = 0,
    quality_seeds: int = 1,
    world: World = PLAIN,
    progress: Log = _silent,
) -> BenchResult:
    """Measure each variant in its own process, one after the other.

    Args:
        variants: the first is the reference of the ratios, unless some are `original`: then the fastest of those is.
        repeats: warm steps to time.
        warmup: untimed steps between the first step and the timed ones; none after a first step of a minute.
        steps: denoising steps of a full image; None for the folder's default.
        prompt: prompt of the timed image.
        quality: held-out prompts per task of the world to score; 0 scores nothing.
        quality_seeds: images per such prompt.
        world: the shapes world that the models draw.
        progress: receives a line of text now and then.

    Raises:
        InputError: there is no variant, two have one name, a number is too low, or a folder cannot be used.
        EdgepruneError: a worker died.
    """
    _check(variants, repeats=repeats, warmup=warmup, quality=quality, quality_seeds=quality_seeds, steps=steps)
    spec = {"repeats": repeats, "warmup": warmup, "steps": steps, "prompt": prompt}
    chosen = world.grammar.evaluation_prompts(quality) if quality else []
    prompts = [p for p in chosen for _ in range(quality_seeds)]
    bench = _Bench(spec, prompts, world, memory_bandwidth(), progress)
    candidates, others = [v for v in variants if v.original], [v for v in variants if not v.original]
    for variant in (*others, *candidates):
        if "memory" in variant.options:
            bench.check(variant)
    slower: list[Measured] = []
    measured: list[tuple[Measured, NDArray[np.uint8] | None]] = []
    if candidates:
        first, images, slower = bench.reference(candidates)
        measured.append((first, images))
    measured += [bench.measure(variant) for variant in others]
    first, drawn = measured[0]
    comparisons = {}
    for m, images in measured[1:]:
        other = None if m.runtime == PIPELINE else images  # a reference draws other images
        comparisons[m.name] = compare(
            first, m, None if drawn is None or other is None else psnr_db(drawn, other), slower
        )
    settings = spec | {"quality_prompts_per_task": quality, "quality_seeds": quality_seeds}
    return BenchResult(
        variants=[m for m, _ in measured], comparisons=comparisons, machine=machine(bench.bandwidth),
        settings=settings, slower_originals=slower,
    )  # fmt: skip


@dataclass(frozen=True)
class _Bench:
    """What all variants of a run share."""

    spec: dict[str, Any]
    prompts: list[Prompt]
    """Prompts of the world to score images on; empty scores nothing."""
    world: World
    bandwidth: float
    progress: Log

    def check(self, variant: Variant) -> None:
        """Refuse a limit of memory that is too little for a variant, in a process like the one that measures it.

        Raises:
            InputError: says how much suffices.
        """
        _worker(variant, {"check": True}, self.progress)

    def measure(self, variant: Variant, **changes: Any) -> tuple[Measured, NDArray[np.uint8] | None]:
        """Return a variant's figures and the images that its quality was scored on.

        Args:
            variant: what to measure.
            changes: entries of the worker's spec to replace.
        """
        self.progress(f"{variant.name}: {variant.folder}")
        with tempfile.TemporaryDirectory(prefix="edgeprune-bench-") as scratch:
            path = Path(scratch) / "images.npy"
            texts, seeds = [p.text for p in self.prompts], Split.HELD_OUT.seeds(len(self.prompts))
            spec = self.spec | {"prompts": texts, "seeds": seeds, "images": str(path)} | changes
            reply = _worker(variant, spec, self.progress)
            images = np.load(path) if spec["prompts"] else None
        quality = None if images is None else _score(images, self.prompts, self.world)
        return _measured(variant, reply, self.bandwidth, quality), images

    def reference(self, candidates: Sequence[Variant]) -> tuple[Measured, NDArray[np.uint8] | None, list[Measured]]:
        """Return the fastest candidate, called ORIGINAL, its images, and the other candidates.

        Within TIE of the fastest, the earlier one counts. Only the reference draws images.
        """
        by_name: dict[str, tuple[Variant, Measured]] = {}
        for variant in candidates:
            if why := _left_out([m for _, m in by_name.values()]):
                self.progress(f"{variant.name}: left out: {why}")
            else:
                by_name[variant.name] = variant, self.measure(variant, prompts=[])[0]
        fastest = min(np.median(m.steps_s) for _, m in by_name.values())
        variant, best = next(pair for pair in by_name.values() if np.median(pair[1].steps_s) <= TIE * fastest)
        slower = [m for _, m in by_name.values() if m is not best]
        if not self.prompts:
            return replace(best, name=ORIGINAL), None, slower
        again, images = self.measure(variant, repeats=1, warmup=0)
        return replace(best, name=ORIGINAL, quality=again.quality), images, slower


def _left_out(measured: Sequence[Measured]) -> str:
    """Return why the original need not be measured in this precision too; empty if it should be."""
    return "a GPU is faster in bf16" if any(m.memory_of == "gpu" for m in measured) else ""


def _check(
    variants: Sequence[Variant], *, repeats: int, warmup: int, quality: int, quality_seeds: int, steps: int | None
) -> None:
    names = [v.name for v in variants]
    if not names or len(set(names)) != len(names):
        raise InputError(f"variants: found {names}, expected at least one, with different names")
    for option, value, low in (
        ("repeats", repeats, 1),
        ("warmup", warmup, 0),
        ("quality", quality, 0),
        ("quality_seeds", quality_seeds, 1),
        ("steps", 1 if steps is None else steps, 1),
    ):
        if value < low:
            raise InputError(f"{option}: found {value}, expected {low} or more")
    for variant in variants:  # fail now, not after minutes of measuring the other variants
        foreign = variant.runtime == PIPELINE
        runtimes.RUNTIMES[TORCH if foreign else runtimes.choose(variant.folder, variant.runtime)].require()


def _worker(variant: Variant, spec: dict[str, Any], progress: Log) -> dict[str, Any]:
    """Run one worker to its end and return the JSON of its last line."""
    spec = spec | {
        "settings": {"steps": spec.get("steps")} | variant.settings,
        "folder": str(variant.folder),
        "runtime": variant.runtime,
        "options": variant.options if variant.dtype is None else variant.options | {"dtype": variant.dtype},
    }
    command = [sys.executable, "-m", "edgeprune.bench.worker", json.dumps(spec)]
    last = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, encoding="utf-8") as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                last = line
                if line.startswith('{"progress"'):
                    done, total = json.loads(line)["progress"]
                    progress(f"{variant.name}: {done} of {total} quality images")
        code = worker.returncode
        stderr.seek(0)
        tail = " | ".join(stderr.read().strip().splitlines()[-3:])
    try:
        reply = json.loads(last)
    except ValueError:
        reply = None
    if isinstance(reply, dict) and "error" in reply:
        kind = getattr(errors, reply["kind"], EdgepruneError)
        # MissingExtraError builds its text from two names; the reply already holds the whole text.
        raise (InputError if kind is errors.MissingExtraError else kind)(f"{variant.name}: {reply['error']}")
    if code != 0 or not isinstance(reply, dict):
        raise EdgepruneError(f"{variant.name}: the worker ended with status {code}: {tail or 'no message'}")
    return reply


def _measured(variant: Variant, reply: dict[str, Any], bandwidth: float, quality: Quality | None) -> Measured:
    values: dict[str, float | int | None] = {k: reply[k] for k in MEASURES if k in reply}
    values |= disk_bytes(variant.folder, variant.options.get("variant"))
    weights = functools.partial(weights_bytes, variant.folder, reply["precision"], variant.options.get("variant"))
    values["transformer_weights_bytes"] = weights()
    values["peak_above_runtime_bytes"] = _above(values["peak_bytes"], values["runtime_overhead_bytes"])
    values["step_floor_s"] = weights(each_step=True) / bandwidth
    values["step_p50_s"], values["step_p95_s"] = (float(q) for q in np.quantile(reply["steps_s"], [0.5, 0.95]))
    values["image_p50_s"] = float(np.median(reply["images_s"]))
    return Measured(
        name=variant.name,
        folder=str(variant.folder),
        runtime=reply["runtime"],
        provider=reply["provider"],
        provider_why=reply["provider_why"],
        memory_of=reply["memory_of"],
        precision=reply["precision"],
        values={k: values[k] for k in MEASURES},
        steps_s=reply["steps_s"],
        images_s=reply["images_s"],
        how=reply["how"],
        quality=quality,
        identity=identity(variant.folder),
        settings=variant.settings,
    )


def _above(peak: float | int | None, overhead: float | int | None) -> float | int | None:
    return None if peak is None or overhead is None else max(0, peak - overhead)


def psnr_db(first: NDArray[np.uint8], other: NDArray[np.uint8]) -> float | None:
    """Return the mean peak signal-to-noise ratio of images, both (P, H, W, 3); None if their sizes differ."""
    if first.shape != other.shape:
        return None
    return mean_decibels(list(first), list(other))


def _score(images: NDArray[np.uint8], prompts: list[Prompt], world: World) -> Quality:
    if images.shape[1:] != (world.size, world.size, 3):
        raise InputError(f"quality: found images of {images.shape[1:3]}, expected {world.size}x{world.size}")
    right = [world.check(image, prompt.meaning) for image, prompt in zip(images, prompts, strict=True)]
    # Seeds of one prompt are not independent: the bootstrap is over prompts.
    by_prompt: dict[str, list[bool]] = {}
    for prompt, ok in zip(prompts, right, strict=True):
        by_prompt.setdefault(prompt.text, []).append(ok)
    task_of = {p.text: p.meaning.task for p in prompts}
    values, tasks = np.asarray([np.mean(v) for v in by_prompt.values()]), [task_of[t] for t in by_prompt]
    mean, low, high = score(values, tasks)
    return Quality(
        score=mean, score_low=low, score_high=high, tasks=world.task_means(values, tasks), images=len(images),
        prompt_values=values.tolist(), prompt_tasks=tasks,
    )  # fmt: skip
