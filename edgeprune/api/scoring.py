"""`score`: images of a model, or images that exist already, by any metric."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.drawing import own_options, torch_options
from edgeprune.api.folders import AnyPath, check_model, check_out, world_drawn
from edgeprune.common.errors import InputError
from edgeprune.common.extras import TORCH
from edgeprune.common.progress import Progress, silent
from edgeprune.common.splits import Split
from edgeprune.reference import PIPELINE, is_reference

if TYPE_CHECKING:
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.metrics.scoring import Score, Wish
    from edgeprune.shapes import World


@dataclass(frozen=True)
class Scored:
    """The result of `score`."""

    scores: tuple[Score, ...]
    """One per metric, with 95 % bootstrap intervals over prompts."""
    folder: str
    """What was scored."""
    against: str | None
    """The original."""
    weights: Mapping[str, str]
    """The metrics' weights by name."""
    steps: int | None
    prompts_sha256: str | None
    """Of the file of prompts, if one was given."""
    drawn: tuple[str, ...]
    """Which images were drawn for this: `images`, `original`."""
    pipelines: Mapping[str, str]
    """The class of the pipeline of each of these that is a reference, see `edgeprune.reference`."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune score --json` prints; docs/metrics.md describes it."""
        from edgeprune.metrics import scoring

        settings = {
            "folder": self.folder,
            "against": self.against,
            "weights": dict(self.weights),
            "steps": self.steps,
            "prompts_sha256": self.prompts_sha256,
            "pipelines": dict(self.pipelines),
        }
        return scoring.to_json(self.scores) | {"settings": settings}


def score(
    folder: AnyPath,
    metrics: Sequence[str],
    *,
    against: AnyPath | None = None,
    revision: str | None = None,
    variant: str | None = None,
    weights: Mapping[str, str] | None = None,
    prompts: AnyPath | None = None,
    per_task: int | None = None,
    seeds: int = 1,
    runtime: str | None = None,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    device: str = "auto",
    memory: int | None = None,
    longest_s: float | None = None,
    options: Mapping[str, Any] | None = None,
    exact: bool = False,
    out: AnyPath | None = None,
    progress: Progress = silent,
) -> Scored:
    """Score images by each metric, and with `against` also what was lost, in pairs of images of the same prompt.

    Args:
        folder: a model folder or hub id to draw with, or a folder of images with metadata.jsonl. A reference, a
            text-to-image folder of diffusers that is of no family, is drawn by its own pipeline in torch.
        metrics: names: clip, geneval, hpsv2, lpips, psnr, shapes, ssim.
        against: the original: a model folder, a hub id, `built-in`, or a folder of images of the same prompts.
        revision: a branch, tag or commit of the hub id that `folder` or `against` is; None for its default.
        variant: of the weights of an original that is drawn, such as fp16; None for the full ones, or the only ones.
        weights: paths of the metrics' weights by name.
        prompts: a text file with one prompt per line; None for the metric's own prompts, else 100 held-out captions.
        per_task: geneval and shapes: number of prompts of each task; None for all.
        seeds: images per prompt.
        runtime: the runtime to draw with; None for the first installed one that fits.
        steps: denoising steps of an image; None for the model's own.
        height: pixels of a reference's images; None for its own, as for the next two.
        width: pixels of a reference's images.
        guidance_scale: of a reference.
        device: where torch draws, and where metrics' own networks compute: auto, cpu, cuda, cuda:1, mps or xpu.
        memory: most bytes of the process, with torch on a GPU of the GPU; None takes most of what is free.
        longest_s: refuse drawing that takes torch at least so many seconds; None takes any time. Other runtimes, and
            metrics, do not count.
        options: the own options of the runtime that draws `folder`, as for `runtimes.load`; text is read as the type of
            the option.
        exact: draw in that runtime's most exact precision, not in the fastest that is exact enough.
        out: keep the images here, so that an interrupted call resumes; None removes them.
        progress: called after each batch.

    Raises:
        InputError: a folder, a metric, its weights or a prompt is not usable, `out` holds other images, or torch takes
            longer than `longest_s` or more than `memory`.
        MissingExtraError: a package that a metric imports is not installed.
    """
    models = [folder, *([against] if against else [])]
    for model in models:
        check_model(model)
    at = _revisions(models, revision)
    if out:
        check_out(out)
    from edgeprune.common.files import read_json, sha256_file
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.data.imagefolder import is_images
    from edgeprune.metrics import KNOWN, scoring
    from edgeprune.runtimes import RUNTIMES

    paths = dict(weights or {})
    scoring.check(metrics, paths, against is not None)
    places = {n: _images_or_model(m, at.get(m), variant) for n, m in zip(("images", "original"), models, strict=False)}
    if variant and not any(map(_is_original, places.values())):
        raise InputError(f"--variant {variant}: found no original among {' and '.join(map(str, models))}, expected one")
    ready = [path for path in places.values() if is_images(path)]
    if ready and (prompts or per_task or seeds > 1):
        raise InputError(f"{ready[0]} already has prompts; omit --prompts, --per-task and --seeds")
    computed = any(KNOWN[name].computes for name in metrics)
    if len(ready) == len(models):
        for option in ["--device"] * (device != "auto" and not computed) + ["--memory"] * (memory is not None):
            progress(f"{option}: no image is drawn, so it is not used")
    drawn = {name: place for name, place in places.items() if place not in ready}
    chosen = _runtimes(drawn, runtime)
    loading = _loading(chosen, device, memory, computed=computed)
    of_references = {"height": height, "width": width, "guidance_scale": guidance_scale}
    of_references = {option: value for option, value in of_references.items() if value is not None}
    if of_references and PIPELINE not in chosen.values():
        first = next(iter(of_references)).replace("_", "-")
        raise InputError(f"--{first}: is of a reference of another architecture, and none is drawn; omit it")
    for name, place in drawn.items():
        if chosen[name] == PIPELINE:
            _check_reference(place, variant, {"num_inference_steps": steps, **of_references}, loading[name])
        else:
            _check_drawn(place, variant, steps)
    sizes = _sizes(places, drawn, metrics, progress)
    if memory is not None:
        _check_memory({n: at for n, at in drawn.items() if chosen[n] != PIPELINE}, sizes, runtime, variant, loading)
    if chosen.get("images") == PIPELINE and (options or exact):
        raise InputError(f"--option and --exact: {folder} is drawn by its own pipeline, expected a runtime; omit them")
    ours = chosen.get("images", PIPELINE) != PIPELINE
    own = own_options(options, exact, [chosen["images"]])[chosen["images"]] if ours else {}
    if "images" not in chosen and (options or exact):
        progress("--option and --exact: the images are drawn already, so they are not used")
    file, world = Path(prompts) if prompts else None, _world(places.values()) if "shapes" in metrics else None
    if ready:
        wishes = _wishes_of(ready[0], metrics, world)
    else:
        wishes = scoring.wishes(metrics, prompts=file, per_task=per_task, seeds=seeds, world=world)
    if in_torch := {name: places[name] for name, chosen_runtime in chosen.items() if chosen_runtime == TORCH}:
        RUNTIMES[TORCH].require()
        compute = ComputeOptions(device, memory, longest_s)
        _check_time(in_torch, sizes, len(wishes), None if ready else seeds, steps, out, compute, progress)
    settings = {name: of_references if chosen[name] == PIPELINE else sizes[name] for name in drawn}
    scores = _drawn_and_scored(
        places,
        ready,
        settings,
        wishes,
        metrics,
        paths,
        world,
        runtime,
        steps,
        loading,
        own,
        out,
        progress,
        variant,
        device,
    )
    return Scored(
        scores=tuple(scores),
        folder=str(folder),
        against=None if against is None else str(against),
        weights=paths,
        steps=steps,
        prompts_sha256=sha256_file(file) if file else None,
        drawn=tuple(drawn),
        pipelines={
            n: read_json(at / "model_index.json")["_class_name"] for n, at in drawn.items() if chosen[n] == PIPELINE
        },
    )


def _runtimes(drawn: Mapping[str, Path], runtime: str | None) -> dict[str, str]:
    """Return the runtime that draws with each model, or PIPELINE.

    Raises:
        InputError: a model is not usable, or a runtime was named for a reference.
    """
    from edgeprune import runtimes

    out = {}
    for name, place in drawn.items():
        asked = runtime if name == "images" else None
        if is_reference(place) and asked:
            raise InputError(f"--runtime {asked}: {place} is drawn by its own pipeline in diffusers; omit --runtime")
        out[name] = PIPELINE if is_reference(place) else runtimes.choose(place, asked)
    return out


def _sizes(
    places: Mapping[str, Path], drawn: Mapping[str, Path], metrics: Sequence[str], progress: Progress
) -> dict[str, dict[str, int]]:
    """Return the height and width in pixels of what is drawn, by name; nothing where they are the folder's own.

    If a metric takes pairs, an original is drawn as large as the images, whatever its own size.

    Raises:
        InputError: the original cannot draw images of that size, or has images of another size than is drawn.
    """
    from edgeprune.common.images import open_image
    from edgeprune.data.imagefolder import is_images, read_samples
    from edgeprune.metrics import KNOWN
    from edgeprune.sampling.generation import Generation, GenerationOptions

    sizes: dict[str, dict[str, int]] = {name: {} for name in drawn}
    if not drawn or "original" not in places or not any(KNOWN[name].paired for name in metrics):
        return sizes
    if strange := [place for place in places.values() if is_reference(place)]:
        paired = ", ".join(name for name in metrics if KNOWN[name].paired)
        raise InputError(
            f"--metric {paired}: compares images that one model and its original draw alike, but {strange[0]} is of "
            "another architecture; score it by clip, geneval, hpsv2 or shapes"
        )
    found = dict[str, tuple[int, int]]()
    for name, place in places.items():
        if is_images(place):
            found[name] = open_image(read_samples(place)[0].path).size
        else:
            own = Generation.load(place)
            found[name] = own.width, own.height
    images, original = (f"{width}x{height}" for width, height in (found["images"], found["original"]))
    if images == original:
        return sizes
    if "original" not in drawn:
        raise InputError(f"--against: found images of {original}, expected {images} as {places['images']} draws")
    width, height = found["images"]
    asked = Generation.load(drawn["original"]).changed(GenerationOptions(height=height, width=width), "--against")
    try:
        asked.check_size(drawn["original"])
    except InputError as error:
        raise InputError(f"--against: cannot be drawn at {images}, as {places['images']} has it: {error}") from error
    progress(f"original: drawn at {images}, as the images are; its own size is {original}")
    return sizes | {"original": {"height": height, "width": width}}


def _check_time(
    drawn: Mapping[str, Path],
    sizes: Mapping[str, dict[str, int]],
    wishes: int,
    seeds: int | None,
    steps: int | None,
    out: AnyPath | None,
    compute: ComputeOptions,
    progress: Progress,
) -> None:
    """Say what drawing takes in torch at least, and refuse what takes too long or too much memory.

    Args:
        drawn: the models in torch.
        sizes: see `_sizes`.
        wishes: images of each.
        seeds: images of each prompt; None if they are those of images that exist.
        steps: see `score`.
        out: see `score`.
        compute: where torch draws, in how much memory, and how long at most.
        progress: gets the line.
    """
    from edgeprune.metrics.scoring import count_drawn
    from edgeprune.sampling.generation import GenerationOptions
    from edgeprune.stages.drawing import Drawn, check
    from edgeprune.stages.options import halvings

    done = {name: count_drawn(Path(out) / name) if out else 0 for name in drawn}

    def left(images: int) -> list[Drawn]:
        options = {
            name: GenerationOptions(
                num_inference_steps=steps, height=sizes[name].get("height"), width=sizes[name].get("width")
            )
            for name in drawn
        }
        counts = {name: max(0, images - done[name]) for name in drawn}
        return [Drawn.of(at, options[name], images=counts[name]) for name, at in drawn.items() if counts[name]]

    if now := left(wishes):
        ways, fewest, option = list[tuple[str, list[Drawn]]](), now, ""
        if seeds is not None:
            fewer = [n for n in halvings(wishes // seeds) if n > 1]
            fewest, option = left(1) or now, "--prompts FILE with 1 line "
            ways += [("--seeds 1", left(wishes // seeds))] if seeds > 1 else []
            ways += [*((f"--prompts FILE with {n} lines", left(n)) for n in fewer), (option.strip(), fewest)]
        steps_now = now[0].subject.generation.num_inference_steps
        ways += [
            (f"{option}--steps {n}", [one.changed(num_inference_steps=n) for one in fewest])
            for n in halvings(steps_now)
        ]
        check("score", now, ways, compute, progress)


def _loading(names: Mapping[str, str], device: str, memory: int | None, *, computed: bool) -> dict[str, dict[str, Any]]:
    """Return the options of `runtimes.load` that say where each model is drawn and in how much memory.

    Args:
        names: the runtime that draws with each model.
        device: see `score`.
        memory: see `score`.
        computed: whether a metric computes in torch.

    Raises:
        InputError: torch does not find the device, or neither draws nor scores.
    """
    in_torch = {name: TORCH if chosen == PIPELINE else chosen for name, chosen in names.items()}
    torch = torch_options(device, [*in_torch.values(), *[TORCH] * computed]) if names or computed else {}
    given = {} if memory is None else {"memory": memory}
    return {name: given | torch.get(chosen, {}) for name, chosen in in_torch.items()}


def _world(places: Iterable[Path]) -> World | None:
    """Return the world of the first model that draws one, or of images that have the size of its scenes."""
    from edgeprune import shapes
    from edgeprune.common.images import open_image
    from edgeprune.data.imagefolder import is_images, read_samples

    for place in places:
        if is_images(place):
            width, height = open_image(read_samples(place)[0].path).size
            world = shapes.WORLDS.get(height) if width == height else None
        else:
            world = world_drawn(place)
        if world:
            return world
    return None


def _wishes_of(images: Path, metrics: Sequence[str], world: World | None) -> list[Wish]:
    """Return the prompts and seeds of images that exist already."""
    from edgeprune.data.imagefolder import read_samples
    from edgeprune.metrics import scoring

    drawn = enumerate(read_samples(images))
    wishes = [scoring.Wish(s.text, Split.HELD_OUT.seed(i) if s.seed is None else s.seed) for i, s in drawn]
    scoring.check_prompts(metrics, [w.text for w in wishes], world)
    return wishes


def _drawn_and_scored(
    places: dict[str, Path],
    ready: list[Path],
    settings: Mapping[str, Mapping[str, Any]],
    wishes: list[Wish],
    metrics: Sequence[str],
    weights: dict[str, str],
    world: World | None,
    runtime: str | None,
    steps: int | None,
    loading: Mapping[str, dict[str, Any]],
    own: Mapping[str, Any],
    out: AnyPath | None,
    progress: Progress,
    variant: str | None,
    device: str,
) -> list[Score]:
    """Draw the images that do not exist yet, and score all."""
    from edgeprune.data.imagefolder import read_samples
    from edgeprune.metrics import scoring

    with ExitStack() as stack:
        kept = Path(out or stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-score-")))
        folders = dict(places)
        for name, place in places.items():
            if place not in ready:
                # The runtime is about the export; its original is a diffusers folder.
                scoring.draw(
                    place, kept / name, wishes, runtime=runtime if name == "images" else None, steps=steps,
                    settings=settings[name], loading=loading[name], own=own if name == "images" else None,
                    variant=variant if _is_original(place) else None, progress=progress,
                )  # fmt: skip
                folders[name] = kept / name
        samples = {name: read_samples(folder) for name, folder in folders.items()}
        return scoring.score(
            samples["images"], metrics, against=samples.get("original"), weights=weights, world=world, device=device,
            progress=progress,
        )  # fmt: skip


def _revisions(models: Sequence[AnyPath], revision: str | None) -> dict[AnyPath, str]:
    """Return the revision by the one hub id that it is meant for.

    Raises:
        InputError: a revision was given, and there is no hub id or more than one.
    """
    if revision is None:
        return {}
    hub_ids = [model for model in models if str(model) != "built-in" and not Path(model).is_dir()]
    if len(hub_ids) != 1:
        found = " and ".join(map(str, hub_ids)) or "none"
        raise InputError(
            f"--revision {revision}: is that of one hub id like owner/name; among the models, found {found}"
        )
    return {hub_ids[0]: revision}


def _check_drawn(model: Path, variant: str | None, steps: int | None) -> None:
    """Refuse a model that cannot be drawn with, before any image is made, and say which of its settings are guessed."""
    from edgeprune.artefact.checks import check_pipeline
    from edgeprune.sampling.generation import say_guesses

    if not (model / "edgeprune_export.json").is_file():
        check_pipeline(model, variant if _is_original(model) else None)
    say_guesses(model, () if steps is None else ("num_inference_steps",), steps="--steps")


def _check_reference(model: Path, variant: str | None, settings: Mapping[str, Any], loading: Mapping[str, Any]) -> None:
    """Refuse a reference that cannot be drawn, before any image is made."""
    from edgeprune.runtimes import RUNTIMES

    RUNTIMES[TORCH].require()
    from edgeprune.reference.drawing import open_drawer, settings_of
    from edgeprune.sampling.generation import GenerationOptions

    drawer = open_drawer(model, variant=variant, **loading)
    settings_of(drawer.reference, GenerationOptions(**settings))


def _check_memory(
    drawn: Mapping[str, Path],
    sizes: Mapping[str, dict[str, int]],
    runtime: str | None,
    variant: str | None,
    loading: Mapping[str, dict[str, Any]],
) -> None:
    """Refuse a limit that is too little for one of the models, before the first of them draws.

    Raises:
        InputError: the limit is too little; says how much suffices.
    """
    from edgeprune import runtimes

    for name, place in drawn.items():
        options = loading[name] | ({"variant": variant} if variant and _is_original(place) else {})
        with runtimes.plan(place, runtime if name == "images" else None, **options) as model:
            model.prepare(**sizes[name])


def _is_original(folder: Path) -> bool:
    """Return whether this is a diffusers folder that edgeprune did not write."""
    made = any((folder / name).is_file() for name in ("edgeprune.json", "edgeprune_export.json"))
    return (folder / "model_index.json").is_file() and not made


def _images_or_model(model: AnyPath, revision: str | None, variant: str | None) -> Path:
    """Return the folder of images or of a model that the user named; `built-in` is the built-in model."""
    folder = Path(model)
    if folder.is_dir():
        from edgeprune.data.imagefolder import METADATA

        if not any((folder / name).is_file() for name in (METADATA, "edgeprune_export.json", "model_index.json")):
            raise InputError(
                f"{folder}: found none of {METADATA} (images with their prompts), edgeprune_export.json (an export), "
                "model_index.json (a diffusers pipeline), expected one"
            )
        if _is_original(folder):
            from edgeprune.residency.model_files import check_variant

            check_variant(folder, variant)
        return folder
    from edgeprune.artefact.resolve import resolve

    return resolve(None if str(model) == "built-in" else str(model), revision, variant)
