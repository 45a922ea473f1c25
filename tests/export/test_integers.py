"""For one artefact, every format has the same integers in every quantised layer; and their size on disk.

Each format is written by its public `export`, without the text encoders and the VAE, which are not quantised.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import stored
import tiny
import torch
import traced
from safetensors.torch import load_file, save_file
from stored import Weight

from edgeprune import targets
from edgeprune.artefact.manifest import Manifest
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.writing import save_transformer
from edgeprune.export import to_coreml, to_onnx, to_openvino, to_trt
from edgeprune.quantization.int4 import PackedLinear, pack
from edgeprune.quantization.quantize import prepare

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
WEIGHTS = "transformer_int4/diffusion_pytorch_model.safetensors"
DEVICES = [pytest.param(fmt, marks=pytest.mark.slow) for fmt in ("coreml", "trt")]  # parity compares what these hold
FORMATS = ("onnx", "openvino", *DEVICES)
LAYERS = {"sd3": (33, 7), "flux": (20, 10)}
"""Numbers of INT4 and INT8 layers. SD3: two blocks with a second attention, the last without a context MLP. FLUX: one
joint and one single block. INT8: embedders and output.
"""


# test_flux.py compares FLUX's exports with torch.
@pytest.fixture(scope="module", params=["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def artefact(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of two blocks with random integers over the whole range and random scales."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    pipeline: Any
    if kind == "flux":
        pipeline = tiny.tiny_flux_pipeline(folder, num_layers=1, num_single_layers=1)
    else:
        pipeline = tiny.tiny_pipeline(folder, num_layers=2, dual_attention_layers=(0, 1))
    config, family = read_config(folder)
    model, generator = prepare(family, pipeline.transformer), torch.Generator().manual_seed(5)
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            low, shape = -(2 ** (layer.bits - 1)), (layer.out_features, layer.in_features)
            layer.weight_packed.copy_(pack(torch.randint(low, -low, shape, generator=generator), layer.bits))
            layer.weight_scale.copy_((torch.rand(layer.weight_scale.shape, generator=generator) + 0.5) * 0.2 / -low)
    state = {n: t if n.endswith(("_packed", "_scale")) else t.half() for n, t in model.state_dict().items()}
    save_transformer(folder, "transformer_int4", config, state)
    manifest = Manifest(source="tiny", fingerprint="", family=kind, config=config, group_size=64)
    manifest.hash_files(folder, "transformer_int4")
    manifest.save(folder)
    return folder


@dataclasses.dataclass
class Written:
    """The weights in one format's files, and the files' size."""

    weights: dict[str, Weight]
    bytes: int


def write(artefact: Path, out: Path, fmt: str) -> Written:
    """Export the transformer to a format and read it back; `trt` is the ONNX file that TensorRT's parser gets.

    OpenVINO's IR is made of the ONNX model, which is traced once for both.
    """
    if fmt == "checkpoint":
        return Written(stored.of_checkpoint(artefact), (artefact / WEIGHTS).stat().st_size)
    sources, network = to_onnx.sources, to_coreml.convert_network

    def only_the_transformer(name: str, *rest: Any, **more: Any) -> dict[str, Any]:
        return network(name, *rest, **more) if name == "transformer" else {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "sources", lambda *of, **how: itertools.islice(sources(*of, **how), 1))
        patch.setattr(to_coreml, "convert_network", only_the_transformer)
        if fmt == "trt":
            return parsed_by_tensorrt(artefact, out / fmt, patch)
        if fmt == "coreml":
            to_coreml.export(artefact, out / fmt, device=targets.load("macbook-m"))
            path = out / fmt / "transformer" / "model.mlpackage"
            weight_bin = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
            return Written(stored.of_coreml(path, list(stored.of_checkpoint(artefact))), weight_bin.stat().st_size)
        if not (out / "onnx").exists():
            to_onnx.export(artefact, out / "onnx")
        path = out / "onnx" / "transformer" / "model.onnx"
        if fmt == "onnx":
            return Written(stored.of_onnx(path), sum(p.stat().st_size for p in path.parent.iterdir()))
        traced.reuse(patch, out / "onnx", "transformer")
        to_openvino.export(artefact, out / fmt, device=targets.load("cpu-x86"))
        path = out / fmt / "transformer" / "openvino_model.xml"
        return Written(stored.of_openvino(path), path.with_suffix(".bin").stat().st_size)


def parsed_by_tensorrt(artefact: Path, out: Path, patch: pytest.MonkeyPatch) -> Written:
    given, build = list[onnx.ModelProto](), to_trt.Builder.build

    def noted(self: to_trt.Builder, name: str, path: Path, *rest: Any) -> dict[str, Any]:
        given.append(onnx.load(str(path)))
        return build(self, name, path, *rest)

    patch.setattr(to_trt.Builder, "build", noted)
    said = to_trt.export(artefact, out, device=targets.load("rtx"))["networks"]["transformer"]
    layers = LAYERS[Manifest.load(artefact).family]
    assert (said["int4_layers"], said["int8_layers"]) == layers  # as TensorRT itself counts
    assert said["precision"] == "float16"
    (engine_input,) = given
    return Written(stored.of_onnx(engine_input), engine_input.ByteSize())


@pytest.fixture(scope="module")
def written(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Write a format, once."""
    return functools.cache(functools.partial(write, artefact, tmp_path_factory.mktemp("out")))


def differences(expected: dict[str, Weight], found: dict[str, Weight]) -> list[str]:
    """Return the layers that differ in integers, bits or scales, or are only in one of the two."""
    return sorted(expected.keys() ^ found.keys()) + [
        name
        for name in sorted(expected.keys() & found.keys())
        if expected[name].bits != found[name].bits
        or expected[name].integers.tobytes() != found[name].integers.tobytes()
        or expected[name].scale.tobytes() != found[name].scale.tobytes()
    ]


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_holds_the_checkpoints_integers(kind: str, fmt: str, written: Callable[[str], Written]) -> None:
    expected = written("checkpoint").weights
    bits = [weight.bits for weight in expected.values()]
    assert (bits.count(4), bits.count(8)) == LAYERS[kind]
    for weight in expected.values():
        limits = weight.integers.min(), weight.integers.max()
        assert limits == ((-8, 7) if weight.bits == 4 else limits) and len(np.unique(weight.scale)) > 1
    assert differences(expected, written(fmt).weights) == []


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_one_flipped_bit_is_seen(
    artefact: Path, written: Callable[[str], Written], bits: int, fmt: str, tmp_path: Path
) -> None:
    """Test the comparison itself with a checkpoint that differs in one bit of one layer."""
    name = next(n for n, w in written("checkpoint").weights.items() if w.bits == bits)
    state = load_file(artefact / WEIGHTS)
    state[f"{name}.weight_packed"][1, 2] ^= 0x10
    (tmp_path / WEIGHTS).parent.mkdir()
    save_file(state, tmp_path / WEIGHTS)
    assert differences(stored.of_checkpoint(tmp_path), written(fmt).weights) == [name]


SCALES: dict[str, Callable[[int], float]] = {
    "checkpoint": lambda group: 4 + 16 / group,
    "trt": lambda group: 4 + 16 / group,
    "coreml": lambda group: 4 + 16 / group,
    "onnx": lambda group: 4 + 32 / group,  # scales in float32, like the activations
    "openvino": lambda group: 4 + 32 / group,  # halved only in layers with at least 256 of them
}
"""Largest number of bits per weight by format, for a group size."""


@pytest.mark.parametrize("fmt", ["checkpoint", *FORMATS])
def test_bits_per_weight_on_disk(written: Callable[[str], Written], fmt: str) -> None:
    """4.25 with scales in half precision, 4.5 with float32 scales: integers and scales, measured in the files."""
    weights = [w for w in written(fmt).weights.values() if w.bits == 4]
    count = sum(w.integers.size for w in weights)
    found = 8 * sum(w.file_bytes for w in weights) / count
    assert {w.integers.shape[1] // w.scale.shape[1] for w in weights} == {64}
    assert 4.25 <= found <= SCALES[fmt](64) <= 4.5
    # The rest of the file is too small for a second copy in half precision.
    assert written(fmt).bytes - sum(w.file_bytes for w in weights) < 2 * count
