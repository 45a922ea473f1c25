"""Writes an export folder with ONNX networks of any size; each is a few matrix products, so weights dominate memory.

It is for tests of memory, where a real model of that size would take minutes. The images are noise.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

_FLOAT, _INT = TensorProto.FLOAT, TensorProto.INT64


def folder(tiny_export: Path, out: Path, stage_bytes: int) -> Path:
    """Copy the tiny export's small files and write networks with `stage_bytes` of weights in each stage."""
    shutil.copytree(tiny_export, out, ignore=shutil.ignore_patterns("*.onnx*"))
    node = helper.make_node
    for name in ("text_encoder", "text_encoder_2"):
        nodes, constants = _products("embedded", 8, "hidden_states.0", 32, stage_bytes // 2)
        nodes = [
            node("Gather", ["table", "input_ids"], ["embedded"]),
            *nodes,
            node("Identity", ["hidden_states.0"], ["hidden_states.1"]),
            node("ReduceMean", ["hidden_states.0", "one"], ["text_embeds"], keepdims=0),
        ]
        tokens = {"hidden_states.0": ["b", "m", 32], "hidden_states.1": ["b", "m", 32], "text_embeds": ["b", 32]}
        ids = helper.make_tensor_value_info("input_ids", _INT, ["b", "m"])
        table = _numbers("table", np.ones((1000, 8), np.float32))  # the tiny tokenizer has fewer tokens
        _save(out / name, nodes, [ids], tokens, [*constants, table, _numbers("one", [1])])
    noisy = {"hidden_states": 4, "encoder_hidden_states": 3, "pooled_projections": 2, "timestep": 1}
    inputs = [helper.make_tensor_value_info(n, _FLOAT, list("abcd"[:rank])) for n, rank in noisy.items()]
    nodes, constants = _products("pooled_projections", 64, "flat", 512, stage_bytes)
    nodes += [
        node("Reshape", ["flat", "shape"], ["shift"]),
        node("Add", ["hidden_states", "shift"], ["velocity"]),
    ]
    shape = _numbers("shape", [-1, 8, 8, 8])
    _save(out / "transformer", nodes, inputs, {"velocity": list("abcd")}, [*constants, shape])
    nodes, constants = _products("flat", 512, "colours", 3, stage_bytes)
    nodes = [
        node("Reshape", ["latent_sample", "line"], ["flat"]),
        *nodes,
        node("Reshape", ["colours", "dot"], ["small"]),
        node("Expand", ["small", "size"], ["sample"]),
    ]
    latents = helper.make_tensor_value_info("latent_sample", _FLOAT, list("abcd"))
    rest = [_numbers("line", [-1, 512]), _numbers("dot", [-1, 3, 1, 1]), _numbers("size", [1, 3, 64, 64])]
    _save(out / "vae_decoder", nodes, [latents], {"sample": list("abcd")}, [*constants, *rest])
    return out


def _products(
    first: str, width: int, last: str, width_out: int, size: int
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return nodes and weights that compute `last` from `first` through a square matrix of about `size` bytes."""
    side = math.isqrt(size // 4)
    rng = np.random.default_rng(size)
    shapes = {"rise": (width, side), "square": (side, side), "fall": (side, width_out)}
    constants = [_numbers(n, rng.random(shape, dtype=np.float32) / side) for n, shape in shapes.items()]
    names = [first, "risen", "squared", last]
    nodes = [helper.make_node("MatMul", [names[i], weight], [names[i + 1]]) for i, weight in enumerate(shapes)]
    return nodes, constants


def _numbers(name: str, values: object) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(values), name)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: dict[str, list[str | int]],
    constants: list[onnx.TensorProto],
) -> None:
    results = [helper.make_tensor_value_info(name, _FLOAT, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(nodes, "heavy", inputs, results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    # In a file of their own, as in exports: reading weights inside the model takes three times their memory.
    onnx.save(model, path / "model.onnx", save_as_external_data=True, location="model.onnx.data")
