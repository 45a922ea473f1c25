"""Reads the quantised weights from each format's files, independently of the code that wrote them.

    of_checkpoint(folder), of_onnx(path), of_openvino(path), of_coreml(path) -> {layer: Weight}

Layers have the names of the checkpoint. Engines cannot be read, because their format is private to TensorRT; use
`of_onnx` on the ONNX file that its parser gets. O and I are a layer's outputs and inputs, G groups along I.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file


@dataclass(frozen=True)
class Weight:
    """A quantised layer as stored in a file."""

    bits: int
    integers: NDArray[np.int8]
    """The integers (O, I)."""
    scale: NDArray[np.float32]
    """The scales (O, G)."""
    file_bytes: int
    """Bytes of integers and scales in the file."""


def integers(raw: bytes, bits: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """Decode two's complement numbers of 8 bits, or of 4 bits with the lower nibble first."""
    stored = np.frombuffer(raw, np.uint8)
    if bits == 4:
        nibbles = np.stack([stored & 15, stored >> 4], -1).reshape(-1)
        stored = np.where(nibbles > 7, nibbles + 240, nibbles).astype(np.uint8)
    return stored.view(np.int8).reshape(shape)


def of_checkpoint(folder: Path) -> dict[str, Weight]:
    """Read an artefact's `transformer_int4/`: uint8 (O, I * bits / 8), half-precision scales (O, G)."""
    tensors = load_file(folder / "transformer_int4" / "diffusion_pytorch_model.safetensors")
    layers = {}
    for key, packed in tensors.items():
        name = key.removesuffix(".weight_packed")
        if name == key:
            continue
        scale = tensors[f"{name}.weight_scale"]
        inside = name.startswith(("transformer_blocks.", "single_transformer_blocks."))
        bits = 4 if inside else 8  # the rule of precision.py
        shape = packed.shape[0], packed.shape[1] * 8 // bits
        values = integers(packed.tobytes(), bits, shape)
        layers[name] = Weight(bits, values, scale.astype(np.float32), packed.nbytes + scale.nbytes)
    return layers


def of_onnx(model: Any) -> dict[str, Weight]:
    """Read an ONNX file or loaded model: INT4 or INT8 (I, O), scales (G, O), or (O) if there is one per output."""
    import onnx

    loaded = onnx.load(str(model)) if isinstance(model, Path) else model
    tensors = {tensor.name: tensor for tensor in loaded.graph.initializer}
    layers = {}
    for key, tensor in tensors.items():
        name = key.removesuffix(".weight_packed.T")
        if name == key:
            continue
        bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}[tensor.data_type]
        scale = onnx.numpy_helper.to_array(tensors[f"{name}.weight_scale.T"]).reshape(-1, tensor.dims[1])
        values = integers(tensor.raw_data, bits, tuple(tensor.dims))
        layers[name] = Weight(bits, values.T, scale.T.astype(np.float32), len(tensor.raw_data) + scale.nbytes)
    return layers


def of_openvino(path: Path) -> dict[str, Weight]:
    """Read an `openvino_model.xml`: i4 or i8 (I, O), scales (G, O)."""
    from edgeprune.runtimes.openvino import core

    nodes = core().read_model(path).get_ordered_ops()
    constants = {n.get_friendly_name(): n for n in nodes if n.get_type_name() == "Constant"}
    layers = {}
    for key, node in constants.items():
        name = key.removesuffix(".weight_packed.T")
        if name == key:
            continue
        bits = {"i4": 4, "i8": 8}[node.get_element_type().get_type_name()]
        raw, scale = np.array(node.data, copy=True), np.array(constants[f"{name}.weight_scale.T"].data, copy=True)
        values = integers(raw.tobytes(), bits, tuple(node.shape))
        scales = scale.reshape(-1, node.shape[1]).T.astype(np.float32)
        layers[name] = Weight(bits, values.T, scales, raw.nbytes + scale.nbytes)
    return layers


def of_coreml(path: Path, names: list[str]) -> dict[str, Weight]:
    """Read a `model.mlpackage`: data (O, I), scales (O, G). `names` are the layers'; a program has no dots in names."""
    import coremltools as ct

    from edgeprune.export.mil_reference import Package

    bits_of = {ct.proto.MIL_pb2.INT4: 4, ct.proto.MIL_pb2.INT8: 8}
    weights = (path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").read_bytes()
    operations = Package(path).operations
    constants = {op.outputs[0].name: op.attributes["val"] for op in operations if op.type == "const"}

    def read(op: Any, key: str) -> tuple[bytes, Any]:
        """Return a constant's bytes and type; they are in weight.bin behind a header, or in the program itself."""
        binding = op.inputs[key].arguments[0]
        value = constants[binding.name] if binding.name else binding.value
        if value.HasField("immediateValue"):
            return bytes(value.immediateValue.tensor.bytes.values), value.type.tensorType
        sentinel, _, size, offset = struct.unpack_from("<IIQQ", weights, value.blobFileValue.offset)
        assert sentinel == 0xDEADBEEF
        return weights[offset : offset + size], value.type.tensorType

    # torch.export writes names in lower case.
    by_program_name = {f"_{name.lower().replace('.', '_')}_weight_packed": name for name in names}
    layers = {}
    for op in operations:
        if op.type != "constexpr_blockwise_shift_scale":
            continue
        # One name may be the end of another: proj_out and single_transformer_blocks.0.proj_out.
        name = by_program_name[max((key for key in by_program_name if key in f"_{op.outputs[0].name}"), key=len)]
        (data, kind), (scale, width) = read(op, "data"), read(op, "scale")
        shape = tuple(d.constant.size for d in kind.dimensions)
        float_of = {ct.proto.MIL_pb2.FLOAT16: np.float16, ct.proto.MIL_pb2.FLOAT32: np.float32}[width.dataType]
        scales = np.frombuffer(scale, float_of).reshape(shape[0], -1).astype(np.float32)
        bits = bits_of[kind.dataType]
        assert name not in layers
        layers[name] = Weight(bits, integers(data, bits, shape), scales, len(data) + len(scale))
    return layers
