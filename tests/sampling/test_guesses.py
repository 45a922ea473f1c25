"""Settings that a folder does not say are guessed from what it does say, and said with the option that changes them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from edgeprune.families import family_of
from edgeprune.families.architecture import Hints
from edgeprune.sampling.generation import Generation, hints_of, say_guesses
from edgeprune.sampling.prompts import cut_words

CONFIGS = json.loads((Path(__file__).parents[1] / "samples" / "transformer_configs.json").read_text())
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0}


def pipeline(folder: Path, config: str, *, scheduler: dict[str, Any] | None = None, **fields: Any) -> Path:
    """Make the configs of a folder without generation.json; `fields` are of the transformer's config."""
    for part in ("transformer", "scheduler"):
        (folder / part).mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIGS[config] | fields))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler or {"shift": 3.0}))
    family = family_of(CONFIGS[config])
    (folder / "model_index.json").write_text(json.dumps({"_class_name": family.pipeline}))
    return folder


def guessed(folder: Path) -> tuple[int, float]:
    """Return steps and guidance scale."""
    found = Generation.load(folder)
    return found.num_inference_steps, found.guidance_scale


FOLDERS: dict[str, tuple[str, dict[str, Any], tuple[int, float]]] = {
    "stable-diffusion-3.5-large": ("sd3.5-large", {}, (28, 7.0)),
    "stable-diffusion-3.5-large-turbo": ("sd3.5-large", {}, (4, 0.0)),
    "models--stabilityai--stable-diffusion-3.5-large-turbo/snapshots/abc": ("sd3.5-large", {}, (4, 0.0)),
    "mine": ("sd3.5-large", {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}, (4, 0.0)),
    "turbo-tests/mine": ("sd3.5-large", {"_name_or_path": "/home/turbo/models/sd35/transformer"}, (28, 7.0)),
    "Hyper-SD3-16steps": ("sd3.5-large", {}, (16, 0.0)),
    "hyperrealism": ("sd3.5-large", {}, (28, 7.0)),
    "FLUX.1-dev": ("flux.1-dev", {"scheduler": DYNAMIC}, (28, 3.5)),
    "FLUX.1-Turbo-Alpha": ("flux.1-dev", {"scheduler": DYNAMIC}, (8, 3.5)),
    "FLUX.1-schnell": ("flux.1-schnell", {}, (4, 0.0)),
    "flux-dev-de-distill": ("flux.1-schnell", {}, (28, 3.5)),
    "OpenFLUX.1": ("flux.1-schnell", {}, (28, 3.5)),
    "my-flux": ("flux.1-schnell", {"scheduler": DYNAMIC}, (28, 3.5)),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_steps_and_guidance_follow_what_the_folder_says(name: str, tmp_path: Path) -> None:
    config, more, expected = FOLDERS[name]
    assert guessed(pipeline(tmp_path / name, config, **more)) == expected


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: other\nbase_model: stabilityai/stable-diffusion-3.5-large-turbo\n---\n",
        "---\nbase_model:\n  - stabilityai/sd3.5-medium\n- stabilityai/stable-diffusion-3.5-large-turbo\n---\n",
    ],
)
def test_the_card_names_the_base_model(card: str, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "mine", "sd3.5-large")
    (folder / "README.md").write_text("---\ntags: [turbo]\n---\nFaster than Turbo.\n")
    assert guessed(folder) == (28, 7.0)
    (folder / "README.md").write_text(card)
    assert guessed(folder) == (4, 0.0) and "large-turbo" in hints_of(folder).names


def test_numbers_of_steps_in_names() -> None:
    found = [Hints(names=n).few_steps for n in ("x-8steps", "x-4-step-lora", "9k-stepsize", "1000steps", "x", "turbo")]
    assert found == [8, 4, None, None, None, 0]


def said(folder: Path, *given: str, **options: str) -> list[str]:
    """Return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        say_guesses(folder, given, **options)
    return [str(one.message) for one in caught]


def test_guesses_are_said_with_the_options_that_change_them(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "model", "sd3.5-large")
    options = {"steps": "--steps", "guidance": "--guidance-scale"}
    assert said(folder, **options) == [
        f"steps 28, guidance 7: guessed for StableDiffusion3Pipeline, since {folder} has no generation.json; "
        "change with --steps and --guidance-scale"
    ]
    (line,) = said(folder, "guidance_scale", **options)
    assert line.startswith("steps 28: guessed") and line.endswith("change with --steps")
    (line,) = said(folder, "num_inference_steps", steps="--steps")
    assert line.startswith("guidance 7: guessed") and line.endswith("change with generation.json")
    assert said(folder, "num_inference_steps", "guidance_scale", **options) == []
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert "guidance 7, shift 1: guessed" in said(folder, **options)[0]
    Generation.load(folder).save(folder)
    assert said(folder, **options) == []


def test_cut_words_are_named() -> None:
    def count(text: str) -> int:
        return 2 + len(text.split())

    assert cut_words("text_encoder", ["a b c", ""], count, 5) == ""
    line = cut_words("text_encoder", ["a red fox jumps far", ""], count, 5)
    assert line == "text_encoder: 2 of 7 tokens are cut (the prompt from 'jumps' on); it reads 5"
    line = cut_words("text_encoder_3", ["a b c d", "a red fox jumps far", "a"], count, 5)
    assert line == "text_encoder_3: 2 of 7 tokens are cut (2 of 3 prompts, the longest from 'jumps' on); it reads 5"
    assert "from 'x" in cut_words("t", ["x" * 400], len, 77)


def test_what_follows_a_prompt_in_its_chat_is_cut_first() -> None:
    """The words of a prompt are cut where it and what is before it are too long."""

    def until(text: str) -> int:
        return 3 + len(text.split())

    line = cut_words("t", ["a red fox jumps far"], lambda text: until(text) + 9, 6, until)
    assert line == "t: 11 of 17 tokens are cut (the prompt from 'jumps' on); it reads 6"
    line = cut_words("t", ["a red fox jumps far"], lambda text: until(text) + 9, 12, until)
    assert line == "t: 5 of 17 tokens are cut (the prompt after its last word); it reads 12"
