"""Projected modulation: exact on its subspace, counted without weights, used in every stage, refused by diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from tiny import KINDS, config_of, quantize, tiny_inputs, tiny_pipeline, tiny_step

import edgeprune
from edgeprune.analysis.contribution import ContributionReport, fingerprint, parts, removed
from edgeprune.artefact.loading import load_transformer, open_transformer
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.surgery import prune
from edgeprune.cli.options import parse_rank
from edgeprune.cli.plan import plan_rows
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.common.files import write_json
from edgeprune.families import Config, Family, family_of
from edgeprune.planning.budget import resident_bytes
from edgeprune.planning.make import make_plan
from edgeprune.planning.modulation import choose_rank, embedder_alone, modulation_inputs, ranks, subspace
from edgeprune.planning.options import DEFAULT, PlanOptions
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import modulation_width
from edgeprune.quantization.int4 import PackedLinear
from edgeprune.sampling import denoising as sampling
from edgeprune.sampling.denoising import Conditioning
from edgeprune.stages.compress import compress
from edgeprune.stages.modulation import MODULATION
from edgeprune.stages.options import CompressOptions, DataOptions
from edgeprune.stages.plan import calibration_inputs
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prompts import calibration_prompts
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions, Recipe, parameter_groups

WIDTH = 64
THIN = [kind for kind in KINDS if not kind.startswith(("flux2", "z-image"))]
"""FLUX.2 shares three modulation layers between all blocks, and Z-Image's read 256 numbers: nothing to save."""


def setup(kind: str = "sd3", **overrides: Any) -> tuple[Any, Config, Family]:
    model = KINDS[kind](**overrides)
    config = config_of(model)
    return model, config, family_of(config)


def velocity(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs() | inputs, return_dict=False)[0]


# ------------------------------------------------------------------------------------------------ surgery


@pytest.mark.parametrize("kind", THIN)
@pytest.mark.parametrize(
    ("blocks", "parted"),
    [
        ("", False),
        ("1", True),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("", True), ("3", False), ("3", True), ("1", False))),
    ],
)
def test_exact_where_the_inputs_lie_in_the_basis(kind: str, blocks: str, parted: bool) -> None:
    """Twelve samples span eleven directions: at rank 11 the model computes what it computed, at 3 it does not.

    Of Qwen-Image, which reads the noise level alone, they are three samples; there rank 1 does not.
    """
    low = 1 if kind == "qwen-image" else 3
    model, config, family = setup(kind)
    sigmas, pooled = torch.tensor([0.01, 0.5, 0.99]), torch.randn(4, WIDTH)
    latents, condition, _, guidance = tiny_step()
    found = subspace(modulation_inputs(family, model, sigmas * 1000, pooled, guidance).flatten(0, 1))
    assert found.directions.shape == (11, WIDTH)
    step = (latents, Conditioning(condition.hidden, pooled[[3, 1]]), sigmas[[0, 2]], guidance)
    # Every fifth component of the blocks that stay: a norm is removed with and without its neighbours.
    gone = [
        (b, c) for i, (b, c) in enumerate(parts(family, config, blocks=False)) if i % 5 == 0 and str(b) not in blocks
    ]
    components = ",".join(f"{b}:{c}" for b, c in gone) if parted else ""
    listed = {"method": "manual", "blocks": blocks, "components": components}
    plans = {rank: make_plan(family, config, None, modulation_rank=rank, **listed) for rank in (11, low)}
    with torch.no_grad():
        with removed(family, model, plans[11].keys, found.mean):
            expected = sampling.velocity(model, *step)
        for rank, plan in plans.items():
            thin = prune(family, model, config, plan, found.mean, found.basis(rank))
            assert sum(p.numel() for p in thin.parameters()) == plan.after.parameters
            error = (sampling.velocity(thin, *step) - expected).abs().max()
            assert error <= 1e-4 if rank == 11 else error > 1e-3
    assert thin.state_dict()["time_text_embed.basis"].shape == (low, WIDTH)
    assert not [n for n, t in thin.state_dict().items() if family.modulates(n) and t.ndim == 2 and t.shape[1] != low]


@pytest.mark.parametrize("kind", THIN)
def test_rank_0_is_constant_modulation(kind: str) -> None:
    """Equals rank 1 with a basis of zeros."""
    model, config, family = setup(kind)
    mean = torch.randn(WIDTH)
    plan = make_plan(family, config, None, method="manual", modulation_rank=0)
    thin = prune(family, model, config, plan, mean)
    assert sum(p.numel() for p in thin.parameters()) == plan.after.parameters
    assert not [n for n in thin.state_dict() if n.startswith("time_text_embed.")]
    line = make_plan(family, config, None, method="manual", modulation_rank=1)
    with torch.no_grad():
        latents, condition, sigma, guidance = tiny_step()
        expected = sampling.velocity(
            prune(family, model, config, line, mean, torch.zeros(1, WIDTH)), latents, condition, sigma, guidance
        )
        other = Conditioning(condition.hidden, torch.zeros_like(condition.pooled))
        found = [sampling.velocity(thin, latents, c, s, guidance) for c, s in ((condition, sigma), (other, sigma / 2))]
    assert (found[0] - expected).abs().max() <= 1e-5 and torch.equal(*found)


@pytest.mark.parametrize("kind", THIN)
def test_calibration_reads_the_embedder_alone(kind: str) -> None:
    model, config, family = setup(kind)
    state = {n: t for n, t in model.state_dict().items() if n.startswith("time_text_embed.")}
    alone = embedder_alone(family, config, state.__getitem__)
    assert sum(p.numel() for p in alone.parameters()) == sum(t.numel() for t in state.values())
    timesteps, pooled = torch.tensor([10.0, 500.0]), torch.randn(3, WIDTH)
    inputs = modulation_inputs(family, alone, timesteps, pooled, 3.0)
    assert inputs.shape == (3, 2, WIDTH)
    torch.testing.assert_close(inputs[2], family.modulation_input(model, timesteps, pooled[[2, 2]], 3.0))
    if config.get("guidance_embeds"):
        assert not torch.allclose(inputs, modulation_inputs(family, alone, timesteps, pooled, 1.0))


def test_what_is_missing_is_said() -> None:
    model, config, family = setup()
    plan = make_plan(family, config, None, method="manual", modulation_rank=4)
    with pytest.raises(InputError, match="basis"):
        prune(family, model, config, plan, torch.zeros(WIDTH))
    with pytest.raises(InputError, match="mean"):
        prune(family, model, config, plan, None, torch.zeros(4, WIDTH))


# ------------------------------------------------------------------------------------------------ the subspace


def test_directions_are_those_of_the_largest_variance() -> None:
    axes = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0][:3]
    spread = torch.tensor([5.0, 2.0, 1.0])
    samples = torch.randn(400, 3, generator=torch.Generator().manual_seed(1)) * spread
    found = subspace(samples @ axes + 7)
    torch.testing.assert_close(found.mean, (samples @ axes + 7).mean(0))
    assert ((found.directions[:3] @ axes.T).abs().diagonal() > 0.99).all()
    left = found.residuals(samples @ axes + 7)
    expected = [1.0, (5 / 30) ** 0.5, (1 / 30) ** 0.5, 0.0]
    torch.testing.assert_close(left[:4].float(), torch.tensor(expected), rtol=0.1, atol=1e-3)
    assert found.residuals(found.mean.expand(5, -1) + 3 * found.directions[0])[1] < 1e-3


def test_auto_is_measured_on_prompts_held_out() -> None:
    """40 random prompts, constant over timesteps: the directions of one half do not fit the other half."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 10, WIDTH, generator=generator)
    assert choose_rank((shared * 3).expand(40, -1, -1), WIDTH) == 16  # ten timesteps: nine directions, 4 are too few
    alone = torch.randn(40, 1, WIDTH, generator=generator).expand(-1, 10, -1)
    assert choose_rank(alone, WIDTH) is None
    assert ranks(WIDTH) == [2, 4, 16, 32] and ranks(2432)[-1] == 1216


def test_more_directions_than_samples() -> None:
    with pytest.raises(InputError, match=r"--modulation-rank: found 9, expected up to 5: .* --prompts"):
        subspace(torch.randn(6, WIDTH)).basis(9)


# ------------------------------------------------------------------------------------------------ plan


def test_modulation_first_then_blocks() -> None:
    model, config, family = setup()
    scores = ContributionReport("", "sd3", 4, "none", [], [], {}, summary={((b, None),): float(b) for b in range(4)})
    options = {"method": "hpp", "protect_first": 1, "protect_last": 0}
    full = make_plan(family, config, scores, keep=0.8, **options)
    thin = make_plan(family, config, scores, keep=0.8, modulation_rank=16, **options)
    assert full.blocks == [1] and thin.blocks == []
    assert thin.after.int4_bytes < thin.before.int4_bytes and thin.after.parameters <= 0.8 * thin.before.parameters
    both = make_plan(family, config, scores, keep=0.6, modulation_rank=16, **options)
    assert both.blocks == [1] and both.after.parameters < thin.after.parameters
    stored = quantize(family, prune(family, model, config, both, torch.zeros(WIDTH), torch.eye(WIDTH)[:16]))
    keep = (".weight_packed", ".weight_scale")
    sizes = {n: t.numel() * (t.element_size() if n.endswith(keep) else 2) for n, t in stored.state_dict().items()}
    assert sum(sizes.values()) == both.after.int4_bytes
    with pytest.raises(BudgetError):
        make_plan(family, config, scores, max_size_bytes=10_000, modulation_rank=0, **options)


@pytest.mark.parametrize("rank", [-1, WIDTH])
def test_rank_out_of_range(rank: int) -> None:
    _, config, family = setup()
    with pytest.raises(InputError, match=f"--modulation-rank: found {rank}, expected 0 to 63, or full"):
        make_plan(family, config, None, method="manual", modulation_rank=rank)


def test_plan_file_keeps_the_rank() -> None:
    _, config, family = setup()
    plan = make_plan(family, config, None, method="manual", modulation_rank=16)
    data = json.loads(json.dumps(plan.to_json()))
    assert PrunePlan.from_json(data, "plan.json") == plan and not plan.stock
    del data["modulation_rank"]  # a plan from before the field existed
    assert PrunePlan.from_json(data, "plan.json").modulation_rank is None
    with pytest.raises(InputError, match=r"plan.json: modulation_rank: found -2"):
        PrunePlan.from_json(data | {"modulation_rank": -2}, "plan.json")


def test_the_rank_is_shown() -> None:
    _, config, family = setup()
    thin, whole = (
        make_plan(family, config, None, method="manual", blocks="1", modulation_rank=rank) for rank in (16, None)
    )
    assert dict(plan_rows(thin, "auto"))["modulation rank"] == "16"
    assert "modulation rank" not in dict(plan_rows(whole, None))
    assert "give more --prompts" in dict(plan_rows(whole, "auto"))["modulation rank"]


def test_option() -> None:
    assert (parse_rank("auto"), parse_rank("full"), parse_rank("16")) == ("auto", None, 16)
    for text in ("", "-1", "half", "1.5", "²"):
        with pytest.raises(InputError, match="--modulation-rank: found"):
            parse_rank(text)
    _, config, family = setup()
    with pytest.raises(InputError, match="--modulation-rank auto: is measured on a model: give -o"):
        make_plan(family, config, None, PlanOptions("manual", modulation_rank="auto"))


# ------------------------------------------------------------------------------------------------ later stages


def test_distillation_trains_all_blocks_where_nothing_else_changed() -> None:
    model, config, family = setup()
    for blocks, first in (("", 0), ("2", 2)):
        plan = make_plan(family, config, None, method="manual", blocks=blocks, modulation_rank=16)
        assert plan.first_pruned == first
        thin = prune(family, model, config, plan, torch.zeros(WIDTH), torch.eye(WIDTH)[:16])
        parameter_groups(family, thin, plan, None, Recipe(), 1e-4)
        trained = {n for n, p in thin.named_parameters() if p.requires_grad}
        assert ("transformer_blocks.0.norm1.linear.weight" in trained) == (first == 0)
        assert "transformer_blocks.2.norm1.linear.weight" in trained
        assert not [n for n in trained if n.startswith("time_text_embed.")]


@pytest.mark.parametrize(("rank", "bits", "group"), [(32, 4, 32), (16, 4, 16), (8, 8, 8)])
def test_thin_layers_are_quantised_in_groups_that_divide_the_rank(rank: int, bits: int, group: int) -> None:
    model, config, family = setup()
    plan = make_plan(family, config, None, method="manual", modulation_rank=rank)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0][:rank]
    thin = quantize(family, prune(family, model, config, plan, torch.zeros(WIDTH), basis))
    layer = thin.transformer_blocks[1].norm1.linear
    assert isinstance(layer, PackedLinear) and (layer.bits, layer.group_size) == (bits, group)
    assert thin.norm_out.linear.bits == 8
    assert isinstance(thin.time_text_embed.basis, torch.nn.Parameter)  # 16 bits, see docs/modulation.md


OPTIONS = CompressOptions(
    plan=PlanOptions("manual", blocks="1", modulation_rank=16), data=DataOptions("shapes", 16),
    distill=DistillOptions(steps=2, batch=2, sensitivity="off"),
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def artefact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefact") / "small"
    compress(Workspace(out, str(source)), OPTIONS)
    return out


def test_all_stages(artefact: Path, source: Path) -> None:
    manifest = json.loads((artefact / "edgeprune.json").read_text())
    assert manifest["plan"]["modulation_rank"] == 16 == manifest["stages"]["plan"]["modulation_rank"]
    assert MODULATION in manifest["files"]
    pipe = edgeprune.load(artefact)
    assert isinstance(pipe.transformer.transformer_blocks[0].norm1.linear, PackedLinear)
    half = load_transformer(artefact, quantized=False)
    original = load_transformer(source, quantized=False)
    ws = Workspace(artefact, str(source))
    small, whole = (velocity(m) for m in (half, original))
    assert small.isfinite().all() and not torch.equal(small, whole)
    stored = open_transformer(artefact, quantized=True).running()  # as exports read it, block by block
    assert (velocity(stored) - velocity(pipe.transformer)).abs().max() <= 1e-5
    assert compress(ws, OPTIONS) == []


def test_auto_stage_says_what_it_chose(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    run_plan(ws, replace(OPTIONS.plan, modulation_rank="auto"))
    inputs = calibration_inputs(ws, ["", *calibration_prompts(None, world=None)])
    expected = choose_rank(inputs, modulation_width(ws.family, ws.config))
    assert ws.plan().modulation_rank == expected == ws.manifest.stages["plan"]["modulation_rank"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo stars\n")
    assert calibration_prompts(str(prompts), world=None) == ["a red circle", "two stars"]


def test_it_stays_whole_by_default(source: Path, tmp_path: Path) -> None:
    """Where a plan leaves little, its rows name the option."""
    config, family = read_config(source)
    count = family.block_count(config)
    scores = {((block, None),): [-float(block)] for block in range(count)}
    report = ContributionReport(fingerprint(config), family.name, count, "none", ["a star"], [0.0], scores)
    write_json(tmp_path / "scores.json", report.to_json())

    def planned(keep: float) -> PrunePlan:
        ws = Workspace(tmp_path / "out", str(source), fresh=True)
        run_plan(ws, replace(DEFAULT, keep=keep, protect_first=0, protect_last=0), tmp_path / "scores.json")
        return ws.plan()

    much, little = planned(1.0), planned(0.6)
    assert much.modulation_rank is None and little.modulation_rank is None
    assert not (tmp_path / "out" / MODULATION).exists()
    assert "modulation rank" not in dict(plan_rows(much, None))
    assert dict(plan_rows(little, None))["modulation rank"].startswith("full; --modulation-rank auto kept more")


@pytest.mark.parametrize("name", ["sd3.5-large", "flux.1-dev"])
def test_projecting_saves_bytes_of_the_file_and_none_in_memory(name: str) -> None:
    """The threshold of a third less in memory, from the published config."""
    config = json.loads((Path(__file__).parents[1] / "samples" / "transformer_configs.json").read_text())[name]
    family = family_of(config)

    def counted(rank: int | None, components: str = "") -> tuple[int, int]:
        plan = make_plan(family, config, None, method="manual", modulation_rank=rank, components=components)
        return plan.after.int4_bytes, resident_bytes(family, config, plan, 64)

    (file, resident), (thin, thin_resident), constant = counted(None), counted(256), counted(0)
    assert resident / file <= (0.70 if name == "sd3.5-large" else 0.75)
    assert thin < 0.8 * file and thin_resident == resident
    assert constant[0] == constant[1] > resident  # vectors of all norms, in the transformer
    less = counted(None, "3:norm")  # whose vector is in the transformer
    assert less[0] < file and less[1] == resident + 2 * 6 * modulation_width(family, config)
    rows = dict(plan_rows(make_plan(family, config, None, method="manual"), None, resident_bytes=resident))
    assert rows["INT4 file"].startswith(f"{file / 1e6:,.1f} MB")
    assert rows["INT4 in memory"].startswith(f"{resident / 1e6:,.1f} MB in each step")


def test_a_plan_without_it_leaves_no_basis_behind(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    run_plan(ws, OPTIONS.plan)
    (ws.out / MODULATION).write_bytes(b"damaged")
    with pytest.raises(InputError, match="SHA-256"):
        run_prune(ws)
    run_plan(Workspace(ws.out, str(source), fresh=True), replace(OPTIONS.plan, modulation_rank=None))
    assert not (ws.out / MODULATION).exists()
    assert MODULATION not in Workspace(ws.out, str(source)).manifest.files


# ------------------------------------------------------------------------------------------------ stock diffusers


@pytest.mark.filterwarnings("ignore")
def test_stock_diffusers_refuses(artefact: Path) -> None:
    for part in ("transformer", "transformer_int4"):
        with pytest.raises(ValueError, match=r"got edgeprune: .*edgeprune\.load\(folder\)"):
            SD3Transformer2DModel.from_pretrained(artefact / part)
    with pytest.raises(ValueError, match=r"got edgeprune: .*edgeprune\.load\(folder\)"):
        StableDiffusion3Pipeline.from_pretrained(artefact, text_encoder_3=None, tokenizer_3=None)


def test_an_export_has_the_stock_config(artefact: Path, source: Path, tmp_path: Path) -> None:
    """Optimum reads the config, and the exported network needs no class of edgeprune."""
    pytest.importorskip("onnxruntime")
    from edgeprune.export import folder

    folder.write(artefact, tmp_path / "out", "onnx", {}, lambda work: {})
    written, original = (
        json.loads((path / "transformer" / "config.json").read_text()) for path in (tmp_path / "out", source)
    )
    assert written["_class_name"] == original["_class_name"] and "quantization_config" not in written
    assert written["num_layers"] == 2


def test_only_the_original_is_compressed(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compress the original"):
        Workspace(tmp_path / "again", str(artefact))
    assert not (tmp_path / "again").exists()


def test_without_its_manifest(artefact: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    (copy / "edgeprune.json").unlink()
    with pytest.raises(InputError, match=r"no edgeprune.json"):
        load_transformer(copy, quantized=False)
