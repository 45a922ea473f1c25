"""States: what the frozen blocks that ship make of pairs, the tail that learns from them, and what a kill leaves."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from typer.testing import CliRunner

from edgeprune import api
from edgeprune.artefact.loading import load_transformer
from edgeprune.cli import app
from edgeprune.common.errors import InputError
from edgeprune.families import family_of, family_of_model, published
from edgeprune.families.sd3 import SD3
from edgeprune.planning.make import make_plan
from edgeprune.planning.options import PlanOptions
from edgeprune.residency.compute import Compute
from edgeprune.sampling.denoising import Conditioning
from edgeprune.sampling.generation import Generation
from edgeprune.stages import distill, plan, prune, quantize, states, tail
from edgeprune.stages.compress import compress
from edgeprune.stages.memory import Memory
from edgeprune.stages.options import CompressOptions, DataOptions, QuantizeOptions
from edgeprune.stages.states import PREFIX
from edgeprune.stages.workspace import Workspace
from edgeprune.training import distill as training
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import DistillOptions, Placement, Recipe
from edgeprune.training.resume import losses_of

DATA = DataOptions("shapes", 6)


def options(**changes: Any) -> DistillOptions:
    """Return those of a short training from seven states."""
    return DistillOptions(**{"steps": 6, "batch": 2, "rate": 1e-3, "states": 7} | changes)


def begun(source: Path, out: Path, **changes: Any) -> Workspace:
    """Return a folder less block 1 of 3."""
    ws = Workspace(out, str(source))
    plan.run(ws, PlanOptions("manual", **{"blocks": "1"} | changes))
    prune.run(ws)
    return ws


def files(folder: Path, pattern: str) -> dict[str, str]:
    """Return hashes of files by their names."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern)) if p.is_file()}


@pytest.fixture
def lots_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "SMALL_LOT", 3)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the samples that pass through a block; a forecast's have no data."""
    ran, real = [0], SD3.run

    def run(self: SD3, block: Any, image: torch.Tensor, *rest: Any) -> Any:
        ran[0] += 0 if image.is_meta or isinstance(image, FakeTensor) else len(image)
        return real(self, block, image, *rest)

    monkeypatch.setattr(SD3, "run", run)
    return ran


@pytest.mark.parametrize(
    ("changes", "a_state", "once"),
    [
        ({}, 3 + 1, 0),
        ({"int4_group_size": None}, 3, 0),
        ({"lambda_feature": 1.0}, 3 + 1, 0),
        ({"prefix_calibration": "feedback"}, 3 + 1, 2 * 3),  # the first lot, for its inputs and to send them on
    ],
)
@pytest.mark.usefixtures("lots_of_three")
def test_no_block_runs_more_than_it_has_to(
    source: Path, tmp_path: Path, counted: list[int], changes: dict[str, Any], a_state: int, once: int
) -> None:
    ws = begun(source, tmp_path / "out")
    made = list[int]()

    def progress(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if what == "distill: checking":
            counted[0] = 0  # the data is encoded
        if what.startswith("states") and done == total:
            made.append(counted[0])

    distill.run(ws, options(**changes), DATA, progress)
    assert made == [7 * a_state + once]
    assert 3 * distill.made(ws.subject, options(**changes), ws.plan()).evaluations == pytest.approx(made[0])
    # A step: the one block that is left after the removed one, and the teacher's two where features are compared.
    assert counted[0] - made[0] == 6 * 2 * (1 + 2 * ("lambda_feature" in changes))
    assert sorted(p.name for p in ws.cache.glob("states-*/*")) == [f"0000{n}.safetensors" for n in range(3)]
    stage = ws.manifest.stages["distill"]
    assert stage["options"]["options"]["lambda_feature"] == changes.get("lambda_feature", 0.0)
    assert stage["first_loss"] > 0


@pytest.mark.parametrize("calibration", ["none", "feedback"])
def test_the_prefix_that_ships_is_the_one_that_states_saw(source: Path, tmp_path: Path, calibration: str) -> None:
    ws = begun(source, tmp_path / "out")
    distill.run(ws, options(prefix_calibration=calibration), DATA)
    quantize.run(ws, QuantizeOptions())
    (path,) = ws.cache.glob("states-*/*")
    found = load_file(path)
    seen, shipped = (load_file(next(f.glob("*.safetensors"))) for f in (ws.cache / PREFIX, ws.out / "transformer_int4"))
    frozen = [name for name in seen if name.startswith("transformer_blocks.0.")]
    assert frozen and all(torch.equal(seen[name], shipped[name]) for name in frozen)
    # Rounded without samples, the prefix is another.
    plain = begun(source, tmp_path / "plain")
    quantize.run(plain, QuantizeOptions(calibration="none"))
    nearest = load_file(next((plain.out / "transformer_int4").glob("*.safetensors")))
    same = all(torch.equal(nearest[name], shipped[name]) for name in frozen)
    assert same == (calibration == "none")
    # The streams are what the shipped model computes.
    model = load_transformer(ws.out, quantized=True)
    drawn = states.Maker._drawn
    family, batches = family_of_model(model), list[Any]()

    def note(self: Any, number: int, size: int) -> Any:
        batches.append(drawn(self, number, size))
        return batches[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states.Maker, "_drawn", note)
        other = begun(source, tmp_path / "other")
        distill.run(other, options(prefix_calibration=calibration), DATA)
    batch = batches[0]
    with torch.no_grad():
        inputs = states.model_inputs(model, batch.latents, batch.condition, batch.sigma, 3.0)
        image, text, modulation = family.embed(model, inputs)
        image, after = family.run(family.blocks(model)[0], image, text, modulation, ())
        assert after is not None
    assert not any(name.startswith("taught") for name in found)
    for name, expected in (("image", image), ("text", after), ("modulation", modulation)):
        assert (found[name] - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    teacher = load_transformer(source, quantized=False)
    with torch.no_grad():
        answer = states_velocity(teacher, batch)
    assert (found["velocity"] - answer).abs().max() <= 1e-4 * answer.abs().max()
    assert torch.equal(found["target"], batch.velocity)


def states_velocity(model: Any, batch: Any) -> torch.Tensor:
    from edgeprune.sampling.denoising import velocity

    return velocity(model, batch.latents, batch.condition, batch.sigma, 3.0)


@pytest.mark.parametrize(
    ("rank", "rounded"),
    [(None, False), (4, True), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((None, True), (4, False)))],
)
def test_the_teachers_streams_are_its_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None, rounded: bool
) -> None:
    drawn, batches = states.Maker._drawn, list[Any]()

    def note(self: Any, number: int, size: int) -> Any:
        batches.append(drawn(self, number, size))
        return batches[-1]

    monkeypatch.setattr(states.Maker, "_drawn", note)
    ws = begun(source, tmp_path / "out", modulation_rank=rank)
    chosen = options(lambda_feature=1.0) if rounded else options(lambda_feature=1.0, int4_group_size=None)
    distill.run(ws, chosen, DATA)
    (path,) = ws.cache.glob("states-*/*")
    found, (batch,) = load_file(path), batches
    teacher = load_transformer(source, quantized=False)
    family = family_of_model(teacher)
    with torch.no_grad():
        inputs = states.model_inputs(teacher, batch.latents, batch.condition, batch.sigma, 3.0)
        image, text, modulation = family.embed(teacher, inputs)
        image, text = family.run(family.blocks(teacher)[0], image, text, modulation, ())
    for name, expected in (("image", image), ("text", text), ("modulation", modulation)):
        assert (found[f"taught.{name}"] - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        own = found[name]
        same = own.shape == expected.shape and torch.equal(own, found[f"taught.{name}"])
        assert same == (rank is None and not rounded), name
    assert (ws.cache / PREFIX).exists() == rounded


def test_a_round_leaves_nothing_in_memory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, alive, real = begun(source, tmp_path / "out"), list[weakref.ref[Any]](), tail._student

    def student(*args: Any, **named: Any) -> Any:
        assert not ws.original.loaded  # neither original nor encoders nor VAE
        model = real(*args, **named)
        alive.append(weakref.ref(model.proj_out.weight))
        return model

    def progress(what: str, done: int = 0, total: int = 0, text: str = "") -> None:
        if what == "states of round 2 of 2" and done == 1:
            assert len(alive) == 1 and alive[0]() is None
            maps = Path("/proc/self/maps")
            assert not maps.is_file() or "states-" not in maps.read_text()

    monkeypatch.setattr(tail, "_student", student)
    distill.run(ws, options(rounds=2), DATA, progress)
    assert len(alive) == 2


def test_a_begun_training_keeps_its_number_format(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the machine that it goes on on multiplies."""
    ws = begun(source, tmp_path / "out")

    class Killed(Exception):
        pass

    def progress(what: str, done: int = 0, total: int = 0, text: str = "") -> None:
        if what == "distill" and done == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Compute, "dtype", lambda *_, **__: torch.bfloat16)
        patch.setattr(training, "SAVE_S", 0.0)
        distill.run(ws, options(), DATA, progress)
    steps = list[int]()

    def note(what: str, done: int = 0, total: int = 0, text: str = "") -> None:
        if what == "distill":
            steps.append(done)

    for _ in range(2):
        distill.run(Workspace(ws.out, str(source)), options(), DATA, note)
    assert steps == [5, 6]
    found = Workspace(ws.out, str(source)).manifest.stages["distill"]["options"]["options"]["mixed_precision"]
    assert found == "bf16"


def test_the_tail_learns_and_the_prefix_stays(source: Path, tmp_path: Path) -> None:
    ws = begun(source, tmp_path / "out", stand_in=8)
    before = load_transformer(ws.out, quantized=False).state_dict()
    losses = list[float]()

    def progress(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if what == "distill":
            losses.append(float(note.split()[1]))

    distill.run(ws, options(steps=60, batch=7, states=7, int4_group_size=None), DATA, progress)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    after = load_transformer(ws.out, quantized=False).state_dict()
    for name, tensor in after.items():
        trained = name.startswith(("transformer_blocks.1.", "norm_out.", "proj_out."))
        # The text of a last block is only attended to: its query leads nowhere.
        assert torch.equal(tensor, before[name]) != trained or "add_q_proj" in name or "norm_added_q" in name, name
    assert any("stand_in" in name for name in after)


@pytest.mark.usefixtures("lots_of_three")
def test_killed_anywhere_it_ends_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    chosen = options(rounds=2, prefix_calibration="feedback")

    class Killed(Exception):
        pass

    calls = list[tuple[str, int]]()

    def note(what: str, done: int = 0, total: int = 0, text: str = "") -> None:
        calls.append((what, done))

    ws = begun(source, tmp_path / "whole")
    distill.run(ws, chosen, DATA, note)
    quantize.run(ws, QuantizeOptions())
    expected, losses = files(ws.out, "transformer*/*"), losses_of(ws.cache / "distill.safetensors")
    assert len(losses) == 6
    kinds = [(PREFIX, 1), ("states of round 1 of 2", 5), ("distill", 3), ("states of round 2 of 2", 1), ("distill", 5)]
    assert set(kinds) <= set(calls)
    killed = begun(source, tmp_path / "killed")
    for at in kinds:

        def progress(what: str, done: int = 0, total: int = 0, text: str = "", at: tuple[str, int] = at) -> None:
            if (what, done) == at:
                raise Killed

        with pytest.raises(Killed):
            distill.run(Workspace(killed.out, str(source)), chosen, DATA, progress)
    ws = Workspace(killed.out, str(source))
    distill.run(ws, chosen, DATA)
    quantize.run(ws, QuantizeOptions())
    assert files(ws.out, "transformer*/*") == expected
    assert losses_of(ws.cache / "distill.safetensors") == losses
    assert len(list(ws.cache.glob("states-*"))) == 1  # those of the first round are gone


def test_a_state_is_made_once(source: Path, tmp_path: Path, counted: list[int]) -> None:
    ws = begun(source, tmp_path / "out")
    distill.run(ws, options(), DATA)
    before = files(next(ws.cache.glob("states-*")), "*")
    counted[0] = 0
    again = Workspace(ws.out, str(source), fresh=True)
    distill.run(again, options(rate=2e-3), DATA)
    assert counted[0] == 6 * 2 and files(next(ws.cache.glob("states-*")), "*") == before


def test_other_groups_are_rounded_again(source: Path, tmp_path: Path) -> None:
    ws, said = begun(source, tmp_path / "out"), list[str]()
    distill.run(ws, options(), DATA)

    def note(what: str, *_: object) -> None:
        said.append(what)

    quantize.run(ws, QuantizeOptions(), note)
    assert any("the first 1 blocks stay as the trained tail saw them" in line for line in said)
    ws.fresh = True
    quantize.run(ws, QuantizeOptions(group_size=32), note)
    assert any("trained behind a prefix in groups of 64; in groups of 32 it is another" in line for line in said)
    shutil.rmtree(ws.cache / PREFIX)
    quantize.run(ws, QuantizeOptions(), note)
    assert any("is not what the tail was trained behind" in line for line in said)


@pytest.mark.parametrize(
    ("removed", "changes", "said"),
    [
        ({"blocks": "0"}, {}, "--train-states.: the first block is pruned, so no prefix is frozen"),
        ({"blocks": ""}, {}, "--train-states.: nothing is pruned, so no prefix is frozen"),
        ({"blocks": "1"}, {"freeze_prefix": False}, "--train-states.: states come from a frozen prefix"),
        ({"blocks": "1"}, {"states": 0, "rounds": 2}, "--rounds and --prefix-calibration are about states"),
        (
            {"blocks": "1"},
            {"rounds": 7},
            "--states, --rounds: found 7, 7, expected 0 or more, and from 1 to",
        ),
        ({"blocks": "1"}, {"prefix_calibration": "awq"}, "--prefix-calibration: found 'awq'"),
        ({"blocks": "1"}, {"rounds": 0}, "--states, --rounds: found 7, 0"),
        ({"blocks": "1"}, {"prefix_calibration": "feedback", "int4_group_size": None}, "nothing is rounded with"),
        ({"blocks": "1"}, {"teacher_precision": "int8"}, "no teacher is in memory"),
    ],
)
def test_what_cannot_be_is_refused(
    source: Path, tmp_path: Path, removed: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    ws = begun(source, tmp_path / "out", **removed)
    with pytest.raises(InputError, match=said):
        distill.run(ws, options(**changes), DATA)


def test_folders_trained_without_states_stay_current() -> None:
    names = {"states", "rounds", "prefix_calibration"}
    assert not names & DistillOptions().to_json(Recipe()).keys()
    assert names <= DistillOptions().to_json(Recipe(states=7)).keys()


def test_the_forecast_leaves_out_what_is_not_there(source: Path, tmp_path: Path) -> None:
    out = begun(source, tmp_path / "out").out
    whole = api.forecast_distill(out, options(states=0))
    tail = api.forecast_distill(out, options())
    averaged = api.forecast_distill(out, options(ema=0.0))
    compared = api.forecast_distill(out, options(lambda_feature=1.0))
    assert whole.teacher_bytes > compared.teacher_bytes > tail.teacher_bytes == 0
    assert whole.student_bytes > tail.student_bytes == tail.gradients_bytes == whole.gradients_bytes
    assert tail.average_bytes > averaged.average_bytes == 0
    assert tail.activations_bytes == whole.activations_bytes > 0
    added = api.forecast_distill(out, options(train="lora:4", mixed_precision="bf16"))
    assert added.moments_bytes < 0.2 * tail.moments_bytes
    assert (added.student_bytes - added.gradients_bytes) / tail.student_bytes == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "removed", "expected"),
    [
        ({}, "25-28,31-34", {"states": 2000, "rounds": 4, "lambda_feature": 0.0}),  # 1,000 steps of 32
        ({"steps": 10, "batch": 2}, "25-28,31-34", {"states": 5, "rounds": 1, "lambda_feature": 0.0}),
        ({"rounds": 8}, "25-28,31-34", {"states": 1000, "rounds": 8, "lambda_feature": 0.0}),
        ({"rounds": 1}, "25-28,31-34", {"states": 8000, "rounds": 1, "lambda_feature": 0.0}),
        ({"states": 300}, "25-28,31-34", {"states": 300, "rounds": 1, "lambda_feature": 0.0}),
        ({"states": 0}, "25-28,31-34", {}),
        ({}, "0", {}),
        ({"freeze_prefix": False}, "25-28,31-34", {}),
    ],
)
def test_a_large_model_is_trained_from_states(changes: dict[str, Any], removed: str, expected: dict[str, Any]) -> None:
    config = published.transformers()["sd3.5-large"]
    family = family_of(config)
    large = make_plan(family, config, None, method="manual", blocks=removed)
    how = distill.recipe_of(DistillOptions(**changes), large, family, config, Generation())
    assert {name: getattr(how, name) for name in ("states", "rounds", "lambda_feature")} == {
        "states": 0, "rounds": 1, "lambda_feature": 1e-4,
    } | expected  # fmt: skip

    def held(how: Recipe, **changes: Any) -> int:
        return distill.training_bytes(family, config, DistillOptions(**changes), how, large)

    alone, whole = held(how), held(replace(how, states=0))
    assert alone < 0.3 * whole if expected else alone == whole  # neither counts gradients of a frozen prefix
    learned = held(replace(how, states=0, freeze_prefix=False))
    if large.first_pruned and how.freeze_prefix:
        assert learned > 2 * whole
        narrow = whole - held(replace(how, states=0), mixed_precision="bf16")
        assert narrow > 0.95 * (whole - held(how, ema=0.99)) / 2  # of both models what is not trained: half of it
    else:
        assert learned == pytest.approx(whole, rel=0.03)  # PWP freezes what embeds even before a first block
    if how.states:  # 1.0 G parameters: docs/full-size.md, docs/distill.md
        assert (held(how, ema=0.0), held(how, ema=0.0, optimizer="adamw8bit")) == (16_001_180_672, 10_000_737_920)
        assert held(how) == 20_001_475_840


def test_a_state_of_a_real_model_is_as_large_as_the_docs_say(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of SD3.5 Large at 1024x1024 with 333 tokens of text, in bf16."""
    ws, config = begun(source, tmp_path / "out"), published.transformers()["sd3.5-large"]
    (made,) = distill.make_states(ws, options(), DATA)
    found = sum(tensor.nbytes for tensor in load_file(made).values())
    assert found / 7 == pytest.approx(states.state_bytes(ws, Recipe(lambda_feature=0.0)), rel=0.01)
    condition = Conditioning(torch.empty(1, 333, 4096), torch.empty(1, 2048))
    monkeypatch.setattr(states, "sample", lambda *_: (torch.empty(1, 16, 128, 128), condition))
    large = SimpleNamespace(
        family=family_of(config), config=config, source=source, generation=Generation(),
        original=SimpleNamespace(dtype=torch.bfloat16),
    )  # fmt: skip
    alone, both = (states.state_bytes(large, Recipe(lambda_feature=feature)) for feature in (0.0, 1e-4))  # type: ignore[arg-type]
    assert (alone, both) == (23_120_384, 44_667_904)
    assert alone <= 25e6 and both <= 45e6


def test_compress_rounds_the_prefix_as_it_quantizes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(
        Workspace(out, str(source)),
        CompressOptions(
            plan=PlanOptions("manual", blocks="1"), distill=options(), data=DATA,
            quantize=QuantizeOptions(calibration="feedback", count=1),
        ),
    )  # fmt: skip
    stages = Workspace(out, str(source)).manifest.stages
    assert stages["distill"]["options"]["options"]["prefix_calibration"] == "feedback"


def test_compress_trains_as_it_is_asked_to(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, data = list[Any](), tmp_path / "data.txt"
    data.write_text("a red circle\n")

    def compress(*args: Any, **_: Any) -> Any:
        asked.append(args[2])
        raise KeyError  # the rest is not asked for

    monkeypatch.setattr(api, "compress", compress)
    command = ["compress", str(source), "-o", str(tmp_path / "out"), "--data", str(data), "--train-states", "6"]
    CliRunner().invoke(app, [*command, "--rounds", "2", "--batch", "12", "--ema", "0.5", "--accumulate", "3"])
    CliRunner().invoke(app, command)
    given, usual = asked
    found = given.distill
    assert (found.states, found.rounds, found.batch, found.ema) == (6, 2, 12, 0.5)
    assert (usual.distill.rounds, usual.distill.batch, usual.distill.ema) == (None, 32, 0.99)
    assert (given.placement, usual.placement) == (api.Placement(accumulate=3), api.Placement())
    assert given.to_json().keys() == usual.to_json().keys() and "placement" not in usual.to_json()


def test_compress_refuses_at_once_what_training_would_refuse(source: Path, tmp_path: Path) -> None:
    for changes, accumulate, said in (
        ({}, 3, "--batch: found 2, expected a multiple of 3"),
        ({"states": None, "rounds": 2}, 1, r"--rounds and .*; give --states \(of compress: --train-states\), or omit"),
    ):
        chosen = CompressOptions(
            plan=PlanOptions("manual", blocks="1"), distill=options(**changes), data=DATA,
            placement=Placement(accumulate=accumulate),
        )  # fmt: skip
        with pytest.raises(InputError, match=said):
            compress(Workspace(tmp_path / "out", str(source)), chosen)
        assert not Workspace(tmp_path / "out", str(source)).manifest.stages


def test_on_the_command_line(source: Path, tmp_path: Path) -> None:
    runner, out = CliRunner(), begun(source, tmp_path / "out").out
    refused = runner.invoke(
        app, ["compress", str(source), "-o", str(tmp_path / "x"), "--steps", "0", "--train-states", "4"]
    )
    assert isinstance(refused.exception, InputError)
    assert str(refused.exception) == "--train-states: nothing is trained; omit it"
    for flag in ("--rounds", "--batch", "--ema", "--accumulate"):
        value = "0.5" if flag == "--ema" else "2"
        refused = runner.invoke(app, ["compress", str(source), "-o", str(tmp_path / "x"), flag, value])
        assert str(refused.exception).startswith(f"{flag}: nothing is trained; give --data FOLDER")
    refused = runner.invoke(app, ["cache", "--states", "4"])
    assert "`edgeprune distill -o DIR --states N --only-states` makes them" in str(refused.exception)
    refused = runner.invoke(app, ["compress", "-o", str(tmp_path / "x"), "--train", "lora:x"])
    assert str(refused.exception).startswith("--train: found 'lora:x'") and not (tmp_path / "x").exists()
    done = runner.invoke(
        app, ["distill", "-o", str(out), "--data", "shapes", "--samples", "6", "--steps", "2", "--batch", "2",
              "--states", "4", "--prefix-calibration", "feedback", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    options = Workspace(out, str(source)).manifest.stages["distill"]["options"]["options"]
    assert (options["states"], options["rounds"], options["prefix_calibration"]) == (4, 1, "feedback")


def test_states_alone_are_those_that_training_finds(source: Path, tmp_path: Path, counted: list[int]) -> None:
    runner, out = CliRunner(), begun(source, tmp_path / "out").out
    command = [
        *("distill", "-o", str(out), "--data", "shapes", "--samples", "6"),
        *("--steps", "2", "--batch", "2", "--states", "4"),
    ]
    done = runner.invoke(app, [*command, "--only-states", "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout.splitlines()[-1])
    folder = Path(made["folder"])
    assert made["states"] == 4 and made["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert "distill" not in Workspace(out, str(source)).manifest.stages
    before, moved = files(folder, "*"), shutil.copytree(out, tmp_path / "elsewhere")
    counted[0] = 0
    for place in (out, moved):
        assert runner.invoke(app, [*command[:2], str(place), *command[3:]]).exit_code == 0
        assert files(place / "cache" / folder.name, "*") == before
    assert counted[0] == 2 * 2 * 2  # two trainings of two steps of two states through one block
    refused = runner.invoke(app, [*command[:-1], "0", "--only-states"])
    assert str(refused.exception).startswith("--only-states: this training runs both models in every step; give --st")
    refused = runner.invoke(app, [*command, "--only-states", "--fresh"])
    assert str(refused.exception).startswith("--fresh: nothing is trained with --only-states")


def test_training_goes_where_the_folder_computes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With both models, and from states."""
    here, found = torch.device("cpu", 0), list[torch.device]()  # another name of the processor

    class Placed(Exception):
        pass

    def place(self: Parallel, accumulate: int, size: int, device: torch.device) -> None:
        found.append(device)
        raise Placed

    monkeypatch.setattr(Parallel, "_accelerate", place)
    ws = begun(source, tmp_path / "out")
    ws.original.compute = Compute(here)
    for many in (0, 3):
        with pytest.raises(Placed):
            distill.run(ws, options(states=many), DATA)
    assert found == [here, here]


def test_distill_takes_memory_and_a_device(source: Path, tmp_path: Path) -> None:
    """Of a GPU, what stays on the processor does not count."""
    out = tmp_path / "out"
    ws = begun(source, out)
    need = distill.memory(ws.memory, chosen := options(states=0, batch=64), DATA, ws.plan())
    for placement, less in (
        (Placement(accumulate=16), True),
        (Placement(teacher_offload=True, ema_offload=True), False),
    ):
        assert (distill.memory(ws.memory, chosen, DATA, ws.plan(), placement) < need) is less
    gpu = Memory(ws.subject, Compute(torch.device("cuda")))
    parts = [Placement(), Placement(teacher_offload=True), Placement(teacher_offload=True, ema_offload=True)]
    sizes = [distill.memory(gpu, chosen, DATA, ws.plan(), placement) for placement in parts]
    assert sizes == sorted(set(sizes), reverse=True)
    del ws
    command = ["distill", "-o", str(out), "--data", "shapes", "--batch", "2", "--states", "3"]
    for more, said in (
        (["--memory", "300MB"], r"--memory: found 0\.30 GB, expected at least 0\.\d+ GB here for distill"),
        (["--memory", "300MB", "--only-states"], r"--memory: found 0\.30 GB, .* here for states"),
        (["--device", "cuda:77"], "--device: found 'cuda:77', expected one of auto, .*cpu"),
        (["--device", "cuda:77", "--dry-run"], "--device: found 'cuda:77', expected one of auto, .*cpu"),
    ):
        refused = CliRunner().invoke(app, [*command, *more])
        assert isinstance(refused.exception, InputError) and re.search(said, str(refused.exception)), refused.exception
