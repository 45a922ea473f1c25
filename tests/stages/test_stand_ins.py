"""Maps that stand in for removed runs of blocks: how they are found, and their place in the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import stored
import torch
import traced
from loras import pair
from safetensors.torch import load_file, save_file
from tiny import KINDS, config_of, tiny_flux_pipeline, tiny_pipeline, tiny_step, tiny_velocity
from typer.testing import CliRunner

from edgeprune import api, targets
from edgeprune.api import preset
from edgeprune.artefact.loading import load_transformer
from edgeprune.artefact.surgery import prune, structure
from edgeprune.cli import app
from edgeprune.cli.plan import plan_rows
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.export import parity, to_coreml, to_onnx, to_openvino
from edgeprune.families import CHANGED, family_of
from edgeprune.families.stand_in import StandIn
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.make import make_plan
from edgeprune.planning.options import PlanOptions
from edgeprune.planning.plan import PrunePlan, followers
from edgeprune.sampling.denoising import model_inputs
from edgeprune.stages import plan as planning
from edgeprune.stages import prune as pruning
from edgeprune.stages import quantize, stand_ins
from edgeprune.stages.choice import MOVES, NO_SCORES, Choice
from edgeprune.stages.compress import memories, works
from edgeprune.stages.options import CompressOptions, QuantizeOptions
from edgeprune.stages.stand_ins import Regression
from edgeprune.stages.weights import STAND_INS, stand_ins_of
from edgeprune.stages.workspace import Workspace

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def regression(x: torch.Tensor, y: torch.Tensor) -> Regression:
    found = Regression(x.shape[-1])
    for some, others in zip(x.split(100), y.split(100), strict=True):
        found.add(some[None], others[None])
    return found


def test_the_regression_finds_an_affine_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "RIDGE", 1e-9)
    torch.manual_seed(0)
    x, factor, bias = 3 + torch.randn(1000, 16), torch.randn(16, 3) @ torch.randn(3, 16), torch.randn(16)
    one = StandIn(16, 3)
    one.load_state_dict(regression(x, x + x @ factor + bias).solve(3))
    torch.testing.assert_close(one(x), x + x @ factor + bias, rtol=1e-3, atol=1e-3)


def test_of_a_lower_rank_it_is_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A singular value decomposition of the map, which knows nothing of its inputs, does worse."""
    monkeypatch.setattr(stand_ins, "RIDGE", 1e-9)
    torch.manual_seed(0)
    x = torch.randn(2000, 16) * torch.logspace(0, 2, 16)
    wanted = x + x @ (torch.randn(16, 16) / torch.logspace(0, 2, 16)[:, None] ** 0.5)
    maps = regression(x, wanted)

    def error(rank: int) -> float:
        one = StandIn(16, rank)
        one.load_state_dict(maps.solve(rank))
        return float((one(x) - wanted).square().sum())

    whole = maps.solve(16)
    u, s, v = torch.linalg.svd((whole["up.weight"] @ whole["down.weight"]).T)
    plain = x + x @ (u[:, :4] * s[:4]) @ v[:4] + whole["up.bias"]
    assert error(16) < error(8) < error(4) < 0.5 * float((plain - wanted).square().sum())


def test_what_was_never_seen_is_not_divided_by() -> None:
    x = torch.zeros(10, 4)
    found = regression(x, x + 1).solve(2)
    assert all(tensor.isfinite().all() for tensor in found.values())
    torch.testing.assert_close(found["up.bias"], torch.ones(4))


@pytest.mark.parametrize(
    ("removed", "expected"), [([], []), ([1], [1]), ([0, 1], [0]), ([4, 5], []), ([1, 3, 4], [1, 2]), ([2, 5], [2])]
)
def test_a_run_at_the_end_has_no_stand_in(removed: list[int], expected: list[int]) -> None:
    assert followers(removed, 6) == expected


def made(kind: str, blocks: str = "1-2") -> tuple[Any, PrunePlan, Any]:
    """Return an original, a plan with stand-ins, and the shorter model with random maps."""
    model = KINDS[kind]()
    family = family_of(config_of(model))
    plan = make_plan(family, config_of(model), None, method="manual", blocks=blocks, stand_in=5)
    torch.manual_seed(1)
    names = {n: t for n, t in structure(family, config_of(model), plan).state_dict().items() if ".stand_in." in n}
    maps = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in names.items()}
    mean = torch.zeros(next(iter(maps.values())).shape[-1])
    return model, plan, prune(family, model, config_of(model), plan, mean, stand_ins=maps)


@pytest.mark.parametrize("kind", KINDS)
def test_the_maps_run_before_the_block(kind: str) -> None:
    model, plan, short = made(kind)
    family, config = family_of(config_of(model)), config_of(model)
    assert plan.stand_ins == [1] and not plan.stock and plan.stand_in_rank == 5
    assert sum(p.numel() for p in short.parameters()) == plan.after.parameters
    plain = prune(family, model, config, replace(plan, stand_in_rank=None), None)
    block = family.blocks(short)[1]
    assert type(block) is type(family.blocks(plain)[1])
    maps = list(block.stand_in.values())

    def moved(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        names = ("hidden_states", "encoder_hidden_states")
        named |= dict(zip(names, args, strict=False))
        for name, one in zip(names, (maps[0], maps[-1]), strict=True):
            if named.get(name) is not None:
                named[name] = one(named[name])
        return tuple(named.pop(name) for name in names[: len(args)]) + args[2:], named

    family.blocks(plain)[1].register_forward_pre_hook(moved, with_kwargs=True)
    expected = tiny_velocity(plain)
    assert (tiny_velocity(short) - expected).abs().max() <= 1e-6
    cut = prune(family, model, config, replace(plan, stand_in_rank=None), None)
    assert (tiny_velocity(cut) - expected).abs().max() > 1e-3
    # In pieces, as large models run.
    latents, condition, sigma, guidance = tiny_step()
    with torch.no_grad():
        inputs = model_inputs(short, latents, condition, sigma, guidance)
        image, text, modulation = family.embed(short, inputs)
        for one in family.blocks(short):
            image, after = family.run(one, image, text, modulation, family.positions(short, inputs))
            text = text if after is None else after
        output = family.unembed(short, image, modulation, family.grid(short, inputs))
        pieces = family.velocity(short.config, output, latents.shape)
    assert (pieces - expected).abs().max() <= 1e-5


def test_a_plan_without_them_stays_as_it_was(tmp_path: Path) -> None:
    _, plan, _ = made("sd3")
    without = replace(plan, stand_in_rank=None)
    assert "stand_in_rank" not in without.to_json() and "stand_in" not in PlanOptions().to_json()
    assert PrunePlan.from_json(json.loads(json.dumps(plan.to_json())), "plan") == plan
    assert PrunePlan.from_json(without.to_json(), "plan") == without
    with pytest.raises(InputError, match="stand_in_rank: found 0, expected"):
        PrunePlan.from_json(plan.to_json() | {"stand_in_rank": 0}, "plan")


@pytest.mark.parametrize("rank", [0, 65, "half"])
def test_a_rank_that_is_none_is_refused(rank: int | str) -> None:
    model = KINDS["sd3"]()
    with pytest.raises(InputError, match="--stand-in: found .*expected none, quarter, or a rank up to 64"):
        make_plan(family_of(config_of(model)), config_of(model), None, method="manual", blocks="1", stand_in=rank)


def test_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preset("default", world=None).plan.stand_in is None
    asked = list[CompressOptions]()

    def forecast(_: Any, __: Any, options: CompressOptions, **___: Any) -> None:
        asked.append(options)
        raise InputError("seen")

    monkeypatch.setattr("edgeprune.api.forecast_compress", forecast)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    for words in ("--steps 0", "--stand-in 7", "--stand-in quarter --method manual --blocks 3", "--stand-in none"):
        words += f" --modulation-rank full --prompts {prompts}"
        CliRunner().invoke(app, ["compress", "-o", str(tmp_path / "x"), "--dry-run", *words.split()])
    assert [one.plan.stand_in for one in asked] == [None, 7, "quarter", None]
    assert [one.plan.prompts for one in asked] == [None, str(prompts), str(prompts), None]
    found = CliRunner().invoke(app, ["compress", "-o", str(tmp_path / "x"), "--stand-in", "half"])
    assert "--stand-in: found 'half', expected none, quarter or a number" in str(found.exception)


def test_they_are_fitted_on_the_prompts_that_are_given(artefact: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    ws = Workspace(tmp_path / "given", str(Workspace(artefact, None, model_given=False).source))
    planning.run(ws, PlanOptions("manual", blocks="1-2", stand_in=3, prompts=str(prompts)))
    assert stand_ins.prompts_of_fit(ws) == ["a cat", "a dog"]
    pruning.run(ws)
    assert ws.manifest.stages["prune"]["options"]["stand_in_prompts"] == ["a cat", "a dog"]


@pytest.fixture(scope="module", autouse=True)
def enough_prompts(little_work: Any) -> Iterator[None]:
    """A map that is fitted needs more prompts than other tests calibrate on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeprune.stages.prompts.prompts_of", little_work)
        yield


@pytest.fixture(scope="module", params=["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sd3":
        tiny_pipeline(folder / "tiny", num_layers=4)
    else:
        tiny_flux_pipeline(folder / "tiny")
    ws = Workspace(folder / "small", str(folder / "tiny"))
    planning.run(ws, PlanOptions("manual", blocks="1-2", stand_in="quarter"))
    pruning.run(ws)
    quantize.run(ws, QuantizeOptions())
    return ws.out


def error_of(ws: Workspace, model: Any) -> float:
    metric = VelocityError(ws.pipe, ws.generation, ["a", "b", "c"], split=Split.HELD_OUT)
    ws.pipe.transformer, original = model, ws.pipe.transformer
    try:
        return -sum(metric.score()) / 3
    finally:
        ws.pipe.transformer = original


def test_they_win_back_velocity_and_survive_rounding(artefact: Path, tmp_path: Path) -> None:
    ws = Workspace(artefact, None, model_given=False)
    cut = Workspace(tmp_path / "cut", str(ws.source))
    planning.run(cut, PlanOptions("manual", blocks="1-2"))
    pruning.run(cut)
    lost = error_of(ws, load_transformer(cut.out, quantized=False))
    half, int4 = (error_of(ws, load_transformer(artefact, quantized=quantized)) for quantized in (False, True))
    # Of random blocks an affine map tells little; of the built-in model docs/stand-ins.md has the figures.
    assert half < 0.97 * lost and int4 < 0.97 * lost, (lost, half, int4)
    config = json.loads((artefact / "transformer/config.json").read_text())
    assert config["_class_name"].startswith(CHANGED)  # stock diffusers must not open it


def test_pruned_in_pieces_they_are_the_same(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large model one block is in memory, and its weights may stay in the original."""
    ws = Workspace(artefact, None, model_given=False)
    for module in ("edgeprune.stages.stand_ins", "edgeprune.residency.running", "edgeprune.residency.compute"):
        monkeypatch.setattr(f"{module}.is_small", lambda numbers: False)
    monkeypatch.setattr(stand_ins, "LARGE_STATES", 6)
    monkeypatch.setattr("edgeprune.residency.compute.multiplies_bf16", lambda: False)
    other = Workspace(tmp_path / "other", str(ws.source))
    planning.run(other, PlanOptions("manual", blocks="1-2", stand_in="quarter"))
    pruning.run(other, no_half=True)
    assert _close(artefact / STAND_INS, other.out / STAND_INS)
    quantize.run(other, QuantizeOptions())
    assert load_transformer(other.out, quantized=True)


def _close(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    for name in {n.rpartition(".")[0].rpartition(".")[0] for n in a}:
        first, second = (t[f"{name}.up.weight"] @ t[f"{name}.down.weight"] for t in (a, b))
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)
    return a.keys() == b.keys()


def test_a_damaged_or_missing_file_is_refused(artefact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artefact, tmp_path / "copy")
    ws = Workspace(folder, None, model_given=False)
    pruning.run(ws, no_half=True)
    assert not ws.manifest.half_in_source  # the half copy that is there stays
    (folder / STAND_INS).write_bytes(b"x")
    with pytest.raises(InputError, match=STAND_INS):
        stand_ins_of(ws, ws.plan())
    (folder / STAND_INS).unlink()
    with pytest.raises(InputError, match=f"{STAND_INS}: no such file; run `edgeprune prune"):
        stand_ins_of(ws, ws.plan())


def test_an_export_has_them(artefact: Path, tmp_path: Path) -> None:
    source = next(to_onnx.sources(artefact))
    (tmp_path / source.name).mkdir()
    path = tmp_path / source.name / "model.onnx"
    to_onnx.save(source.name, source.to_ir(), path)
    module, opened = source.checkpoint(), parity.session(path)
    parity.check(source.name, opened, module, source.examples, list(module.outputs))
    assert any(".stand_in." in weight.name for weight in onnx.load(path, load_external_data=False).graph.initializer)


@pytest.mark.slow  # test_an_export_has_them is the quick twin
@pytest.mark.filterwarnings("ignore")  # vendors' deprecations
@pytest.mark.parametrize("fmt", ["openvino", "coreml"])
def test_other_formats_have_them(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    """Each export is compared with torch before it is complete."""
    packed, convert = list(stored.of_checkpoint(artefact)), to_coreml.convert_network
    monkeypatch.setattr(
        to_coreml,
        "convert_network",
        lambda name, *of, **how: convert(name, *of, **how) if name == "transformer" else {},
    )
    traced.only(monkeypatch, "transformer")
    if fmt == "coreml":
        record = to_coreml.export(artefact, tmp_path / fmt, device=targets.load("macbook-m"))
        found = stored.of_coreml(tmp_path / fmt / "transformer" / "model.mlpackage", packed)
    else:
        record = to_openvino.export(artefact, tmp_path / fmt, device=targets.load("cpu-x86"))
        found = stored.of_openvino(tmp_path / fmt / "transformer" / "openvino_model.xml")
    assert record["parity"]["transformer"]["max_relative"] < 1e-3
    assert found.keys() == set(packed) and any(".stand_in." in name for name in found)


def test_a_second_run_makes_up_for_what_the_first_leaves(tmp_path: Path) -> None:
    tiny_flux_pipeline(tmp_path / "tiny")
    errors = {}
    for name, rank in (("none", None), ("both", 64)):
        ws = Workspace(tmp_path / name, str(tmp_path / "tiny"))
        planning.run(ws, PlanOptions("manual", blocks="1,3", stand_in=rank))
        pruning.run(ws)
        errors[name] = error_of(ws, load_transformer(ws.out, quantized=False))
        if rank:
            assert ws.plan().stand_ins == [1, 2]
            model = load_transformer(ws.out, quantized=False)
            second = ws.family.block_prefix(model, 2)
            maps = load_file(ws.out / STAND_INS)
            model.load_state_dict({n: 0 * t for n, t in maps.items() if n.startswith(second)}, strict=False)
            errors["first"] = error_of(ws, model)
    assert errors["both"] < 0.9 * min(errors["first"], errors["none"]), errors


def test_a_killed_run_finds_what_it_had_found(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fits = Workspace(artefact, None, model_given=False).source, [0]
    real = stand_ins._fitted

    def counted(*args: Any) -> Any:
        fits[0] += 1
        return real(*args)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stand_ins, "_fitted", counted)
    ws = Workspace(tmp_path / "killed", str(source))
    planning.run(ws, PlanOptions("manual", blocks="1-2", stand_in="quarter"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pruning, "write_half", killed)
        pruning.run(ws)
    assert pruning.run(ws) and fits == [1] and not pruning.run(ws)
    assert (ws.out / STAND_INS).read_bytes() == (artefact / STAND_INS).read_bytes()
    # Another plan takes the file along.
    del ws
    again = Workspace(tmp_path / "killed", None, model_given=False, fresh=True)
    planning.run(again, PlanOptions("manual", blocks="1"))
    pruning.run(again)
    assert not (again.out / STAND_INS).exists() and STAND_INS not in again.manifest.files


def test_time_gives_them_up_last(artefact: Path) -> None:
    assert MOVES[-2:] == (("stand_ins", 0), NO_SCORES)
    ws = Workspace(artefact, None, model_given=False)
    options = CompressOptions(plan=PlanOptions("manual", blocks="1-2", stand_in="quarter"), distill=None)
    choice = Choice(60, "", 60, "gates", 0, 6, 0, 0, 0, 1, 4, stand_ins=1)
    assert choice.over(options, {}).plan.stand_in == "quarter" and "stand-ins for removed" in choice.described()
    without = replace(choice, stand_ins=0).over(options, {})
    assert without.plan.stand_in is None
    counted = [works(ws.subject, some, ws.plan(), 0)["prune"].evaluations for some in (options, without)]
    states = stand_ins.PROMPTS * min(6, ws.generation.num_inference_steps) * ws.subject.per_step
    assert counted[1] == 0 and 2 * states < counted[0] < 3 * states
    alone = memories(ws.memory, without, replace(ws.plan(), stand_in_rank=None), 0)["prune"]
    assert memories(ws.memory, options, ws.plan(), 0)["prune"] > alone


@pytest.mark.parametrize("artefact", ["flux"], indirect=True)  # as the file
def test_a_merged_lora_keeps_them(artefact: Path, tmp_path: Path) -> None:
    save_file(pair("lora_unet_double_blocks_0_img_attn_qkv", 192, 64), tmp_path / "style.safetensors")
    words = f"lora {tmp_path}/style.safetensors --model {artefact} --merge -o {tmp_path}/merged"
    found = CliRunner().invoke(app, words.split())
    assert found.exit_code == 0, found.output
    assert (tmp_path / "merged" / STAND_INS).read_bytes() == (artefact / STAND_INS).read_bytes()
    failed = {f.check for f in api.verify(tmp_path / "merged").findings if f.verdict == "fail"}
    assert failed == {"vae"}  # whose weights are random


def test_training_goes_on_from_them(artefact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(artefact, tmp_path / "copy")
    options = api.DistillOptions(steps=2, batch=2)
    with torch.enable_grad():
        api.distill(folder, options, api.DataOptions("captions", 4))
    before, after = (load_transformer(some, quantized=False).state_dict() for some in (artefact, folder))
    name = next(n for n in before if ".stand_in." in n)
    assert not torch.equal(before[name], after[name]) and (before[name] - after[name]).abs().max() < 0.1


def test_a_plan_says_where_nothing_stands_in() -> None:
    family, config = family_of(config_of(KINDS["sd3"]())), config_of(KINDS["sd3"]())
    for blocks, said in (("1-2", "rank 16, before block 3"), ("", "none: no block that stays follows a removed one")):
        plan = make_plan(family, config, None, method="manual", blocks=blocks, stand_in="quarter")
        assert dict(plan_rows(plan, None, "", "quarter"))["stand-ins"] == said
        assert ("stand-ins" in dict(plan_rows(plan, None))) is bool(blocks)


def test_streams_that_are_not_finite_are_refused() -> None:
    x = torch.full((3, 4), float("inf"))
    with pytest.raises(InputError, match="stand-ins: the original's streams are not finite .* --stand-in none"):
        regression(x, x).solve(2)
