"""How a plan is distilled if options are not set: by its method and its model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stage_runs import OPTIONS
from tiny import tiny_flux, tiny_transformer

from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json
from edgeprune.families import family_of_model
from edgeprune.planning.make import make_plan
from edgeprune.planning.methods import baselines
from edgeprune.planning.options import PlanOptions
from edgeprune.planning.plan import PrunePlan
from edgeprune.sampling.generation import Generation
from edgeprune.stages import distill, plan, prune
from edgeprune.stages.distill import recipe_of
from edgeprune.stages.options import CompressOptions
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions, Recipe

CONFIG: Any = tiny_transformer(num_layers=5).config
FAMILY = family_of_model(tiny_transformer())
BLOCKS = make_plan(FAMILY, CONFIG, None, method="manual", blocks="2")
COMPONENTS = make_plan(FAMILY, CONFIG, None, method="manual", blocks="2", components="3:mlp")


def recipe(made: PrunePlan, *, guidance_scale: float = 0.0, **options: Any) -> Recipe:
    settings = Generation(num_inference_steps=28, guidance_scale=guidance_scale)
    return recipe_of(DistillOptions(**options), made, FAMILY, CONFIG, settings)


def test_updates_are_graded_where_components_are_removed() -> None:
    assert recipe(BLOCKS) == Recipe(sensitivity="off", freeze_prefix=True, features="blocks")
    assert recipe(COMPONENTS) == Recipe(sensitivity="graded", freeze_prefix=True, features="blocks")
    assert recipe(BLOCKS, sensitivity="graded").sensitivity == "graded"
    assert recipe(COMPONENTS, sensitivity="off").sensitivity == "off"


def test_baselines_are_distilled_as_by_their_authors() -> None:
    for name in baselines():
        found = recipe(replace(BLOCKS, method=name))
        assert (found.lambda_task, found.lambda_output, found.lambda_feature) == (1, 1, 1)
        assert (found.sensitivity, found.freeze_prefix) == ("off", False)
        assert found.features == ("attention" if name == "koala" else "blocks")
    own = recipe(replace(BLOCKS, method="koala"), lambda_task=0.0, freeze_prefix=True)
    assert own == Recipe(features="attention", lambda_task=0, lambda_output=1, lambda_feature=1)


def test_few_step_models_are_trained_on_their_steps() -> None:
    four = Generation(num_inference_steps=4, guidance_scale=0.0)
    assert recipe_of(DistillOptions(), BLOCKS, FAMILY, CONFIG, four).levels == "steps"
    assert recipe_of(DistillOptions(levels="uniform"), BLOCKS, FAMILY, CONFIG, four).levels == "uniform"
    assert recipe(BLOCKS).levels == "shifted"


def test_captions_are_dropped_for_guided_models_alone() -> None:
    assert recipe(BLOCKS, guidance_scale=0).drop_captions == 0  # SD3.5 Large Turbo
    assert recipe(BLOCKS, guidance_scale=7).drop_captions == 0.1
    assert recipe(BLOCKS, guidance_scale=7, drop_captions=0.3).drop_captions == 0.3
    assert recipe(BLOCKS, guidance_scale=7, drop_captions=0.0).drop_captions == 0
    flux: Any = tiny_flux()
    taken = recipe_of(DistillOptions(), BLOCKS, family_of_model(flux), flux.config, Generation(guidance_scale=3.5))
    assert taken.drop_captions == 0  # FLUX.1 dev takes the scale as an input and never evaluates the empty prompt


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (OPTIONS, True),
        (replace(OPTIONS, plan=PlanOptions("koala", keep=0.8)), False),
        (replace(OPTIONS, plan=PlanOptions("manual", blocks="1")), False),
        (replace(OPTIONS, plan=PlanOptions("manual", components="1:mlp")), True),
        (replace(OPTIONS, plan=PlanOptions("manual", components="1:mlp"), distill=None), False),
        (replace(OPTIONS, plan=PlanOptions("koala"), distill=DistillOptions(sensitivity="graded")), True),
    ],
)
def test_when_scores_are_needed(chosen: CompressOptions, expected: bool) -> None:
    assert chosen.reads_scores == expected


def test_koala_stage_by_stage_is_koala(source: Path, tmp_path: Path) -> None:
    """The same recipe as in `compress`, said in the output and kept in the manifest."""
    ws = Workspace(tmp_path / "small", str(source))
    plan.run(ws, PlanOptions("koala", keep=0.8, protect_last=0))
    prune.run(ws)
    lines: list[str] = []
    distill.run(ws, DistillOptions(steps=1, batch=2), OPTIONS.data, lambda what, *_: lines.append(what))
    stored = read_json(tmp_path / "small" / "edgeprune.json")["stages"]["distill"]["options"]["options"]
    assert stored["features"] == "attention"
    assert (stored["lambda_task"], stored["lambda_output"], stored["lambda_feature"]) == (1, 1, 1)
    assert (stored["sensitivity"], stored["freeze_prefix"]) == ("off", False)
    assert stored["levels"] == "steps"  # the tiny pipeline is sampled in four steps
    said = next(line for line in lines if line.startswith("distill: recipe of koala"))
    assert "task 1, output 1, feature 1 (attention)" in said and "all weights trained" in said
    assert "1 steps of 2, 4.9e-07 of the published training's samples (64000 steps of 64)" in said


def test_components_without_scores_are_refused_before_training(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "small", str(source))
    plan.run(ws, PlanOptions("manual", components="1:mlp"))
    prune.run(ws)
    with pytest.raises(InputError, match="--sensitivity: found graded, the default .* run `edgeprune analyze`"):
        distill.run(ws, DistillOptions(steps=1, batch=2), OPTIONS.data)
