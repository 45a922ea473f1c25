"""Folds constants and drops no-ops of a traced graph, by onnxscript's own passes: its optimizer in linear time.

    simplify(model)

onnxscript.optimizer.optimize_ir has 46 rules, and one of them (it splits slices) goes through all nodes for each node:
three minutes for FLUX's 57 blocks. No network here meets it. What it leaves out: rules that no network here meets.
"""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
from onnx_ir.passes import common
from onnxscript.rewriter.rules import common as rules

_RULES = [
    rules.add_0_rule,
    rules.cast_cast_rule,
    rules.collapse_slice2_rule,
    rules.collapse_slice_rule,
    rules.div_by_1_rule,
    rules.materialize_reshape_shape_rule,
    rules.mul_by_1_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.reshape_reshape_rule,
    rules.squeeze_reshape_1d_rule,
    rules.sub_0_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
]
_ROUNDS = 2
"""A rule's result may be folded, and what is folded may meet a rule."""
# In bytes: sizes are folded, weights are not.
_LARGEST_INPUT, _LARGEST_OUTPUT = 4096, 65536


def simplify(model: ir.Model) -> None:
    """In place."""
    for _ in range(_ROUNDS):
        onnxscript.optimizer.fold_constants(
            model, onnx_shape_inference=True, input_size_limit=_LARGEST_INPUT, output_size_limit=_LARGEST_OUTPUT
        )
        onnxscript.rewriter.rewrite(model, _RULES)
    ir.passes.Sequential(
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
