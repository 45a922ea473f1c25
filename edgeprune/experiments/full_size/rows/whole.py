"""Rows on whole pipelines at their real size: every network is real, and so are steps, guidance and 1024x1024 pixels.

What a row runs, a user with such a machine would run. Where 1024x1024 would take hours here, a row says another size.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from edgeprune.artefact.resolve import read_original
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.splits import Split
from edgeprune.experiments.full_size.forecast import MOST_BYTES, Work
from edgeprune.experiments.full_size.recording import Recorder
from edgeprune.experiments.full_size.rows.row import Row
from edgeprune.families import family_of
from edgeprune.families.published import transformers
from edgeprune.metrics.velocity import STATES
from edgeprune.planning.make import make_plan
from edgeprune.residency.compute import Compute
from edgeprune.residency.running import running
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.prompts import prompts as captions
from edgeprune.stages.costs import sample
from edgeprune.stages.options import LARGE_STATES as CALIBRATED_AT
from edgeprune.stages.original import Original
from edgeprune.stages.stand_ins import LARGE_STATES
from edgeprune.stages.work import CALIBRATED, block_by_block_s
from edgeprune.training.resume import losses_of, step_generator
from edgeprune.training.states import States


@dataclass(frozen=True)
class _Model:
    name: str
    suffix: str
    """Of its rows' names."""
    weights: float
    """Of the transformer."""
    others: float
    """Weights of text encoders and VAE."""
    flops: float
    """Of an evaluation at 512x512."""
    per_step: int
    """Evaluations of a sampling step."""
    blocks: str
    """Eight of them, for rows that remove some."""
    calibrated: int
    """Prompts that calibrate, as many as a row has time for."""


_MODELS = (
    _Model("sd3.5-large", "", 8.15e9, 5.66e9, 8.0e12, 2, "25-28,31-34", 4),
    _Model("flux.1-dev", "-flux", 11.9e9, 4.97e9, 19e12, 1, "40-47", 2),
)
_MEDIUM = ("--height", "512", "--width", "512")
_LITTLE = ("--memory", "3GB")
_SIX = ("--memory", "6GB")
_PROMPTS = 4
"""That stand-ins are fitted on."""
_PAIRS, _STEPS = 8, 20
"""Of training."""
_RATE = "1e-5"
"""Of training: at the default, 1e-4, twenty steps of one sample each drive a model of random weights astray."""
_NEAREST = ("--calibration", "none")
_T5 = 4.76e9
"""Weights of T5-XXL."""
_TEXT = ("--encoders", "int8")
"""The INT4 of T5-XXL alone takes up to an hour."""


def rows() -> Iterator[Row]:
    """Yield the rows of each model."""
    for m in _MODELS:
        everything, pruned = 2 * (m.weights + m.others), 2.5 * m.weights + 2 * m.others
        moved = 2 * everything + pruned
        compress = Work(moved=moved, rounded=m.weights)
        yield Row(
            f"synth{m.suffix}", f"{m.name} whole, random weights", Work(drawn=m.weights + m.others, moved=everything),
            int(everything), functools.partial(_synth, m), model=m.name,
        )  # fmt: skip
        yield _row(m, "compress-blocks", "prune 8 blocks, INT4", compress, ("--blocks", m.blocks, *_NEAREST))
        yield _row(
            m, "compress-no-half", "prune 8 blocks, INT4 alone", compress,
            ("--blocks", m.blocks, "--no-half", *_NEAREST),
        )  # fmt: skip
        if not m.suffix:  # FLUX.1 has the same T5
            yield _row(
                m, "encoders", "prune 8 blocks, INT4, also of T5-XXL, in 3 GB",
                Work(moved=moved, rounded=m.weights + 2 * CALIBRATED["feedback"] * _T5, large_flops=2.5e14),
                ("--blocks", m.blocks, "--no-half", *_NEAREST, "--encoders", "int4", *_MEDIUM, *_LITTLE),
            )  # fmt: skip
        yield _row(
            m, "plan-auto", "modulation at the rank that is measured, INT4, in 3 GB",
            Work(moved=moved, rounded=m.weights, flops=2e12),
            ("--method", "manual", "--modulation-rank", "auto", *_NEAREST, *_LITTLE),
        )  # fmt: skip
        evaluations = m.calibrated * CALIBRATED_AT * m.per_step * (1 + 2 * 0.79)
        yield _row(
            m, "quantize-feedback", "prune 8 blocks, INT4 by error feedback at 512x512, in 6 GB",
            Work(moved=moved, rounded=CALIBRATED["feedback"] * m.weights, large_flops=evaluations * m.flops),
            ("--blocks", m.blocks, "--calibration-count", str(m.calibrated), *_TEXT, *_MEDIUM, *_SIX),
        )  # fmt: skip
        evaluations = int(2.8 * _PROMPTS * LARGE_STATES * m.per_step)
        work, what = Work(moved=moved, rounded=m.weights, large_flops=evaluations * m.flops), "prune 8 blocks, INT4"
        yield Row(
            f"stand-ins{m.suffix}", f"{m.name}: {what}, stand-ins from eight states at 512x512, in 6 GB", work,
            int(2.5 * m.weights), functools.partial(_stand_ins, m), needs=(f"synth{m.suffix}",),
        )  # fmt: skip
        # Both transformers, the new one while it replaces the other, and the state of the training.
        learned, disk = 1.7 * _PAIRS + 2 * 3 * _STEPS * _tail_share(m), int(4.5 * m.weights)
        if disk <= MOST_BYTES:
            yield Row(
                f"tail{m.suffix}", f"{m.name} less 8 blocks: 20 steps of the tail from eight states at 512x512, twice",
                Work(2, moved=2 * everything + 4 * m.weights, rounded=2 * m.weights, large_flops=learned * m.flops),
                disk, functools.partial(_tail, m), needs=(f"synth{m.suffix}",),
            )  # fmt: skip
        # Two images of each model, or an image and two timed ones: a step of less blocks is 0.79 of one.
        for name, what, steps, measure in (("draw", "report and score", 2, _draw), ("bench", "bench", 3, _bench)):
            drawing = Work(
                5, moved=2 * everything, rounded=m.weights, large_flops=1.79 * steps * m.per_step * 4 * m.flops
            )
            yield Row(
                f"{name}{m.suffix}", f"{m.name} less 8 blocks: {what} of one step at 1024x1024, in 6 GB", drawing,
                int(0.5 * m.weights), functools.partial(measure, m), needs=(f"synth{m.suffix}",),
            )  # fmt: skip
        yield Row(
            f"verify{m.suffix}", f"{m.name}: verify at 512x512, in 6 GB",
            Work(moved=3 * everything, flops=m.flops, large_flops=m.flops), 10**9, functools.partial(_verify, m),
            needs=(f"synth{m.suffix}",),
        )  # fmt: skip
        yield Row(
            f"analyze-gates{m.suffix}", f"{m.name}: scores of all blocks by gradients at 512x512, in 3 GB",
            Work(moved=2 * everything, large_flops=_evaluations(m) * m.flops), 2 * 10**10, functools.partial(_gates, m),
            needs=(f"synth{m.suffix}",),
        )  # fmt: skip

        computed = 1.79 * m.per_step * (CALIBRATED_AT + 2 * LARGE_STATES)
        yield Row(
            f"learn-3gb{m.suffix}", f"{m.name}: 8 blocks less, stand-ins, error feedback, a prompt at 512x512, in 3 GB",
            Work(moved=moved, rounded=CALIBRATED["feedback"] * m.weights, large_flops=computed * m.flops),
            int(0.5 * m.weights), functools.partial(_learn, m), needs=(f"synth{m.suffix}",),
        )  # fmt: skip
        yield Row(
            f"draw-3gb{m.suffix}", f"{m.name} less 8 blocks: report, score, bench, verify, a step at 512x512, in 3 GB",
            Work(5, moved=4 * everything, rounded=m.weights, large_flops=1.79 * 5 * m.per_step * m.flops),
            int(0.5 * m.weights), functools.partial(_draw_little, m), needs=(f"synth{m.suffix}",),
        )  # fmt: skip


def _row(model: _Model, name: str, what: str, work: Work, options: tuple[str, ...]) -> Row:
    """Return a row of `compress` without training."""
    label = f"{name}{model.suffix}"
    return Row(
        label, f"{model.name}: {what}", work, int(2.5 * model.weights),  # text encoders and VAE are linked
        functools.partial(_compress, model, label, options), needs=(f"synth{model.suffix}",),
    )  # fmt: skip


def _synth(model: _Model, recorder: Recorder) -> None:
    folder = recorder.out / model.name
    recorder.stage(f"{model.name}: synth", "synth", model.name, "-o", str(folder), makes=folder, file=folder)


def _compress(model: _Model, label: str, options: tuple[str, ...], recorder: Recorder) -> None:
    source, out = recorder.out / model.name, recorder.out / label
    recorder.stage(
        f"{label}: compress", "compress", str(source), "-o", str(out), "--steps", "0", "--json", *options,
        makes=out, file=out / "transformer_int4", caches=recorder.out / f"{label}-caches",
    )  # fmt: skip
    recorder.remove(label)


def _stand_ins(model: _Model, recorder: Recorder) -> None:
    label = f"stand-ins{model.suffix}"
    prompts = recorder.out / f"{label}.txt"
    prompts.write_text("".join(f"{one}\n" for one in captions(Split.CALIBRATION, _PROMPTS)), encoding="utf-8")
    options = (
        *("--blocks", model.blocks, "--stand-in", "quarter", "--prompts", str(prompts)), *_NEAREST, *_MEDIUM, *_SIX,
    )  # fmt: skip
    _compress(model, label, options, recorder)


def _tail_share(model: _Model) -> float:
    """Return the share of an evaluation that the trained blocks take."""
    config = transformers()[model.name]
    family = family_of(config)
    plan = make_plan(family, config, None, method="manual", blocks=model.blocks)
    return sum(block >= plan.first_pruned for block in plan.kept) / plan.num_blocks


def _tail(model: _Model, recorder: Recorder) -> None:
    label = f"tail{model.suffix}"
    source, out, images = recorder.out / model.name, recorder.out / label, recorder.out / f"{label}-images"
    recorder.stage(
        f"{label}: compress", "compress", str(source), "-o", str(out), "--steps", "0", "--blocks", model.blocks,
        *_NEAREST, *_MEDIUM, makes=out,
    )  # fmt: skip
    _pairs(images)
    for trained in ("all", "lora:64"):
        name = f"{label}: distill, {trained}"
        recorder.stage(
            name, "distill", "-o", str(out), "--data", str(images), "--samples", str(_PAIRS), "--states", str(_PAIRS),
            "--steps", str(_STEPS), "--batch", "1", "--ema", "0", "--rate", _RATE, "--train", trained, "--yes",
            "--fresh",
        )  # fmt: skip
        recorder.remark(name, functools.partial(_losses, out))
    recorder.remove(label)


def _pairs(folder: Path) -> None:
    """Write images of noise with captions."""
    folder.mkdir(exist_ok=True)
    draw, lines = np.random.default_rng(0), []
    for index, caption in enumerate(captions(Split.TRAINING, _PAIRS)):
        Image.fromarray(draw.integers(0, 256, (512, 512, 3), np.uint8)).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _losses(out: Path) -> str:
    """Say what became of the losses of states that were drawn more than once."""
    losses = losses_of(out / "cache" / "distill.safetensors")
    states = States(sorted((out / "cache").glob("states-*/*.safetensors")))
    seen: dict[float, list[float]] = {}
    for step, loss in enumerate(losses):
        state = states.batch(1, step_generator(0, step))
        seen.setdefault(float(state.velocity.abs().sum()), []).append(loss)
    ratios = [found[-1] / found[0] for found in seen.values() if len(found) > 1]
    return f"of {len(ratios)} states drawn again, the last loss is {np.median(ratios):.2f} of the first (median)"


def _draw(model: _Model, recorder: Recorder) -> None:
    label = f"draw{model.suffix}"
    out, prompts = _one_step(model, label, recorder), _prompt(recorder, label)
    recorder.stage(f"{label}: report", "report", "-o", str(out), "--images", "1", "--yes", *_SIX)
    recorder.stage(
        f"{label}: score", "score", str(out), "--against", str(recorder.out / model.name), "--metric", "psnr",
        "--prompts", str(prompts), "--runtime", "eager", "--steps", "1", *_SIX,
    )  # fmt: skip
    recorder.remove(label)


def _prompt(recorder: Recorder, label: str) -> Path:
    """Write a file of one prompt."""
    path = recorder.out / f"{label}.txt"
    path.write_text("a lighthouse on a cliff at dusk\n", encoding="utf-8")
    return path


def _bench(model: _Model, recorder: Recorder) -> None:
    label = f"bench{model.suffix}"
    out = _one_step(model, label, recorder)
    recorder.stage(f"{label}: bench", "bench", str(out), "--runtime", "eager", "--repeats", "1", "--steps", "1", *_SIX)
    recorder.remove(label)


def _one_step(model: _Model, label: str, recorder: Recorder, *options: str) -> Path:
    """Return an artefact less 8 blocks that draws in one step."""
    source, out = recorder.out / model.name, recorder.out / label
    recorder.stage(
        f"{label}: compress", "compress", str(source), "-o", str(out), "--steps", "0", "--no-half",
        "--blocks", model.blocks, "--inference-steps", "1", *_NEAREST, *options, makes=out,
    )  # fmt: skip
    return out


def _learn(model: _Model, recorder: Recorder) -> None:
    label = f"learn-3gb{model.suffix}"
    learned = ("--stand-in", "quarter", "--prompts", str(_prompt(recorder, label)), "--calibration-count", "1")
    _compress(model, label, ("--blocks", model.blocks, "--no-half", *learned, *_TEXT, *_MEDIUM, *_LITTLE), recorder)


def _draw_little(model: _Model, recorder: Recorder) -> None:
    label = f"draw-3gb{model.suffix}"
    source, prompts = recorder.out / model.name, _prompt(recorder, label)
    out = _one_step(model, label, recorder, *_MEDIUM, *_LITTLE, "--preset", "quick")  # with a report of two images
    drawn = ("--runtime", "eager", "--steps", "1", *_LITTLE)
    recorder.stage(
        f"{label}: score", "score", str(out), "--against", str(source), "--metric", "psnr", "--prompts", str(prompts),
        *drawn,
    )  # fmt: skip
    recorder.stage(f"{label}: bench", "bench", str(out), "--repeats", "1", *drawn)
    recorder.stage(f"{label}: verify", "verify", str(source), *_MEDIUM, *_LITTLE)
    recorder.remove(label)


def _verify(model: _Model, recorder: Recorder) -> None:
    recorder.stage(f"verify{model.suffix}: verify", "verify", str(recorder.out / model.name), *_MEDIUM, *_SIX)


def _evaluations(model: _Model) -> int:
    """Return the evaluations of gates on one prompt: the trajectory, and forward, forward again and backward."""
    return STATES * (model.per_step + 3) - model.per_step


def _gates(model: _Model, recorder: Recorder) -> None:
    label = f"gates{model.suffix}"
    source, out, name = recorder.out / model.name, recorder.out / label, f"{label}: analyze"
    options = ("--estimator", "gates", "--count", "1", "--only-blocks", "--yes", *_MEDIUM, *_LITTLE)
    recorder.stage(name, "analyze", str(source), "-o", str(out), *options, makes=out)
    recorder.remark(name, lambda: _beside_blocks(source, recorder.stages[name]["seconds"], _evaluations(model)))
    recorder.remove(label)


def _beside_blocks(source: Path, seconds: float, evaluations: int) -> str:
    """Say how a command's time compares with that of its evaluations, of which a block of each kind is timed now."""
    config, family = read_original(source)
    generation = replace(Generation.load(source), height=512, width=512)
    place = Compute.of(ComputeOptions(memory=3 * 10**9))
    transformer = running(Original(source, compute=place).stored, place, keep=False)
    one = block_by_block_s(family, transformer, sample(family, config, source, generation))
    return (
        f"{evaluations} evaluations, a gradient counted as two; one takes {one:.1f} s by its blocks' own time, so all "
        f"is {seconds / (evaluations * one):.2f} times that"
    )
