"""FLUX.1 from a diffusers folder to every runtime, with a plan that removes blocks and components of both kinds.

Other tests cover what all families share: surgery, plans, distillation, quantisation, integers. These cover what only
FLUX.1 has: packing, guidance as an input, its text encoders and its schedule.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import tiny
import torch
import traced

import edgeprune
from edgeprune import runtimes, targets
from edgeprune.artefact.loading import load_transformer, open_transformer
from edgeprune.common.errors import InputError
from edgeprune.export import graph, modules, parity, to_coreml, to_onnx, to_openvino, to_trt
from edgeprune.export.mil_reference import Package
from edgeprune.export.to_coreml import convert_network
from edgeprune.planning.options import PlanOptions
from edgeprune.report import make
from edgeprune.runtimes import base, coreml, networks
from edgeprune.sampling.denoising import Conditioning, evaluate
from edgeprune.sampling.generation import Generation
from edgeprune.stages.compress import compress, forecast
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.workspace import STAGES, Workspace
from edgeprune.training.recipe import DistillOptions

import coremltools  # isort: skip  # after to_coreml, which keeps it quiet

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PROMPTS = ["two red circles", "a drawing of a star above a ring"]
GONE = {"blocks": "3", "components": "1:mlp,1:context_norm,2:mlp,4:attn,4:norm"}
OPTIONS = CompressOptions(
    analyze=AnalyzeOptions(count=2),
    plan=PlanOptions("manual", **GONE),
    data=DataOptions("shapes", 8),
    distill=DistillOptions(steps=3, batch=2),
)
VARIANTS = {"dev": {}, "schnell": {"guidance_embeds": False}}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) / "tiny" for name in VARIANTS}
    for name, folder in folders.items():
        tiny.tiny_flux_pipeline(folder, **VARIANTS[name])
    return folders


@pytest.fixture(scope="module")
def source(variant: str, sources: dict[str, Path]) -> Path:
    return sources[variant]


@pytest.fixture(scope="module")
def artefact(sources: dict[str, Path]) -> Path:
    """An artefact made from dev."""
    ws = Workspace(sources["dev"].with_name("small"), str(sources["dev"]))
    assert compress(ws, OPTIONS) == [*STAGES, "encoders"]
    return ws.out


@pytest.fixture(scope="module")
def exported(artefact: Path, tiny_folders: tuple[Path, Path]) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        traced.reuse(patch, tiny_folders[1], "vae_decoder")  # that of every tiny pipeline
        to_onnx.export(artefact, artefact.with_name("onnx"))
    return artefact.with_name("onnx")


# ------------------------------------------------------------------------------------- compress


def test_every_stage(artefact: Path, sources: dict[str, Path]) -> None:
    scored = json.loads((artefact / "analysis.json").read_text())["scores"]
    found = {tuple(part) for entry in scored for part in entry["parts"]}
    assert {(0, None), (4, None), (1, "context_mlp"), (4, "mlp")} <= found and (4, "context_mlp") not in found
    assert all(max(entry["scores"]) < 0 for entry in scored)  # every part has an effect
    model: Any = load_transformer(artefact, quantized=True)
    assert (model.config.num_layers, model.config.num_single_layers) == (2, 2)
    first, second = model.single_transformer_blocks
    assert (first.proj_out.in_features, second.proj_out.in_features) == (64, 4 * 64)
    assert compress(Workspace(artefact, str(sources["dev"])), OPTIONS) == []
    make.make_report(Workspace(artefact, str(sources["dev"])), quick=True)
    assert (artefact / "report.html").is_file()


def test_whole_block_plans_load_in_stock_diffusers(source: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    ws = Workspace(tmp_path / "blocks", str(source))
    run_plan(ws, PlanOptions("manual", blocks="1,3"))
    run_prune(ws)
    stock = FluxPipeline.from_pretrained(ws.out)
    ours = edgeprune.load(ws.out)
    with torch.no_grad():
        torch.testing.assert_close(
            *(tiny_step(p.transformer.float(), ws.out) for p in (stock, ours)), rtol=1e-4, atol=1e-4
        )
    assert (stock.transformer.config.num_layers, stock.transformer.config.num_single_layers) == (1, 2)


def tiny_step(model: Any, folder: Path) -> torch.Tensor:
    """Return one velocity at random inputs."""
    whole = modules.Transformer(model)
    return whole.reference(**whole.example(batch=1, height=2, width=3, tokens=5))[0]


def test_forecast(source: Path, variant: str) -> None:
    plan = PlanOptions(keep=0.9, protect_first=0, protect_last=0)
    options = CompressOptions(plan=plan, data=DataOptions("captions"))
    rows = forecast(source, options, Generation.load(source))
    # Guidance is an input of dev, but a second evaluation of schnell.
    assert rows["data_evaluations"] == 1024 * 4 * (1 if variant == "dev" else 2)
    assert rows["evaluation_flops"] > 0 and rows["parameters_left"] < rows["parameters"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"guidance_embeds": True}, (28, 3.5, 1024, 512)), ({"guidance_embeds": False}, (4, 0.0, 1024, 256))],
)
def test_defaults_are_those_of_the_model(source: Path, tmp_path: Path, config: Any, expected: Any) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "copy"))
    (folder / "generation.json").unlink()
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    dynamic = {"use_dynamic_shifting": config["guidance_embeds"]}  # else the model looks de-distilled
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | dynamic))
    found = Generation.load(folder)
    got = found.num_inference_steps, found.guidance_scale, found.height, found.max_sequence_length
    assert got == expected and found.width == found.height
    with pytest.raises(InputError, match="height: found 72, expected a multiple of 16"):  # 8 is a latent pixel
        Generation(height=72, width=64).check_size(folder)


# ------------------------------------------------------------------------------------- runtimes


def test_eager_equals_stock_diffusers(source: Path, variant: str) -> None:
    """Our loop, guidance, schedule and decoding equal FluxPipeline's, from the same noise."""
    with runtimes.load(source) as model:
        ours = np.asarray(model.generate(PROMPTS[0], seed=3)[0], int)
        pipe = model.backend.pipeline  # type: ignore[attr-defined]
        pipe.set_progress_bar_config(disable=True)
        noise = torch.from_numpy(base.initial_latents(model.settings, [3], 64, 64))
        # For schnell the pipeline reads only the guidance scale of its own second evaluation.
        second = {} if variant == "dev" else {"negative_prompt": "", "true_cfg_scale": 3.0}
        theirs = pipe(
            PROMPTS[0], latents=pipe._pack_latents(noise, 1, 8, 8, 8), num_inference_steps=4, guidance_scale=3.0,
            height=64, width=64, max_sequence_length=24, **second,
        ).images[0]  # fmt: skip
    assert ours.std() > 5 and np.abs(ours - np.asarray(theirs, int)).max() <= 1


def test_guidance_reaches_the_image_in_one_evaluation(source: Path, variant: str) -> None:
    with runtimes.load(source) as model:
        batches: list[int] = []
        step = model.backend.step
        model.backend.step = lambda *args: batches.append(len(args[0])) or step(*args)  # type: ignore[method-assign, func-returns-value]
        drawn = [model.generate_latents(PROMPTS[0], seed=3, guidance_scale=g, steps=2) for g in (1.0, 5.0)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-2
    assert batches == ([1, 1, 1, 1] if variant == "dev" else [1, 1, 2, 2])


@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_same_seed_same_image_as_torch(
    artefact: Path, exported: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both run the artefact's INT4 transformer; most of the difference comes from the export's 8-bit T5."""
    monkeypatch.setattr(networks, "allowed", lambda: 0)
    exact = {"precision": "exact"} if name == "openvino" else {}
    with runtimes.load(exported, name, **exact) as ours, runtimes.load(artefact) as theirs:
        for mine, reference in zip(ours.backend.encode(PROMPTS), theirs.backend.encode(PROMPTS), strict=True):
            assert np.linalg.norm(mine - reference) <= 1e-2 * np.linalg.norm(reference)
        text = theirs.backend.encode(PROMPTS)
        latents = base.initial_latents(ours.settings, [1, 2], 48, 80)
        sigma = np.asarray([0.9, 0.2], np.float32)
        mine, reference = (m.step(latents, *text, sigma, 3.5) for m in (ours, theirs))
        assert mine.shape == latents.shape
        assert np.linalg.norm(mine - reference) <= 1e-4 * np.linalg.norm(reference)
        images = [np.asarray(m.generate(PROMPTS[0], seed=7, height=32, width=96)[0], int) for m in (ours, theirs)]
        assert images[0].shape == (32, 96, 3) and images[0].std() > 5
        assert np.abs(images[0] - images[1]).max() <= 4


# ------------------------------------------------------------------------------------- exports


def test_network_is_what_diffusers_gives_it(exported: Path) -> None:
    def axes(name: str) -> dict[str, list[str | int]]:
        loaded = onnx.load(str(exported / name / "model.onnx"), load_external_data=False).graph
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in [*loaded.input, *loaded.output]
        }

    assert axes("transformer") == {
        "hidden_states": ["batch_size", "packed_height_width", 32],
        "encoder_hidden_states": ["batch_size", "sequence_length", tiny.T5_WIDTH],
        "pooled_projections": ["batch_size", tiny.TEXT_WIDTH],
        "timestep": ["batch_size"],
        "img_ids": ["packed_height_width", 3],
        "txt_ids": ["sequence_length", 3],
        "guidance": ["batch_size"],
        "out_hidden_states": ["batch_size", "packed_height_width", 32],
    }
    assert axes("text_encoder") == {
        "input_ids": ["batch_size", "sequence_length"],
        "last_hidden_state": ["batch_size", "sequence_length", tiny.TEXT_WIDTH],
        "pooler_output": ["batch_size", tiny.TEXT_WIDTH],
    }
    loaded = onnx.load(str(exported / "transformer" / "model.onnx"))
    # diffusers computes the rotary embedding in float64, which TensorRT lacks.
    assert onnx.TensorProto.DOUBLE not in {t.data_type for t in loaded.graph.initializer}
    assert onnx.TensorProto.DOUBLE not in {v.type.tensor_type.elem_type for v in loaded.graph.value_info}


@pytest.mark.slow
def test_openvino(artefact: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The IR draws torch's images; the exported ONNX replaces a second trace, which takes long."""
    names = iter(("transformer", "text_encoder", "text_encoder_2", "vae_decoder"))
    monkeypatch.setattr(graph, "to_ir", lambda *_, **__: ir.load(exported / next(names) / "model.onnx"))
    record = to_openvino.export(artefact, tmp_path / "ir", device=targets.load("cpu-x86"))
    assert max(found["max_relative"] for found in record["parity"].values()) < 1e-4
    with runtimes.load(tmp_path / "ir") as ours, runtimes.load(artefact) as theirs:
        images = [np.asarray(m.generate(PROMPTS[0], seed=7, steps=2)[0], int) for m in (ours, theirs)]
    assert ours.name == "openvino" and np.abs(images[0] - images[1]).max() <= 4


@pytest.mark.parametrize("name", VARIANTS)
def test_engine_profiles_are_of_packed_tokens(name: str, sources: dict[str, Path]) -> None:
    """test_integers.py tests that TensorRT builds the engine from integers and half precision; FLUX.1's is slow."""
    whole = modules.Transformer(tiny.tiny_flux(**VARIANTS[name]))
    settings = base.read_settings(sources[name])
    sizes = to_trt.axis_ranges(targets.load("rtx"), settings, settings.family.latents(settings.config).largest, 24)
    profile = to_trt.profile_of(whole.inputs, whole.example(batch=2, height=2, width=2, tokens=5), sizes)
    # From the model's 64 x 64 pixels up to the device's 1024 x 1024.
    assert profile["hidden_states"] == ((1, 16, 32), (2, 16, 32), (2, 4096, 32))
    assert profile["img_ids"] == ((16, 3), (16, 3), (4096, 3)) and profile["txt_ids"][2] == (24, 3)
    assert ("guidance" in profile) == (name == "dev")
    smallest = to_trt._smallest(whole, sizes)
    assert {key: tuple(value.shape) for key, value in smallest.items() if key != "encoder_hidden_states"} == {
        key: shapes[0] if key != "txt_ids" else shapes[2] for key, shapes in profile.items()
        if key != "encoder_hidden_states"
    }  # fmt: skip


@pytest.mark.slow
def test_core_ml(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference evaluator computes the same from the chunks as diffusers from the whole model."""
    model: Any = load_transformer(artefact, quantized=True)
    whole = modules.Transformer(model)
    examples = [whole.example(batch=1, height=4, width=4, tokens=24)]
    parts = to_coreml.split(whole, 3, examples[0])
    assert [part.inputs[:2] for part in parts[1:]] == [[f"image_tokens_{i}", f"text_tokens_{i}"] for i in (1, 2)]
    record = convert_network("transformer", parts, whole, examples, tmp_path, chunks=3)
    assert 0 < record["max_relative"] < 1e-3 and record["max_relative"] < record["half_relative"] < 1e-2

    def opened(path: Path) -> SimpleNamespace:
        package = Package(path)
        return SimpleNamespace(
            compile_s=0, specialise_s=0,
            predict=lambda arrays: dict(zip(package.outputs, package.run(None, arrays), strict=True)),
        )  # fmt: skip

    # The runtime passes positions too, but they are constants of the package.
    example = whole.example(batch=1, height=4, width=4, tokens=24, seed=3)
    monkeypatch.setattr(coreml, "coremltools", coremltools)
    network = coreml.CoremlNetwork(tmp_path, "all", opened)
    found = network(**{name: value.numpy() for name, value in example.items()})["out_hidden_states"]
    with torch.no_grad():
        assert parity.relative_error(found, whole.reference(**example)[0].numpy())[0] < 1e-3


# ------------------------------------------------------------------------------------- residency


@torch.no_grad()
def test_int4_runs_with_no_block_in_memory(artefact: Path) -> None:
    """None of its parameters is then in memory: where and in what to compute is known from biases."""
    stored = open_transformer(artefact, quantized=True)
    latents, sigma = torch.randn(2, stored.family.latents(stored.model.config).channels, 6, 8), torch.tensor([0.9, 0.2])
    width, pooled_width = stored.family.text_widths(stored.model.config)
    condition = Conditioning(torch.randn(2, 24, width), torch.randn(2, pooled_width))
    read = stored.running(torch.float32, torch.device("cpu"), keep=0)
    assert all(p.is_meta for p in read.parameters())
    found, expected = (evaluate(model, latents, condition, sigma, 3.5) for model in (read, stored.load(torch.float32)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
