"""`bench`: memory, latency and quality of what runs here, next to the original. Needs no torch for the exports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.drawing import own_options, say_conflicts, torch_options
from edgeprune.api.folders import AnyPath, source_of, world_drawn
from edgeprune.common.errors import CannotRunError, InputError
from edgeprune.common.extras import TORCH
from edgeprune.common.progress import Progress, silent
from edgeprune.reference import PIPELINE, is_reference

if TYPE_CHECKING:
    from edgeprune.bench.results import BenchResult
    from edgeprune.bench.run import Variant
    from edgeprune.common.memory import ComputeOptions

ALL = "all"
"""Value of `runtime`: every runtime that opens a folder and can run here."""


def bench(
    folders: Sequence[AnyPath],
    *,
    runtime: str | None = None,
    baseline: AnyPath | None = None,
    reference: AnyPath | None = None,
    revision: str | None = None,
    variant: str | None = None,
    repeats: int = 20,
    steps: int | None = None,
    quality: int = 0,
    original: bool = True,
    way: bool = False,
    device: str = "auto",
    memory: int | None = None,
    longest_s: float | None = None,
    options: Mapping[str, Any] | None = None,
    exact: bool = False,
    progress: Progress = silent,
) -> BenchResult:
    """Measure memory, latency and quality of folders next to their original. Each variant runs in a fresh process.

    The original runs in torch, in bf16 and in float32; the faster one is what ratios refer to.

    Args:
        folders: exports, artefact folders or diffusers folders.
        runtime: a runtime's name; `all` measures every one that opens a folder and can run here; None takes the first
            installed one that fits.
        baseline: the original, a folder or hub id; None for the model that the first folder was made from.
        reference: a text-to-image folder of diffusers that is of no family, a further variant: drawn by its own
            pipeline, in its own number of steps, at the size of the first folder's images.
        revision: a branch, tag or commit of the baseline's hub id; None for its default.
        variant: of the baseline's weights, such as fp16; None for the one that the first folder was made from.
        repeats: warm steps to time.
        steps: denoising steps of an image; None for the model's own.
        quality: shapes-world prompts per task to score images on; 0 scores none.
        original: measure the original too; without it, ratios refer to the first folder.
        way: measure the changes from the original to the folders one by one, each on top of those before it: pruned,
            INT4, exported, solver, range of guidance. Takes an artefact folder, an export, or one of each.
        device: where torch computes, the original and folders that run in it: auto, cpu, cuda, cuda:1, mps or xpu.
        memory: most bytes of each process, with torch on a GPU of the GPU; None takes most of what is free.
        longest_s: refuse what takes torch at least so many seconds; None takes any time. Other runtimes do not count.
        options: the runtimes' own, as for `runtimes.load`, for the folders and not the original; text is read as the
            type of the option.
        exact: run the folders in their runtimes' most exact precision, not in the fastest that is exact enough.
        progress: gets a line of text now and then, also for folders that cannot run here.

    Raises:
        CannotRunError: nothing here can run any of the folders.
        InputError: a folder, a number or the device is not usable, nothing that `device` is about runs in torch, or
            torch takes longer than `longest_s` or more than `memory`.
        MissingExtraError: a package of a runtime is not installed.
    """
    from edgeprune.artefact.resolve import resolve
    from edgeprune.bench import run as bench_run
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.runtimes import RUNTIMES
    from edgeprune.sampling.generation import say_guesses
    from edgeprune.shapes import PLAIN

    if not folders:
        raise InputError("bench: found no folder, expected at least one")
    for folder in (*folders, *([baseline] if baseline else [])):
        if Path(folder).is_dir() and is_reference(Path(folder)):
            raise InputError(f"{folder}: is of no family, so it is measured as --reference {folder}")
    pairs = _pairs([Path(folder) for folder in folders], runtime, progress)
    if reference is not None and way:
        raise InputError("bench: --way shows the changes from the original; omit --reference")
    names = ["compressed"] if len(pairs) == 1 else [f"{folder}:{name}" for folder, name in pairs]
    given: dict[str, Any] = {} if memory is None else {"memory": memory}
    chosen = torch_options(device, [name for _, name in pairs] + [TORCH] * (original or reference is not None))
    own = own_options(options, exact, [name for _, name in pairs])
    variants: list[Variant] = []
    if original:
        model, commit, made_from = source_of(Path(folders[0])) if baseline is None else (str(baseline), None, None)
        weights = variant or made_from
        variants = bench_run.originals(
            resolve(model, revision or commit, weights), weights, **given, **chosen.get(TORCH, {})
        )
    elif baseline or revision or variant:
        raise InputError("bench: --baseline, --revision and --variant are about the original; omit --no-original")
    taken = {name: given | chosen.get(name, {}) | own.get(name, {}) for name in (TORCH, *(name for _, name in pairs))}
    if way:
        variants = _way(variants, pairs, taken, steps, progress)
    else:
        variants += [
            bench_run.Variant(name, folder, runtime_name, options=taken[runtime_name])
            for name, (folder, runtime_name) in zip(names, pairs, strict=True)
        ]
    world = (world_drawn(pairs[0][0]) if quality else None) or PLAIN
    variants = _one_size(variants, [folder for folder, _ in pairs], progress)
    for folder in dict.fromkeys(v.folder for v in variants):
        say_guesses(folder, () if steps is None else ("num_inference_steps",), steps="--steps")
    if timed := [variant for variant in variants if variant.runtime == TORCH]:
        RUNTIMES[TORCH].require()
        compute = ComputeOptions(device, memory, longest_s)
        images = quality * len(world.grammar.names)
        _check_time(timed, repeats, steps, images, compute, progress, beside=len(timed) < len(variants))
    if reference is not None:
        variants.append(_reference(Path(reference), Path(folders[0]), given | chosen.get(TORCH, {}), progress))
    return bench_run.run(variants, repeats=repeats, steps=steps, quality=quality, world=world, progress=progress)


def _reference(folder: Path, first: Path, options: dict[str, Any], progress: Progress) -> Variant:
    """Return the variant of a reference.

    Args:
        folder: the reference.
        first: the folder whose size of images it takes.
        options: its device and memory.
        progress: gets a line.

    Raises:
        InputError: it cannot be drawn with, or not at this size.
    """
    from edgeprune.bench.run import Variant
    from edgeprune.runtimes import RUNTIMES
    from edgeprune.sampling.generation import Generation, GenerationOptions

    if not is_reference(folder):
        raise InputError(
            f"--reference {folder}: expected a text-to-image folder of diffusers of another architecture; a folder of "
            "a family is an argument of its own, or --baseline"
        )
    RUNTIMES[TORCH].require()
    from edgeprune.reference.drawing import open_drawer, settings_of

    own = Generation.load(first)
    settings_of(open_drawer(folder, **options).reference, GenerationOptions(height=own.height, width=own.width))
    progress(f"reference: measured at {own.width}x{own.height}, in its own number of steps")
    settings = {"steps": None, "height": own.height, "width": own.width}
    return Variant("reference", folder, PIPELINE, options=options, settings=settings)


def _one_size(variants: list[Variant], folders: list[Path], progress: Progress) -> list[Variant]:
    """Return the variants with images of one size: that of the user's folders, whatever the original's own is.

    Raises:
        InputError: two of the folders have images of different sizes, or the original cannot draw images of that size.
    """
    from edgeprune.sampling.generation import Generation, GenerationOptions

    loaded = {folder: Generation.load(folder) for folder in (*folders, *(v.folder for v in variants))}
    sizes = {folder: (own.height, own.width) for folder, own in loaded.items()}
    first, *others = folders
    height, width = sizes[first]
    for other in others:
        if sizes[other] != sizes[first]:
            found, expected = (f"{w}x{h}" for h, w in (sizes[other], sizes[first]))
            raise InputError(f"bench: {other}: found images of {found}, expected {expected} as those of {first}")
    out = []
    for variant in variants:
        if sizes[variant.folder] != sizes[first]:
            options = GenerationOptions(height=height, width=width)
            loaded[variant.folder].changed(options, "bench").check_size(variant.folder)
            progress(f"{variant.name}: measured at {width}x{height}, as {first} draws")
            variant = replace(variant, settings=variant.settings | {"height": height, "width": width})
        out.append(variant)
    return out


def _check_time(
    variants: Sequence[Variant],
    repeats: int,
    steps: int | None,
    quality: int,
    compute: ComputeOptions,
    progress: Progress,
    *,
    beside: bool,
) -> None:
    """Say what the variants in torch take at least, and refuse what takes too long or too much memory.

    Args:
        variants: those in torch.
        repeats: see `bench`.
        steps: see `bench`.
        quality: images of each variant that are scored.
        compute: where torch computes, in how much memory, and how long at most.
        progress: gets the line.
        beside: whether others are measured, too.
    """
    from edgeprune.sampling.generation import GenerationOptions
    from edgeprune.stages.drawing import Drawn, check
    from edgeprune.stages.options import halvings

    def drawn(repeats: int, *, original: bool = True) -> list[Drawn]:
        found = []
        for variant in variants:
            own = variant.settings
            options = GenerationOptions(
                num_inference_steps=own.get("steps", steps),
                height=own.get("height"),
                width=own.get("width"),
                solver=own.get("solver"),
                guidance_range=own.get("guidance_range"),
            )
            # Of the original's two dtypes one draws what is scored.
            scored = 0 if variant.original and variant is not variants[0] else quality
            if original or not variant.original:
                found.append(Drawn.of(variant.folder, options, images=1 + scored, timed=1 + repeats))
        return found

    now, fewest = drawn(repeats), drawn(1)
    ways = [(f"--repeats {n}", drawn(n)) for n in halvings(repeats)]
    if any(variant.original for variant in variants) and (beside or len(variants) > 1):
        ways.append(("--no-original", drawn(repeats, original=False)))
    ways += [
        (f"--repeats 1 --steps {n}", [one.changed(num_inference_steps=n) for one in fewest])
        for n in halvings(now[0].subject.generation.num_inference_steps)
    ]
    check("bench", now, ways, compute, progress)


def _way(
    originals: list[Variant],
    pairs: list[tuple[Path, str]],
    options: dict[str, dict[str, Any]],
    steps: int | None,
    progress: Progress,
) -> list[Variant]:
    """Return the original with its own settings, and a variant per change.

    Raises:
        InputError: the original is left out, steps are given, or the folders are several of a kind.
    """
    from edgeprune.bench import way

    if not originals or steps is not None:
        raise InputError("bench: --way begins at the original and its steps; omit --no-original and --steps")
    drawn, rows, missing = way.way(originals[0].folder, pairs, options)
    for line in missing:
        progress(line)
    return [replace(one, settings=drawn) for one in originals] + rows


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
