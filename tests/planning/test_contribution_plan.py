"""Contribution reports and plans: torch-free arithmetic, known answers, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.analysis.contribution import ContributionReport, fingerprint, group, groups, parts
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.families import family_of
from edgeprune.planning.make import make_plan
from edgeprune.planning.methods.manual import parse_blocks, parse_components
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import remaining_shapes
from edgeprune.quantization.precision import footprint

DATA = Path(__file__).parents[1] / "samples"
CONFIGS = json.loads((DATA / "transformer_configs.json").read_text())
LARGE = CONFIGS["sd3.5-large"]
SCORES = DATA / "sd35_large_turbo_blocks_hpsv2.json"
SD3 = family_of(LARGE)


def test_published_plan_from_published_scores() -> None:
    plan = make_plan(SD3, LARGE, ContributionReport.load(SCORES), keep=0.79)
    assert plan.blocks == json.loads(SCORES.read_text())["published_plan"] == [25, 26, 27, 28, 31, 32, 33, 34]
    assert plan.after.parameters == 6_352_630_080
    assert plan.after.int4_bytes / plan.before.bf16_bytes < 0.225


COUNTS = {
    "sd3.5-large": 8_056_627_520,
    "sd3.5-medium": 2_243_171_520,
    "flux.1-schnell": 11_891_178_560,
    "flux.1-dev": 11_901_408_320,
    "z-image-turbo": 6_154_908_736,
    "qwen-image": 20_430_401_088,
}


@pytest.mark.parametrize(("name", "parameters"), COUNTS.items())
def test_parameter_counts_of_real_models(name: str, parameters: int) -> None:
    family = family_of(CONFIGS[name])
    assert footprint(family, family.tensor_shapes(CONFIGS[name])).parameters == parameters


def test_one_block_of_sd35_large_has_213_million_parameters() -> None:
    shapes = {n: s for n, s in SD3.tensor_shapes(LARGE).items() if n.startswith("transformer_blocks.5.")}
    assert abs(footprint(SD3, shapes).parameters - 213.0e6) < 0.1e6


@pytest.mark.parametrize(("block", "millions"), [(5, 339.8), (18, 339.8), (19, 141.6), (56, 141.6)])
def test_blocks_of_flux_have_one_index(block: int, millions: float) -> None:
    config, gone = CONFIGS["flux.1-dev"], str(block)
    plan = make_plan(family_of(config), config, None, method="manual", blocks=gone)
    assert plan.num_blocks == 57
    assert plan.before.parameters - plan.after.parameters == pytest.approx(millions * 1e6, rel=1e-3)


def test_components_of_a_single_block_of_flux() -> None:
    """A block has about 15 D^2: adaLN 3, attention 3 and its columns of proj_out 1, MLP 4 and its columns 4."""
    config, d2 = CONFIGS["flux.1-dev"], 3072**2
    for component, share in (("norm", 3), ("attn", 4), ("mlp", 8)):
        plan = make_plan(family_of(config), config, None, method="manual", components=f"30:{component}")
        assert plan.before.parameters - plan.after.parameters == pytest.approx(share * d2, rel=2e-3)
    with pytest.raises(InputError, match="30:context_mlp is not in this model"):
        make_plan(family_of(config), config, None, method="manual", components="30:context_mlp")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plan_from_config_alone_is_quick_and_torch_free(name: str, tmp_path: Path) -> None:
    """Runs the command with hybrid, whose hundreds of candidates are counted one set of components at a time."""
    config = CONFIGS[name]
    family = family_of(config)
    scores = {(key,): [-0.01 * i] for i, key in enumerate(parts(family, config))}
    count = family.block_count(config)
    made = ContributionReport(fingerprint(config), family.name, count, "m", ["p"], [0.0], scores)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "scores.json").write_text(json.dumps(made.to_json()))
    arguments = ["--config", "config.json", "--scores", "scores.json", "--method", "hybrid", "--keep", "0.7"]
    arguments += ["--protect-first", "0"]
    code = f"""
import sys
from edgeprune.planning import budget
from edgeprune.cli import main
sys.argv = ["edgeprune", "plan", *{arguments!r}]
ended, counted, count = None, [], budget.remaining_shapes
budget.remaining_shapes = lambda *a, **k: counted.append(a) or count(*a, **k)
try:
    ended = main()
except SystemExit as error:
    ended = error.code
assert not ended, ended
assert not {{"torch", "diffusers", "transformers"}} & set(sys.modules)
print(len(counted))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    counted = int(run.stdout.splitlines()[-1])  # how often the tensors of a model were counted
    assert 1 < counted < len(scores) / 2


def test_noops_are_left_out() -> None:
    keys = parts(SD3, LARGE)
    assert (37, "context_mlp") not in keys
    assert (0, "attn2") not in keys
    assert len(keys) == 38 + 5 * 38 - 1


def report(config: dict[str, object], drops: dict[tuple[int, str | None], float]) -> ContributionReport:
    return ContributionReport(
        fingerprint(config), "sd3", SD3.block_count(config), "velocity", ["p", "q"], [0.0, 0.0],
        {(k,): [-d, -d] for k, d in drops.items()},
    )  # fmt: skip


SMALL = LARGE | {"num_layers": 8}


def test_hybrid_takes_blocks_then_components_of_the_remaining_later_blocks() -> None:
    drops: dict[tuple[int, str | None], float] = {(b, None): 1.0 + b for b in range(8)}
    drops |= {(b, c): 0.5 + b for b in range(8) for c in ("mlp", "context_mlp")}
    plan = make_plan(SD3, SMALL, report(SMALL, drops), method="hybrid", keep=0.8, threshold=0.13, protect_last=1)
    assert plan.blocks == [4]
    assert plan.components and all(b in (5, 6) for b, _ in plan.components)
    assert plan.after.parameters <= 0.8 * plan.before.parameters


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_block_by_block_are_those_of_the_whole(name: str) -> None:
    config, family = CONFIGS[name], family_of(CONFIGS[name])
    last = family.block_count(config) - 1
    parts = [(0, "mlp"), (0, "attn"), (30, "attn"), (30, "mlp"), (last - 1, "norm"), (last, "mlp")]
    parts = [p for p in parts if p[0] <= last and p[1] in family.components]
    for gone in ([], [1, last], [last - 2]):
        listed = [p for p in parts if p[0] not in gone]
        names = {"blocks": ",".join(map(str, gone)), "components": ",".join(f"{b}:{c}" for b, c in listed)}
        plan = make_plan(family, config, None, method="manual", **names)
        assert plan.after == footprint(family, remaining_shapes(family, config, plan.blocks, plan.components))


def test_memory_budget_counts_bytes_after_int4() -> None:
    found = ContributionReport.load(SCORES)
    whole = footprint(SD3, SD3.tensor_shapes(LARGE)).int4_bytes
    plan = make_plan(SD3, LARGE, found, max_size_bytes=whole - 1)
    assert plan.blocks == [31]
    assert plan.after.int4_bytes < whole


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"keep": 0.3}, BudgetError, "cannot be met.*or use --method hybrid$"),
        ({"keep": 0.3, "method": "hybrid"}, BudgetError, "whole blocks alone; use --method hpp, or analyze components"),
        ({"keep": 0.02, "protect_first": 0, "protect_last": 0}, BudgetError, "cannot be met"),
        ({"method": "manual", "blocks": "3", "keep": 0.5}, InputError, "omit --keep"),
        ({"keep": 1.2}, InputError, "--keep"),
        ({}, InputError, "give --keep or --max-size$"),
        ({"keep": 0.5, "max_size_bytes": 5}, InputError, "give --keep or --max-size, not both"),
        ({"method": "best", "keep": 0.8}, InputError, "--method"),
        ({"method": "manual", "blocks": "0-37"}, InputError, "at least one must stay"),
        ({"method": "manual", "blocks": "30-40"}, InputError, "30-40"),
        ({"method": "manual", "components": "37:context_mlp"}, InputError, "nothing to remove"),
        ({"method": "manual", "components": "3:ff"}, InputError, "3:ff"),
        ({"keep": 0.8, "blocks": "3"}, InputError, "--method manual"),
    ],
)
def test_refusals_name_the_option(options: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make_plan(SD3, LARGE, ContributionReport.load(SCORES), **options)  # type: ignore[arg-type]


def test_ranges_are_closed() -> None:
    assert parse_blocks("25-28, 31", 38) == [25, 26, 27, 28, 31]
    assert parse_components("30:mlp,30:context_mlp", 38, SD3) == [(30, "context_mlp"), (30, "mlp")]


def test_plan_survives_its_file_and_refuses_another_model(tmp_path: Path) -> None:
    plan = make_plan(SD3, LARGE, None, method="manual", blocks="30", components="31:mlp")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert PrunePlan.load(path) == plan
    assert plan.first_pruned == 30
    with pytest.raises(InputError, match="another model"):
        plan.check(CONFIGS["sd3.5-medium"], path)


def test_report_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="another model"):
        make_plan(SD3, LARGE, report(SMALL, {(0, None): 1.0}), keep=0.8)


def test_contribution_is_a_mean_of_differences_with_an_interval() -> None:
    found = ContributionReport("", "sd3", 1, "m", ["a", "b"], [1.0, 3.0], {((0, None),): [0.5, 1.5]})
    c = found.contributions()[0, None]
    assert c.drop == 1.0
    assert c.half_width == pytest.approx(12.706 * 0.5, rel=1e-4)  # one degree of freedom


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema_version": 9}', '{"drop": 3, "metric": "m"}', '{"drop": {"x": 1}}']
)
def test_broken_reports_are_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match="scores.json"):
        ContributionReport.load(path)


def test_components_file_of_the_reference_ranks_no_noop() -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "sd35_large_turbo_components_hpsv2.json"
    if not path.is_file():
        pytest.skip("the components file is not part of the project (see shared/data)")
    assert "37<tab>ff_context" in json.loads(path.read_text())  # the reference ranks it; we must not
    assert (37, "context_mlp") in SD3.noops(LARGE)


def test_joint_removals_are_those_that_a_family_has() -> None:
    found = {kind: groups(family_of(CONFIGS[kind]), CONFIGS[kind], joint=True) for kind in CONFIGS}
    large = [g for g in found["sd3.5-large"] if len(g) > 1]
    assert len(large) == 6 * 38 - 4  # the last block has no context MLP, which is part of four of the six
    assert ((5, "context_norm"), (5, "mlp"), (5, "norm")) not in large  # not one of figure 4
    assert ((5, "context_mlp"), (5, "context_norm"), (5, "mlp"), (5, "norm")) in large
    single = [g for g in found["flux.1-dev"] if len(g) > 1 and g[0][0] >= 19]
    sets = [("attn", "norm"), ("mlp", "norm"), ("attn", "mlp")]  # figure 4 has these three for single-stream blocks
    assert single == [tuple((b, c) for c in names) for names in sets for b in range(19, 57)]
    two_streams = [g for g in found["flux.1-dev"] if len(g) > 1 and g[0][0] < 19]
    assert len(two_streams) == 6 * 19  # the last one's context is read by the single-stream blocks


def test_pairs_do_not_overlap_and_are_said_once() -> None:
    found = groups(SD3, SMALL, joint=True, pairs=True)
    assert len(found) == len(set(found)) and all(g == group(g) for g in found)
    assert group([(3, "mlp"), (2, None)]) in found and group([(2, "mlp"), (2, None)]) not in found
    singles = 8 + 5 * 8 - 1
    overlapping = sum(len([g for g in found if g[0][0] == b and len(g) == 1]) - 1 for b in range(8))
    assert len([g for g in found if len(g) == 2]) == singles * (singles - 1) // 2 - overlapping


def test_reports_of_schema_1_are_read(tmp_path: Path) -> None:
    both = report(SMALL, {(0, None): 1.0, (1, "mlp"): 0.5})
    new = both.to_json()
    parts = [{"block": e["parts"][0][0], "component": e["parts"][0][1], "scores": e["scores"]} for e in new["scores"]]
    for name, data in (("new", new), ("old", new | {"schema_version": 1, "scores": parts})):
        (tmp_path / name).write_text(json.dumps(data))
        assert ContributionReport.load(tmp_path / name) == both


def test_joint_contributions_are_apart_from_single_ones(tmp_path: Path) -> None:
    both = group([(2, "norm"), (2, "mlp")])
    made = ContributionReport("", "sd3", 3, "m", ["a"], [1.0], {((2, "mlp"),): [0.5], both: [0.25]}, estimator="reuse")
    (tmp_path / "r").write_text(json.dumps(made.to_json()))
    read = ContributionReport.load(tmp_path / "r")
    assert read == made and list(read.contributions()) == [(2, "mlp")]
    assert read.joint()[both].drop == 0.75 and str(read.joint()[both]) == "2:mlp + 2:norm"
