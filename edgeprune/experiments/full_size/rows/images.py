"""Rows that draw: a whole pipeline in INT4, exported, and an image of it within a limit of memory.

Nothing is removed, which is the harder case, except where the transformer is to stay in memory whole. Exports stay, so
that `edgeprune.experiments.stage_peaks` can look closer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeprune.experiments.full_size.forecast import Work
from edgeprune.experiments.full_size.recording import Recorder
from edgeprune.experiments.full_size.rows.row import Row


@dataclass(frozen=True)
class _Model:
    name: str
    suffix: str
    """Of its rows' names."""
    synth: str
    """The row that makes it."""
    weights: float
    """Of the transformer."""
    others: float
    """Weights of text encoders and VAE."""
    flops: float
    """Of a sampling step at 512x512."""
    steps: int
    """Of an image here; at most the model's own."""
    limits: tuple[tuple[int, str], ...]
    """Pixels of a side, and memory: what is aimed for, and what all blocks of most models stay in."""
    what: str = "nothing removed"
    options: tuple[str, ...] = ("--method", "manual")
    """Of `compress`."""


_LARGE, _MEDIUM, _RESIDENT = (1024, "2GB"), (512, "1GB"), (512, "8GB")
_LESS = "less 8 blocks", ("--blocks", "25-28,31-34")
_LESS_128 = "less 8 blocks, in groups of 128", (*_LESS[1], "--group-size", "128")
_MODELS = (
    _Model("sd3.5-large", "", "synth", 8.06e9, 5.66e9, 16e12, 2, (_LARGE, _MEDIUM, _RESIDENT)),
    _Model("sd3.5-large", "-8", "synth", 6.35e9, 5.66e9, 16e12, 1, ((1024, "4GB"),), *_LESS),
    _Model("sd3.5-large", "-8-g128", "synth", 6.35e9, 5.66e9, 16e12, 1, ((1024, "4GB"),), *_LESS_128),
    _Model("flux.1-schnell", "-schnell", "synth-schnell", 11.9e9, 4.97e9, 16e12, 2, (_LARGE, _MEDIUM, _RESIDENT)),
    _Model("flux.2-klein-4b", "-klein", "synth-klein", 3.88e9, 4.1e9, 11e12, 4, (_LARGE, _RESIDENT)),
    _Model("z-image-turbo", "-z-image", "synth-z-image", 6.15e9, 4.1e9, 14e12, 8, (_LARGE, _RESIDENT)),
)
_MEDIUM_STEPS = 4
"""Of an image at 512x512, at most."""
_RUNTIMES = {"openvino": "OpenVINO", "onnx": "ONNX Runtime"}


def rows() -> Iterator[Row]:
    """Yield the rows of each model."""
    for m in _MODELS:
        everything = 2 * (m.weights + m.others)
        if m.synth != "synth":  # which rows without an export make
            yield Row(
                m.synth, f"{m.name} whole, random weights", Work(drawn=m.weights + m.others, moved=2 * everything),
                int(everything), functools.partial(_synth, m), model=m.name,
            )  # fmt: skip
        yield Row(
            f"int4{m.suffix}", f"{m.name}: INT4 alone, {m.what}, and a report",
            Work(1, moved=3 * everything, rounded=m.weights, large_flops=4 * m.steps * m.flops),
            int(0.6 * m.weights), functools.partial(_int4, m), needs=(m.synth,), model=_folder(m),
        )  # fmt: skip
        for target, runtime in _RUNTIMES.items():
            # A step at 1024x1024 has four times as many tokens.
            limits = ", ".join(f"{side}x{side} in {limit}" for side, limit in m.limits)
            drawn = sum(_steps(m, side) * (side / 512) ** 2 for side, _ in m.limits)
            yield Row(
                f"{target}{m.suffix}", f"{m.name}, INT4, {m.what}, images in {runtime}: {limits}",
                Work(4, moved=3 * everything, large_flops=drawn * m.flops), int(0.6 * everything),
                functools.partial(_images, m, target), needs=(f"int4{m.suffix}",), model=f"{_folder(m)}-{target}",
            )  # fmt: skip


def _steps(model: _Model, side: int) -> int:
    return model.steps if side > 512 else min(model.steps, _MEDIUM_STEPS)


def _folder(model: _Model) -> str:
    """Return the name of the artefact's folder."""
    return f"{model.name}-int4" if model.options[0] == "--method" else f"{model.name}{model.suffix}-int4"


def _synth(model: _Model, recorder: Recorder) -> None:
    folder = recorder.out / model.name
    recorder.stage(f"{model.name}: synth", "synth", model.name, "-o", str(folder), makes=folder, file=folder)


def _int4(model: _Model, recorder: Recorder) -> None:
    source, out, label = recorder.out / model.name, recorder.out / _folder(model), f"int4{model.suffix}"
    recorder.stage(
        f"{label}: compress", "compress", str(source), "-o", str(out), *model.options, "--steps", "0",
        "--no-half", "--calibration", "none", "--preset", "quick", "--height", "512", "--width", "512",
        "--inference-steps", str(model.steps), "--memory", "6GB", makes=out, file=out / "transformer_int4",
    )  # fmt: skip


def _images(model: _Model, target: str, recorder: Recorder) -> None:
    label, artefact = f"{target}{model.suffix}", recorder.out / _folder(model)
    exported = Path(f"{artefact}-{target}")
    recorder.stage(
        f"{label}: export", "export", str(artefact), "--target", target, "-o", str(exported), makes=exported,
        file=exported,
    )  # fmt: skip
    for side, limit in model.limits:
        steps = _steps(model, side)
        recorder.stage(
            f"{label}: {side}x{side} in {limit}, {steps} steps", "generate", "a lighthouse on a cliff at dusk",
            "--model", str(exported), "--memory", limit, "--height", str(side), "--width", str(side),
            "--steps", str(steps), "-o", f"{exported}-{side}-{limit}.png",
        )  # fmt: skip
