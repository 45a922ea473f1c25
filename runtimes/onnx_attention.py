"""Computes attention for a few queries at a time, so that tokens x tokens numbers never exist.

A row of scores depends on one query, so slices of queries give what all queries give together. ONNX Runtime has a fused
operation (com.microsoft.MultiHeadAttention). Its CPU kernel holds all scores unless several conditions are met, which
differ between versions and machines (all of q, k and v as (B, tokens, width), a known cache size), and needs more
memory even then: copies of q, k and v. Measured with 38 heads of 64 numbers on one core:

| tokens | | time | memory |
| --- | --- | --- | --- |
| 1,357 | plain | 0.28 s | 293 MB |
| | fused | 0.17 s | 93 MB |
| | slices of 128 | 0.17 s | 40 MB |
| 4,429 | plain | 4.0 s | 3,025 MB |
| | fused | 1.9 s | 302 MB |
| | slices of 128 | 2.7 s | 129 MB |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgeprune.common.extras import needs
from edgeprune.runtimes.onnx_sizes import Kind, Sizing

with needs("onnx"):
    import onnx
    from onnx import helper, numpy_helper

QUERIES = 128
"""Queries of a slice. Fewer cost time; with more, the scores of a head leave the processor's cache."""


def slice_attention(nodes: Sequence[Any], sizing: Sizing, returned: set[str]) -> tuple[list[Any], list[Any]]:
    """Return nodes of which softmax(q k) v is computed in slices, and the new weights that they read.

    Args:
        nodes: of a graph, in order.
        sizing: gets the new values.
        returned: the names of the graph's outputs.
    """
    makers = {name: node for node in nodes for name in node.output}
    users: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    replaced: dict[str, list[Any]] = {}
    dropped: set[str] = set()
    weights: dict[str, Any] = {}
    for softmax in nodes:
        if softmax.op_type != "Softmax" or softmax.domain:
            continue
        scores, product = makers.get(softmax.input[0]), users.get(softmax.output[0], [])
        inner = (softmax.input[0], softmax.output[0])
        alone = all(len(users.get(name, [])) == 1 and name not in returned for name in inner)
        if scores is None or not alone or [one.op_type for one in (scores, *product)] != ["MatMul", "MatMul"]:
            continue
        axis = next((one.i for one in softmax.attribute if one.name == "axis"), -1)
        shape = sizing.kinds[inner[0]].shape
        at_end = axis % len(shape) == len(shape) - 1 and product[0].input[0] == inner[1]
        if not at_end or len(shape) < 3 or shape[-2] < 2 * QUERIES:
            continue
        if len(sizing.kinds[scores.input[0]].shape) != len(shape):
            continue  # queries of fewer axes, to be broadcast
        replaced[product[0].output[0]] = _slices(scores, softmax, product[0], sizing, weights)
        dropped |= {inner[0], inner[1]}
    kept = [node for node in nodes if not dropped & set(node.output)]
    out = [new for node in kept for new in replaced.get(node.output[0], [node])]
    return out, list(weights.values())


def _slices(scores: Any, softmax: Any, product: Any, sizing: Sizing, weights: dict[str, Any]) -> list[Any]:
    """Return the nodes that compute a product's output slice by slice."""
    queries, result = scores.input[0], product.output[0]
    kinds = sizing.kinds
    total = kinds[queries].shape[-2]
    sizes = [min(QUERIES, total - start) for start in range(0, total, QUERIES)]
    lengths = f"edgeprune/slices/{total}"
    if lengths not in weights:
        weights[lengths] = numpy_helper.from_array(np.array(sizes, np.int64), lengths)
        kinds[lengths] = Kind(onnx.TensorProto.INT64, (len(sizes),))
    axis = len(kinds[queries].shape) - 2

    def name(what: str, index: int) -> str:
        return f"{result}/{what}/{index}"

    out = [helper.make_node("Split", [queries, lengths], [name("q", i) for i in range(len(sizes))], axis=axis)]
    for i, rows in enumerate(sizes):
        first, second = (helper.make_node("MatMul", ends, [made]) for ends, made in (
            ([name("q", i), scores.input[1]], name("scores", i)),
            ([name("shares", i), product.input[1]], name("made", i)),
        ))  # fmt: skip
        middle = helper.make_node("Softmax", [name("scores", i)], [name("shares", i)], axis=-1)
        out += [first, middle, second]
        for made, whole in (
            ("q", queries),
            ("scores", scores.output[0]),
            ("shares", softmax.output[0]),
            ("made", result),
        ):
            shape = list(kinds[whole].shape)
            shape[-2] = rows
            kinds[name(made, i)] = Kind(kinds[whole].element, tuple(shape))
    out.append(helper.make_node("Concat", [name("made", i) for i in range(len(sizes))], [result], axis=axis))
    return out
