"""`bench`: memory, latency and quality of what runs here, next to the original. Needs no torch for the exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.drawing import TORCH, say_conflicts, torch_options
from edgeprune.api.folders import AnyPath, source_of
from edgeprune.common.errors import CannotRunError, InputError
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:
    from edgeprune.bench.results import BenchResult

ALL = "all"
"""Value of `runtime`: every runtime that opens a folder and can run here."""


def bench(
    folders: Sequence[AnyPath],
    *,
    runtime: str | None = None,
    baseline: AnyPath | None = None,
    revision: str | None = None,
    variant: str | None = None,
    repeats: int = 20,
    steps: int | None = None,
    quality: int = 0,
    original: bool = True,
    device: str = "auto",
    memory: int | None = None,
    progress: Progress = silent,
) -> BenchResult:
    """Measure memory, latency and quality of folders next to their original. Each variant runs in a fresh process.

    The original runs in torch, in bf16 and in float32; the faster one is what ratios refer to.

    Args:
        folders: exports, artefact folders or diffusers folders.
        runtime: a runtime's name; `all` measures every one that opens a folder and can run here; None takes the first
            installed one that fits.
        baseline: the original, a folder or hub id; None for the model that the first folder was made from.
        revision: a branch, tag or commit of the baseline's hub id; None for its default.
        variant: of the baseline's weights, such as fp16; None for the one that the first folder was made from.
        repeats: warm steps to time.
        steps: denoising steps of an image; None for the model's own.
        quality: shapes-world prompts per task to score images on; 0 scores none.
        original: measure the original too; without it, ratios refer to the first folder.
        device: where torch computes, the original and folders that run in it: auto, cpu, cuda, cuda:1, mps or xpu.
        memory: most bytes of each process, with torch on a GPU of the GPU; None takes most of what is free.
        progress: gets a line of text now and then, also for folders that cannot run here.

    Raises:
        CannotRunError: nothing here can run any of the folders.
        InputError: a folder, a number or the device is not usable, or nothing that `device` is about runs in torch.
        MissingExtraError: a package of a runtime is not installed.
    """
    from edgeprune.artefact.resolve import resolve
    from edgeprune.bench import run as bench_run
    from edgeprune.sampling.generation import say_guesses

    if not folders:
        raise InputError("bench: found no folder, expected at least one")
    pairs = _pairs([Path(folder) for folder in folders], runtime, progress)
    names = ["compressed"] if len(pairs) == 1 else [f"{folder}:{name}" for folder, name in pairs]
    given: dict[str, Any] = {} if memory is None else {"memory": memory}
    chosen = torch_options(device, [name for _, name in pairs] + [TORCH] * original)
    variants = []
    if original:
        model, commit, made_from = source_of(Path(folders[0])) if baseline is None else (str(baseline), None, None)
        weights = variant or made_from
        variants = bench_run.originals(
            resolve(model, revision or commit, weights), weights, **given, **chosen.get(TORCH, {})
        )
    elif baseline or revision or variant:
        raise InputError("bench: --baseline, --revision and --variant are about the original; omit --no-original")
    for name, (folder, runtime_name) in zip(names, pairs, strict=True):
        options = given | chosen.get(runtime_name, {})
        variants.append(bench_run.Variant(name, folder, runtime_name, options=options))
    for folder in dict.fromkeys(v.folder for v in variants):
        say_guesses(folder, () if steps is None else ("num_inference_steps",), steps="--steps")
    return bench_run.run(variants, repeats=repeats, steps=steps, quality=quality, progress=progress)


def _pairs(folders: list[Path], runtime: str | None, progress: Progress) -> list[tuple[Path, str]]:
    """Return what to measure: folders with a runtime each. Folders that nothing here can run are named."""
    from edgeprune import runtimes

    pairs: list[tuple[Path, str]] = []
    refusals: list[CannotRunError] = []
    for folder in folders:
        try:
            fitting = runtimes.runnable(folder) if runtime == ALL else [runtimes.choose(folder, runtime)]
        except CannotRunError as refusal:  # another device's folder, which does not stop the others
            refusals.append(refusal)
            continue
        pairs += [(folder, name) for name in fitting]
    if not pairs:
        raise refusals[0]
    for left_out in refusals:
        progress(f"left out: {left_out}")
    for name in {name for _, name in pairs}:
        say_conflicts(name, progress)
    return pairs
