"""The stage `encoders` of FLUX.2 klein: its Qwen3 in INT4, measured at the states that are read; torch, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import tiny
import torch
import traced
from stage_runs import begun

from edgeprune.artefact.loading import load, load_packed, load_part, open_transformer
from edgeprune.artefact.manifest import Manifest
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.export import to_onnx
from edgeprune.export.stored_qwen3 import StoredQwen3
from edgeprune.families.encoders import QWEN3
from edgeprune.quantization.text import quantize_text_encoder
from edgeprune.residency.compute import Compute
from edgeprune.residency.weights import Weights
from edgeprune.sampling.denoising import encode_prompts
from edgeprune.stages import encoders
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.workspace import Workspace

PACKED, STATES, COUNT = "text_encoder_int4", (9, 18, 27), 6
pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "klein"
    tiny.tiny_klein_pipeline(folder)
    return folder


def kept(patch: pytest.MonkeyPatch, bound: float) -> None:
    """Keep the forms with at most this error, whatever their cosine."""
    patch.setattr(encoders, "PROMPTS", COUNT)
    patch.setattr(encoders, "BOUND", bound)
    patch.setattr(encoders, "LEAST_COSINE", -1.0)


@pytest.fixture(scope="module")
def ws(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    with pytest.MonkeyPatch.context() as patch:
        kept(patch, 10.0)
        found = begun(source, tmp_path_factory.mktemp("out") / "small")
        run_quantize(found, QuantizeOptions(calibration="none", group_size=16))
        assert encoders.run(found, "int4", 16) and not encoders.run(found, "int4", 16)
    return found


@torch.no_grad()
def said(pipe: Any, ws: Workspace) -> torch.Tensor:
    """Return the embeddings of the prompts that calibrate, as diffusers' pipeline encodes them."""
    prompts = calibrating(ws, count=COUNT)[:COUNT]
    return encode_prompts(pipe, prompts, ws.generation.max_sequence_length).hidden


def test_the_error_that_is_written_is_that_of_the_integers(ws: Workspace, source: Path) -> None:
    """Measured by transformers' own forward pass; feedback leaves less of it than the nearest integers."""
    assert Manifest.load(ws.out).encoders == "int4" and Manifest.load(ws.out).files[f"{PACKED}/model.safetensors"]
    exact = load(source)
    wanted = said(exact, ws)
    packed = load(source)
    packed.text_encoder = load_packed(ws.out / "text_encoder", QWEN3, states=STATES)
    found = encoders.errors(said(packed, ws), wanted, states=3)
    written = ws.manifest.stages["encoders"]["errors"]["int4"]
    assert written["relative"] == pytest.approx(found.relative, rel=1e-3)
    assert written["cosine"] == pytest.approx(found.cosine, abs=1e-4)
    exact.text_encoder = quantize_text_encoder(load_part(source / "text_encoder", QWEN3, states=STATES), "int4")
    assert found.relative < encoders.errors(said(exact, ws), wanted, states=3).relative
    shapes = Weights(ws.out / PACKED).shapes
    layers = {int(name.split(".")[2]) for name in shapes if ".layers." in name}
    assert layers == set(range(27)) and "model.norm.weight" not in shapes
    assert shapes["model.embed_tokens.weight_packed"] == (len(tiny.tiny_qwen_tokenizer()), tiny.QWEN_WIDTH)


def test_the_worst_state_counts() -> None:
    """A state of small numbers is read by the transformer like the others, which would hide its error."""
    exact = torch.cat([torch.full((2, 5, 4), size) for size in (100.0, 1.0, 10.0)], dim=-1)
    found = exact.clone()
    found[..., 4] += 1.0  # of four numbers of the second state
    seen = encoders.errors(found, exact, states=3)
    assert seen.relative == pytest.approx(0.5) and not seen.within
    assert seen.cosine == pytest.approx(seen.least_cosine) == pytest.approx(5 / (2 * 7**0.5))
    assert encoders.errors(found, exact).within  # side by side
    for place in (0, 4, 11):  # no state hides what is no number
        broken = exact.clone()
        broken[1, 2, place] = float("nan")
        assert not encoders.errors(broken, exact, states=3).within
    sums, halves = encoders.Sums(), ((found[:1], exact[:1]), (found[1:], exact[1:]))
    for half in halves:
        sums.add(*half)
    assert encoders.worst([sums]).relative == pytest.approx(encoders.errors(found, exact).relative)


def test_torch_and_exports_have_the_same_integers(ws: Workspace) -> None:
    whole = load(ws.out)
    wanted = said(whole, ws)
    staged = StagedPipeline(ws.out, open_transformer(ws.out, quantized=True).load(), Compute(), quantized=True)
    torch.testing.assert_close(said(staged, ws), wanted, rtol=1e-4, atol=1e-4)
    stored = StoredQwen3(ws.out / "text_encoder", STATES)
    ids, mask = staged.tokens("text_encoder", calibrating(ws, count=COUNT)[:COUNT], ws.generation.max_sequence_length)
    for forward in (stored.running(), stored.checkpoint().reference):  # what is written, and what it is compared with
        with torch.no_grad():
            found = torch.cat(forward(ids, mask), dim=-1)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_down_projections_get_8_bits_where_the_error_asks_for_it(
    ws: Workspace, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {form: found["relative"] for form, found in ws.manifest.stages["encoders"]["errors"].items()}
    assert errors["int4-wo8"] < errors["int4"]
    kept(monkeypatch, errors["int4-wo8"] * 1.001)
    other = begun(source, tmp_path / "wide")
    encoders.run(other, "int4", 16)
    assert other.manifest.encoders == "int4-wo8"
    narrow, wide = Weights(ws.out / PACKED), Weights(other.out / PACKED)
    for name in narrow.shapes:
        if ".down_proj." not in name:
            assert torch.equal(narrow[name], wide[name]), name
    name = "model.layers.3.mlp.down_proj.weight_packed"
    assert (narrow.shapes[name], wide.shapes[name]) == ((tiny.QWEN_WIDTH, 24), (tiny.QWEN_WIDTH, 48))


@pytest.mark.slow  # a trace of all its layers
def test_an_export_has_them_too(ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`export` compares the file with transformers' own forward pass on the same integers."""
    traced.only(monkeypatch, "text_encoder")
    record = to_onnx.export(ws.out, tmp_path / "onnx")
    assert record["encoders"] == {"text_encoder": "int4"} and record["parity"]["text_encoder"]["max_relative"] < 1e-4
    model = onnx.load(str(tmp_path / "onnx" / "text_encoder" / "model.onnx"), load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    linear = {kind for name, kind in kinds.items() if "_proj.weight_packed" in name}
    words = {kind for name, kind in kinds.items() if "embed_tokens.weight_packed" in name}
    assert linear == {onnx.TensorProto.INT4} and words == {onnx.TensorProto.INT8}
