"""Evaluates a saved Core ML package without a Mac: a reference for the MIL operations that edgeprune's packages use.

    Package(Path("model.mlpackage")).run(["velocity"], {"hidden_states": ...})

It walks the operations of the saved program, reads every constant from weight.bin, and computes each operation in
torch. By default all arithmetic is float32 on the stored values, so a difference to the checkpoint comes from how the
package stores them. With `half=True` every value that the program declares as half precision is rounded after each
operation, as on a device (apart from the order of sums), so an overflow shows. Control flow, state and images are not
supported; any operation or parameter that is not listed below raises an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.frontend.milproto.load import TranscriptionContext, _load_value
from numpy.typing import NDArray
from torch.nn import functional as F

from edgeprune.common.errors import ParityError

Tensor = torch.Tensor


class Package:
    """A saved mlprogram.

    Raises:
        ParityError: coremltools cannot read it as an mlprogram.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            model = ct.models.MLModel(str(path), skip_model_load=True)
        except Exception as error:  # coremltools raises plain Exception
            raise ParityError(f"{path.name}: coremltools cannot read it ({error})") from error
        self._constants = TranscriptionContext(weights_dir=model.weights_dir)
        self.spec: Any = model.get_spec()
        program = self.spec.mlProgram.functions["main"]
        block = program.block_specializations[program.opset]
        self.operations, self.inputs = list(block.operations), [v.name for v in program.inputs]
        self.outputs = list(block.outputs)
        # A value is dropped after its last reader; otherwise all weights of a large model would be here in float32.
        self._last = {name: i for i, op in enumerate(self.operations) for name in _read_by(op)}

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, half: bool = False) -> list[NDArray[Any]]:
        """Compute the outputs `names` (for None all, in the program's order) from arrays by input name.

        Raises:
            ParityError: an operation is not listed below, or fails.
        """
        values: dict[str, Any] = {name: _plain(np.asarray(array)) for name, array in feeds.items()}
        wanted = list(names or self.outputs)
        for i, op in enumerate(self.operations):
            results = self._step(op, values)
            for output, result in zip(op.outputs, results, strict=True):
                rounded = half and output.type.tensorType.dataType == ct.proto.MIL_pb2.FLOAT16
                values[output.name] = result.half().float() if rounded and isinstance(result, Tensor) else result
            for name in _read_by(op):
                if self._last[name] == i and name not in wanted:
                    del values[name]
        self._constants.blob_reader_from_filename.clear()  # each reader keeps its file mapped: a chain would hold all
        return [values[name].numpy() for name in wanted]

    def _step(self, op: Any, values: Mapping[str, Any]) -> Sequence[Any]:
        """Compute the results of one operation."""
        if op.type == "const":
            return [_plain(_load_value(self._constants, op.attributes["val"]))]
        if op.type not in OPERATIONS:
            raise ParityError(
                f"{self.path.name}: MIL operation {op.type!r} ({op.outputs[0].name}): not supported by mil_reference"
            )
        arguments = {}
        for key, argument in op.inputs.items():
            bound = [self._argument(binding, values) for binding in argument.arguments]
            arguments[key] = bound if key == "values" else bound[0]
        try:
            result = OPERATIONS[op.type](**arguments)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            line = " ".join(str(error).split())
            raise ParityError(f"{self.path.name}: MIL operation {op.type!r} ({op.outputs[0].name}): {line}") from error
        return result if isinstance(result, (tuple, list)) else [result]

    def _argument(self, binding: Any, values: Mapping[str, Any]) -> Any:
        if binding.WhichOneof("binding") == "name":
            return values[binding.name]
        return _plain(_load_value(self._constants, binding.value))


def _read_by(op: Any) -> set[str]:
    """Return the names of the values that an operation reads."""
    return {b.name for a in op.inputs.values() for b in a.arguments if b.WhichOneof("binding") == "name"}


def _plain(value: Any) -> Any:
    """Convert numbers to tensors of float32, int64 or bool, of int8 or uint8 if they have one byte; keep text."""
    if isinstance(value, (str, bytes)):
        return value
    array = np.asarray(value)
    integer = {("i", 1): np.int8, ("u", 1): np.uint8}.get((array.dtype.kind, array.dtype.itemsize), np.int64)
    kind: Any = np.float32 if array.dtype.kind == "f" else bool if array.dtype.kind == "b" else integer
    return torch.from_numpy(np.array(array, kind))


# ------------------------------------------------------------------------------ operations without an equal in torch
# Parameters have MIL's names; a parameter that a program may omit has MIL's default.


def _ints(value: Tensor | None) -> list[int]:
    return [] if value is None else [int(v) for v in value.reshape(-1)]


def _only(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{what}: found {found!r}, expected {expected!r}")


def _dequantise(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """Return scale * (data - offset); each scale covers a block, of equal size along every axis."""

    def blocks(tensor: Tensor) -> Tensor:
        """Split each axis in two, the blocks and the values in one block, where a 1 broadcasts."""
        pairs = zip(scale.shape, tensor.shape, strict=True)
        return tensor.reshape([n for count, size in pairs for n in (count, size // count)])

    values = blocks(data) if offset is None else blocks(data) - blocks(offset.float())
    return (values * blocks(scale.float())).reshape(data.shape)


def _cast(x: Tensor, dtype: str) -> Tensor:
    kinds = {"fp16": torch.float32, "fp32": torch.float32, "bool": torch.bool}
    kinds |= dict.fromkeys(("int8", "uint8", "int16", "uint16", "int32"), torch.int64)
    return x.to(kinds[dtype])


def _conv(
    x: Tensor, weight: Tensor, strides: Tensor, pad_type: str, pad: Tensor, dilations: Tensor, groups: Tensor,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if pad_type == "custom":  # before and after of each axis, first axis first; torch wants the last first
        pairs = [_ints(pad)[i : i + 2] for i in range(0, pad.numel(), 2)]
        x = F.pad(x, [p for pair in reversed(pairs) for p in pair])
    else:
        _only("pad_type", pad_type, "valid")
    _only("rank", x.ndim, 4)
    return F.conv2d(x, weight, bias, _ints(strides), 0, _ints(dilations), int(groups))


def _split(x: Tensor, axis: Tensor, split_sizes: Tensor | None = None, num_splits: Tensor | None = None) -> Any:
    if split_sizes is not None:
        return x.split(_ints(split_sizes), int(axis))
    assert num_splits is not None
    return x.chunk(int(num_splits), int(axis))


def _slice_by_index(
    x: Tensor, begin: Tensor, end: Tensor, stride: Tensor | None = None, begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None, squeeze_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Slice each axis; a mask of 1 means: from the start, to the end, or take one element and drop the axis."""
    none = [0] * x.ndim
    firsts, lasts, drops = (_ints(mask) or none for mask in (begin_mask, end_mask, squeeze_mask))
    index: list[Any] = []
    steps = _ints(stride) or [1] * x.ndim
    for axis, (first, last, step) in enumerate(zip(_ints(begin), _ints(end), steps, strict=True)):
        part = slice(None if firsts[axis] else first, None if lasts[axis] else last, step)
        index.append(first if drops[axis] else part)
    return x[tuple(index)]


def _concat(values: list[Tensor], axis: Tensor, interleave: Tensor) -> Tensor:
    _only("interleave", bool(interleave), False)
    return torch.cat([torch.atleast_1d(v) for v in values], int(axis))  # MIL takes scalars too


def _gather(
    x: Tensor, indices: Tensor, axis: Tensor, batch_dims: Tensor | int = 0, validate_indices: Tensor | bool = False
) -> Tensor:
    _only("batch_dims", int(batch_dims), 0)
    place = int(axis) % x.ndim
    flat = x.index_select(place, indices.reshape(-1) % x.shape[place])
    return flat.reshape((*x.shape[:place], *indices.shape, *x.shape[place + 1 :]))


def _gather_nd(
    x: Tensor, indices: Tensor, batch_dims: Tensor | int = 0, validate_indices: Tensor | bool = False
) -> Tensor:
    _only("batch_dims", int(batch_dims), 0)
    return x[tuple(indices.unbind(-1))]


def _layer_norm(
    x: Tensor, axes: Tensor, epsilon: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    _only("axes", [a % x.ndim for a in _ints(axes)], [x.ndim - 1])
    return F.layer_norm(x, x.shape[-1:], gamma, beta, float(epsilon))


def _batch_norm(
    x: Tensor, mean: Tensor, variance: Tensor, epsilon: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask)


def _matmul(x: Tensor, y: Tensor, transpose_x: Tensor | bool = False, transpose_y: Tensor | bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    return F.gelu(x, approximate={"EXACT": "none", "TANH_APPROXIMATION": "tanh"}[mode])


def _upsample(x: Tensor, scale_factor_height: Tensor, scale_factor_width: Tensor) -> Tensor:
    return x.repeat_interleave(int(scale_factor_height), -2).repeat_interleave(int(scale_factor_width), -1)


def _reduce(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: Tensor, keep_dims: Tensor | bool = False) -> Tensor:
        return function(x, dim=_ints(axes), keepdim=bool(keep_dims))

    return reduce


def _squeeze(x: Tensor, axes: Tensor) -> Tensor:
    return x.squeeze(tuple(_ints(axes)))


def _expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    final = x.ndim + axes.numel()
    for axis in sorted(a % final for a in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _argmax(x: Tensor, axis: Tensor, keep_dims: Tensor | bool = False, output_dtype: str = "int32") -> Tensor:
    # MIL returns the first of equal values; torch does not promise that.
    best = x == x.amax(int(axis), keepdim=True)
    return best.long().argmax(int(axis), keepdim=bool(keep_dims))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: x.abs(),
    "add": lambda x, y: x + y,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "concat": _concat,
    "constexpr_blockwise_shift_scale": _dequantise,
    "conv": _conv,
    "cos": lambda x: x.cos(),
    "equal": lambda x, y: x == y,
    "expand_dims": _expand_dims,
    "fill_like": lambda ref_tensor, value: value.expand(ref_tensor.shape),
    "floor_div": lambda x, y: x.div(y, rounding_mode="floor"),
    "gather": _gather,
    "gather_nd": _gather_nd,
    "gelu": _gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "identity": lambda x: x,
    "layer_norm": _layer_norm,
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "logical_and": lambda x, y: x & y,
    "logical_not": lambda x: ~x,
    "matmul": _matmul,
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, int(upscale_factor)),
    "pow": lambda x, y: x**y,
    "real_div": lambda x, y: x / y,
    "reduce_argmax": _argmax,
    "reduce_max": _reduce(torch.amax),
    "reduce_mean": _reduce(torch.mean),
    "reduce_sum": _reduce(torch.sum),
    "reshape": lambda x, shape: x.reshape(_ints(shape)),
    "rsqrt": lambda x, epsilon: (x + epsilon).rsqrt(),
    "scaled_dot_product_attention": _attention,
    "select": lambda cond, a, b: torch.where(cond, a, b),
    "shape": lambda x: torch.tensor(x.shape),
    "sigmoid": lambda x: x.sigmoid(),
    "silu": lambda x: F.silu(x),
    "sin": lambda x: x.sin(),
    "slice_by_index": _slice_by_index,
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "split": _split,
    "sqrt": lambda x: x.sqrt(),
    "square": lambda x: x * x,
    "squeeze": _squeeze,
    "stack": lambda values, axis: torch.stack(values, int(axis)),
    "sub": lambda x, y: x - y,
    "tanh": lambda x: x.tanh(),
    "tile": lambda x, reps: x.tile(_ints(reps)),
    "transpose": lambda x, perm: x.permute(_ints(perm)),
    "upsample_nearest_neighbor": _upsample,
}
"""The supported operations, by name: functions of MIL's named parameters."""
