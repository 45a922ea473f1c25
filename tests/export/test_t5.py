"""T5 in every format: embeddings joined as in diffusers, 8-bit weights, tokens, little memory, refused inputs."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import traced

from edgeprune import runtimes, targets
from edgeprune.common.errors import InputError
from edgeprune.export import modules, parity, to_onnx
from edgeprune.planning import fit
from edgeprune.quantization.precision import text_precision_of
from edgeprune.quantization.text import quantize_text_encoder
from edgeprune.runtimes import networks
from edgeprune.runtimes.text import PromptTokenizer
from edgeprune.sampling.generation import Generation

PROMPTS = ["two red circles", "", "a small green ring left of a large blue star " * 9]
pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a tiny pipeline with a T5, and the pipeline with the T5 rounded as in an export."""
    folder = tmp_path_factory.mktemp("t5") / "source"
    pipe = tiny.tiny_pipeline(folder, t5=True, num_layers=1)
    pipe.text_encoder_3 = rounded(pipe.text_encoder_3)
    return folder, pipe


def rounded(model: Any) -> Any:
    """Return transformers' own T5EncoderModel with the dequantised weights."""
    integers = dict(quantize_text_encoder(copy.deepcopy(model)).named_modules())
    out = copy.deepcopy(model)
    for name, layer in out.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = integers[name].weight
    return out


def expected(pipe: Any, prompts: list[str] = PROMPTS) -> list[np.ndarray[Any, Any]]:
    """Return hidden and pooled text from StableDiffusion3Pipeline.encode_prompt."""
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=tiny.T5_TOKENS
        )
    return [hidden.numpy(), pooled.numpy()]


def same(found: Any, wanted: Any, bound: float = 1e-3) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert parity.relative_error(a, b)[0] <= bound


@pytest.fixture(scope="module")
def onnx_folder(
    pipeline: tuple[Path, Any], tiny_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("out") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        traced.reuse(patch, tiny_folders[1], "text_encoder", "text_encoder_2", "vae_decoder")
        record = to_onnx.export(pipeline[0], out)
    assert list(record["parity"]) == ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae_decoder"]
    return out


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
@pytest.mark.parametrize("free", [10**12, 0])
def test_encode_is_diffusers_own(
    onnx_folder: Path, pipeline: tuple[Path, Any], runtime: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not runtimes.RUNTIMES[runtime].installed():
        pytest.skip(f"{runtime} is not installed")
    monkeypatch.setattr(networks, "allowed", lambda: free)
    with runtimes.load(onnx_folder, runtime) as model:
        hidden, pooled = model.backend.encode(PROMPTS)
        assert hidden.shape == (3, tiny.TOKENS + tiny.T5_TOKENS, tiny.T5_WIDTH)
        assert not hidden[:, : tiny.TOKENS, 2 * tiny.TEXT_WIDTH :].any() and hidden[:, tiny.TOKENS :].any()
        same((hidden, pooled), expected(pipeline[1]))
        assert model.generate("two red circles", steps=1)[0].size == (64, 64)


@pytest.mark.slow  # the ONNX folder runs in OpenVINO above
def test_openvino_folder(pipeline: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from edgeprune.export.to_openvino import export

    export(pipeline[0], tmp_path / "ir", device=targets.load("cpu-x86"))
    with runtimes.load(tmp_path / "ir", "openvino") as model:
        same(model.backend.encode(PROMPTS), expected(pipeline[1]))


def test_linear_weights_are_in_8_bits_and_tables_in_half_precision(
    onnx_folder: Path, pipeline: tuple[Path, Any]
) -> None:
    import onnx
    from stored import of_onnx

    model = onnx.load(str(onnx_folder / "text_encoder_3" / "model.onnx"))
    weights, layers = of_onnx(model), quantize_text_encoder(copy.deepcopy(pipeline[1].text_encoder_3))
    assert len(weights) == 2 * 7 and {w.bits for w in weights.values()} == {8}
    for name, weight in weights.items():
        layer: Any = layers.get_submodule(name)
        np.testing.assert_array_equal(weight.integers.view(np.uint8), layer.weight_packed.numpy())
        assert weight.scale.shape == (layer.out_features, 1)
    floats = {t.name: t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert not [
        name for name, t in floats.items() if len(t.dims) > 1 and "weight_scale" not in name and max(t.dims) > 16
    ]
    halves = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    table = [t for t in halves if "weight_scale" not in t.name]
    assert sorted(list(t.dims) for t in table) == [[len(tiny.tiny_t5_tokenizer()), tiny.T5_WIDTH], [257, 2]]


def test_rounding_costs_little(pipeline: tuple[Path, Any]) -> None:
    """Measure the error of 8 bits, which the parity check does not see."""
    ids = torch.from_numpy(np.asarray(tiny.tiny_t5_tokenizer()(PROMPTS, padding=True).input_ids))
    exact = tiny.tiny_t5(len(tiny.tiny_t5_tokenizer()))
    with torch.no_grad():
        found, wanted = pipeline[1].text_encoder_3(ids)[0], exact(ids)[0]
    assert 1e-4 < parity.relative_error(found.numpy(), wanted.numpy())[1] < 5e-2


def test_any_number_of_tokens(onnx_folder: Path, pipeline: tuple[Path, Any]) -> None:
    runner = parity.session(onnx_folder / "text_encoder_3" / "model.onnx")
    for batch, tokens in ((1, 1), (2, 17), (1, 300)):
        example = modules.T5Encoder(pipeline[1].text_encoder_3).example(batch=batch, tokens=tokens)
        with torch.no_grad():
            wanted = pipeline[1].text_encoder_3(example["input_ids"])[0].numpy()
        same(runner.run(None, {"input_ids": example["input_ids"].numpy()}), [wanted])


def test_tokens_equal_transformers(onnx_folder: Path) -> None:
    texts = [*PROMPTS, "  Two   RED\ncircles!! ", "déjà vu 🙂 </s> <pad>", "x" * 400]
    theirs = tiny.tiny_t5_tokenizer()
    for length in (2, 9, tiny.T5_TOKENS):
        ids = theirs(texts, padding="max_length", max_length=length, truncation=True).input_ids
        ours = PromptTokenizer(onnx_folder / "tokenizer_3", chat=False, max_length=length)(texts)
        np.testing.assert_array_equal(ours, ids)
        assert (ours == 1).any(1).all()  # the end token, also in a truncated prompt


def test_little_memory_holds_every_network_alone(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.runtimes.base import read_settings

    shapes = {"text_embeds": (32,), "hidden_states.0": (16, 32), "hidden_states.1": (16, 32)}
    held: set[str] = set()
    held_with: dict[str, set[str]] = {}

    class Opened:
        provider, why = "x", "y"

        def __init__(self, path: Path) -> None:
            self.name = path.name
            held.add(self.name)
            held_with[self.name] = set(held)

        def __call__(self, **arrays: Any) -> dict[str, Any]:
            batch = len(next(iter(arrays.values())))
            if self.name == "text_encoder_3":
                return {"last_hidden_state": np.ones((batch, tiny.T5_TOKENS, tiny.T5_WIDTH), np.float32)}
            return {name: np.ones((batch, *shape), np.float32) for name, shape in shapes.items()}

        def close(self) -> None:
            held.discard(self.name)

    monkeypatch.setattr(networks, "allowed", lambda: 0)
    engine = networks.WholeEngine("x", Opened)
    backend = networks.NetworkBackend(engine, onnx_folder, read_settings(onnx_folder))
    hidden, pooled = backend.encode(["a", "b"])
    assert hidden.shape == (2, tiny.TOKENS + tiny.T5_TOKENS, tiny.T5_WIDTH) and pooled.shape == (2, 64)
    assert held_with == {name: {name} for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    backend._network("transformer")
    assert held == {"transformer"}


def test_fit_counts_it_as_it_is_stored(pipeline: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    device = targets.load("cpu-x86")
    whole = dataclasses.replace(device, runtimes=("trt",))
    generation = Generation.load(pipeline[0])
    state = tiny.tiny_t5(len(tiny.tiny_t5_tokenizer())).state_dict()
    state.pop("encoder.embed_tokens.weight")  # the same tensor as `shared`
    clips = [sum(p.numel() for p in e.parameters()) for e in (pipeline[1].text_encoder, pipeline[1].text_encoder_2)]
    # Of INT4 the larger form counts: which one is kept is not known yet.
    for encoders, form in {"int4": "int4-wo8", "int8": "int8", "half": "half"}.items():
        t5 = sum(text_precision_of(name, tuple(t.shape), form).nbytes(tuple(t.shape)) for name, t in state.items())
        found = fit.fit(pipeline[0], device, generation, encoders).text_encoder_bytes
        assert found == max(t5, *(4 * count for count in clips))
        assert fit.fit(pipeline[0], whole, generation, encoders).text_encoder_bytes == found
    assert t5 > 4 * max(clips)
    assert fit.fit(pipeline[0], device, generation) == fit.fit(pipeline[0], device, generation, "int4")
    monkeypatch.setattr(fit, "PIECE_BYTES", 1000)
    assert fit.fit(pipeline[0], device, generation, "half").text_encoder_bytes == 4 * max(clips)


def test_t5_xxl_in_bytes() -> None:
    """T5-XXL of SD3.5 and FLUX: 4.76 G parameters, of which 131.6 M are embeddings."""
    width, inner, blocks = 4096, 10240, 24
    shapes = {"shared.weight": (32128, width)}
    for i in range(blocks):
        at = f"encoder.block.{i}.layer"
        shapes |= {f"{at}.0.SelfAttention.{n}.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{at}.1.DenseReluDense.{n}.weight": (inner, width) for n in ("wi_0", "wi_1")}
        shapes[f"{at}.1.DenseReluDense.wo.weight"] = (width, inner)
    for form, size in {"int4": 2.59, "int4-wo8": 3.06, "int8": 4.90, "half": 9.52}.items():
        found = sum(text_precision_of(n, s, form).nbytes(s) for n, s in shapes.items()) / 1e9
        assert found == pytest.approx(size, abs=0.01), form


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("model_index.json", {"tokenizer_3": [None, None]}, "tokenizer_3: found"),
        ("model_index.json", {"text_encoder_3": ["transformers", "UMT5EncoderModel"]}, "text_encoder_3: found 'UMT5"),
        ("generation.json", {"max_sequence_length": 1}, "max_sequence_length: found 1, expected 2 or more with a T5"),
    ],
)
def test_what_is_refused(pipeline: tuple[Path, Any], tmp_path: Path, file: str, change: Any, says: str) -> None:
    bad = Path(shutil.copytree(pipeline[0], tmp_path / "bad"))
    (bad / file).write_text(json.dumps(json.loads((bad / file).read_text()) | change))
    with pytest.raises(InputError, match=says):
        to_onnx.export(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------- formats that nothing here runs


@pytest.mark.slow  # test_t5_int4.py and test_coreml_text.py convert T5s
def test_coreml_package(pipeline: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run two chunks in the reference evaluator; they declare that they compute in float32."""
    ct = pytest.importorskip("coremltools")
    from edgeprune.export import to_coreml
    from edgeprune.export.coreml_packages import Chain
    from edgeprune.export.mil_reference import Package

    network = to_coreml.convert_network

    def only_the_t5(name: str, *rest: Any, **more: Any) -> dict[str, Any]:
        return network(name, *rest, **more) if name == "text_encoder_3" else {}

    monkeypatch.setattr(to_coreml, "convert_network", only_the_t5)
    monkeypatch.setattr(to_coreml, "CHUNK_BYTES", 5e4)  # others: test_coreml_text.py
    record = to_coreml.export(pipeline[0], tmp_path / "coreml", device=targets.load("macbook-m"))
    assert record["parity"]["text_encoder_3"]["max_relative"] < 1e-4
    assert record["chunks"]["text_encoder_3"] == 2
    paths = [tmp_path / "coreml" / "text_encoder_3" / f"chunk_{i}.mlpackage" for i in (1, 2)]
    ids = PromptTokenizer(tmp_path / "coreml" / "tokenizer_3", chat=False, max_length=tiny.T5_TOKENS)(PROMPTS[:1])
    same(Chain(paths).run(None, {"input_ids": ids}), [expected(pipeline[1])[0][:1, tiny.TOKENS :]])
    kinds = {"linear": set(), "gather": set(), "constexpr_blockwise_shift_scale": set()}
    for op in (op for path in paths for op in Package(path).operations):
        if op.type in kinds:
            kinds[op.type].add(op.outputs[0].type.tensorType.dataType)
    proto = ct.proto.MIL_pb2
    assert kinds["linear"] == kinds["constexpr_blockwise_shift_scale"] == {proto.FLOAT32}
    assert kinds["gather"] == {proto.FLOAT16}


@pytest.mark.slow  # test_t5_int4.py builds one
def test_engine(pipeline: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """test_trt.py builds the engines of the other networks."""
    pytest.importorskip("tensorrt_rtx")
    from edgeprune.export.to_trt import export

    traced.only(monkeypatch, "text_encoder_3")
    record = export(pipeline[0], tmp_path / "trt", device=targets.load("rtx"))
    said = record["networks"]["text_encoder_3"]
    assert (said["precision"], said["int8_layers"], said["int4_layers"]) == ("float16", 14, 0)
    assert said["profile"]["input_ids"][2][1] == tiny.T5_TOKENS
    assert (tmp_path / "trt" / "text_encoder_3" / "model.engine").stat().st_size == said["engine_bytes"]


def test_the_stream_stays_float32_in_half_precision(pipeline: tuple[Path, Any]) -> None:
    """Sums beyond 65,504, as in T5-XXL, do not overflow."""
    module = modules.T5Encoder(quantize_text_encoder(copy.deepcopy(pipeline[1].text_encoder_3)))
    for block in module.model.encoder.block:
        block.layer[1].DenseReluDense.wo.weight_scale.mul_(100_000)
    example = module.example(batch=1, tokens=9)
    with torch.no_grad():
        wanted = module(**example)[0]
        streams: list[torch.Tensor] = []
        module.model.encoder.final_layer_norm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        found = copy.deepcopy(module).half()(**example)[0]
        module(**example)
    assert streams[-1].abs().max() > 65_504 and found.dtype == torch.float16
    assert parity.relative_error(found.float().numpy(), wanted.numpy())[1] < parity.HALF_BOUND
