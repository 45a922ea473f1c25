"""Distillation: what is frozen, how strongly the rest is updated, losses by original index, and resuming."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import recipe, run, saved, schedule, setup

from edgeprune.common import stop
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.int4 import round_int4
from edgeprune.quantization.precision import precision_of
from edgeprune.training.losses import feature_loss
from edgeprune.training.recipe import DistillOptions, Recipe, parameter_groups, strengths
from edgeprune.training.resume import Ema, load_state
from edgeprune.training.whole import distill, noisy
from edgeprune.training.zero import FlatShard


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        ("sd3", False),
        ("flux", True),
        *(
            pytest.param(kind, checkpointing, marks=pytest.mark.slow)
            for kind, checkpointing in (("sd3", True), ("flux", False))
        ),
    ],
)
def test_a_killed_run_resumes_to_the_same_losses_and_weights(tmp_path: Path, kind: str, checkpointing: bool) -> None:
    options = {"schedule": "cosine", "kind": kind, "gradient_checkpointing": checkpointing}
    whole, losses = run(tmp_path / "whole.safetensors", 8, **options)
    run(tmp_path / "killed.safetensors", 8, until=5, **options)
    again, resumed = run(tmp_path / "killed.safetensors", 8, **options)
    assert resumed == losses
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def test_sigterm_saves_at_the_next_step(tmp_path: Path) -> None:
    whole, losses = run(tmp_path / "whole.safetensors", 8)
    path = tmp_path / "stopped.safetensors"
    family, teacher, student, plan, report, pairs = setup()

    def progress(step: int, total: int, loss: float) -> None:
        stop.check()
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    chosen = DistillOptions(steps=8, batch=4, rate=1e-3)
    with pytest.raises(stop.Stopped), stop.on_sigterm():
        distill(
            family, teacher, student, plan, report, pairs, chosen, recipe(chosen), schedule(teacher), path,
            inputs_digest="x", guidance=3.5, save_every=100, progress=progress,
        )  # fmt: skip
    assert saved(path)[1]["step"] == 4
    again, resumed = run(path, 8)
    assert resumed == losses and all(torch.equal(whole[n], again[n]) for n in whole)


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        ("sd3", "transformer_blocks.2."),
        pytest.param("flux", "single_transformer_blocks.0.", marks=pytest.mark.slow),
    ],
)
def test_loss_falls_and_prefix_stays(tmp_path: Path, kind: str, moved: str) -> None:
    _, _, before, plan, _, _ = setup(kind)
    after, losses = run(tmp_path / "s.safetensors", 60, kind=kind, sensitivity="off")
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    start = before.state_dict()
    for name, tensor in after.items():
        frozen = name.startswith(
            ("transformer_blocks.0.", "transformer_blocks.1.", "time_text_embed.", "context_embedder.", "x_embedder.")
        )
        if frozen:
            assert torch.equal(tensor, start[name]), name
    assert not torch.equal(after[f"{moved}attn.to_q.weight"], start[f"{moved}attn.to_q.weight"])
    assert plan.first_pruned == 2


GRADED = Recipe(sensitivity="graded")


def graded(report: Any, plan: PrunePlan, family: Any, *, freeze_prefix: bool = True) -> dict[tuple[int, str], float]:
    return strengths(report, plan, family.components, sensitivity="graded", freeze_prefix=freeze_prefix)


def test_strength_falls_as_contribution_rises() -> None:
    family, _, _, plan, report, _ = setup()
    found = graded(report, plan, family, freeze_prefix=False)
    assert found[0, "norm"] > found[3, "mlp"] > found[4, "mlp"]
    assert max(found.values()) == 1.0 and min(found.values()) == pytest.approx(0.1)
    off = strengths(report, plan, family.components, sensitivity="off", freeze_prefix=False)
    assert {*off.values(), *graded(None, plan, family, freeze_prefix=False).values()} == {1.0}
    assert all(block != 2 for block, _ in found)


def test_only_trainable_parts_are_ranked() -> None:
    """The prefix of two blocks is frozen; the lowest part after it has the full rate, whatever the prefix scores."""
    family, _, _, plan, report, _ = setup()
    found = graded(report, plan, family)
    assert {found[part] for part in found if part[0] < 2} == {0.0}
    after = {part: value for part, value in found.items() if part[0] > 2}
    scored = {part: value for part, value in after.items() if (part,) in report.scores}
    assert max(scored.values()) == 1.0 and min(scored.values()) == pytest.approx(0.1)


def test_binary_is_refused_with_what_it_means() -> None:
    with pytest.raises(InputError, match=r"--sensitivity: found 'binary': .* frozen prefix \(PWP\).*; use off$"):
        DistillOptions(sensitivity="binary").check()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_groups_follow_original_indices_after_a_block_is_gone(kind: str) -> None:
    family, _, student, plan, report, _ = setup(kind)
    groups = parameter_groups(family, student, plan, report, GRADED, 1.0)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    third: Any = family.blocks(student)[2]  # original block 3
    mlp = (third.proj_mlp if kind == "flux" else third.ff.net[2]).weight
    assert rate[id(mlp)] == pytest.approx(graded(report, plan, family)[3, "mlp"])


def test_all_frozen_is_refused() -> None:
    family, _, student, plan, report, _ = setup()
    student.norm_out = student.proj_out = torch.nn.Identity()
    student.transformer_blocks = student.transformer_blocks[:2]
    with pytest.raises(InputError, match="every part is frozen"):
        parameter_groups(family, student, plan, report, GRADED, 1.0)


def test_features_pair_by_original_index() -> None:
    a, b = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    teacher = {0: {"image": a}, 1: {"image": b, "context": b}, 2: {"image": a, "context": b}}
    assert feature_loss({1: {"image": b, "context": b}}, teacher) == 0
    assert feature_loss({2: {"image": b}}, teacher) == 1
    assert feature_loss({2: {"context": b}}, teacher) == 0
    assert feature_loss({0: {"context": b, "image": b}}, teacher) == 1
    assert feature_loss({}, teacher) == 0


def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(tmp_path: Path) -> None:
    family, teacher, student, plan, report, pairs = setup()
    path = tmp_path / "s.safetensors"
    with pytest.raises(EdgepruneError, match="not finite at step"):
        distill(
            family, teacher, student, plan, report, pairs,
            DistillOptions(steps=50, batch=4, rate=1e30), Recipe(), schedule(teacher), path,
            inputs_digest="x", save_every=1,
        )  # fmt: skip
    assert path.is_file()


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_lost(tmp_path: Path) -> None:
    family, teacher, student, plan, report, pairs = setup()
    path = tmp_path / "s.safetensors"

    def progress(step: int, total: int, loss: float) -> None:
        if step == 3:
            student.proj_out.weight.register_hook(lambda gradient: gradient * torch.nan)

    with pytest.raises(EdgepruneError, match=f"gradient is not finite at step 4; {path} holds the state after step 3"):
        distill(
            family, teacher, student, plan, report, pairs,
            DistillOptions(steps=8, batch=4), Recipe(), schedule(teacher), path,
            inputs_digest="x", save_every=1, progress=progress,
        )  # fmt: skip
    modules, meta = saved(path)
    assert meta["step"] == 3
    assert all(tensor.isfinite().all() for state in modules.values() for tensor in state.values())


@pytest.mark.parametrize(
    "options",
    [
        {"sensitivity": "some"},
        {"sensitivity": "binary"},
        {"drop_captions": 1.5},
        {"schedule": "up"},
        {"mixed_precision": "int2"},
        {"steps": 0},
    ],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="--"):
        DistillOptions(**options).check()


def test_a_batch_has_the_levels_of_its_schedule_and_of_its_step() -> None:
    _, teacher, _, _, _, pairs = setup()
    options = DistillOptions(batch=64)
    batches = [noisy(pairs, options, Recipe(), schedule(teacher, shift=3.0), step) for step in range(64)]
    sigma = torch.cat([batch.sigma for batch in batches])
    assert float(sigma.median()) == pytest.approx(0.75, abs=0.02)
    again = noisy(pairs, options, Recipe(), schedule(teacher, shift=3.0), 5)
    assert torch.equal(again.sigma, batches[5].sigma) and torch.equal(again.latents, batches[5].latents)


def test_damaged_state_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="delete it to start over"):
        load_state(path, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))


def test_ema_moves_towards_the_live_weights() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    ema = Ema({"p": p}, 0.9)
    with torch.no_grad():
        p.fill_(1.0)
    ema.update(10_000)
    assert torch.allclose(ema.average["p"], torch.full((2,), 0.1))


@pytest.mark.parametrize("host", [False, True])
def test_the_average_follows_steps_that_bf16_would_lose(host: bool) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    ema = Ema({"p": p}, 0.99, host=host)
    with torch.no_grad():
        p.mul_(1.05)
    for _ in range(500):
        ema.update(10_000)
    assert torch.allclose(ema.average["p"], torch.tensor(1.05), atol=1e-3)


@pytest.mark.slow  # the tests of rounding.py are quick
def test_training_on_rounded_weights_lowers_the_error_after_rounding(tmp_path: Path) -> None:
    family, teacher, student, _, _, pairs = setup()
    g = torch.Generator().manual_seed(1)
    batch, sigma = pairs.batch(16, 0.1, g), torch.rand(16, generator=g)
    mixed = torch.lerp(batch.latents, torch.randn(batch.latents.shape, generator=g), sigma.view(-1, 1, 1, 1))
    inputs = (mixed, batch.hidden, batch.pooled, sigma * 1000)

    def error(group_size: int | None) -> float:
        """Return the relative velocity error of the trained student after its weights are rounded to INT4."""
        _, _, fresh, plan, report, _ = setup()
        options = DistillOptions(
            steps=100, batch=16, rate=5e-4, schedule="cosine", sensitivity="off", freeze_prefix=False,
            int4_group_size=group_size,
        )  # fmt: skip
        path = tmp_path / f"{group_size}.safetensors"
        state, _ = distill(
            family,
            teacher,
            fresh,
            plan,
            report,
            pairs,
            options,
            recipe(options),
            schedule(teacher),
            path,
            inputs_digest="x",
        )
        for name, tensor in state.items():
            if precision_of(family, name, tuple(tensor.shape), group_size=64).bits == 4:
                state[name] = round_int4(tensor, 64)
        student.load_state_dict(state)
        with torch.no_grad():
            found, expected = (m(*inputs, return_dict=False)[0] for m in (student, teacher))
        return float((found - expected).norm() / expected.norm())

    aware, unaware = error(64), error(None)
    assert aware < 0.95 * unaware


def test_training_on_rounded_weights_leaves_the_student_as_it_was_built(tmp_path: Path) -> None:
    family, teacher, student, plan, report, pairs = setup()
    options = DistillOptions(steps=2, batch=4)
    distill(
        family,
        teacher,
        student,
        plan,
        report,
        pairs,
        options,
        Recipe(),
        schedule(teacher),
        tmp_path / "s",
        inputs_digest="x",
    )
    assert not [n for n, m in student.named_modules() if "forward" in vars(m)]


def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--mixed-precision: found fp16, expected no or bf16 on cpu: it needs a CUDA"):
        run(tmp_path / "state.safetensors", 1, mixed_precision="fp16")


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_average_asks_no_more_of_a_shard_than_deepspeeds_have(decay: float) -> None:
    shard = FlatShard(torch.ones(4), torch.Size((2, 2)))
    ema = Ema({"w": shard}, decay)  # type: ignore[dict-item]
    shard.to_local().add_(1)
    ema.update(100)
    assert ema.average["w"].to_local().tolist() == pytest.approx([2 - decay] * 4)


def test_an_average_on_the_host_is_the_same() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    averages = [Ema({"w": weight}, 0.9, host=host) for host in (False, True)]
    with torch.no_grad():
        weight.add_(1)
    for ema in averages:
        ema.update(100)
    assert torch.equal(*(ema.average["w"] for ema in averages)) and averages[1].average["w"].tolist() != [2.0] * 3
