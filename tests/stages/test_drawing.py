"""What `generate`, `score` and `bench` say before torch draws, and what they refuse."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from stage_runs import OPTIONS
from typer.testing import CliRunner

from edgeprune import api
from edgeprune.bench import run as bench_run
from edgeprune.cli import app
from edgeprune.common.errors import InputError
from edgeprune.metrics import scoring
from edgeprune.sampling.generation import GenerationOptions
from edgeprune.stages import drawing, plan, prune, quantize
from edgeprune.stages.drawing import Drawn
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.work import Speeds
from edgeprune.stages.workspace import Workspace


@pytest.fixture
def an_evaluation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what sets the seconds of an evaluation; nothing is measured or drawn."""

    def unexpected(*_: object, **__: object) -> Any:
        raise AssertionError("refused before anything is loaded")

    for module, name in ((scoring, "draw"), (bench_run, "run")):
        monkeypatch.setattr(module, name, unexpected)
    return lambda seconds: monkeypatch.setattr(drawing, "least", lambda *_: Speeds(seconds))


def refused(*words: str) -> str:
    done = CliRunner().invoke(app, [*words, "--device", "cpu"])
    assert isinstance(done.exception, InputError), done.exception
    return str(done.exception)


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Four prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\nc\nd\n")
    return path


def test_an_image_of_hours_is_refused(source: Path, tmp_path: Path, an_evaluation: Any) -> None:
    words = ("generate", "a circle", "--model", str(source), "-o", str(tmp_path / "out.png"))
    an_evaluation(600.0)  # 4 steps of 2
    assert refused(*words) == "generate: at least 80 min here, on cpu; --steps 2 takes 40 min; --yes runs it anyway"
    assert "--steps 1 takes 20 min" in refused(*words, "--time", "30m")
    assert re.search(r"on cpu; --steps 1 --height 32 --width 32 takes \d+ min; ", refused(*words, "--time", "19m"))
    # Where guidance does not act, a step is one evaluation: three of these four are below 0.8.
    assert "generate: at least 50 min" in refused(*words, "--guidance-range", "0.8", "--time", "49m")
    assert refused(*words, "--memory", "1MB").startswith("--memory: found 0.00 GB, expected at least 0.")
    assert not (tmp_path / "out.png").exists()


def test_what_is_drawn_to_score_is_said_and_refused(
    source: Path, lines: Path, tmp_path: Path, an_evaluation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("score", str(source), "--metric", "psnr", "--against", str(source), "--prompts", str(lines))
    an_evaluation(60.0)  # 4 prompts, 2 models, 4 steps of 2 evaluations
    assert refused(*words) == (
        "score: at least 64 min here, on cpu; --prompts FILE with 2 lines takes 32 min; --yes runs it anyway"
    )
    assert "; --seeds 1 takes 64 min; " in refused(*words, "--seeds", "3", "--time", "70m")
    assert "; --prompts FILE with 1 line --steps 2 takes 8 min; " in refused(*words, "--time", "10m")
    kept = tmp_path / "kept" / "images"
    kept.mkdir(parents=True)
    (kept / "metadata.jsonl").write_text("{}\n{}\n{}\n")  # what is drawn already takes nothing
    assert "score: at least 40 min" in refused(*words, "-o", str(tmp_path / "kept"), "--time", "39m")
    said = list[str]()
    monkeypatch.setattr(scoring, "draw", lambda *_, **__: said.append("drawn"))
    monkeypatch.setattr(scoring, "score", lambda *_, **__: [])
    with pytest.raises((InputError, FileNotFoundError)):
        api.score(source, ["psnr"], against=source, prompts=lines, progress=lambda what, *_: said.append(what))
    assert said[0].startswith("score: at least 64 min here, on ") and said[1] == "drawn"


def test_images_that_exist_are_drawn_again_for_no_fewer_prompts(
    source: Path, tmp_path: Path, an_evaluation: Any
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    Image.new("RGB", (64, 64)).save(images / "0.png")
    an_evaluation(600.0)
    said = refused("score", str(images), "--metric", "psnr", "--against", str(source))
    assert said == "score: at least 80 min here, on cpu; --steps 2 takes 40 min; --yes runs it anyway"


def test_a_bench_of_hours_is_refused(source: Path, an_evaluation: Any) -> None:
    words = ("bench", str(source), "--baseline", str(source), "--runtime", "eager", "--steps", "2")
    an_evaluation(30.0)  # of three variants: 21 steps of 2 evaluations and an image of 2 such steps
    assert refused(*words) == "bench: at least 69 min here, on cpu; --repeats 10 takes 39 min; --yes runs it anyway"
    assert "; --repeats 1 takes 12 min; " in refused(*words, "--time", "14m")
    assert "; --no-original takes 4 min; " in refused(*words, "--repeats", "1", "--time", "11m")
    alone = ("bench", str(source), "--runtime", "eager", "--steps", "2", "--repeats", "1", "--no-original")
    assert refused(*alone, "--time", "3m").endswith("; --repeats 1 --steps 1 takes 3 min; --yes runs it anyway")


def test_what_a_compressed_model_lacks_is_not_counted(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    plan.run(ws, replace(OPTIONS.plan, method="manual", keep=None, blocks="1", components="0:mlp"))
    prune.run(ws)
    quantize.run(ws, QuantizeOptions(calibration="none"))
    whole, less = Drawn.of(source), Drawn.of(ws.out, GenerationOptions(num_inference_steps=4))
    assert less.parameters == ws.plan().after.parameters < less.subject.numbers < whole.subject.numbers
    share = ws.plan().after.parameters / whole.parameters
    assert less.work(whole.subject).evaluations == pytest.approx(whole.work(whole.subject).evaluations * share)
