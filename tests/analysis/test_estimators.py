"""Estimators on tiny models of every family: equal scores with less work, or close ones with much less."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from scipy.stats import spearmanr

from edgeprune.analysis.contribution import Group, collapsed, group, groups
from edgeprune.analysis.estimators import estimator_named
from edgeprune.analysis.estimators.exhaustive import Exhaustive
from edgeprune.analysis.estimators.gates import Gates
from edgeprune.analysis.estimators.reuse import Reuse
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.families import family_of
from edgeprune.metrics.velocity import VelocityError
from edgeprune.sampling.denoising import Conditioning
from edgeprune.sampling.generation import Generation

STEPS, PROMPTS = 3, 2
OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("flux", "z-image", "qwen-image")]


def setup(kind: str, monkeypatch: pytest.MonkeyPatch, *, batch: int = 4) -> tuple[Any, Any, list[Group]]:
    """Return a family, a prepared metric over two batches, and every group of the model."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = tiny.KINDS[kind]()
    config = tiny.config_of(model)
    family = family_of(config)

    def encode(pipe: Any, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        draws = [torch.Generator().manual_seed(len(p)) for p in prompts]
        return torch.stack([torch.randn(6, 64, generator=g) for g in draws]), torch.stack(
            [torch.randn(64, generator=g) for g in draws]
        )

    monkeypatch.setattr(type(family), "encode", lambda _, *given: encode(*given))
    pipe = SimpleNamespace(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae_scale_factor=8)
    monkeypatch.setattr("edgeprune.metrics.velocity.at_once", lambda *_: batch)
    metric = VelocityError(pipe, Generation(STEPS, 1.0, 64, 64, 6), ["a", "bb"], split=Split.ANALYSIS)
    assert isinstance(metric.condition, Conditioning) and len(metric.states) == STEPS * PROMPTS
    return family, metric, [(), *groups(family, config, joint=True)]


def block_samples(model: Any, family: Any) -> list[int]:
    """Return a list that grows by the number of samples whenever a block runs."""
    seen: list[int] = []
    for block in family.blocks(model):
        block.register_forward_hook(
            lambda _, args, kwargs, out: seen.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
    return seen


@pytest.mark.parametrize("kind", ["sd3-dual", "flux2", *OTHERS])
def test_reuse_gives_the_same_numbers_and_the_model_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, metric, wanted = setup(kind, monkeypatch)
    wanted = [*wanted, group([(1, "mlp"), (2, "attn")]), group([(0, None), (2, "mlp")])]
    mean = torch.full((64,), 0.1)
    model = metric.pipe.transformer
    before = list(model.modules())
    assert dict(Reuse(family, metric, mean).estimate(wanted)) == dict(Exhaustive(family, metric, mean).estimate(wanted))
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


@pytest.mark.parametrize("kind", ["sd3", "flux2"])
def test_work_is_what_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecast work equals the samples counted. Whole-block groups are left out: a removed block does not run."""
    family, metric, wanted = setup(kind, monkeypatch)
    model, mean = metric.pipe.transformer, torch.zeros(64)
    # Groups that empty a block, as `attn + mlp` of a single-stream block of FLUX.2, remove it as a whole.
    wanted = [g for g in wanted if all(c is not None for _, c in collapsed(family, tiny.config_of(model), g))]
    blocks = len(family.blocks(model))
    seen = block_samples(model, family)
    for estimator in (Exhaustive, Reuse, Gates):
        seen.clear()
        list(estimator(family, metric, mean).estimate(wanted))
        said = estimator.evaluations(wanted, blocks, STEPS * PROMPTS) * blocks
        assert sum(seen) * (2 if estimator is Gates else 1) == pytest.approx(said), estimator


@pytest.mark.parametrize("kind", ["sd3-dual", "flux2", *OTHERS])
def test_gates_are_first_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass estimates the error of parts, and of groups without interactions, within a factor of two."""
    family, metric, wanted = setup(kind, monkeypatch)
    wanted = [g for g in wanted if len(g) < 2 or not {"norm", "context_norm"} & {c for _, c in g}]
    model, mean = metric.pipe.transformer, torch.zeros(64)
    needed = [p.requires_grad for p in model.parameters()]
    exact = {g: -sum(s) for g, s in Exhaustive(family, metric, mean).estimate(wanted)}
    found = {g: -sum(s) for g, s in Gates(family, metric, mean, projections=16).estimate(wanted)}
    assert found[()] == 0 and needed == [p.requires_grad for p in model.parameters()]
    assert any(len(g) == 2 for g in wanted) and spearmanr(*([d[g] for g in wanted] for d in (exact, found)))[0] > 0.85
    assert all(0.5 < found[g] / exact[g] < 2 for g in wanted if 0 < exact[g] < 0.3)


def test_one_projection_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    family, metric, wanted = setup("sd3", monkeypatch)
    first, again, other = (dict(Gates(family, metric, torch.zeros(64), seed=s).estimate(wanted)) for s in (0, 0, 1))
    assert first == again != other


def test_gates_are_on_the_device_of_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    family, metric, wanted = setup("sd3", monkeypatch)
    devices, ones = list[Any](), torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *size, **given: devices.append(given.get("device")) or ones(*size, **given)
    )
    dict(Gates(family, metric, torch.zeros(64)).estimate(wanted))
    assert devices and set(devices) == {metric.states.device}


def test_gates_save_no_more_states_than_the_metric_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    family, metric, wanted = setup("sd3", monkeypatch, batch=1)
    seen = block_samples(metric.pipe.transformer, family)
    list(Gates(family, metric, torch.zeros(64)).estimate(wanted))
    assert set(seen) == {1} and Gates.extra_bytes(1, 10, STEPS * PROMPTS, 1, streamed=False) == 10


@pytest.mark.parametrize(
    ("name", "metric", "words"), [("best", "velocity", "--estimator"), ("gates", "shapes", "--metric velocity")]
)
def test_refusals(name: str, metric: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        estimator_named(name, metric)
