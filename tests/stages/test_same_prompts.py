"""Stages of the built-in model and of real ones have the prompts that they always had: committed results stay valid.

The digests were taken before teachers of other worlds were known to the stages.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.common.splits import Split
from edgeprune.compare.run import prompts_to_score
from edgeprune.data.encoder import entries_of
from edgeprune.data.settings import CacheOptions, source_digest
from edgeprune.metrics import scoring
from edgeprune.shapes import PLAIN
from edgeprune.stages import prompts
from edgeprune.stages.options import AnalyzeOptions
from edgeprune.stages.prompts import analysis_prompts, calibration_prompts
from edgeprune.stages.workspace import Workspace


def short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def wishes(**options: Any) -> list[tuple[str, int]]:
    return [(wish.text, wish.seed) for wish in scoring.wishes(["shapes"], world=PLAIN, **options)]


def test_the_built_in_model_has_the_prompts_that_it_always_had(
    little_work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "prompts_of", little_work)
    scenes = [
        (scene.text, hashlib.sha256(scene.image.tobytes()).hexdigest())
        for scene in entries_of(CacheOptions("shapes", 50), None, PLAIN)
    ]
    found = {
        "analysis": short(analysis_prompts(AnalyzeOptions(), world=PLAIN)),
        "calibration": short(calibration_prompts(None, world=PLAIN)),
        "scenes": short(scenes),
        "tuning": short(prompts_to_score(PLAIN, None, 30, split=Split.TUNING)),
        "held-out": short(prompts_to_score(PLAIN, None, 30)),
        "score": short(wishes()),
        "tune": short(wishes(per_task=15, split=Split.TUNING)),
        "report": short([p.text for p in PLAIN.grammar.evaluation_prompts(15)]),
    }
    assert found == {
        "analysis": "dd7d0e71d6cfaa29",
        "calibration": "0de4090d907109f6",
        "scenes": "ff060f69b907de3f",
        "tuning": "f27fe9d633a1b596",
        "held-out": "bf2514e828e2e0ca",
        "score": "44e5b4171d3071f9",
        "tune": "a0473c4b9638616d",
        "report": "b1a768000146ddea",
    }
    assert source_digest("shapes", PLAIN) == source_digest("shapes", None) == "shapes, training"


def test_a_real_model_has_the_prompts_that_it_always_had(little_work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "prompts_of", little_work)
    found = {
        "analysis": short(analysis_prompts(AnalyzeOptions(), world=None)),
        "calibration": short(calibration_prompts(None, world=None)),
        "held-out": short(prompts_to_score(None, None, 30, "velocity")),
        "geneval": short(prompts_to_score(None, None, 3, "geneval")),
        "shapes": short(prompts_to_score(None, None, 3, "shapes")),
    }
    assert found == {
        "analysis": "38542f52cfde351d",
        "calibration": "ed860025f729b07c",
        "held-out": "c1e007d2743410ad",
        "geneval": "61cbde535ad182c7",
        "shapes": "a329566ce5c31013",
    }


def test_the_built_in_model_is_the_one_that_folders_were_begun_with(tmp_path: Path) -> None:
    begun = "e0a4496685e80fec913dd6715ca228351336e2cb584de580ec92f578b9a7d20d"
    assert Workspace(tmp_path / "out", None).weights_hash == begun
