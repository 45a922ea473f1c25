"""An export folder whose networks are lookup tables in ONNX: as large as asked for, next to nothing to compute.

For tests of memory, where a real model of that size would take minutes. What it leaves out: sense.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

_FLOAT, _INT = TensorProto.FLOAT, TensorProto.INT64


def folder(tiny_export: Path, out: Path, stage_bytes: int) -> Path:
    """The tiny export's small files, and networks of which each stage (both text encoders, ...) has `stage_bytes`."""
    shutil.copytree(tiny_export, out, ignore=shutil.ignore_patterns("*.onnx*"))
    for name in ("text_encoder", "text_encoder_2"):
        table = _table(stage_bytes // 2, 32)
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], ["hidden_states.0"]),
            helper.make_node("Identity", ["hidden_states.0"], ["hidden_states.1"]),
            helper.make_node("ReduceMean", ["hidden_states.0", "one"], ["text_embeds"], keepdims=0),
        ]
        tokens = {"hidden_states.0": ["b", "m", 32], "hidden_states.1": ["b", "m", 32], "text_embeds": ["b", 32]}
        ids = helper.make_tensor_value_info("input_ids", _INT, ["b", "m"])
        _save(out / name, nodes, [ids], tokens, [table, _numbers("one", [1])])
    noisy = {"hidden_states": 4, "encoder_hidden_states": 3, "pooled_projections": 2, "timestep": 1}
    inputs = [helper.make_tensor_value_info(n, _FLOAT, list("abcd"[:rank])) for n, rank in noisy.items()]
    nodes = [
        helper.make_node("Cast", ["timestep"], ["row"], to=_INT),
        helper.make_node("Gather", ["table", "row"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["shift"]),
        helper.make_node("Add", ["hidden_states", "shift"], ["velocity"]),
    ]
    shape = _numbers("shape", [-1, 8, 8, 8])
    _save(out / "transformer", nodes, inputs, {"velocity": list("abcd")}, [_table(stage_bytes, 512, rows=1001), shape])
    nodes = [
        helper.make_node("ReduceMax", ["latent_sample", "axes"], ["most"], keepdims=0),
        helper.make_node("Sub", ["most", "most"], ["nothing"]),
        helper.make_node("Cast", ["nothing"], ["row"], to=_INT),
        helper.make_node("Gather", ["table", "row"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["sample"]),
    ]
    latents = helper.make_tensor_value_info("latent_sample", _FLOAT, list("abcd"))
    rest = [_numbers("axes", [1, 2, 3]), _numbers("shape", [-1, 3, 64, 64])]
    _save(out / "vae_decoder", nodes, [latents], {"sample": list("abcd")}, [_table(stage_bytes, 3 * 64 * 64), *rest])
    return out


def _table(size: int, width: int, *, rows: int = 1) -> onnx.TensorProto:
    """Of `size` bytes, but of at least `rows` rows; every token id of the tiny tokenizer has one."""
    rows = max(rows, size // (4 * width), 1000 if width == 32 else 1)
    values = np.linspace(-1, 1, rows * width, dtype=np.float32).reshape(rows, width)
    return onnx.numpy_helper.from_array(values, "table")


def _numbers(name: str, values: list[int]) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(values, np.int64), name)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: dict[str, list[str | int]],
    constants: list[onnx.TensorProto],
) -> None:
    found = [helper.make_tensor_value_info(name, _FLOAT, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(nodes, "tables", inputs, found, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    # Inside the file: ONNX Runtime would map tables of a file beside it, and what is not read takes no memory.
    onnx.save(model, path / "model.onnx")
