"""Folds constants and removes no-ops of a traced graph with onnxscript's own passes, in linear time.

    simplify(model)

This is onnxscript 0.7.2's optimize_ir without one of its 46 rules, which splits slices: it visits all nodes for each
node, which takes minutes for FLUX's 57 blocks. Rules that apply to none of the exported networks are omitted too.
"""

from __future__ import annotations

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
from onnx_ir.passes import common
from onnxscript.rewriter.rules import common as rules

from edgeprune.export.lowering import lay_out_weights

# In the order of optimize_ir: some rules compete for a node.
_RULES = [
    *rules.mul_by_1_rule.commute(),
    *rules.add_0_rule.commute(),
    rules.sub_0_rule,
    rules.div_by_1_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
]
_ROUNDS = 2
"""Folding can make a rule apply, and a rule's result can be folded."""
# Bytes: shapes and sizes are folded, weights are not. (The folder ignores this before a Transpose.)
_LARGEST_INPUT, _LARGEST_OUTPUT = 4096, 65536


def simplify(model: ir.Model) -> None:
    """Simplify a model, in place."""
    onnxscript.optimizer.inline(model)
    lay_out_weights(model)
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
    _forget()


def _forget() -> None:
    """Match the rules with nothing: a rule refers to the node it last tried, and so to all weights of the model."""
    node = ir.Node("", "Nothing", [])
    nothing = ir.Model(ir.Graph([], [], nodes=[node]), ir_version=10)
    for rule in _RULES:
        rule.match(nothing, nothing.graph, node)
