"""Stages of a model whose blocks are read when they run give what they give with the whole model in memory."""

from __future__ import annotations

import gc
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_flux_pipeline, tiny_klein_pipeline, tiny_pipeline, tiny_velocity, tiny_z_image_pipeline
from typer.testing import CliRunner

from edgeprune.analysis.contribution import ContributionReport, removed
from edgeprune.artefact.loading import load_transformer
from edgeprune.cli import app
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import silent
from edgeprune.common.splits import Split
from edgeprune.common.tensors import Tensors
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.fit import vae_activations
from edgeprune.planning.options import PlanOptions
from edgeprune.report.measure import measure
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import filled, held_bytes, is_streamed
from edgeprune.residency.weights import Weights
from edgeprune.sampling import denoising
from edgeprune.sampling.denoising import generate
from edgeprune.stages import analyze, calibration, plan, prune, quantize
from edgeprune.stages.modulation import modulation_mean
from edgeprune.stages.options import AnalyzeOptions, QuantizeOptions
from edgeprune.stages.workspace import Workspace

MADE = {
    "sd3": tiny_pipeline,
    "flux": tiny_flux_pipeline,
    "klein": tiny_klein_pipeline,
    "z-image": tiny_z_image_pipeline,
}
IN_BF16 = {("gates", "sd3"), ("reuse", "klein")}
"""Estimators and families that the quick suite computes in bf16, which is slow where the processor has no bf16."""
LITTLE = ComputeOptions("cpu", 100 * 10**9)
"""Any given memory means that blocks are read when they run, unless they are kept."""


def opened(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch, *, little: bool) -> Workspace:
    ws = Workspace(out, str(source), compute=LITTLE if little else ComputeOptions("cpu"))
    if little:
        monkeypatch.setattr("edgeprune.residency.running._WORKING_BYTES", 10**12)  # nothing is kept
    assert is_streamed(ws.family.blocks(ws.teacher)[0]) is little
    return ws


@pytest.mark.parametrize("estimator", ["exhaustive", "reuse", "gates"])
def test_contributions(estimator: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for little in (False, True):
        ws = opened(tmp_path / str(little), source, monkeypatch, little=little)
        analyze.run(ws, AnalyzeOptions(count=2, estimator=estimator))
        report = ContributionReport.load(ws.report_path)
        found.append({parts: torch.tensor(scores) for parts, scores in report.scores.items()})
    whole, streamed = found
    assert whole.keys() == streamed.keys()
    for parts, scores in whole.items():
        torch.testing.assert_close(streamed[parts], scores, rtol=1e-5, atol=1e-6)


@pytest.fixture
def in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large model on a processor that multiplies bf16: blocks and encoders are streamed, and computed in bf16."""
    for module in ("compute", "running"):
        monkeypatch.setattr(f"edgeprune.residency.{module}.is_small", lambda numbers: False)
    monkeypatch.setattr("edgeprune.residency.compute.multiplies_bf16", lambda: True)


@pytest.mark.parametrize(
    ("estimator", "kind"),
    [
        pytest.param(estimator, kind, marks=() if (estimator, kind) in IN_BF16 else pytest.mark.slow)
        for estimator in ("exhaustive", "reuse", "gates")
        for kind in MADE
    ],
)
def test_contributions_in_bf16(estimator: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = tmp_path / "tiny"
    MADE[kind](source)
    drops = []
    for name in ("whole", "bf16"):
        if name == "bf16":
            request.getfixturevalue("in_bf16")
        ws = Workspace(tmp_path / name, str(source))
        analyze.run(ws, AnalyzeOptions(count=2, estimator=estimator))
        assert ws.original.dtype == (torch.bfloat16 if name == "bf16" else torch.float32)
        report = ContributionReport.load(ws.report_path)
        drops.append([drop.drop for drop in report.contributions().values()])
    whole, half = map(torch.tensor, drops)
    assert torch.corrcoef(torch.stack([whole, half]))[0, 1] > 0.98
    assert (half - whole).abs().max() < 0.1 * whole.abs().max()


def test_every_stage_runs_in_bf16(source: Path, tmp_path: Path, in_bf16: None) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    analyze.run(ws, AnalyzeOptions(count=1, components=False))
    plan.run(ws, PlanOptions("manual", blocks="1", components="0:norm"))
    prune.run(ws)
    quantize.run(ws, QuantizeOptions(calibration="feedback"))
    summary, images = measure(ws, quick=True, progress=silent)
    assert summary["psnr_db"] > 5 and len(images["compressed"]) == 2


def test_int4_is_calibrated_in_bf16_where_that_is_what_the_weights_are(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """That keeps three quarters at least of what float32 gains over the nearest integers."""
    shutil.copytree(source, tmp_path / "tiny")
    (path,) = (tmp_path / "tiny" / "transformer").glob("*.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    seen, real, errors = list[torch.dtype](), calibration.Streams.run, {}
    monkeypatch.setattr(
        calibration.Streams, "run",
        lambda self, *a, **k: seen.append(self.spill.get("0")["image"].dtype) or real(self, *a, **k),
    )  # fmt: skip
    for name, how in (("nearest", "none"), ("float32", "feedback"), ("bf16", "feedback")):
        if name == "bf16":
            request.getfixturevalue("in_bf16")
        ws = Workspace(tmp_path / name, str(tmp_path / "tiny"))
        plan.run(ws, PlanOptions("manual", blocks="1"))
        prune.run(ws)
        seen.clear()
        quantize.run(ws, QuantizeOptions(calibration=how))
        assert set(seen) == ({getattr(torch, name.replace("bf16", "bfloat16"))} if how == "feedback" else set())
        whole, rounded = (load_transformer(ws.out, quantized=q) for q in (False, True))
        errors[name] = float((tiny_velocity(rounded) - tiny_velocity(whole)).norm())
    gained, kept = (errors["nearest"] - errors[name] for name in ("float32", "bf16"))
    assert kept > 0.75 * gained > 0


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of each tensor that is read from now on; call it before a model is opened."""
    reads, real = list[str](), Weights.__getitem__
    monkeypatch.setattr(Weights, "__getitem__", lambda self, name: reads.append(name) or real(self, name))
    return reads


def test_gates_read_each_block_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted_reads(monkeypatch)
    ws = opened(tmp_path / "out", source, monkeypatch, little=True)
    monkeypatch.setattr("edgeprune.metrics.velocity.at_once", lambda *_: 12)  # three states a batch
    reads.clear()
    analyze.run(ws, AnalyzeOptions(count=2, estimator="gates", components=False))
    in_blocks = [name for name in reads if name.startswith("transformer_blocks.1.")]
    # Once for each step between states, then forward, and again for backward.
    assert len(in_blocks) == (ws.generation.num_inference_steps - 1 + 2) * len(set(in_blocks)) > 0
    assert not (ws.cache / "analysis" / "0").exists()


@pytest.mark.parametrize("kind", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_killed_analysis_goes_on_with_the_block(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is killed, the next run computes what was not on disk, and the scores are the same to the bit."""
    source = tmp_path / "tiny"
    if kind == "flux":
        tiny_flux_pipeline(source, num_layers=1, num_single_layers=1)
    else:
        tiny_pipeline(source, num_layers=2)
    ran, real, left = list[str](), Spill.put, [10**6]
    monkeypatch.setattr("edgeprune.metrics.velocity.at_once", lambda *_: 12)  # three states a batch

    def put(self: Spill, key: str, tensors: Tensors) -> None:
        if left_after() < 0:
            raise KeyboardInterrupt
        ran.append(key)
        real(self, key, tensors)

    def left_after() -> int:
        left[0] -= 1
        return left[0]

    monkeypatch.setattr(Spill, "put", put)
    options = AnalyzeOptions(count=2, estimator="gates")
    whole = opened(tmp_path / "whole", source, monkeypatch, little=True)
    analyze.run(whole, options)
    keys, killed, starts = list(ran), tmp_path / "killed", 0
    assert len(set(keys)) == len(keys)
    while True:
        left[0], starts = 7, starts + 1
        ws = opened(killed, source, monkeypatch, little=True)
        try:
            analyze.run(ws, options)
            break
        except KeyboardInterrupt:
            del ws
            gc.collect()  # frees the folder's lock
    assert 3 < starts < len(keys) / 3 and not (killed / "cache" / "analysis").exists()
    assert (killed / "analysis.json").read_bytes() == (tmp_path / "whole" / "analysis.json").read_bytes()


def test_an_analysis_killed_between_its_scores_has_the_same_ones(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is other parts: slopes that the first run left are not theirs."""

    def killed(what: str, done: int = 0, *_: object) -> None:
        if (what, done) == ("analyze", 8):
            raise KeyboardInterrupt

    reports = []
    for name in ("whole", "killed"):
        ws = opened(tmp_path / name, source, monkeypatch, little=True)
        if name == "killed":
            with pytest.raises(KeyboardInterrupt):
                analyze.run(ws, AnalyzeOptions(count=1, estimator="gates"), killed)
        analyze.run(ws, AnalyzeOptions(count=1, estimator="gates"))
        reports.append(ContributionReport.load(ws.report_path).scores)
    whole, resumed = reports
    assert whole.keys() == resumed.keys()
    for parts, scores in whole.items():  # a gate that is open rounds
        assert resumed[parts] == pytest.approx(scores, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_halves_of_guidance_pass_a_block_one_after_the_other(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reads, found = tmp_path / "tiny", counted_reads(monkeypatch), []
    {"sd3": tiny_pipeline, "flux": tiny_flux_pipeline}[kind](source)
    ws = opened(tmp_path / "out", source, monkeypatch, little=True)
    metric = VelocityError(ws.pipe, ws.generation, ["a", "b"], split=Split.ANALYSIS, compares=False)
    sizes = list[int]()
    ws.family.blocks(ws.teacher)[1].register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len((kwargs or dict(enumerate(args)))["hidden_states"])), with_kwargs=True
    )
    for most in (9, 1):
        monkeypatch.setattr("edgeprune.sampling.denoising.at_once", lambda *_, most=most: most)
        reads.clear()
        found.append(metric.velocity(slice(0, 3)))
        names = [name for name in reads if "transformer_blocks.1." in name]
        assert len(names) == len(set(names)) > 0
    assert sizes == [3, 1, 1, 1]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_a_killed_report_goes_on_with_the_step(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = opened(tmp_path / "out", source, monkeypatch, little=True)
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)
    quantize.run(ws, QuantizeOptions())
    _, whole = measure(ws, quick=True, progress=silent)
    kept, real = list[str](), Spill.put
    shutil.rmtree(ws.cache / "report")

    def put(self: Spill, key: str, tensors: Tensors) -> None:
        if len(kept) == 3 * starts:
            raise KeyboardInterrupt
        kept.append(key)
        real(self, key, tensors)

    monkeypatch.setattr(Spill, "put", put)
    for starts in (1, 2, 9):
        with pytest.raises(KeyboardInterrupt) if starts < 9 else nullcontext():
            _, images = measure(ws, quick=True, progress=silent)
    steps = ws.generation.num_inference_steps
    assert kept == [*(f"images.0.{step}" for step in range(1, steps + 1)), "pixels.0"] * 2
    assert all((images[name] == whole[name]).all() for name in whole)


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_too_little_memory_is_refused_before_the_folder_is_made(dry: list[str], source: Path, tmp_path: Path) -> None:
    words = ["compress", str(source), "-o", str(tmp_path / "out"), "--keep", "1", "--memory", "1MB", *dry]
    found = CliRunner().invoke(app, words)
    assert isinstance(found.exception, InputError) and "--memory: found 0.00 GB, expected at least" in str(
        found.exception
    )
    assert not (tmp_path / "out").exists()


def test_every_image_gets_room(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a second transformer are freed for its images, too; all images of a pipeline are made alike."""
    ws, freed = opened(tmp_path / "out", source, monkeypatch, little=True), list[object]()
    monkeypatch.setattr("edgeprune.artefact.staged.release", freed.append)
    monkeypatch.setattr("edgeprune.residency.compute.Compute.left", lambda _: 10)
    pipe, first, second = ws.pipe, ws.pipe.transformer, object()
    pipe.make_room(64, 64)
    pipe.transformer = second
    pipe.make_room(64, 64)
    assert freed == [first, second] and pipe.vae.use_tiling
    pipe.transformer = first


def test_tiles_are_as_large_as_memory_allows(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A VAE that is freed for the next transformer works in the same tiles when it is loaded again."""
    ws = opened(tmp_path / "out", source, monkeypatch, little=True)
    factor = ws.pipe.vae_scale_factor
    for side, expected in ((64, 64), (32, 32), (1, 32)):
        pipe, pixels = ws.pipe.apart(hold=True), side * factor
        room = 4 * vae_activations(pipe.vae.config, pixels, pixels)
        monkeypatch.setattr("edgeprune.residency.compute.Compute.left", lambda _, room=room: room)
        pipe._tile = None
        for _ in range(2):
            pipe.make_room(128 * factor, 96 * factor)
            assert (pipe.vae.use_tiling, pipe.vae.tile_latent_min_size) == (True, expected)
            first = pipe.vae
            pipe.free_vae()
            assert pipe.vae is not first


@pytest.mark.parametrize("kind", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_killed_step_goes_on_with_the_block(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a large image may take longer than the time between two kills."""
    source, left, ran = tmp_path / "tiny", [10**6], [0]
    {"sd3": tiny_pipeline, "flux": tiny_flux_pipeline}[kind](source)
    ws = opened(tmp_path / "out", source, monkeypatch, little=True)
    monkeypatch.setattr(denoising, "KEEP_S", -1.0)
    monkeypatch.setattr(denoising, "at_once", lambda *_: 1)  # the halves of guidance are two

    def enter(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        ran[0] += 1

    for block in ws.family.blocks(ws.pipe.transformer):
        block.register_forward_pre_hook(enter)
    # The same road: a model's own forward rounds positions otherwise in some versions of diffusers.
    whole = generate(ws.pipe, ["a"], [1], ws.generation, spill=Spill(tmp_path / "whole", identity="the same"))
    undisturbed, ran[0] = ran[0], 0
    kills, images = 0, None
    while images is None and kills < 99:
        left[0], spill = 3, Spill(tmp_path / "kept", identity="the same")
        try:
            images = generate(ws.pipe, ["a"], [1], ws.generation, spill=spill)
        except KeyboardInterrupt:
            kills += 1
    assert (images == whole).all() and kills > 5
    assert ran[0] <= undisturbed + kills  # half of a block is run again after a kill


def test_calibrated_int4(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On disk or in memory, streams give the integers that they give with the original in memory."""
    found, spills = [], list[Path]()
    for little in (False, True):
        ws = opened(tmp_path / str(little), source, monkeypatch, little=little)
        plan.run(ws, PlanOptions("manual", blocks="1", components="0:mlp"))
        prune.run(ws)
        if little:
            monkeypatch.setattr(calibration, "Spill", lambda folder, room: spills.append(folder) or Spill(folder))
        quantize.run(ws, QuantizeOptions(calibration="feedback"))
        assert spills == [ws.cache / "streams"] * little and not (ws.cache / "streams").exists()
        (path,) = (ws.out / "transformer_int4").glob("*.safetensors")
        found.append(load_file(path))
    whole, streamed = found
    assert whole.keys() == streamed.keys()
    for name, tensor in whole.items():
        assert torch.equal(streamed[name], tensor), name


def test_too_little_memory_is_refused_with_what_does_before_anything_is_dropped(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source), compute=ComputeOptions("cpu", 10**8))
    with pytest.raises(InputError, match=r"--memory: found 0.10 GB, expected at least \d+\.\d\d GB here"):
        _ = ws.teacher
    done = CliRunner().invoke(app, ["analyze", str(source), "-o", str(tmp_path / "new"), "--memory", "lots"])
    assert isinstance(done.exception, InputError) and not (tmp_path / "new").exists()
    first = Workspace(tmp_path / "out", str(source))
    analyze.run(first, AnalyzeOptions(count=1, estimator="gates", components=False))
    again = Workspace(tmp_path / "out", str(source), compute=ComputeOptions("cpu", 10**8), fresh=True)
    with pytest.raises(InputError, match="--memory"):
        analyze.run(again, AnalyzeOptions(count=2, estimator="gates", components=False))
    assert "analyze" in again.manifest.stages and again.report_path.exists()


def test_a_released_transformer_keeps_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever still holds its structure. What is held is counted from shapes."""
    ws = Workspace(tmp_path / "out", str(source), compute=LITTLE)
    held, pipe = ws.teacher, ws.pipe
    layer = held.transformer_blocks[-1]
    with filled(layer):
        one = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    monkeypatch.setattr(Weights, "__getitem__", None)  # nothing is read
    before, outside = held_bytes(held), sum(p.nbytes for p in held.parameters() if not p.is_meta)
    assert before >= outside + one
    monkeypatch.undo()
    ws.original.release_transformer()
    assert pipe.transformer is held and held_bytes(held) < before
    assert not ws.original.loaded and ws.teacher is not held


def test_a_metric_compares_with_the_model_that_it_was_made_with(source: Path, tmp_path: Path) -> None:
    """Also where its first score is of a changed model, as in a grid that resumes."""
    ws = Workspace(tmp_path / "out", str(source))
    metric = VelocityError(ws.pipe, ws.generation, ["a"], split=Split.ANALYSIS)
    with removed(ws.family, ws.teacher, [(1, None)], modulation_mean(ws, ["a"])):
        changed = metric.score()
    assert changed[0] < -0.01 and metric.score() == [0.0]
    bare = VelocityError(ws.pipe, ws.generation, ["a"], split=Split.ANALYSIS, compares=False)
    with pytest.raises(AssertionError, match="compares=False"):
        bare.score()
