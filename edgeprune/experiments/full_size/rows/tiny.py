"""Rows on a transformer of real size with tiny encoders: pruning, INT4, exports, and one step at 512x512.

The tiny encoders keep them small enough for exports in every format.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from edgeprune.bench.run import Variant, originals
from edgeprune.bench.run import run as run_bench
from edgeprune.common.files import read_json, write_json
from edgeprune.experiments.full_size.forecast import Work
from edgeprune.experiments.full_size.recording import Recorder, Values
from edgeprune.experiments.full_size.rows.row import Row
from edgeprune.export.folder import FILE as EXPORT
from edgeprune.families.published import transformers
from edgeprune.runtimes.precision import lacking

BLOCKS = "25-28,31-34"
"""The eight blocks that the published plan removes from SD3.5 Large Turbo."""
MORE_BLOCKS = "8-28"
"""Twenty-one blocks, to time a step of the other seventeen; such a model would hardly draw well."""
LARGE, SCHNELL = "sd3.5-large-tiny", "flux.1-schnell-tiny"
"""Folders of the models."""
_ISA = "ONEDNN_MAX_CPU_ISA"
_RANK = ("--method", "manual", "--modulation-rank", "256")
_GROUPS = ("--group-size", "128")
_STEP = 6.4e12
"""Operations of a step of SD3.5 Large. Most steps run faster than in float32, so fewer are counted."""


def rows() -> Iterator[Row]:
    """Yield the rows. An export handles each weight once, which takes about as long as rounding it."""
    yield Row("plans", "a plan from each config alone", Work(commands=len(transformers())), 10**6, plans)
    yield _synth("synth-tiny", "sd3.5-large", LARGE, 8.15e9)
    yield _synth("synth-tiny-schnell", "flux.1-schnell", SCHNELL, 11.9e9)
    large = {
        "large-8": ("less 8 blocks: all exports, one step", large_8, Work(12, 0, 8e10, 4.5e10, 6 * _STEP), 24),
        "large-r256": ("at rank 256: ONNX", large_r256, Work(2, 0, 4e10, 1.4e10), 19),
        "large-8-r256-g128": (
            "less 8 blocks, at rank 256, in groups of 128: ONNX, OpenVINO, one step", large_8_r256_g128,
            Work(8, 0, 6e10, 1.6e10, 5 * _STEP), 19,
        ),
        "large-21-r256-g128": (
            "less 21 blocks, at rank 256, in groups of 128: OpenVINO, one step", large_21_r256_g128,
            Work(6, 0, 4e10, 6e9, 3 * _STEP), 13,
        ),
    }  # fmt: skip
    for name, (what, measure, work, gigabytes) in large.items():
        yield Row(name, f"SD3.5 Large {what}", work, gigabytes * 10**9, measure, needs=("synth-tiny",))
    yield Row(
        "flux", "FLUX.1 schnell, INT4 alone: ONNX", Work(2, 0, 1e11, 2.4e10), 31 * 10**9, flux,
        needs=("synth-tiny-schnell",),
    )  # fmt: skip


def _synth(row: str, name: str, folder: str, weights: float) -> Row:
    def measure(recorder: Recorder) -> None:
        out = recorder.out / folder
        recorder.stage(f"{name} with tiny encoders: synth", "synth", name, "--tiny-encoders", "-o", str(out), makes=out)

    work = Work(drawn=weights, moved=2 * weights)
    return Row(row, f"{name} with tiny encoders, random weights", work, int(2 * weights), measure, model=folder)


def plans(recorder: Recorder) -> None:
    """Measure a plan from each config alone."""
    for name, config in transformers().items():
        path = recorder.out / f"{name}.json"
        write_json(path, config)
        recorder.stage(
            f"{name}: plan from config", "plan", "--config", str(path), "--method", "manual", "--blocks", "5-8"
        )


def large_8(recorder: Recorder) -> None:
    """Measure SD3.5 Large less 8 blocks in every format, and its step."""
    artefact = compressed(recorder, "large-8", LARGE, "--blocks", BLOCKS)
    onnx(recorder, artefact)
    steps(recorder, "large-8", ort=True)
    recorder.stage(
        "large-8: TensorRT-RTX", "export", str(artefact), "--target", "trt", "--device", "rtx",
        "-o", f"{artefact}-trt", file=Path(f"{artefact}-trt/transformer"),
    )  # fmt: skip
    recorder.remark("large-8: TensorRT-RTX", functools.partial(_build, Path(f"{artefact}-trt")))
    recorder.stage(
        "large-8: Core ML", "export", str(artefact), "--target", "coreml", "--device", "iphone-15-pro",
        "-o", f"{artefact}-coreml", file=Path(f"{artefact}-coreml/transformer"),
    )  # fmt: skip
    recorder.remove("large-8")


def large_r256(recorder: Recorder) -> None:
    """Measure projected modulation."""
    onnx(recorder, compressed(recorder, "large-r256", LARGE, *_RANK))
    recorder.remove("large-r256")


def large_8_r256_g128(recorder: Recorder) -> None:
    """Measure 8 blocks less, projected modulation and larger groups, and the step also without the processor's bf16."""
    label = "large-8-r256-g128"
    onnx(recorder, compressed(recorder, label, LARGE, *_RANK, "--blocks", BLOCKS, *_GROUPS))
    steps(recorder, label, ort=False)
    without_bf16(recorder, label)
    recorder.remove(label)


def large_21_r256_g128(recorder: Recorder) -> None:
    """Measure the step of 17 blocks."""
    label = "large-21-r256-g128"
    compressed(recorder, label, LARGE, *_RANK, "--blocks", MORE_BLOCKS, *_GROUPS)
    steps(recorder, label, ort=False)
    recorder.remove(label)


def flux(recorder: Recorder) -> None:
    """Measure FLUX.1 schnell with INT4 alone."""
    onnx(recorder, compressed(recorder, "flux", SCHNELL, "--method", "manual"))
    recorder.remove("flux")


def compressed(recorder: Recorder, label: str, model: str, *options: str) -> Path:
    """Prune and quantize a model; return the artefact."""
    artefact, source = recorder.out / label, recorder.out / model
    recorder.stage(
        f"{label}: prune and INT4", "compress", str(source), "-o", str(artefact), "--steps", "0",
        "--calibration", "none", *options, makes=artefact,
    )  # fmt: skip
    for shard in (artefact / "transformer").glob("*.safetensors"):
        shard.unlink()  # nothing reads the half-precision weights again
    return artefact


def onnx(recorder: Recorder, artefact: Path) -> None:
    """Export an artefact to ONNX."""
    out = Path(f"{artefact}-onnx")
    recorder.stage(
        f"{artefact.name}: ONNX", "export", str(artefact), "--target", "onnx", "-o", str(out), makes=out,
        file=out / "transformer",
    )  # fmt: skip


def steps(recorder: Recorder, label: str, *, ort: bool) -> None:
    """Measure one denoising step in OpenVINO, with `ort` also in ONNX Runtime, against the original."""
    folder = str(recorder.out / label)
    exported, ir, prepared = (Path(f"{folder}-{kind}") for kind in ("onnx", "openvino", "prepared"))
    recorder.stage(
        f"{label}: OpenVINO", "export", folder, "--target", "openvino", "-o", str(ir), makes=ir,
        file=ir / "transformer",
    )  # fmt: skip
    cached = {"cache_dir": str(prepared), "precision": "exact"}
    variants = [Variant("OpenVINO", ir, "openvino", options={"precision": "exact"})]
    if not lacking("int8"):
        variants.append(Variant("OpenVINO, int8", ir, "openvino", options={"precision": "int8"}))
    if ort:
        recorder.stage(
            f"{label}: ONNX Runtime prepares its weights", "generate", "a lake", "--model", str(exported), "--runtime",
            "ort", "--option", f"cache_dir={prepared}", "--exact", "--steps", "1", "--height", "64", "--width", "64",
            "-o", f"{folder}-image.png", file=prepared,
        )  # fmt: skip
        variants += [
            Variant("ONNX Runtime", exported, "ort", options={"precision": "exact"}),
            Variant("ONNX Runtime, weights prepared", exported, "ort", options=cached),
        ]
    _bench(recorder, f"{label}: one step", variants, repeats=3)


def without_bf16(recorder: Recorder, label: str) -> None:
    """Measure a step as on processors that have int8 dot products but no bf16, by restricting oneDNN's instructions.

    OpenVINO ignores that variable, but computes everything but int8 in float32.
    """
    folder = recorder.out / f"{label}-onnx"
    variant = Variant("OpenVINO, int8", folder, "openvino", options={"precision": "int8"})
    name = f"{label}: one step without the processor's bf16 (the original's is emulated)"
    os.environ[_ISA] = "AVX512_CORE_VNNI"
    try:
        _bench(recorder, name, [variant], repeats=1)
    finally:
        del os.environ[_ISA]


def _bench(recorder: Recorder, name: str, variants: list[Variant], *, repeats: int) -> None:
    """Measure one step of the original and of `variants` unless that is done."""
    if name not in recorder.stages:
        recorder.note(name, measured([*originals(recorder.out / LARGE), *variants], repeats=repeats))


def measured(variants: list[Variant], *, repeats: int) -> dict[str, Values]:
    """Run a bench and return its figures by variant."""
    result = run_bench(variants, repeats=repeats, warmup=0, steps=1, progress=print)
    keys = ("load_s", "first_step_s", "step_p50_s", "peak_bytes", "anon_bytes", "file_bytes")
    first, *others = result.variants
    named = {f"original, torch {v.precision}": v for v in (first, *result.slower_originals)}
    named |= {v.name: v for v in others}
    return {name: {key: v.values[key] for key in keys} for name, v in named.items()}


def _build(engines: Path) -> str:
    built = read_json(engines / EXPORT)["networks"]["transformer"]
    share = built["engine_bytes"] / built["onnx_weight_bytes"]
    return f"{built['build_s']:.0f} s of that is the build; the engine has {share:.3f} times the bytes of its weights"
