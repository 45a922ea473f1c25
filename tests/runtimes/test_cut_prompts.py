"""What an encoder does not read of a long prompt is said, in the same words by every runtime."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from edgeprune import runtimes

PROMPT = "two red circles left of a large blue star above a small green ring"


def said(folder: Path, name: str, prompt: str) -> list[str]:
    with runtimes.load(folder, name) as model, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate_latents(prompt, steps=1)
    return [str(one.message) for one in caught if "tokens" in str(one.message)]


def test_each_encoder_that_cuts_is_named(tiny_folders: tuple[Path, Path]) -> None:
    source, onnx = tiny_folders
    eager, ort = said(source, "eager", PROMPT * 2), said(onnx, "ort", PROMPT * 2)
    assert eager == ort and [line.split(":")[0] for line in ort] == ["text_encoder", "text_encoder_2"]
    assert all("tokens are cut (the prompt from" in line and line.endswith("it reads 16") for line in ort)
    assert said(source, "eager", "two red circles") == said(onnx, "ort", "two red circles") == []


@pytest.mark.parametrize("runtime", ["eager", "ort"])
def test_the_word_is_the_first_that_is_lost(tiny_folders: tuple[Path, Path], runtime: str) -> None:
    folder = tiny_folders[runtime == "ort"]
    (line, _) = said(folder, runtime, PROMPT + " zebra zebra")
    word = line.split("'")[1]
    assert word in PROMPT.split() + ["zebra"]
    assert said(folder, runtime, PROMPT[: (PROMPT + " zebra").rindex(word)]) == []
