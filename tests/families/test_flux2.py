"""FLUX.2: whatever the tests over tiny.KINDS (surgery, packing, pieces, quantisation) do not cover."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from edgeprune.analysis.contribution import analyze, groups, parts, removed
from edgeprune.analysis.estimators.exhaustive import Exhaustive
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.export import external_data, graph, modules, parity
from edgeprune.families import family_of
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.make import make_plan
from edgeprune.quantization.precision import footprint
from edgeprune.sampling.denoising import sigmas
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.scheduler import FlowMatch

KLEIN = {
    "_class_name": "Flux2Transformer2DModel", "patch_size": 1, "in_channels": 128, "num_layers": 5,
    "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "timestep_guidance_channels": 256, "mlp_ratio": 3.0, "axes_dims_rope": [32, 32, 32, 32], "guidance_embeds": False,
}  # fmt: skip


def pipe() -> Any:
    """Return the parts of a pipeline that analysis reads; each prompt encodes to random text."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    def encode_prompt(prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, None]:
        seeds = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        return torch.stack([torch.randn(max_sequence_length, 64, generator=g) for g in seeds]), None

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    model = tiny.tiny_flux2()
    return SimpleNamespace(transformer=model, scheduler=scheduler, vae_scale_factor=8, encode_prompt=encode_prompt)


def test_analysis_scores_every_part_and_leaves_the_model_whole(tmp_path: Path) -> None:
    found = pipe()
    config = tiny.config_of(found.transformer)
    family = family_of(config)
    metric = VelocityError(found, Generation(3, 1.0, 64, 64, 6), ["a", "bb"], split=Split.ANALYSIS)
    report = analyze(
        family, config, Exhaustive(family, metric, torch.zeros(64)).estimate, groups=groups(family, config),
        metric="velocity", estimator="exhaustive", prompts=["a", "bb"], path=tmp_path / "analysis.json",
        inputs_digest="x",
    )  # fmt: skip
    assert set(report.contributions()) == set(parts(family, config)) and len(report.scores) == 5 + 5 + 5 + 2
    assert max(max(s) for s in report.scores.values()) < 0 and metric.score() == report.untouched == [0.0, 0.0]
    plan = make_plan(family, config, report, method="hybrid", keep=0.85, protect_first=0, protect_last=0)
    assert plan.components and plan.after.parameters <= 0.85 * plan.before.parameters
    with removed(family, found.transformer, plan.keys, torch.zeros(64)):
        assert max(metric.score()) < 0


@pytest.mark.parametrize(("height", "steps"), [(64, 4), (64, 50), (1280, 4)])
def test_schedule_is_the_pipelines(height: int, steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    found = pipe()
    tokens = (height // 16) ** 2
    family = family_of(KLEIN)
    assert family.shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))
    scheduler = type(found.scheduler).from_config(found.scheduler.config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    ours = sigmas(found, Generation(num_inference_steps=steps), (8, height // 8, height // 8))
    torch.testing.assert_close(ours, scheduler.sigmas)
    device = FlowMatch.from_config(dict(scheduler.config)).sigmas(
        steps, tokens=tokens, levels=family.levels(steps), mu=family.shift(tokens, steps)
    )
    np.testing.assert_allclose(device, ours.numpy(), atol=1e-6)


def test_a_real_config_is_planned_without_weights() -> None:
    family = family_of(KLEIN)
    d, plan = 3072, make_plan(family, KLEIN, None, method="manual", components="20:mlp,21:attn")
    assert footprint(family, family.tensor_shapes(KLEIN)).parameters == plan.before.parameters
    gone = 3 * d * 2 * d + 3 * d * d + 3 * d * d + d * d + 2 * 128  # a gated MLP of 3 D; attention and two norms
    assert plan.before.parameters - plan.after.parameters == gone
    with pytest.raises(InputError, match="--modulation-rank: found a model of flux2"):
        make_plan(family, KLEIN, None, method="manual", blocks="20", modulation_rank=4)


@pytest.mark.slow  # as in test_klein_export.py
def test_the_transformer_is_exported(tmp_path: Path) -> None:
    whole = modules.Transformer(tiny.tiny_flux2(guidance_embeds=True, num_layers=1, num_single_layers=1)).eval()
    traced = whole.example(batch=2, height=4, width=6, tokens=5)
    external_data.save(graph.to_ir(whole, traced, whole.inputs, whole.outputs), tmp_path / "model.onnx")
    examples = [whole.example(batch=b, height=h, width=w, tokens=m) for b, h, w, m in ((1, 3, 5, 7), (3, 8, 8, 2))]
    runner = parity.session(tmp_path / "model.onnx")
    assert parity.check("transformer", runner, whole, examples, list(whole.outputs))["max_relative"] < 1e-4
