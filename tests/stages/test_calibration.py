"""The prompts that constants of a compressed model are calibrated on: given ones, else a split, and the empty one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from edgeprune.common.errors import InputError
from edgeprune.planning.options import PlanOptions
from edgeprune.residency.stored import StoredTransformer
from edgeprune.sampling.denoising import encode_prompts
from edgeprune.stages import analyze, calibration, plan, prune, quantize
from edgeprune.stages.compress import compress
from edgeprune.stages.modulation import inputs_of, modulation_mean, sampler_levels
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, QuantizeOptions
from edgeprune.stages.prompts import calibrating, calibration_prompts
from edgeprune.stages.work import Speeds
from edgeprune.stages.workspace import Workspace

GIVEN = ["a red circle", "two stars", "a ring above a square"]


@pytest.fixture
def analyzed(source: Path, tmp_path: Path) -> Workspace:
    """A folder whose analysis was given a file of prompts, which is gone since."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(GIVEN))
    ws = Workspace(tmp_path / "out", str(source))
    analyze.run(ws, AnalyzeOptions(prompts=str(path), estimator="gates", components=False))
    path.unlink()
    return ws


def test_a_removed_norm_keeps_the_mean_of_the_given_prompts_and_the_empty_one(analyzed: Workspace) -> None:
    ws = analyzed
    plan.run(ws, PlanOptions("manual", components="1:norm"))
    prune.run(ws)
    (path,) = ws.cache.glob("mean-*.safetensors")
    inputs = inputs_of(ws, ["", *GIVEN], sampler_levels(ws))
    # Guidance evaluates the empty prompt as often as all others together.
    expected = (inputs[0].mean(0) + inputs[1:].flatten(0, 1).mean(0)) / 2
    torch.testing.assert_close(load_file(path)["mean"], expected)
    assert (expected - inputs[1:].flatten(0, 1).mean(0)).norm() > 0.01 * expected.norm()
    assert ws.manifest.stages["prune"]["options"]["calibration"] == GIVEN


def test_without_guidance_the_empty_prompt_is_never_evaluated(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source), generation={"guidance_scale": 1.0})
    inputs = inputs_of(ws, GIVEN, sampler_levels(ws))
    torch.testing.assert_close(modulation_mean(ws, GIVEN), inputs.flatten(0, 1).mean(0))
    plan.run(ws, PlanOptions("manual", blocks="1", modulation_rank=4))
    assert "" not in ws.manifest.stages["plan"]["options"]["calibration"]


def test_by_default_the_calibration_split(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    split = calibration_prompts(None, world=None)
    assert calibrating(ws) == split
    analyze.run(ws, AnalyzeOptions(count=2, estimator="gates", components=False))
    assert calibrating(ws) == split and not set(split) & set(ws.manifest.stages["analyze"]["options"]["prompts"])
    # Only a plan that needs the mean depends on the prompts.
    plan.run(ws, PlanOptions("manual", components="1:mlp"))
    prune.run(ws)
    assert "calibration" not in ws.manifest.stages["prune"]["options"]


def test_directions_are_found_on_the_given_prompts(analyzed: Workspace, tmp_path: Path) -> None:
    options = PlanOptions("manual", blocks="1", modulation_rank=4)
    plan.run(analyzed, options)
    assert analyzed.manifest.stages["plan"]["options"]["calibration"] == ["", *GIVEN]
    (tmp_path / "other.txt").write_text("a star")
    analyzed.fresh = True
    plan.run(analyzed, replace(options, prompts=str(tmp_path / "other.txt"), modulation_rank=2))
    assert analyzed.manifest.stages["plan"]["options"]["calibration"] == ["", "a star"]


def test_int4_is_calibrated_as_the_model_is_sampled(analyzed: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, seen, real = analyzed, list[dict[str, Any]](), calibration.model_inputs
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)

    def recorded(*arguments: Any) -> Any:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(calibration, "model_inputs", recorded)
    quantize.run(ws, QuantizeOptions(calibration="feedback"))
    assert ws.manifest.stages["quantize"]["options"]["prompts"] == GIVEN
    given, empty = (encode_prompts(ws.pipe, texts, 0).hidden for texts in (GIVEN, [""]))
    prompted, unprompted = seen[:2]
    steps = len(prompted["hidden_states"]) // len(GIVEN)
    assert steps == ws.generation.num_inference_steps
    assert torch.equal(prompted["hidden_states"], unprompted["hidden_states"])
    assert torch.equal(prompted["encoder_hidden_states"], given.repeat(steps, 1, 1))
    assert torch.equal(unprompted["encoder_hidden_states"], empty.expand_as(prompted["encoder_hidden_states"]))


def test_room_on_disk_is_checked_for_samples_that_memory_does_not_hold(
    analyzed: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws, checked, written, real = analyzed, list[int](), list[int](), calibration.Streams.__init__
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)

    def measured(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        files = list((ws.cache / "streams").glob("*.safetensors"))
        written.append(sum(tensor.nbytes for file in files for tensor in load_file(file).values()))

    monkeypatch.setattr(calibration.Compute, "left", lambda _: 0)
    monkeypatch.setattr(calibration, "need_space", lambda _, size: checked.append(size))
    monkeypatch.setattr(calibration.Streams, "__init__", measured)
    quantize.run(ws, QuantizeOptions(calibration="feedback"))
    assert checked == written and checked[0] > 0


def test_the_pruned_model_is_read_after_the_original_has_run(
    analyzed: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is outside the blocks of both is never in memory at once."""
    ws, order = analyzed, list[str]()
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)
    states, fill = quantize.calibration_states, StoredTransformer.fill
    monkeypatch.setattr(quantize, "calibration_states", lambda *a, **o: (order.append("states"), states(*a, **o))[1])
    monkeypatch.setattr(StoredTransformer, "fill", lambda *a: (order.append("fill"), fill(*a))[1])
    ws.original.release()
    quantize.run(ws, QuantizeOptions(calibration="feedback"))
    after = order[order.index("states") + 1 :]
    assert order[0] == "states" and "fill" in after


def test_weights_that_were_trained_as_they_are_rounded_are_rounded_to_the_nearest(
    analyzed: Workspace,
) -> None:
    """All others are calibrated."""
    ws, said = analyzed, list[str]()

    def chosen(*, group_size: int = 64, trained: int | None = 64) -> dict[str, Any]:
        stages = ws.manifest.stages
        stages["distill"] = stages["prune"] | {"options": {"options": {"int4_group_size": trained}}}
        quantize.run(ws, QuantizeOptions(group_size=group_size), lambda text, *_, **__: said.append(text))
        return {k: v for k, v in ws.manifest.stages["quantize"]["options"].items() if k in ("calibration", "prompts")}

    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)
    ws.fresh = True
    assert chosen() == {"calibration": "none"} and "training saw these weights rounded" in said[0]
    assert chosen(group_size=32) == {"calibration": "feedback", "prompts": GIVEN}
    assert chosen(trained=None) == {"calibration": "feedback", "prompts": GIVEN}


def test_of_a_large_model_few_samples_calibrate() -> None:
    few = QuantizeOptions().chosen(rounded=False, large=True)
    assert (few.calibration, few.count, few.states) == ("feedback", 2, 2)
    asked = QuantizeOptions(count=9, states=3)
    assert asked.chosen(rounded=False, large=True) == replace(asked, calibration="feedback")
    assert QuantizeOptions().chosen(rounded=False, large=False) == QuantizeOptions(calibration="feedback")
    with pytest.raises(
        InputError, match="^--count: training saw these weights rounded to the nearest, so they are not"
    ):
        asked.chosen(rounded=True, large=True)
    with pytest.raises(InputError, match="^--states: training saw these weights rounded"):
        QuantizeOptions(states=3).chosen(rounded=True, large=True)
    # `compress` has one --states for the analysis and for this.
    both = CompressOptions(quantize=QuantizeOptions(states=3)).settled(10**9)
    assert both.quantize == QuantizeOptions(calibration="none")
    assert replace(both, distill=None, quantize=QuantizeOptions(states=3)).settled(10**9).quantize.states == 3
    with pytest.raises(InputError, match=r"^--calibration: found 'awq', expected one of auto, none, feedback"):
        QuantizeOptions(calibration="awq").chosen(rounded=True, large=True)


@pytest.mark.parametrize("large", [False, True])
def test_compress_chooses_integers_as_the_stages_one_by_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        for module in ("options", "quantize"):
            monkeypatch.setattr(f"edgeprune.stages.{module}.is_small", lambda numbers: False)
    options = CompressOptions(plan=PlanOptions("manual", blocks="1"), distill=None)
    whole = Workspace(tmp_path / "whole", str(source))
    compress(whole, options)
    apart = Workspace(tmp_path / "apart", str(source))
    plan.run(apart, options.plan)
    prune.run(apart)
    quantize.run(apart, QuantizeOptions())
    found, expected = (ws.manifest.stages["quantize"] for ws in (whole, apart))
    assert found["inputs"] == expected["inputs"] and found["options"] == expected["options"]
    assert found["options"]["calibration"] == "feedback" and found["options"].get("states") == (2 if large else None)
    assert found["options"]["prompts"] == calibrating(whole, count=2 if large else quantize.PROMPTS)
    assert compress(whole, options) == []


def test_what_takes_too_long_is_refused_before_anything_is_pruned(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    ws.longest_s, ws.speeds = 3600, Speeds(100.0)
    options = CompressOptions(plan=PlanOptions("manual", blocks="1"), distill=None)
    with pytest.raises(InputError, match=r"^quantize: at least .*; --calibration-count 1 takes \d+ min; --yes"):
        compress(ws, options)
    assert not ws.manifest.stages
