"""A T5 in INT4: every format has the artefact's integers, torch draws with them, and encoding takes little memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored
import tiny
import torch
import traced
from safetensors.torch import load_file

from edgeprune import api, runtimes, targets
from edgeprune.artefact.loading import load, load_part
from edgeprune.artefact.manifest import Manifest
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.common import pieces
from edgeprune.common.errors import InputError
from edgeprune.export import accepts, parity, to_onnx
from edgeprune.export.stored_t5 import StoredT5
from edgeprune.families.encoders import T5
from edgeprune.quantization.int4 import dequantize
from edgeprune.residency.compute import Compute
from edgeprune.runtimes import piecewise
from edgeprune.stages import encoders
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.workspace import Workspace

NAME = "text_encoder_3"
PROMPTS = ["two red circles", "", "a small green ring left of a large blue star " * 9]
pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations


@pytest.fixture(scope="module", params=["int4", pytest.param("int4-wo8", marks=pytest.mark.slow)])
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with nothing removed, and its T5 in one of the INT4 forms."""
    root = tmp_path_factory.mktemp("t5")
    tiny.tiny_pipeline(root / "source", t5=True, num_layers=1)
    ws = Workspace(root / "small", str(root / "source"))
    run_plan(ws, api.PlanOptions(method="manual", blocks=""))
    run_prune(ws)
    run_quantize(ws, api.QuantizeOptions(calibration="none"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "PROMPTS", 4)
        patch.setattr(encoders, "LEAST_COSINE", 0.0)
        patch.setattr(encoders, "BOUND", 1.0)
        if request.param == "int4-wo8":
            within = encoders.Errors.within.fget
            forms = iter([False, True])
            patch.setattr(encoders.Errors, "within", property(lambda self: within(self) and next(forms)))
        encoders.run(ws, "int4", 64)
    assert ws.manifest.encoders == request.param
    return ws.out


@pytest.fixture(scope="module")
def onnx_folder(artefact: Path, tiny_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        traced.reuse(patch, tiny_folders[1], "text_encoder", "text_encoder_2", "vae_decoder")
        record = to_onnx.export(artefact, out)
    assert record["encoders"] == {NAME: Manifest.load(artefact).encoders}
    assert record["parity"][NAME]["max_relative"] < 1e-4
    return out


def floats(artefact: Path) -> Any:
    """Return transformers' own T5 with what the artefact's integers stand for, unpacked here."""
    model = load_part(artefact / NAME, T5)
    tensors, state = load_file(artefact / f"{NAME}_int4" / "model.safetensors"), model.state_dict()
    for name, tensor in state.items():
        layer = name.removesuffix(".weight").replace("encoder.embed_tokens", "shared")
        if f"{layer}.weight_packed" in tensors:
            packed = tensors[f"{layer}.weight_packed"]
            bits = 8 * packed.shape[1] // tensor.shape[1]
            state[name] = dequantize(packed, tensors[f"{layer}.weight_scale"], bits, torch.float32)
        else:
            state[name] = tensors[f"{layer}.weight"].float()
    model.load_state_dict(state)
    return model


def ids() -> torch.Tensor:
    words = tiny.tiny_t5_tokenizer()
    return torch.tensor(words(PROMPTS, padding="max_length", max_length=tiny.T5_TOKENS, truncation=True).input_ids)


def expected(artefact: Path) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = floats(artefact)(ids()).last_hidden_state
    return out


def check_integers(artefact: Path, found: dict[str, stored.Weight]) -> None:
    tensors = load_file(artefact / f"{NAME}_int4" / "model.safetensors")
    names = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    names.remove("shared")
    assert sorted(found) == sorted(names) and len(names) == 2 * 7
    for name in names:
        packed, weight = tensors[f"{name}.weight_packed"], found[name]
        wide = name.endswith("wo") and Manifest.load(artefact).encoders == "int4-wo8"
        assert weight.bits == (8 if wide else 4)
        shape = packed.shape[0], packed.shape[1] * 8 // weight.bits
        np.testing.assert_array_equal(weight.integers, stored.integers(packed.numpy().tobytes(), weight.bits, shape))
        np.testing.assert_array_equal(weight.scale, tensors[f"{name}.weight_scale"].float().numpy())


def test_onnx_has_its_integers(artefact: Path, onnx_folder: Path) -> None:
    import onnx

    model = onnx.load(str(onnx_folder / NAME / "model.onnx"))
    check_integers(artefact, stored.of_onnx(model))
    tables = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if "embed_tokens" in t.name}
    assert [t.dtype for t in tables.values()].count(np.int8) == 1
    table = next(t for t in tables.values() if t.dtype == np.int8)
    packed = load_file(artefact / f"{NAME}_int4" / "model.safetensors")["shared.weight_packed"]
    np.testing.assert_array_equal(table, packed.numpy().view(np.int8))
    assert "INT4" in (onnx_folder / "README.md").read_text()


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_runtimes_encode_with_them(artefact: Path, onnx_folder: Path, runtime: str) -> None:
    if not runtimes.RUNTIMES[runtime].installed():
        pytest.skip(f"{runtime} is not installed")
    with runtimes.load(onnx_folder, runtime) as model:
        hidden, _ = model.backend.encode(PROMPTS)
    assert parity.relative_error(hidden[:, tiny.TOKENS :], expected(artefact).numpy())[0] < 1e-3


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_pieces_look_words_up_in_the_file(
    artefact: Path, onnx_folder: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not runtimes.RUNTIMES[runtime].installed():
        pytest.skip(f"{runtime} is not installed")
    monkeypatch.setattr(piecewise, "TABLE", 1000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    path, looked_up, call = onnx_folder / NAME / "model.onnx", [], piecewise.Lookup.__call__
    monkeypatch.setattr(
        piecewise.Lookup, "__call__", lambda self, feed: looked_up.append(self.table.dtype) or call(self, feed)
    )
    file: Any
    if runtime == "ort":
        from edgeprune.runtimes.ort_pieces import OrtFile
        from edgeprune.runtimes.ort_session import session_options
        from edgeprune.runtimes.providers import Choice

        choice = Choice("cpu", ("CPUExecutionProvider",), "", False)
        file = OrtFile(path, session_options, choice)
    else:
        from edgeprune.runtimes.openvino import OpenVinoFile
        from edgeprune.runtimes.openvino import settings_of as openvino_settings

        file = OpenVinoFile(path, "CPU", openvino_settings("CPU"))
    network = piecewise.PiecewiseNetwork(file, 1)
    found = network(input_ids=ids().numpy())["last_hidden_state"]
    network.close()
    assert parity.relative_error(found, expected(artefact).numpy())[0] < 1e-3
    assert np.dtype(np.int8) in looked_up


@pytest.mark.slow
def test_openvino_has_its_integers(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from edgeprune.export.to_openvino import MODEL, export

    traced.only(monkeypatch, NAME)
    monkeypatch.setattr("edgeprune.export.genai.write", lambda folder: {})
    export(artefact, tmp_path / "ir", device=targets.load("cpu-x86"))
    check_integers(artefact, stored.of_openvino(tmp_path / "ir" / NAME / MODEL))


def test_coreml_computes_with_them(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("coremltools")
    from edgeprune.export import to_coreml
    from edgeprune.export.coreml_packages import Chain

    network = to_coreml.convert_network

    def only_the_t5(name: str, *rest: Any, **more: Any) -> dict[str, Any]:
        return network(name, *rest, **more) if name == NAME else {}

    monkeypatch.setattr(to_coreml, "convert_network", only_the_t5)
    record = to_coreml.export(artefact, tmp_path / "coreml", device=targets.load("macbook-m"))
    assert record["parity"][NAME]["max_relative"] < 1e-4
    path = tmp_path / "coreml" / NAME / "model.mlpackage"
    names = [name for name, module in floats(artefact).named_modules() if isinstance(module, torch.nn.Linear)]
    check_integers(artefact, stored.of_coreml(path, names))
    found = Chain([path]).run(None, {"input_ids": ids()[:1].numpy()})[0]
    assert parity.relative_error(found, expected(artefact)[:1].numpy())[0] < 1e-3


@pytest.mark.slow  # test_trt.py builds engines of INT4
def test_an_engine_is_built_of_them(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgeprune.export.to_trt import export

    traced.only(monkeypatch, NAME)
    said = export(artefact, tmp_path / "trt", device=targets.load("rtx"))["networks"][NAME]
    wide = 2 if Manifest.load(artefact).encoders == "int4-wo8" else 0
    # The table of words has 8 bits, too.
    assert (said["precision"], said["int8_layers"], said["int4_layers"]) == ("float16", wide + 1, 14 - wide)


@torch.no_grad()
def test_torch_draws_with_them(artefact: Path) -> None:
    """A pipeline whose encoders are read layer by layer, and one in memory; INT4 is used if asked for."""
    wanted = expected(artefact)
    for quantized in (True, False):
        staged = StagedPipeline(artefact, None, Compute(), quantized=quantized)
        said = torch.from_numpy(staged.outputs(PROMPTS, tiny.T5_TOKENS)[NAME]["last_hidden_state"])
        assert torch.allclose(said, wanted, atol=1e-4) == quantized
    pipe = load(artefact, quantized=False)
    assert torch.equal(pipe.text_encoder_3(ids()).last_hidden_state, load_part(artefact / NAME, T5)(ids())[0])


def test_eager_reads_them(artefact: Path) -> None:
    for memory in (None, 10**10):
        with runtimes.load(artefact, "eager", memory=memory) as model:
            hidden, _ = model.backend.encode(PROMPTS)
        assert parity.relative_error(hidden[:, tiny.TOKENS :], expected(artefact).numpy())[0] < 1e-3


@pytest.mark.slow  # two traces; test_t5.py exports one in 8 bits
def test_other_forms_are_rounded_at_export(tmp_path: Path) -> None:
    tiny.tiny_pipeline(tmp_path / "source", t5=True, num_layers=1)
    ws = Workspace(tmp_path / "small", str(tmp_path / "source"))
    run_plan(ws, api.PlanOptions(method="manual", blocks=""))
    run_prune(ws)
    exact = load_part(ws.out / NAME, T5)
    for form, bound in (("half", 1e-6), ("int8", 0.05)):
        ws.fresh = True
        encoders.run(ws, form, 64)
        t5 = StoredT5(ws.out / NAME)
        example = t5.running().example(batch=2, tokens=9)
        with torch.no_grad():
            (found,), (run,), wanted = t5.checkpoint()(**example), t5.running()(**example), exact(**example)[0]
        assert parity.relative_error(run.numpy(), found.numpy())[0] < 1e-5
        assert parity.relative_error(found.numpy(), wanted.numpy())[1] < bound
        source = to_onnx.NetworkSource("t5", t5.running(), example, [example], example, t5, t5.checkpoint)
        to_onnx.save("t5", source.to_ir(), tmp_path / f"{form}.onnx")
        parity.check(
            "t5", parity.session(tmp_path / f"{form}.onnx"), source.checkpoint(), [example], ["last_hidden_state"]
        )


def test_a_device_that_takes_no_such_groups_refuses_it(artefact: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(artefact, tmp_path / "bad"))
    shutil.rmtree(bad / "transformer_int4")
    device = dataclasses.replace(targets.load("cpu-x86"), int4_group_sizes=(128,))
    with pytest.raises(InputError, match=f"{NAME}_int4: encoder.block.0.*group size"):
        accepts.check(bad, device)
    accepts.check(bad, dataclasses.replace(device, int4_group_sizes=(32, 64)))


def test_a_part_of_another_t5_is_refused(artefact: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(artefact, tmp_path / "bad"))
    path = bad / NAME / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 1}))
    with pytest.raises(InputError, match=r"encoder\.block\.1"):
        StoredT5(bad / NAME)
