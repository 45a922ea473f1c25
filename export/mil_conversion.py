"""Converts a torch module to a Core ML mlprogram (iOS 18, macOS 15); quantised layers keep their integers.

    convert(module, example, outputs, batches) -> coremltools MLModel

Every `edgeprune::packed_linear` becomes constexpr_blockwise_shift_scale and linear, with the checkpoint's own integers
and half-precision scales. Importing this module also silences coremltools' warnings about a system other than macOS.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.common.extras import needs
from edgeprune.export.coreml_chunks import STREAMS, Chunk, Tensors
from edgeprune.quantization.int4 import unpack

logging.getLogger("coremltools").setLevel(logging.ERROR)  # importing it warns about what only a Mac has
with needs("coreml"):
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
    from coremltools.converters.mil.mil import types


LARGEST_CONSTANT = 2**20
"""Most numbers that the converter computes and stores in a program in float32; what is larger, the device computes.

T5's position biases for 512 tokens are 17 M numbers, made of a table of 16,448.
"""


def convert(
    module: nn.Module, example: Tensors, outputs: Sequence[str], batches: Sequence[int], *, half: bool = True
) -> Any:
    """Convert `module(*example.values())` to an MLModel, which is not loaded.

    Args:
        module: takes its inputs by position.
        example: inputs by name; their first axis is the batch.
        outputs: names of the outputs.
        batches: the batch sizes that the program takes.
        half: compute in half precision, except the timestep's angles; otherwise only table look-ups are.
    """
    batch = torch.export.Dim("batch", min=min(batches), max=max(batches)) if len(batches) > 1 else None
    dynamic = tuple({0: batch} for _ in example) if batch else None
    program = torch.export.export(
        module,
        tuple(example.values()),
        dynamic_shapes=(dynamic,) if batch and isinstance(module, Chunk) else dynamic,  # *tensors is one argument
        strict=False,
    ).run_decompositions({})
    for node in list(program.graph.nodes):  # coremltools does not know this no-op
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    pipeline = ct.PassPipeline()
    if not half:  # in half precision the rounded weights themselves are such constants
        pipeline.set_options("common::const_elimination", {"skip_const_by_size": str(LARGEST_CONSTANT)})
    shapes = {name: [(b, *value.shape[1:]) for b in batches] for name, value in example.items()}
    return ct.convert(
        program,
        inputs=[
            ct.TensorType(
                name=name,
                shape=ct.EnumeratedShapes(shapes[name]) if batch else shapes[name][0],
                dtype=_dtype(name, value),
            )
            for name, value in example.items()
        ],
        outputs=[ct.TensorType(name=name, dtype=_dtype(name)) for name in outputs],
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.transform.FP16ComputePrecision(_is_no_angle if half else _is_lookup),
        pass_pipeline=pipeline,
        skip_model_load=True,
    )


def _dtype(name: str, value: torch.Tensor | None = None) -> Any:
    """Return the type of a program's input or output: int32 or float32 outside, half precision between chunks."""
    if value is not None and not value.is_floating_point():
        return np.int32
    return np.float16 if name.startswith(STREAMS) else np.float32


def _is_no_angle(op: Any) -> bool:
    return not _is_angle(op)


def _is_lookup(op: Any) -> bool:
    return bool(op.op_type == "gather")


def _is_angle(op: Any, depth: int = 4) -> bool:
    """Return whether an operation is a sine or cosine, or is read only by operations that lead to one.

    A timestep goes up to 1000, where neighbouring half-precision numbers are half a radian apart.
    """
    if op.op_type in ("sin", "cos"):
        return True
    readers = [reader for output in op.outputs for reader in output.child_ops]
    return depth > 0 and bool(readers) and all(_is_angle(reader, depth - 1) for reader in readers)


@register_torch_op(torch_alias=["edgeprune::packed_linear"], override=True)  # type: ignore[untyped-decorator]
def packed_linear(context: Any, node: Any) -> None:
    """Translate the custom op: integers (O, I) and scales (O, G) are stored as they are, the device dequantises."""
    x, packed, scale, bias, bits = _get_inputs(context, node)
    integers = unpack(torch.from_numpy(np.array(packed.val).view(np.uint8)), int(bits.val)).numpy()
    weight = mb.constexpr_blockwise_shift_scale(
        data=integers.astype(types.np_int4_dtype if bits.val == 4 else np.int8),
        scale=scale.val,
        name=packed.name,
    )
    more = {} if bias is None or bias.val is None else {"bias": np.asarray(bias.val, scale.val.dtype)}
    context.add(mb.linear(x=x, weight=weight, name=node.name, **more))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence coremltools' progress bars and its warnings about the versions in use."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
