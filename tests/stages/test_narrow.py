"""Training with both models in memory holds of a large model in float32 only what is trained, and learns the same."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from edgeprune.planning.options import PlanOptions
from edgeprune.residency import compute
from edgeprune.stages import distill, plan, prune
from edgeprune.stages.options import DataOptions
from edgeprune.stages.workspace import Workspace
from edgeprune.training import teaching
from edgeprune.training.recipe import DistillOptions


def begun(source: Path, out: Path) -> Workspace:
    """Return a folder less block 1 of 3."""
    ws = Workspace(out, str(source))
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)
    return ws


def trained(ws: Workspace, **changes: Any) -> list[float]:
    """Train for three steps, and return the loss of each."""
    losses = list[float]()

    def progress(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        if what == "distill":
            losses.append(float(note.split()[1]))

    options = DistillOptions(**{"steps": 3, "batch": 2, "rate": 1e-3, "states": 0, "mixed_precision": "bf16"} | changes)
    distill.run(ws, options, DataOptions("shapes", 6), progress)
    return losses


@pytest.mark.parametrize(
    ("changes", "narrow"),
    [({}, True), ({"int4_group_size": None}, True), ({"train": "lora:2"}, True), ({"mixed_precision": "no"}, False)],
)
def test_only_what_is_trained_is_in_float32(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], narrow: bool
) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(compute, "SMALL_BYTES", 0)
    ws, made = begun(source, tmp_path / "out"), list[weakref.ref[torch.Tensor]]()
    real, build, prune_state = distill.distill, distill.build, distill.prune_state

    def pruned(*args: Any) -> dict[str, torch.Tensor]:
        state = prune_state(*args)
        made.extend(map(weakref.ref, state.values()))
        return state

    def built(family: Any, config: Any, how: Any, state: dict[str, torch.Tensor]) -> Any:
        left = [tensor for ref in made if (tensor := ref()) is not None]
        kept = [tensor for tensor in state.values() if tensor.dtype == torch.float16]
        assert {*map(id, left)} == {*map(id, kept)}  # what was widened is freed
        assert bool(kept) == narrow
        return build(family, config, how, state)

    def train(family: Any, teacher: Any, student: Any, *rest: Any, **named: Any) -> Any:
        for name, model in (("teacher", teacher), ("student", student)):
            own = set(teaching.block_weights(family, model))
            if name == "student" and "train" not in changes:
                own = {weight for weight in own if weight.startswith("transformer_blocks.0.")}
            for key, tensor in model.state_dict().items():
                expected = torch.float16 if narrow and key in own else torch.float32
                assert tensor.dtype == expected, (name, key)
        return real(family, teacher, student, *rest, **named)

    monkeypatch.setattr(distill, "prune_state", pruned)
    monkeypatch.setattr(distill, "build", built)
    monkeypatch.setattr(distill, "distill", train)
    assert len(trained(ws, **changes)) == 3 and made
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("rounded", [True, False])
def test_it_learns_the_same(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounded: bool) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(compute, "SMALL_BYTES", 0)
    changes = {} if rounded else {"int4_group_size": None}
    found = trained(begun(source, tmp_path / "narrow"), **changes)
    monkeypatch.setattr(distill, "narrowed", lambda *_, **__: False)
    assert trained(begun(source, tmp_path / "wide"), **changes) == found
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_lowered_teacher_is_never_whole_in_float32(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(compute, "SMALL_BYTES", 0)
    ws, read, real = begun(source, tmp_path / "out"), list[torch.Tensor](), teaching.lower

    def lower(family: Any, teacher: Any, asked: str) -> None:
        own = [teacher.get_parameter(name) for name in teaching.block_weights(family, teacher)]
        read.extend(own)
        real(family, teacher, asked)

    monkeypatch.setattr(teaching, "lower", lower)
    trained(ws, mixed_precision="no", teacher_precision=precision)
    expected = {"bf16": torch.bfloat16, "int8": torch.float16}[precision]
    assert read and {tensor.dtype for tensor in read} == {expected}
    AcceleratorState._reset_state(True)
