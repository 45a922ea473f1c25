"""`compress --time` chooses what fits, once, keeps that in the folder, and loses nothing when it is interrupted."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from stage_runs import OPTIONS, edit
from typer.testing import CliRunner

from edgeprune.artefact.resolve import read_original
from edgeprune.cli import app
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import silent
from edgeprune.planning.options import PlanOptions
from edgeprune.report import make
from edgeprune.report.steps import StepTimes
from edgeprune.residency.spill import Spill
from edgeprune.sampling.generation import Generation
from edgeprune.stages import choice, compress
from edgeprune.stages.choice import MOVES, SHARE, Choice, choose, settle
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions, QuantizeOptions
from edgeprune.stages.work import Speeds, Subject, Work
from edgeprune.stages.workspace import Workspace

KINDS = {"joint": range(4), "single": range(4, 4)}
ASKED = CompressOptions(
    analyze=AnalyzeOptions(count=28), plan=PlanOptions(keep=0.95, protect_first=1, protect_last=0), distill=None,
    quantize=QuantizeOptions(calibration="feedback"),
)  # fmt: skip
INT4 = QuantizeOptions(calibration="none")


@pytest.fixture(scope="module")
def subject(source: Path) -> Subject:
    config, family = read_original(source)
    return Subject(source, family, config, Generation(28, 7.0, 64, 64, 6))


def test_what_is_asked_for_runs_where_it_fits(subject: Subject) -> None:
    found = choose(subject, ASKED, 3600, Speeds(1e-9))
    assert (found.estimator, found.prompts, found.states, found.calibration) == ("exhaustive", 28, 6, 28)
    assert (found.images, found.image_steps, found.steps) == (8, 28, 0)
    assert found.over(ASKED, KINDS) == replace(
        ASKED,
        analyze=replace(ASKED.analyze, estimator="exhaustive"),
        quantize=replace(ASKED.quantize, count=28),
        encoders="int4",
    )


def test_what_is_given_up_fits_and_is_no_more_than_it_takes(subject: Subject) -> None:
    """In the order of MOVES; each one that was in vain is taken back."""
    found = [choose(subject, ASKED, 3600, Speeds(10 ** (n / 2))) for n in range(-6, 6)]
    for one in found:
        assert one.prompts == 0 or one.forecast_s <= SHARE * 3600
        assert one.prompts == 0 or one.images == 0 or one.forecast_s > 0.2 * SHARE * 3600 or one.images == 8
    assert {one.estimator for one in found} == {"exhaustive", "gates"}
    assert found[0].prompts > found[-1].prompts and found[0].images > found[-1].images == 0
    only_images = choose(subject, replace(ASKED, quantize=INT4), 3600, Speeds(3.0))
    assert (only_images.estimator, only_images.states) == ("gates", 6)
    assert {name for name, _ in MOVES} <= {*asdict(only_images), "training"}


def test_a_t5_has_8_bits_before_integers_of_the_transformer_are_given_up(tmp_path: Path) -> None:
    tiny.tiny_pipeline(tmp_path / "t5", t5=True)
    config, family = read_original(tmp_path / "t5")
    subject = Subject(tmp_path / "t5", family, config, Generation(28, 7.0, 64, 64, 6))
    stages = compress.works(subject, ASKED, compress.expected_plan(subject.source, subject.generation, ASKED), 8)
    text = stages.pop("encoders").rounded
    others = sum(stages.values(), Work()).rounded
    speeds = Speeds(1e-9, rounded=(others + text / 2) / (SHARE * 3600))  # all but the T5's INT4 fit
    assert choose(subject, ASKED, 3600, Speeds(1e-9)).over(ASKED, KINDS).text_form == "int4"
    found = choose(subject, ASKED, 3600, speeds)
    assert (found.int4_text, found.calibration) == (0, 28) and "text encoder in 8 bits" in found.described()
    assert found.over(ASKED, KINDS).text_form == "int8"
    assert found.over(replace(ASKED, encoders="half"), KINDS).text_form == "half"


def test_a_choice_of_an_older_version_keeps_the_form_of_a_t5(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    chosen = asdict(choose(ws.subject, ASKED, 3600, Speeds(1e-9)))
    del chosen["int4_text"]
    ws.keep_choice(chosen)
    found = Choice.of_manifest(ws)
    assert found is not None and found.over(ASKED, KINDS).text_form == "int4"
    # What users typed then has the same digest now.
    nearest, named = replace(ASKED, quantize=INT4), replace(ASKED, encoders="int4")
    assert nearest.to_json()["encoders"] == "int8" and "encoders" not in named.to_json()


def test_training_gets_what_is_left_or_nothing(subject: Subject) -> None:
    trained = replace(ASKED, distill=OPTIONS.distill and replace(OPTIONS.distill, steps=1000, batch=32))
    given = replace(trained, data=DataOptions("captions", 1024))
    shares = {}
    for seconds in (1e-3, 1e-2, 0.04, 0.06, 10.0):
        found = choose(subject, given, 3600, Speeds(seconds))
        shares[seconds] = found.steps / 1000
        assert found.samples == (int(1024 * found.steps / 1000) or 1)
        assert (found.over(given, KINDS).distill is None) == (found.steps == 0)
    assert shares[1e-3] == 1.0 and shares[10.0] == 0.0 and set(shares.values()) & {0.5, 0.25, 0.125}


def test_integers_are_calibrated_where_training_is_given_up(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = replace(OPTIONS.distill, steps=1000, batch=32) if OPTIONS.distill else None
    asked = replace(ASKED, distill=trained, quantize=QuantizeOptions())
    rich, poor = (choose(subject, asked, 3600, Speeds(speed)) for speed in (1e-9, 1.0))
    assert rich.steps == 1000 and rich.calibration == 0 and "calibrate" not in rich.described()
    assert rich.over(asked, KINDS).quantize == INT4
    assert poor.steps == 0 and poor.calibration > 0
    assert poor.over(asked, KINDS).quantize.calibration == "feedback"
    with pytest.raises(InputError, match="^--calibration-count: training saw these weights rounded"):
        choose(subject, replace(asked, quantize=QuantizeOptions(count=8)), 3600, Speeds(1e-9))
    # Of a large model, no move sees more of a trajectory than there was.
    monkeypatch.setattr("edgeprune.stages.options.is_small", lambda numbers: False)
    monkeypatch.setattr(choice, "is_small", lambda numbers: False)
    for given, states in ((None, 2), (6, 6)):
        alone = replace(ASKED, quantize=QuantizeOptions(states=given))
        for lowered, expected in ((), states), ([("states", 3)], min(3, states)), ([("states", 1)], 1):
            most = choice._most(subject, alone, 3600, quick=False).lowered(lowered, drawn=False)
            assert most.over(alone, KINDS).settled(subject.numbers).quantize.states == expected


def test_without_time_for_scores_the_plan_is_by_position(subject: Subject) -> None:
    asked = replace(ASKED, plan=replace(ASKED.plan, protect_first=None))
    found = choose(subject, asked, 60, Speeds(1e4))
    assert (found.prompts, found.images, found.calibration) == (0, 0, 0) and "no scores" in found.described()
    options = found.over(asked, KINDS)
    assert options.plan.method == choice.WITHOUT_SCORES and options.plan.protect_first == 2
    assert not options.reads_scores and options.quantize == INT4
    kinds = {"joint": range(3), "single": range(3, 9)}
    named = replace(asked, plan=replace(asked.plan, protect_first={"single": 2}))
    assert found.over(named, kinds).plan.protect_first == {"joint": 3, "single": 2}
    other = replace(asked, plan=replace(asked.plan, protect_first={"joint": 1}))
    assert found.over(other, kinds).plan.protect_first == {"joint": 1, "single": 1}  # half of all nine are the first 4
    listed = replace(ASKED, plan=PlanOptions("manual", blocks="1"))
    assert choose(subject, listed, 60, Speeds(1e4)).over(listed, KINDS).plan == listed.plan


@pytest.mark.parametrize(("method", "keep", "scored"), [("hpp", 0.79, False), ("hybrid", 0.2, True)])
def test_what_is_chosen_meets_the_budget(subject: Subject, method: str, keep: float, scored: bool) -> None:
    """By position with projected modulation where that suffices, else by scores, in whatever time they take."""
    plan = PlanOptions(method, keep=keep, modulation_rank="auto")
    asked = replace(ASKED, plan=replace(plan, protect_first=0, protect_last=0) if scored else plan)
    found = choose(subject, asked, 60, Speeds(1e4))
    assert (found.prompts == 1) == scored and found.images == 0
    planned = compress.expected_plan(subject.source, subject.generation, found.over(asked, KINDS))
    assert planned.after.parameters <= keep * planned.before.parameters


def test_a_folder_keeps_its_choice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settled(seconds: float, time_s: float | None, options: CompressOptions = ASKED) -> Choice | None:
        monkeypatch.setattr(choice, "measured", lambda *_: Speeds(seconds))
        ws = Workspace(tmp_path / "out", str(source), fresh=fresh)
        return settle(ws, options, time_s, lines.append)

    lines, fresh = list[str](), False
    assert settled(1.0, None) is None
    first = settled(1.0, 600)
    assert first and lines[-1] == first.described() and lines[-1].startswith("--time 10 min: about ")
    assert settled(100.0, 600) == settled(100.0, None) == first
    with pytest.raises(StaleStageError, match=r"begun with --time 10 min; use --fresh to choose again, or another -o$"):
        settled(1.0, 1200)
    with pytest.raises(StaleStageError, match="begun with --time 10 min and other options; use --fresh"):
        settled(1.0, None, replace(ASKED, quantize=INT4))
    fresh = True
    again = settled(100.0, 1200)
    assert again and again != first and again.time_s == 1200
    path = tmp_path / "out" / "edgeprune.json"
    edit(path, "choice", json.loads(path.read_text())["choice"] | {"prompts": "many"})
    with pytest.raises(InputError, match="choice: prompts: found 'many', expected a whole number"):
        settled(1.0, None)
    edit(path, "choice", None)
    edit(path, "stages", {"analyze": {"inputs": "x", "command": "", "seconds": 1.0}})
    fresh = False
    with pytest.raises(StaleStageError, match="begun without --time; use --fresh"):
        settled(1.0, 600)


def test_an_interrupted_run_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model every step is kept: a run that gets only a few at a time ends, with the first choice."""
    for module in ("residency.compute", "residency.running", "stages.work"):
        monkeypatch.setattr(f"edgeprune.{module}.is_small", lambda numbers: False)
    monkeypatch.setattr("edgeprune.report.measure.step_times", lambda *_: StepTimes(1.0, 1.0, 1.0, None))
    left, real = [10**9], Spill.put

    def few(self: Spill, name: str, *args: Any) -> None:
        real(self, name, *args)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Spill, "put", few)

    def run(out: Path, speed: float) -> Path:
        monkeypatch.setattr(choice, "measured", lambda *_: Speeds(speed))
        ws, options = Workspace(out, str(source), generation={"num_inference_steps": 4}), replace(ASKED, quantize=INT4)
        chosen = settle(ws, options, 60, silent)
        assert chosen and (chosen.estimator, chosen.prompts) == ("gates", 1) and chosen.images < 8
        compress.compress(ws, chosen.over(options, KINDS))
        make.make_report(ws)
        return out

    whole, runs = run(tmp_path / "whole", 1.0), 0
    killed = None
    while killed is None:
        runs, left[0] = runs + 1, 9
        with contextlib.suppress(KeyboardInterrupt):
            killed = run(tmp_path / "killed", 1.0 * runs)  # a slower machine each time
        assert runs < 30
    assert runs > 2
    for name in ("analysis.json", "plan.json", "transformer_int4/diffusion_pytorch_model.safetensors", "report.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_large_models_run_goes_on_in_the_memory_that_it_began_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row counts follow from it, and so do last bits."""
    monkeypatch.setattr(choice, "measured", lambda *_: Speeds(1.0))

    def memory(out: str, free: int, given: int | None = None) -> int | None:
        monkeypatch.setattr("edgeprune.residency.compute.allowed", lambda: free)
        ws = Workspace(tmp_path / out, str(source), compute=ComputeOptions("cpu", given))
        settle(ws, ASKED, 600, lambda what, *_: lines.append(what))
        return ws.original.compute.memory

    lines = list[str]()
    assert memory("small", 8 * 10**9) is None  # all of it is in memory
    monkeypatch.setattr(choice, "is_small", lambda numbers: False)
    assert memory("large", 8 * 10**9) == memory("large", 75 * 10**8) == 8 * 10**9
    assert memory("large", 5 * 10**9) is None  # a limit that is not there would help nobody
    assert lines[-1].startswith("memory: 5.0 GB are free, 8.0 GB were when this began")
    assert memory("large", 5 * 10**9, given=3 * 10**9) == 3 * 10**9
    assert memory("given", 8 * 10**9, given=3 * 10**9) == 3 * 10**9 and memory("given", 8 * 10**9) is None


def test_the_command_shows_what_it_would_choose(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "measured", lambda *_: Speeds(2.0))
    out = ["compress", str(source), "-o", str(tmp_path / "out"), "--keep", "0.95", "--protect-first", "1"]
    done = CliRunner().invoke(app, [*out, "--protect-last", "0", "--time", "20m", "--dry-run", "--json"])
    assert done.exit_code == 0, done.exception
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["choice"]["time_s"] == 1200 and found["analyze_prompts"] == found["choice"]["prompts"] > 0
    assert "--time 20 min: about " in done.stderr and "prompts scored by" in done.stderr
    assert not (tmp_path / "out").exists()
    refused = CliRunner().invoke(app, [*out, "--time", "40"])
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception) == "--time: found '40', expected a time such as 90s, 40m or 2h"
