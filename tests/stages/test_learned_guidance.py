"""A student that learns the guided velocity: what it is taught, and how it is drawn afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import recipe, schedule, setup
from safetensors.torch import load_file
from typer.testing import CliRunner

from edgeprune import api, runtimes
from edgeprune.artefact.loading import load_transformer
from edgeprune.cli import app
from edgeprune.common.errors import InputError
from edgeprune.common.progress import silent
from edgeprune.compare.grid import Grid
from edgeprune.planning.options import PlanOptions
from edgeprune.report import measure as measuring
from edgeprune.sampling.denoising import Conditioning, velocity
from edgeprune.sampling.generation import Generation
from edgeprune.stages import distill, plan, prune, quantize, states
from edgeprune.stages.compress import forecast
from edgeprune.stages.options import CompressOptions, DataOptions, QuantizeOptions
from edgeprune.stages.workspace import Workspace
from edgeprune.training.features import Catcher
from edgeprune.training.parallel import Parallel
from edgeprune.training.recipe import HERE, DistillOptions
from edgeprune.training.whole import Whole

SCALE = 4.0


def guided(model: Any, batch: Any, empty: Conditioning, scale: float) -> torch.Tensor:
    """Return the velocity that guidance combines, by its formula."""
    with torch.no_grad():
        one = velocity(model, batch.latents, batch.condition, batch.sigma, 3.0)
        other = velocity(model, batch.latents, empty.like(batch.condition), batch.sigma, 3.0)
    return other + scale * (one - other)


def options(**changes: Any) -> DistillOptions:
    return DistillOptions(**{"steps": 2, "batch": 2, "rate": 1e-3, "guidance": SCALE} | changes)


def test_the_target_is_guided_and_features_are_those_with_the_prompt() -> None:
    family, teacher, student, found_plan, _, pairs = setup()
    chosen = options(batch=3, int4_group_size=None)
    lesson = Whole(family, teacher, student, found_plan, pairs, chosen, recipe(chosen), schedule(teacher), 3.0)
    batch = lesson.batch(0)
    lesson.begin(student, Parallel("no", 3, HERE, torch.device("cpu")))
    lesson.loss(batch)
    seen = {block: dict(streams) for block, streams in lesson.teacher_features.features.items()}
    with torch.no_grad():
        target = lesson._target(batch)
    lesson.end()
    expected = guided(teacher, batch, Conditioning(*pairs.empty), SCALE)
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
    catcher = Catcher(family, teacher, list(range(5)), "blocks")
    with torch.no_grad():
        velocity(teacher, batch.latents, batch.condition, batch.sigma, 3.0)
    for block, streams in catcher.features.items():
        for name, stream in streams.items():
            torch.testing.assert_close(seen[block][name], stream)
    catcher.close()


@pytest.mark.parametrize("kept", [7, 0], ids=["from states", "both models"])
def test_it_is_drawn_without_guidance_and_the_original_with_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    ws, batches, drawn = Workspace(tmp_path / "out", str(source)), list[Any](), states.Maker._drawn
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)

    def note(self: Any, number: int, size: int) -> Any:
        batches.append((drawn(self, number, size), self.pairs))
        return batches[-1][0]

    monkeypatch.setattr(states.Maker, "_drawn", note)
    assert Generation.load(ws.out).guidance_scale == 3.0
    distill.run(ws, options(states=kept), DataOptions("shapes", 6))
    kept_options = ws.manifest.stages["distill"]["options"]["options"]
    assert (kept_options["guidance"], kept_options["drop_captions"]) == (SCALE, 0.0)
    assert distill.amount(ws).startswith("2 steps of 2, guidance of 4 learned")
    if kept:
        (batch, pairs), (path,) = batches[0], ws.cache.glob("states-*/*")
        expected = guided(load_transformer(source, quantized=False), batch, Conditioning(*pairs.empty), SCALE)
        assert (load_file(path)["velocity"] - expected).abs().max() <= 1e-4 * expected.abs().max()
    # The folder still knows how the original is drawn, and its stages stay done.
    del ws
    ws = Workspace(tmp_path / "out", None, model_given=False)
    assert ws.generation.guidance_scale == 3.0 and Generation.load(ws.out).guidance_scale == 1.0
    assert not plan.run(ws, PlanOptions("manual", blocks="1")) and not prune.run(ws)
    quantize.run(ws, QuantizeOptions())
    scales, real = list[float](), measuring.generate
    monkeypatch.setattr(measuring, "generate", lambda *a, **k: scales.append(a[3].guidance_scale) or real(*a, **k))
    summary, _ = measuring.measure(ws, quick=True, progress=silent, images=1)
    assert scales == [3.0, 1.0] and summary["step_ratio"] < 0.9  # one evaluation of two blocks, of two of three
    with runtimes.load(ws.out, "eager") as model:
        rows, step = list[int](), model.backend.step
        monkeypatch.setattr(model.backend, "step", lambda x, *rest: rows.append(len(x)) or step(x, *rest))
        model.generate("a red circle", steps=3, seed=0)
        assert rows == [1, 1, 1]
        with pytest.warns(UserWarning, match="^guidance scale 4: the model was compressed for 1, and never measured"):
            assert model.settings.scale(4.0) == 4.0


def test_states_with_features_are_those_with_the_prompt(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever guidance adds to the teacher's samples."""
    found = []
    for guidance in (None, SCALE):
        ws = Workspace(tmp_path / str(guidance), str(source))
        plan.run(ws, PlanOptions("manual", blocks="1"))
        prune.run(ws)
        chosen = options(states=5, lambda_feature=1.0, guidance=guidance, drop_captions=0.0)
        distill.run(ws, chosen, DataOptions("shapes", 6))
        (path,) = ws.cache.glob("states-*/*")
        found.append(load_file(path))
    plain, learned = found
    assert plain.keys() == learned.keys()
    for name in plain:
        close = plain[name].shape == learned[name].shape and torch.allclose(plain[name], learned[name], atol=1e-5)
        assert close == (name != "velocity"), name


def test_a_killed_training_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    def killed(what: str, done: int = 0, *_: Any) -> None:
        if (what, done) == ("distill", 3):
            raise KeyboardInterrupt

    weights = []
    for name in ("whole", "killed"):
        ws = Workspace(tmp_path / name, str(source))
        plan.run(ws, PlanOptions("manual", blocks="1"))
        prune.run(ws)
        if name == "killed":
            with pytest.raises(KeyboardInterrupt):
                distill.run(ws, options(steps=5, states=4), DataOptions("shapes", 6), killed)
            assert Generation.load(ws.out).guidance_scale == 3.0
        distill.run(ws, options(steps=5, states=4), DataOptions("shapes", 6))
        assert Generation.load(ws.out).guidance_scale == 1.0
        weights.append(load_file(next((ws.out / "transformer").glob("*.safetensors"))))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_second_training_that_is_killed_leaves_the_first(source: Path, tmp_path: Path) -> None:
    """Its weights, and what is known of them."""

    def killed(what: str, done: int = 0, *_: Any) -> None:
        if (what, done) == ("distill", 1):
            raise KeyboardInterrupt

    ws = Workspace(tmp_path / "out", str(source), fresh=True)
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)
    distill.run(ws, options(), DataOptions("shapes", 4))
    quantize.run(ws, QuantizeOptions())
    (path,) = (ws.out / "transformer").glob("*.safetensors")
    before, said = path.read_bytes(), list[str]()
    with pytest.raises(KeyboardInterrupt):
        distill.run(ws, options(guidance=None, steps=3), DataOptions("shapes", 4), killed)
    del ws
    ws = Workspace(tmp_path / "out", None, model_given=False)
    assert path.read_bytes() == before and not (ws.out / "transformer_int4").exists()
    assert ws.student_generation == Generation.load(ws.out) == ws.generation.without_guidance()
    quantize.run(ws, QuantizeOptions(), lambda text, *_, **__: said.append(text))
    assert ws.manifest.stages["quantize"]["options"]["calibration"] == "none"
    ws.fresh = True
    quantize.run(ws, QuantizeOptions(calibration="feedback", count=1), lambda text, *_, **__: said.append(text))
    assert any("usually loses more" in text for text in said)


def test_trained_or_pruned_again_it_is_guided_again(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source), fresh=True)
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)
    distill.run(ws, options(), DataOptions("shapes", 4))
    assert ws.student_generation == Generation.load(ws.out) == ws.generation.without_guidance()
    distill.run(ws, options(guidance=None), DataOptions("shapes", 4))
    assert ws.student_generation == Generation.load(ws.out) == ws.generation
    distill.run(ws, options(), DataOptions("shapes", 4))
    ws.skip_distillation()
    prune.run(ws)
    assert ws.student_generation == Generation.load(ws.out) == ws.generation


def test_what_cannot_be_learned_is_refused(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source), generation={"guidance_scale": 1.0})
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)
    with pytest.raises(InputError, match="^--distill-guidance: at guidance scale 1 a step of this model is one"):
        distill.run(ws, options(), DataOptions("shapes", 4))
    for wrong in (1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"^--distill-guidance: found {wrong:g}, expected above 1"):
            options(guidance=wrong).check()
    with pytest.raises(InputError, match="^--rate: found nan, expected a finite number"):
        options(rate=float("nan")).check()
    for other in ({"lambda_task": 1.0}, {"drop_captions": 0.1}):
        with pytest.raises(InputError, match="teaches the velocity without guidance; omit it, or --distill-guidance"):
            options(**other).check()
    baseline = replace(ws.plan(), method="bk-sdm")
    for chosen, weight in ((options(), 0.0), (options(guidance=None), 1.0)):
        assert distill.recipe_of(chosen, baseline, ws.family, ws.config, ws.generation).lambda_task == weight
    done = CliRunner().invoke(app, ["compress", "-o", str(tmp_path / "x"), "--steps", "0", "--distill-guidance", "3"])
    assert str(done.exception) == "--distill-guidance: nothing is trained; omit it" and not (tmp_path / "x").exists()
    wrong = CompressOptions(plan=PlanOptions("manual", blocks="1"), distill=options())
    with pytest.raises(InputError, match="^--distill-guidance: at guidance scale 1 a step"):
        forecast(source, wrong, ws.generation)
    with pytest.raises(InputError, match="^--distill-guidance: at guidance scale 1 a step"):
        data = replace(wrong, data=DataOptions("shapes", 4))
        api.compress(source, tmp_path / "y", data, generation=api.GenerationOptions(guidance_scale=1.0))
    assert not (tmp_path / "y").exists()
    (tmp_path / "grid.toml").write_text(
        'budget = 0.5\nreference = "a"\n[[rows]]\nname = "a"\nplan = { method = "hpp" }\ndistill = { guidance = 3.0 }\n'
    )
    with pytest.raises(InputError, match=r"^.*a: distill.guidance: every row is drawn as the original is"):
        Grid.load(tmp_path / "grid.toml", CompressOptions())
