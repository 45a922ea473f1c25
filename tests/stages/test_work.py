"""The work of a training is what its blocks do: each that runs is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers.models.attention import JointTransformerBlock
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook

from edgeprune.common.errors import InputError
from edgeprune.planning.options import PlanOptions
from edgeprune.stages import distill, plan, prune
from edgeprune.stages.options import DataOptions
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions
from edgeprune.training.work import of_states, per_sample, steps_in

STEPS, BATCH = 3, 2
KINDS: dict[str, dict[str, Any]] = {
    "all weights": {"freeze_prefix": False},
    "PWP": {},
    "states": {"states": 4},
    "guidance learned": {"guidance": 2.0},
    "states, nothing rounded": {"states": 4, "rounds": 3, "int4_group_size": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_blocks_do(kind: str, source: Path, tmp_path: Path) -> None:
    ws, ran = Workspace(tmp_path / "out", str(source)), [0]
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)

    def count(module: Any, _: Any, output: Any) -> None:
        if isinstance(module, JointTransformerBlock):
            image = output[-1]
            if not (image.is_meta or isinstance(image, FakeTensor)):
                ran[0] += len(image) * (3 if image.requires_grad else 1)

    def progress(what: str, *_: Any) -> None:
        if what == "distill: checking":
            ran[0] = 0  # the data is encoded

    options = DistillOptions(steps=STEPS, batch=BATCH, **KINDS[kind])
    hook = register_module_forward_hook(count)
    try:
        distill.run(ws, options, DataOptions("shapes", 6), progress)
    finally:
        hook.remove()
    found = ws.plan()
    recipe = distill.recipe_of(options, found, ws.family, ws.config, ws.generation)
    assert ran[0] == of_states(found, recipe, options) + STEPS * BATCH * per_sample(found, recipe, options) > 0
    assert steps_in(ran[0], found, recipe, options) == STEPS
    assert steps_in(ran[0] - 1, found, recipe, options) == STEPS - 1
    with pytest.raises(InputError, match=r"work: found 1 evaluations of a block, expected at least \d+ for "):
        steps_in(1, found, recipe, options)
