"""`generate`: one image, with the runtime that fits the folder. Needs no torch for an export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.api.folders import AnyPath
from edgeprune.common.errors import InputError
from edgeprune.common.extras import TORCH, conflicts
from edgeprune.common.progress import Progress, silent

if TYPE_CHECKING:
    from PIL.Image import Image

    from edgeprune.common.memory import ComputeOptions
    from edgeprune.sampling.generation import GenerationOptions


@dataclass(frozen=True)
class Generated:
    """The result of `generate`."""

    image: Image
    prompt: str
    seed: int
    runtime: str
    """The runtime that drew it: ort, eager, ..."""
    provider: str
    """Where the runtime computed, in its own term."""
    provider_why: str
    """Why it computed there, and in that precision."""
    precision: str
    """What the transformer computed in: fp32, W4A32, W4A8, ..."""

    def to_json(self) -> dict[str, Any]:
        """Return what `edgeprune generate --json` prints besides the file's name. Sizes are in pixels."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "width": self.image.width,
            "height": self.image.height,
            "runtime": self.runtime,
            "provider": self.provider,
            "provider_why": self.provider_why,
            "precision": self.precision,
        }


def generate(
    model: AnyPath,
    prompt: str,
    *,
    negative_prompt: str = "",
    seed: int = 0,
    generation: GenerationOptions | None = None,
    runtime: str | None = None,
    device: str = "auto",
    memory: int | None = None,
    options: Mapping[str, Any] | None = None,
    exact: bool = False,
    keep_embeddings: AnyPath | None = None,
    longest_s: float | None = None,
    progress: Progress = silent,
) -> Generated:
    """Draw one image. For several from one loaded model, use `edgeprune.runtimes.load`.

    Args:
        model: an export, an artefact folder or a diffusers folder.
        prompt: what to draw.
        negative_prompt: what guidance steers away from.
        seed: of the starting noise; the same noise in every runtime, but not that of diffusers.
        generation: steps, guidance, solver and size; None for the model's own.
        runtime: ort, openvino, trt, coreml or eager; None for the first installed one that fits.
        device: where torch (eager) computes: auto, cpu, cuda, cuda:1, mps or xpu; for another runtime, auto.
        memory: most bytes of the process, with torch on a GPU of the GPU; None takes most of what is free.
        options: the runtime's own, as for `runtimes.load`; text is read as the type of the option.
        exact: compute in the most exact precision, not in the fastest that is exact enough.
        keep_embeddings: keeps encoded prompts in this folder, so that each is encoded once.
        longest_s: with torch (eager): refuse what takes at least so many seconds; None draws whatever it takes.
        progress: called after each denoising step, and with a line that says what a large model takes in torch.

    Raises:
        InputError: the folder is not usable, a setting is out of range, or torch takes longer than `longest_s` or more
            than `memory`.
        MissingExtraError: a package of the runtime is not installed.
        CannotRunError: the export is for another device.
    """
    from edgeprune import runtimes
    from edgeprune.artefact.resolve import read_config
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.runtimes.base import check_size, read_settings
    from edgeprune.sampling.generation import GenerationOptions, say_guesses

    folder, chosen = Path(model), generation or GenerationOptions()
    load_options = {"memory": memory, "keep_embeddings": keep_embeddings}
    load_options = {name: value for name, value in load_options.items() if value}
    runtime = runtimes.choose(folder, runtime)
    load_options |= torch_options(device, [runtime]).get(runtime, {}) | own_options(options, exact, [runtime])[runtime]
    say_conflicts(runtime, progress)
    runtimes.RUNTIMES[runtime].require()
    if runtime == TORCH:
        read_config(folder)  # refuses a pipeline of no family in the words of the other commands
    say_guesses(folder, chosen.given(), steps="--steps", guidance="--guidance-scale")
    if runtime == TORCH:  # the others open exports, whose machines may lack what this imports
        from edgeprune.artefact.checks import say_unfinished

        say_unfinished(folder)
    settings = read_settings(folder)  # refuses a bad size before gigabytes are loaded
    asked = chosen.height is not None or chosen.width is not None
    images = settings.generation.changed(chosen, "options")
    check_size(settings, images.height, images.width, where="--" if asked else "")
    if runtime == TORCH:
        unit = settings.factor * settings.patch
        _check_time(folder, chosen, unit, ComputeOptions(device, memory, longest_s), progress)
    with runtimes.plan(folder, runtime, **load_options) as opened:
        opened.prepare(images.height, images.width)
        opened.backend.open()
        (image,) = opened.generate(
            prompt, negative_prompt=negative_prompt, steps=chosen.num_inference_steps,
            guidance_scale=chosen.guidance_scale, height=chosen.height, width=chosen.width, seed=seed,
            solver=chosen.solver, guidance_range=chosen.guidance_range,
            progress=lambda done, total: progress("generate", done, total, ""),
        )  # fmt: skip
        return Generated(
            image=image, prompt=prompt, seed=seed, runtime=opened.name, provider=opened.backend.provider,
            provider_why=opened.backend.why, precision=opened.backend.precision,
        )  # fmt: skip


def _check_time(
    folder: Path, options: GenerationOptions, unit: int, compute: ComputeOptions, progress: Progress
) -> None:
    """Say what an image takes in torch at least, and refuse what takes too long or too much memory.

    Args:
        folder: the model's.
        options: what differs from its own settings.
        unit: pixels of a token on a side.
        compute: where torch computes, in how much memory, and how long at most.
        progress: gets the line.
    """
    from edgeprune.stages.drawing import Drawn, check
    from edgeprune.stages.options import halvings

    drawn = Drawn.of(folder, options)
    images = drawn.subject.generation
    ways = [(f"--steps {n}", [drawn.changed(num_inference_steps=n)]) for n in halvings(images.num_inference_steps)]
    smaller = {"height": images.height // 2, "width": images.width // 2}
    if all(side and side % unit == 0 for side in smaller.values()):
        last = f"--steps 1 --height {smaller['height']} --width {smaller['width']}"
        ways.append((last, [drawn.changed(num_inference_steps=1, **smaller)]))
    check("generate", [drawn], ways, compute, progress)


def torch_options(device: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return by runtime the option of `runtimes.load` that `--device` is: of torch alone, the others have their own.

    Args:
        device: as the user typed it.
        names: the runtimes that will run.

    Raises:
        InputError: torch does not find the device, or none of the runtimes is torch.
    """
    from edgeprune.runtimes import RUNTIMES

    if device == "auto":
        return {}
    if TORCH not in names:
        own = RUNTIMES[names[0]].place
        how = f"; its own choice is --option {own}=..." if own else ""
        raise InputError(f"--device {device}: is about torch, but {names[0]} runs here{how}; omit --device")
    RUNTIMES[TORCH].require()
    from edgeprune.common.memory import ComputeOptions
    from edgeprune.residency.compute import Compute

    Compute.of(ComputeOptions(device))
    return {TORCH: {"device": device}}


def own_options(given: Mapping[str, Any] | None, exact: bool, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return by runtime the options of `runtimes.load` that `--option` and `--exact` are.

    Args:
        given: values of `--option` by name.
        exact: whether `--exact` was given.
        names: the runtimes that will run.

    Raises:
        InputError: none of the runtimes has such an option, or a value is of another type.
        MissingExtraError: a package of a runtime is not installed.
    """
    from edgeprune.runtimes import options

    out = options.by_runtime(given or {}, names)
    if exact:
        if "precision" in (given or {}):
            raise InputError("--exact: found with --option precision, expected one of them")
        having = options.having("precision", names)
        if not having:
            raise InputError(f"--exact: {' and '.join(out)} has no other precision to choose; omit --exact")
        out |= {name: out[name] | {"precision": "exact"} for name in having}
    return out


def say_conflicts(runtime: str, progress: Progress) -> None:
    """Name the installed packages that break this runtime."""
    for conflict in conflicts() if runtime == "ort" else []:
        progress(f"conflict: {conflict}")
