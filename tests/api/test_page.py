"""The examples of docs/api.md run, in the order of the page, on a tiny model.

Three things have stand-ins, since they take long or need a network: the export copies the artefact, which `generate`
then runs in torch; the workers of `bench` reply at once; the hub only takes note.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import hub
import huggingface_hub
import numpy as np
import pytest
from fakes import worker_reply
from PIL import Image
from tiny import tiny_pipeline

from edgeprune import api, export
from edgeprune.bench import run

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
NAME = "sd3.5-medium"


def copied(artefact: Path, out: Path, target: str, *_: object, **__: object) -> dict[str, Any]:
    """Stands in for `edgeprune.export.export`."""
    shutil.copytree(artefact, out)
    return {"target": target, "quantized": True}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the model, images and prompts of the page, and a hub with the model at two revisions."""
    tiny_pipeline(tmp_path / NAME, num_layers=8)
    for ref, commit in (("main", hub.REVISION), ("v2", "2" * 40)):
        made = Path(shutil.copytree(tmp_path / NAME, tmp_path / ref))
        hub.cached(made, tmp_path / "hub", shared=False, repository=f"models--someone--{NAME}", ref=ref, commit=commit)
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(len(pixels))]
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub.FakeHub)
    monkeypatch.setattr(hub.FakeHub, "private", {})
    monkeypatch.setattr(hub.FakeHub, "calls", [])
    monkeypatch.setattr(export, "export", copied)
    monkeypatch.setattr(run, "_worker", worker_reply)
    return tmp_path


@pytest.mark.slow
def test_the_examples_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text("utf-8")
    names: dict[str, Any] = {}
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S):
        above = text[: match.start()].count("\n") + 1  # so that a traceback names the line of the page
        exec(compile("\n" * above + match[1], str(PAGE), "exec"), names)  # the page is the project's own
    assert names["made"].ran == ("analyze", "plan", "prune", "distill", "quantize")
    assert names["drawn"].image.size == (64, 64) and (place / "out.png").is_file()
    assert names["measured"].comparisons["compressed"].ratios["peak_ratio"] == 0.4
    assert names["cost"].blocks == 8 and names["pushed"].revision == "int4"
    shown = capsys.readouterr().out
    assert "cannot be met" in shown and "something else" not in shown


def test_the_page_names_every_function() -> None:
    text = PAGE.read_text("utf-8")
    functions = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))]
    assert [name for name in functions if not re.search(rf"`{name}[`(]", text)] == []
