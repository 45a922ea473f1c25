"""tune: the fewest good evaluations with few trials, judged on the tuning split, written with what was there before."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fakes import SETTINGS, FakeBackend, fake_runtime
from typer.testing import CliRunner

from edgeprune import api
from edgeprune.api import tuning
from edgeprune.cli import app
from edgeprune.common.errors import InputError, LockedError
from edgeprune.common.files import sha256_file
from edgeprune.common.intervals import Interval
from edgeprune.common.lock import LOCK, hold
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.splits import SEEDS, Split
from edgeprune.metrics import scoring
from edgeprune.metrics.psnr import decibels
from edgeprune.runtimes import load
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.prompts import prompts
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.tuning import search
from edgeprune.tuning.trials import Trial

OWN = Generation(12, 3.0, 64, 64, 6)
COSTS = search.Costs(SETTINGS, FlowMatch())


def everything(own: Generation, *, guided: bool) -> list[Generation]:
    steps = range(search.LEAST_STEPS, own.num_inference_steps + 1)
    return [replace(line, num_inference_steps=n) for line in search.lines(own, guided=guided) for n in steps]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_it_finds_the_fewest_with_few_trials(guided: bool, seed: int) -> None:
    """Where more steps are better, it is the best of all, found with a quarter of the trials."""
    own, rng = replace(OWN, num_inference_steps=28), np.random.default_rng(seed)
    enough = {(one.solver, one.guidance_range): rng.integers(4, 40) for one in search.lines(own, guided=guided)}
    tried: list[Generation] = []

    def cost(one: Generation) -> int:
        return one.num_inference_steps + int(guided) * round(one.num_inference_steps * (1 - one.guidance_range[0]))

    def good(one: Generation) -> bool:
        tried.append(one)
        return bool(one.num_inference_steps >= enough[one.solver, one.guidance_range])

    found = search.fewest(own, guided=guided, cost=cost, good=good)
    all_good = [one for one in everything(own, guided=guided) if good(one)]
    assert cost(found) == min(map(cost, [own, *all_good]))
    count = len(everything(own, guided=guided))
    assert len(tried) - count <= count / 4


@pytest.mark.parametrize(
    "made",
    [
        OWN,
        replace(OWN, guidance_range=(0.5, 1.0), solver="ab2"),
        replace(OWN, guidance_range=(0.3, 0.7), solver="heun"),
        replace(OWN, guidance_scale=1.0),
    ],
)
def test_costs_are_what_the_runtime_evaluates(made: Generation) -> None:
    costs = search.Costs(replace(SETTINGS, generation=made), FlowMatch())
    model = fake_runtime()
    model.generate(
        "x", steps=made.num_inference_steps, guidance_scale=made.guidance_scale, solver=made.solver,
        guidance_range=made.guidance_range if made.guidance_scale > 1 else None,
    )  # fmt: skip
    assert isinstance(model.backend, FakeBackend)
    assert costs.evaluations(made) == sum(model.backend.batches)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "pipeline"
    tiny.tiny_pipeline(folder)
    OWN.save(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pipeline"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Prompts that the tiny tokenizer does not cut."""
    path = tmp_path / "prompts.txt"
    path.write_text("two stars\na red circle\nthree squares\n")
    return path


def test_the_choice_is_good_and_written(folder: Path, texts: Path) -> None:
    done = api.tune(folder, psnr_bound_db=12.0, prompts=texts)
    assert Generation.load(folder) == done.new and done.new != OWN
    assert replace(done.new, solver=OWN.solver, num_inference_steps=12, guidance_range=(0.0, 1.0)) == OWN
    assert done.chosen.evaluations < 24 == done.trials[0].evaluations
    report = json.loads((folder / "tuning.json").read_text())
    assert report["old"] == OWN.to_json() | {"solver": "euler"} and report["written"] is True
    assert report == json.loads(json.dumps(done.to_json()))

    lines, seeds = texts.read_text().splitlines(), range(3 * SEEDS, 3 * SEEDS + 3)  # of the tuning split
    with load(folder, "eager") as model:

        def drawn(made: Generation) -> list[Any]:
            steps, solver, guided = made.num_inference_steps, made.solver, made.guidance_range
            images = model.generate(lines, seed=seeds, steps=steps, solver=solver, guidance_range=guided)
            return [np.asarray(image) for image in images]

        exact, own, new = map(drawn, (search.exact(OWN), OWN, done.new))
    for trial, images in ((done.trials[0], own), (done.chosen, new)):
        values = [decibels(a, b) for a, b in zip(images, exact, strict=True)]
        assert trial.psnr.mean == pytest.approx(np.mean(values), abs=1e-6)
    assert done.chosen.psnr_drop.mean == pytest.approx(done.trials[0].psnr.mean - done.chosen.psnr.mean)
    assert done.chosen.psnr_drop.high is not None and done.chosen.psnr_drop.high <= 12.0
    cheaper = [one for one in done.trials if one.good and one.evaluations < done.chosen.evaluations]
    assert not cheaper and any(not one.good for one in done.trials)


def test_prompts_and_seeds_are_of_the_tuning_split() -> None:
    for names in (["shapes"], []):
        wanted = scoring.wishes(names, per_task=2 if names else None, split=Split.TUNING, captions=14)
        held_out = scoring.wishes(names, per_task=2 if names else None)
        assert len(wanted) == 14 and not {w.text for w in wanted} & {w.text for w in held_out}
        assert [w.seed for w in wanted] == Split.TUNING.seeds(14)
    assert [w.text for w in wanted] == prompts(Split.TUNING, 14)


@pytest.mark.slow  # test_the_choice_is_good_and_written tunes, too
def test_a_bound_that_nothing_keeps_to_leaves_the_settings(folder: Path, texts: Path) -> None:
    done = api.tune(folder, psnr_bound_db=-200.0, prompts=texts, count=1)
    assert done.new == done.old == Generation.load(folder)
    assert not done.chosen.good  # by itself, which is no reason to change


@pytest.mark.slow  # test_the_choice_is_good_and_written tunes, too
def test_a_metric_of_images_alone_has_its_own_bound(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scored(samples: Any, names: Any, **options: Any) -> Any:
        if names == ["shapes"]:  # few steps lose 3 % of the score
            few = json.loads((samples[0].path.parent / "metadata.jsonl").read_text().splitlines()[0])["steps"] < 8
            return [scoring.Score("shapes", None, {}, 7, [], [0.97 if few else 1.0] * len(samples))]  # type: ignore[arg-type]
        return score(samples, names, **options)

    score = scoring.score
    monkeypatch.setattr(scoring, "score", scored)
    done = api.tune(folder, psnr_bound_db=1000.0, metric="shapes", count=1, write=False)
    assert done.prompts == 7 and done.new.num_inference_steps == 8  # a prompt of each task
    lost = {one.generation.num_inference_steps: one.score_drop for one in done.trials}
    assert lost[8] == (0, 0, 0) and any(drop and drop.mean == pytest.approx(0.03) for drop in lost.values())
    assert api.tune(folder, psnr_bound_db=1000.0, score_bound=0.04, metric="shapes", count=1, write=False).new \
        .num_inference_steps == search.LEAST_STEPS  # fmt: skip


def test_an_interrupted_run_goes_on(folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw, limit = scoring.draw, [4]

    def counted(model: Path, out: Path, *args: Any, **options: Any) -> None:
        fresh = not (out / "metadata.jsonl").exists()
        if fresh and len(drawn) == limit[0]:
            raise KeyboardInterrupt
        drawn.extend([out.name] * fresh)
        draw(model, out, *args, **options)

    monkeypatch.setattr(scoring, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        api.tune(folder, psnr_bound_db=3.0, prompts=texts, count=2)
    assert Generation.load(folder) == OWN and not (folder / "tuning.json").exists()
    limit[0] = 1000
    done = api.tune(folder, psnr_bound_db=3.0, prompts=texts, count=2)
    assert len(drawn) == len({*drawn}) == 1 + len(done.trials)  # nothing twice, and the exact one
    left = [path.name for path in (folder / "cache" / "tune").iterdir() if path.name != LOCK]
    assert len(left) == 1 and left[0].endswith(".json")


@pytest.mark.slow  # test_the_choice_is_good_and_written tunes, too
def test_without_writing_the_folder_stays_as_it_is(folder: Path, texts: Path) -> None:
    def files() -> dict[str, str]:
        return {str(path): sha256_file(path) for path in folder.rglob("*") if path.is_file()}

    before = files()
    assert api.tune(folder, psnr_bound_db=3.0, prompts=texts, count=1, write=False).new != OWN
    forecast = api.forecast_tune(folder, prompts=texts, count=1)
    assert files() == before and forecast.images == 1 and forecast.evaluations > 2 * 50 + 24 and forecast.seconds > 0


def test_an_export_knows_the_new_file(folder: Path) -> None:
    path, made = folder / "edgeprune_export.json", replace(OWN, solver="ab2")
    path.write_text(json.dumps({"source": "x", "files": {"generation.json": "old", "other": "1"}}))
    zero = Interval(0.0, 0.0, 0.0)
    trials = tuple(Trial(one, 24, zero, zero, None, None, True) for one in (OWN, made))
    tuning._write(folder, tuning.Tuned(OWN, made, trials, None, 1.0, 0.02, 1, True))
    assert Generation.load(folder) == made
    found = json.loads(path.read_text())
    assert found == {"source": "x", "files": {"generation.json": sha256_file(folder / "generation.json"), "other": "1"}}


def test_what_it_cannot_tune_is_refused_first(folder: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "draw", lambda *_, **__: pytest.fail("drew an image"))
    with pytest.raises(
        InputError, match=r"tune: about .* here, [\d,]+ evaluations .*; --count 1 takes .*; --yes runs it"
    ):
        api.tune(folder, prompts=texts, count=2, compute=ComputeOptions(longest_s=1e-3))
    with pytest.raises(InputError, match="--metric psnr: compares images, as tune does by itself"):
        api.tune(folder, metric="psnr")
    with pytest.raises(InputError, match="give --weights clip=PATH"):
        api.tune(folder, metric="clip")
    with (
        hold(folder / "cache" / "tune" / LOCK, folder),
        monkeypatch.context() as patch,
        pytest.raises(LockedError, match="in use by"),
    ):
        patch.setattr("edgeprune.common.lock._locks", {})  # as of another process
        api.tune(folder, count=1)
    replace(OWN, num_inference_steps=4, guidance_scale=0.0).save(folder)
    with pytest.raises(InputError, match="tune: found 4 steps of euler without guidance: these are so few"):
        api.tune(folder)


def test_the_command_shows_what_it_tried(folder: Path, texts: Path) -> None:
    common = [str(folder), "--prompts", str(texts), "--psnr-bound", "12", "--json"]
    shown = CliRunner().invoke(app, ["tune", *common, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert set(json.loads(shown.stdout.splitlines()[-1])) == {"images", "evaluations", "expected_s"}
    shown = CliRunner().invoke(app, ["tune", *common])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout.splitlines()[-1])
    assert found == json.loads((folder / "tuning.json").read_text())
    said = " ".join(shown.stderr.split())
    assert f"{found['new_evaluations']} instead of 24 evaluations an image; written to generation.json" in said
    assert said.count("chosen") == 1 and "beyond the bounds" in said
