"""A model's default sampling settings and their file, `generation.json`. Torch-free.

The file is next to `model_index.json`; stock diffusers ignores it. A folder without it gets its family's defaults, at
the image size of its transformer's training.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.fields import LARGEST, shown
from edgeprune.common.files import read_json, write_json
from edgeprune.families import Architecture, Config, family_of
from edgeprune.families.architecture import Hints, config_number
from edgeprune.families.parts import vae_widths
from edgeprune.sampling.scheduler_classes import solver_of
from edgeprune.sampling.solvers import EULER, SOLVERS

FILE = "generation.json"
TOKENS_AT_ONCE = 4096
"""Most image tokens that pass through the transformer together, twice as many with guidance: one image of 1024x1024 of
SD3 or FLUX, 64 images of the built-in model. It is a limit for speed, which more do not improve: in one thread, four
rows of 1357 tokens took a block of width 1216 1.33 s each, a row alone 1.28 s. Where memory is short, fewer run in one
call, see `rows_together`."""
_MOST_AT_ONCE = 64
"""Limit for smaller images, whose text has more tokens than the image."""


@dataclass(frozen=True)
class Generation:
    """Default sampling settings of a model."""

    num_inference_steps: int = 28
    guidance_scale: float = 7.0
    height: int = 1024
    """Pixels."""
    width: int = 1024
    """Pixels."""
    max_sequence_length: int = 256
    """T5 tokens; SD3 without T5 gets the same number of zero tokens."""
    solver: str = EULER
    """How a step is taken, one of solvers.SOLVERS."""
    guidance_range: tuple[float, float] = (0.0, 1.0)
    """Noise levels at which guidance acts, where it takes a second evaluation."""

    @classmethod
    def load(cls, folder: Path) -> Generation:
        """Read a folder's settings, with the guidance scale that its model heeds.

        Raises:
            InputError: the file has an unknown field, or a value of the wrong type or out of range.
        """
        path = folder / FILE
        if not path.exists():
            config, family = _transformer(folder)
            defaults, factor = {}, _factor(folder)
            if family:
                defaults = family.defaults(config, hints_of(folder))
            if factor and config.get("sample_size") is not None:
                defaults |= dict.fromkeys(("height", "width"), factor * config_number(config, "sample_size"))
            defaults["solver"] = _solver(folder)
            return cls.checked(defaults, str(folder / "transformer" / "config.json"))
        found = cls.checked({"solver": _solver(folder)} | read_json(path), str(path))
        return replace(found, guidance_scale=heeded(folder, found.guidance_scale)[0])

    @classmethod
    def checked(cls, data: dict[str, Any], where: str) -> Generation:
        """Build settings from values by field name; missing fields keep their defaults. `where` begins messages.

        Raises:
            InputError: a field is unknown, or a value has the wrong type or is out of range.
        """
        names = {f.name for f in fields(cls)}
        for name, value in data.items():
            if name not in names:
                raise InputError(f"{where}: {shown(name)}: unknown field, expected {', '.join(sorted(names))}")
            if name == "solver":
                if not isinstance(value, str) or value not in SOLVERS:
                    raise InputError(f"{where}: solver: found {shown(value)}, expected one of {', '.join(SOLVERS)}")
                continue
            if name == "guidance_range":
                if not _is_range(value):
                    raise InputError(
                        f"{where}: guidance_range: found {shown(value)}, expected two noise levels from 0 to 1, as "
                        "[0.5, 1]"
                    )
                continue
            low = 0 if name in ("max_sequence_length", "guidance_scale") else 1
            kinds = (int, float) if name == "guidance_scale" else (int,)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= LARGEST:
                raise InputError(f"{where}: {name}: found {shown(value)}, expected a number from {low} to {LARGEST}")
        if "guidance_range" in data:
            data = data | {"guidance_range": tuple(map(float, data["guidance_range"]))}
        return cls(**data)

    def changed(self, options: GenerationOptions, where: str) -> Generation:
        """Return these settings with the fields that `options` sets. `where` begins messages.

        Raises:
            InputError: a value has the wrong type or is out of range.
        """
        return self.checked(asdict(self) | options.given(), where)

    def guides(self, sigma: float) -> bool:
        """Return whether guidance acts at a noise level."""
        low, high = self.guidance_range
        return low <= sigma <= high

    def to_json(self) -> dict[str, Any]:
        """Return the settings for files and digests; those that older folders lack are left out where they are off."""
        data = asdict(self) | {"guidance_range": list(self.guidance_range)}
        plain = Generation()
        if self.solver == plain.solver:
            del data["solver"]
        if self.guidance_range == plain.guidance_range:
            del data["guidance_range"]
        return data

    def without_guidance(self) -> Generation:
        """Return these settings for a model that has learned the guided velocity."""
        return replace(self, guidance_scale=1.0)

    def check_size(self, folder: Path, options: Collection[str] = ()) -> None:
        """Check that a pipeline's folder can draw images of this height and width.

        Args:
            options: the fields that the user set by an option, so that messages name it.

        Raises:
            InputError: see `check_sides`.
        """
        config, family = _transformer(folder)
        if family:
            space = family.latents(config)
            sides = {f"--{n}" if n in options else n: getattr(self, n) for n in ("height", "width")}
            check_sides(sides, space.patch * (_factor(folder) or 1), space.largest)

    def save(self, folder: Path) -> None:
        """Write the settings to a pipeline's folder; the solver always, since without it the scheduler's acts."""
        write_json(folder / FILE, self.to_json() | {"solver": self.solver})


@dataclass(frozen=True)
class GenerationOptions:
    """Sampling settings that the user sets. None keeps the model's own, see `Generation`."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    solver: str | None = None
    guidance_range: tuple[float, float] | None = None

    def given(self) -> dict[str, Any]:
        """Return the fields that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def _is_range(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value)
    return numbers and 0 <= value[0] < value[1] <= 1


def images_at_once(tokens: int) -> int:
    """Return how many images of `tokens` tokens pass through a transformer together, here and on a device."""
    return max(1, min(_MOST_AT_ONCE, TOKENS_AT_ONCE // max(1, tokens)))


def is_distilled(folder: Path) -> bool:
    """Return `is_distilled` of a pipeline's model_index.json, which few pipelines have; False without it."""
    path = folder / "model_index.json"
    return path.is_file() and read_json(path).get("is_distilled") is True


def hints_of(folder: Path) -> Hints:
    """Return what a pipeline's folder tells about sampling besides the transformer's config.

    Names are those of the folder, or of the repository in a hub's cache; `_name_or_path` of the configs; and
    `base_model` of the model card.
    """
    scheduler = folder / "scheduler" / "scheduler_config.json"
    shifts = scheduler.is_file() and read_json(scheduler).get("use_dynamic_shifting") is True
    place = folder.resolve()
    names = [place.parent.parent.name if place.parent.name == "snapshots" else place.name]
    for path in (folder / "model_index.json", folder / "transformer" / "config.json"):
        name = read_json(path).get("_name_or_path") if path.is_file() else None
        if isinstance(name, str):
            names.append("/".join(name.split("/")[-2:]))
    if (card := folder / "README.md").is_file():
        with card.open(encoding="utf-8", errors="replace") as file:
            names += [match[1] for match in _BASE_MODEL.finditer(file.read(_CARD_CHARACTERS))]
    return Hints(distilled=is_distilled(folder), names="\n".join(names).lower(), shifts_by_size=shifts)


_BASE_MODEL = re.compile(r"^base_model:((?:[ \t]*\n[ \t]*-)?.*(?:\n[ \t]*-.*)*)", re.MULTILINE)
"""In the front matter of a model card: one name, or a list of names."""
_CARD_CHARACTERS = 4096


def say_guesses(folder: Path, given: Collection[str], *, steps: str = "", guidance: str = "") -> None:
    """Warn in one line of the settings that are guessed because the folder has no `generation.json`.

    Args:
        folder: a pipeline's folder.
        given: the fields that the user set.
        steps: the option of the number of steps; empty if the command has none.
        guidance: the option of the guidance scale, likewise.
    """
    options = {"num_inference_steps": ("steps", steps), "guidance_scale": ("guidance", guidance)}
    guessed = {name: option for name, option in options.items() if name not in given}
    if (folder / FILE).exists() or not guessed:
        return
    generation, index = Generation.load(folder), folder / "model_index.json"
    settings = [f"{word} {getattr(generation, name):g}" for name, (word, _) in guessed.items()]
    scheduler = folder / "scheduler" / "scheduler_config.json"
    schedule = read_json(scheduler) if scheduler.is_file() else {}
    if "shift" not in schedule and not schedule.get("use_dynamic_shifting"):
        settings.append("shift 1")
    pipeline = read_json(index).get("_class_name") if index.is_file() else "this model"
    flags = " and ".join(dict.fromkeys(flag or FILE for _, flag in guessed.values()))
    warnings.warn(
        f"{', '.join(settings)}: guessed for {pipeline}, since {folder} has no {FILE}; change with {flags}",
        stacklevel=1,  # of one place, so that the same line is shown once
    )


def heeded(folder: Path, scale: float) -> tuple[float, str]:
    """Return what `Architecture.heeded` says of a pipeline's folder."""
    config, family = _transformer(folder)
    return family.heeded(config, scale, distilled=is_distilled(folder)) if family else (scale, "")


def heed(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the user gave, with the guidance scale that acts; warn of what has no effect."""
    scale = options.get("guidance_scale")
    config, family = _transformer(folder)
    acting = Generation.load(folder).guidance_scale if scale is None else scale
    if options.get("guidance_range") and family and not family.guided(config, acting):
        warnings.warn("guidance range: ignored, because guidance takes no second evaluation", stacklevel=2)
    if not isinstance(scale, (int, float)):
        return options
    scale, why = heeded(folder, scale)
    if why:
        warnings.warn(why, stacklevel=2)
    return options | {"guidance_scale": scale}


def longest_prompt(folder: Path) -> int:
    """Return the number of tokens to which a pipeline's first tokenizer pads a prompt."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    tokens = read_json(path).get("model_max_length", 77)
    return tokens if isinstance(tokens, int) and 2 < tokens < 100_000 else 77


def _transformer(folder: Path) -> tuple[Config, Architecture | None]:
    """Read a pipeline's transformer config and find its family; empty and None without such a file."""
    path = folder / "transformer" / "config.json"
    if not path.exists():
        return {}, None
    config = read_json(path)
    return config, family_of(config, str(path))


def _solver(folder: Path) -> str:
    """Return the solver of the folder's scheduler; Euler's without one."""
    path = folder / "scheduler" / "scheduler_config.json"
    return solver_of(read_json(path)) if path.is_file() else EULER


def _factor(folder: Path) -> int | None:
    """Return the image pixels per side of a latent pixel; None if the folder has no VAE config."""
    paths = [path for name in ("vae_decoder", "vae") if (path := folder / name / "config.json").exists()]
    return latent_factor(read_json(paths[0]), paths[0]) if paths else None


def check_sides(sides: Mapping[str, int], unit: int, largest: int | None) -> None:
    """Refuse an image size that the model cannot draw.

    Args:
        sides: pixels by the name of the field or option.
        unit: pixels per token on a side.
        largest: most tokens along a side, if a position table limits them.

    Raises:
        InputError: a side is not a positive whole number of tokens, or is longer than the position table.
    """
    for name, value in sides.items():
        if value < unit or value % unit:
            raise InputError(f"{name}: found {value}, expected a multiple of {unit}")
        if largest is not None and value > largest * unit:
            raise InputError(f"{name}: found {value}, expected at most {largest * unit}, the model's largest")


def latent_factor(vae: Config, where: object) -> int:
    """Return the image pixels per side of a latent pixel, from a VAE's config.

    Raises:
        InputError: the field with its widths is missing or invalid.
    """
    return int(2 ** (len(vae_widths(vae, where)) - 1))
