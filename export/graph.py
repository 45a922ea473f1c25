"""A torch module becomes an ONNX model (opset 21) in which quantised layers keep their integers.

    to_ir(Transformer(sd3), inputs, inputs_axes, outputs_axes) -> onnx_ir.Model

`torch.onnx.export` leaves every `edgeprune::packed_linear` as one node of that name; `lower_packed_linear` then
replaces it by DequantizeLinear(INT4 or INT8, axis=0, block_size) -> MatMul -> Add. Weights are stored [in, out], so no
Transpose is left for a runtime to trip over. A module of fake tensors is traced like one of real ones; its weights are
then read, repacked and written one at a time. What the checkpoint holds in half precision the file holds so too, and
casts it. What it leaves out: text encoders that do not fit into memory.

Notation: B batch, C latent channels, h w latent height and width, M text tokens, K text width, P pooled width,
I and O a layer's inputs and outputs, G groups along I.
"""

from __future__ import annotations

import functools
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import opset21, values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edgeprune.common.errors import EdgepruneError
from edgeprune.export import external_data as data
from edgeprune.export.progress import Progress, silent
from edgeprune.export.simplify import simplify
from edgeprune.families import family_of_model
from edgeprune.families.base import Axes
from edgeprune.quantization.int4 import PackedLinear, pack, unpack
from edgeprune.sampling.denoising import Conditioning, network_inputs

Read = Callable[[str], torch.Tensor]
"""From a tensor's name to the tensor."""
OPSET = 21
DOMAIN = "edgeprune"
# Above this a model's weights go into `model.onnx.data`; ONNX itself cannot hold 2 GB in one file.
INLINE_BYTES = 1_000_000

_LEAST_TABLE_BYTES = 1024  # smaller ones are not worth a node
_LEAST_BESIDE = 256  # bytes; what is not larger (shapes, axes) stays in the graph's file

_TORCH = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.UINT8: torch.uint8,
}
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_SCHEMA = onnx.defs.OpSchema(
    "PackedLinear",
    DOMAIN,
    1,
    inputs=[
        onnx.defs.OpSchema.FormalParameter("x", "T"),
        onnx.defs.OpSchema.FormalParameter("packed", "tensor(uint8)"),
        onnx.defs.OpSchema.FormalParameter("scale", "S"),
        onnx.defs.OpSchema.FormalParameter("bias", "S", param_option=onnx.defs.OpSchema.FormalParameterOption.Optional),
    ],
    outputs=[onnx.defs.OpSchema.FormalParameter("y", "T")],
    type_constraints=[("T", _FLOATS, "activations"), ("S", _FLOATS, "stored scales and bias")],
    attributes=[onnx.defs.OpSchema.Attribute("bits", onnx.defs.OpSchema.AttrType.INT, "4 or 8", required=True)],
)
_packed_linear_node = values.Op(values.Opset(DOMAIN, 1), "PackedLinear", _SCHEMA)


def _translate(x: Any, packed: Any, scale: Any, bias: Any = None, bits: int = 4) -> Any:
    """`edgeprune::packed_linear` as one ONNX node of our own domain, until `lower_packed_linear`."""
    return _packed_linear_node(x, packed, scale, bias, bits=bits)


def _floor_divide(a: Any, b: Any) -> Any:
    """a // b of sizes, rounding down. PyTorch's own translation truncates, and the exporter writes the crop of the
    position table as w + 8 + (-w) // 2: with an odd number of patches it would be one column too wide.
    """
    return opset21.Div(opset21.Sub(a, opset21.Mod(a, b)), b)


# --------------------------------------------------------------------------------------- what is traced
# Each keeps the network as `model`, whose prefix `to_ir` takes off again: names in the file are the checkpoint's.


class Transformer(nn.Module):
    """A transformer as ONNX sees it: what diffusers gives it, to what it gives, put together from the family's pieces.

    `reference` is diffusers' own forward pass, which exports are compared with.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.family = model, family_of_model(model)
        self.inputs, self.outputs = self.family.axes(model.config)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor]:
        """Those of `inputs`, in order, to that of `outputs`."""
        family, model, inputs = self.family, self.model, dict(zip(self.inputs, tensors, strict=True))
        positions = family.positions(model, inputs)
        text: torch.Tensor | None
        image, text, modulation = family.embed(model, inputs)
        for block in family.blocks(model):
            assert text is not None  # only the last block ends it
            image, text = family.run(block, image, text, modulation, positions)
        return (family.unembed(model, image, modulation, family.grid(model, inputs)),)

    def reference(self, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
        """The same by the model's own forward pass."""
        return (self.model(**inputs, return_dict=False)[0],)

    def example(self, *, batch: int, height: int, width: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random inputs; `height` and `width` count image tokens."""
        generator = torch.Generator().manual_seed(seed)
        space, widths = self.family.latents(self.model.config), self.family.text_widths(self.model.config)
        shape = batch, space.channels, height * space.patch, width * space.patch
        latents = torch.randn(shape, generator=generator)
        condition = Conditioning(
            torch.randn(batch, tokens, widths[0], generator=generator),
            torch.randn(batch, widths[1], generator=generator),
        )
        sigma = torch.rand(batch, generator=generator)
        return network_inputs(self.model, latents, condition, sigma, guidance=4 * float(sigma[0]))


class TextEncoder(nn.Module):
    """CLIPTextModelWithProjection: pooled and projected text, last state, then every hidden state (0 = embedding).

    CLIPTextModel: pooled text alone, not projected.
    """

    inputs: Axes = {"input_ids": {0: "batch_size", 1: "sequence_length"}}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        states = ["last_hidden_state", *(f"hidden_states.{i}" for i in range(self.config.num_hidden_layers + 1))]
        sequence = {0: "batch_size", 1: "sequence_length"}
        self.outputs: Axes = {"pooler_output": {0: "batch_size"}}
        if hasattr(model, "text_projection"):
            self.outputs = {"text_embeds": {0: "batch_size"}, **dict.fromkeys(states, sequence)}

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, M) int64 to (B, P) and states (B, M, D)."""
        if "pooler_output" in self.outputs:
            return (self.model(input_ids=input_ids).pooler_output,)
        out = self.model(input_ids=input_ids, output_hidden_states=True)
        return (out.text_embeds, out.last_hidden_state, *out.hidden_states)

    def example(self, *, batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random words between start and end tokens, padded with end tokens, at different lengths."""
        generator = torch.Generator().manual_seed(seed)
        end = self.config.eos_token_id
        # CLIP configs older than transformers 4.24 say 2 where the tokenizer's end token is the vocabulary's last.
        last = self.config.vocab_size - 1 if end == 2 else end
        ids = torch.randint(0, min(self.config.vocab_size, last) - 1, (batch, tokens), generator=generator)
        for row in range(batch):
            ids[row, max(1, tokens - 1 - row) :] = last
        return {"input_ids": ids}


class T5Encoder(nn.Module):
    """T5EncoderModel: its last hidden state, without a mask: SD3 and FLUX have every token attend to padding too.

    The stream between layers is float32 also where all else is half precision: T5-XXL's goes beyond 65,504. The bias of
    two positions is looked up by their distance: a table instead of T5's logarithms, whose rounding decides a bucket.
    """

    inputs: Axes = {"input_ids": {0: "batch_size", 1: "sequence_length"}}
    outputs: Axes = {"last_hidden_state": {0: "batch_size", 1: "sequence_length"}}
    bias: torch.Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        attention = model.encoder.block[0].layer[0].SelfAttention
        # All positions at this distance or beyond are in one bucket.
        self.farthest = int(self.config.relative_attention_max_distance)
        buckets = attention._relative_position_bucket(
            torch.arange(-self.farthest, self.farthest + 1), bidirectional=True,
            num_buckets=self.config.relative_attention_num_buckets, max_distance=self.farthest,
        )  # fmt: skip
        self.register_buffer("bias", attention.relative_attention_bias.weight.detach()[buckets])

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, M) int64 to (B, M, K)."""
        encoder = self.model.encoder
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        distances = (positions[None, :] - positions[:, None]).clamp(-self.farthest, self.farthest) + self.farthest
        bias = nn.functional.embedding(distances, self.bias).permute(2, 0, 1)[None]  # (1, heads, M, M)
        hidden = encoder.embed_tokens(input_ids).float()
        for block in encoder.block:
            attention, feed_forward = block.layer
            hidden = attention(hidden, position_bias=bias)[0]
            hidden = hidden + self._feed_forward(feed_forward.DenseReluDense, feed_forward.layer_norm(hidden))
        return (encoder.final_layer_norm(hidden),)

    def _feed_forward(self, dense: Any, x: torch.Tensor) -> torch.Tensor:
        """(B, M, K) to float32 (B, M, K). transformers' own reads `wo.weight`, which PackedLinear would unpack."""
        inner = dense.act(dense.wi_0(x)) * dense.wi_1(x) if self.config.is_gated_act else dense.act(dense.wi(x))
        out: torch.Tensor = dense.wo(inner.float())
        return out

    def example(self, *, batch: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random words, an end token, then padding, at different lengths."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, self.config.vocab_size, (batch, tokens), generator=generator)
        for row in range(batch):
            end = tokens - 1 - row * (tokens // batch)
            ids[row, end:] = self.config.pad_token_id
            ids[row, end] = self.config.eos_token_id
        return {"input_ids": ids}


class VaeDecoder(nn.Module):
    """AutoencoderKL's decoder: images (B, 3, h * f, w * f) in about -1..1; scale and shift stay with the caller."""

    inputs: Axes = {"latent_sample": {0: "batch_size", 2: "latent_height", 3: "latent_width"}}

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        # Optimum evaluates the names of output axes, blanks included.
        self.outputs: Axes = {
            "sample": {0: "batch_size", 2: f"latent_height * {factor}", 3: f"latent_width * {factor}"}
        }

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, C, h, w) to (B, 3, h * f, w * f)."""
        return (self.model.decode(latent_sample, return_dict=False)[0],)

    def example(self, *, batch: int, height: int, width: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Random latents."""
        generator = torch.Generator().manual_seed(seed)
        return {"latent_sample": torch.randn(batch, self.config.latent_channels, height, width, generator=generator)}


def half(example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a network in half precision. What is one number a sample (timestep, guidance) stays float32: near
    1000 half precision has steps of 0.5.
    """
    return {k: v.half() if v.is_floating_point() and v.ndim > 1 else v for k, v in example.items()}


M = TypeVar("M", bound=nn.Module)


def widen(module: M) -> M:
    """A network for evaluation in float32, in place; what quantised layers store stays as it is."""
    packed = {m: (m.weight_scale, m.bias) for m in module.modules() if isinstance(m, PackedLinear)}
    module.eval().to(torch.float32)
    for layer, (scale, bias) in packed.items():
        layer.weight_scale, layer.bias = scale, bias
    return module


# --------------------------------------------------------------------------------------- torch to ONNX


def to_ir(
    module: nn.Module, example: Mapping[str, torch.Tensor], inputs: Axes, outputs: Axes, *, read: Read | None = None
) -> ir.Model:
    """Trace `module(*example.values())` and lower the quantised layers; batch and sizes dynamic as the axes say.

    The file computes in the precision of the module and its example: float32, or float16 (`half`).

    Args:
        read: gives the weights of a module of fake tensors, by the checkpoint's names.

    Raises:
        EdgepruneError: PyTorch cannot trace or translate the module.
    """
    shapes: tuple[Any, ...] = tuple(dict(inputs[name]) for name in example)
    try:
        with torch.no_grad(), _quiet(), _fake_mode(module) as mode:
            program = torch.onnx.export(
                module,
                args=tuple(mode.from_tensor(tensor) if mode else tensor for tensor in example.values()),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(shapes,) if isinstance(module, Transformer) else shapes,  # *tensors is one argument
                input_names=list(example),
                output_names=list(outputs),
                custom_translation_table={
                    torch.ops.edgeprune.packed_linear.default: _translate,
                    operator.floordiv: _floor_divide,
                },
                verbose=False,
                optimize=False,  # it would want the weights
            )
    except torch.onnx.OnnxExporterError as error:
        kind = type(getattr(module, "model", module)).__name__
        raise EdgepruneError(f"{kind}: PyTorch cannot export it: {error}") from error
    assert program is not None
    model = program.model
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        value.name = value.name.removeprefix("model.")
        if read is not None and isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            _attach(value, read)
    with _quiet():
        simplify(model)
    lower_packed_linear(model)
    halve_tables(model)
    for value, axes in zip(model.graph.outputs, outputs.values(), strict=True):
        assert value.shape is not None
        value.shape = ir.Shape([axes.get(i, dim) for i, dim in enumerate(value.shape)])
    model.producer_name = "edgeprune"
    # Stack traces: most of a small file, and paths of the machine it was made on.
    ClearMetadataAndDocStringPass()(model)
    return model


@contextmanager
def _fake_mode(module: nn.Module) -> Iterator[FakeTensorMode | None]:
    """The mode that a module's fake tensors belong to; None for a module of real ones."""
    mode: FakeTensorMode | None = getattr(next(module.parameters(), None), "fake_mode", None)
    with mode or nullcontext():
        yield mode


def _attach(value: ir.Value, read: Read) -> None:
    """Give an initialiser that was traced as a fake tensor its data, read when it is written."""
    fake, name = value.const_value, value.name
    assert fake is not None and name is not None
    kind, shape = fake.dtype, ir.Shape(fake.shape.numpy())

    def load() -> ir.TensorProtocol:
        return ir.tensor(read(name).to(_TORCH[kind]).numpy(), dtype=kind, name=name)

    value.const_value = ir.LazyTensor(load, kind, shape, name=name)


def lower_packed_linear(model: ir.Model) -> None:
    """Replace each PackedLinear node by DequantizeLinear, MatMul and, with a bias, Add; in place."""
    graph = model.graph
    for node in list(graph):
        if (node.domain, node.op_type) != (DOMAIN, "PackedLinear"):
            continue
        x, packed, scale = node.inputs[:3]
        bias = node.inputs[3] if len(node.inputs) > 3 else None
        assert packed is not None and scale is not None and packed.name is not None
        bits = node.attributes["bits"].as_int()
        kind = x.dtype or ir.DataType.FLOAT  # type: ignore[union-attr]
        weight_value = _weight(graph, packed, bits)
        nodes: list[ir.Node] = []
        groups = _cast(_scale(graph, scale), kind, nodes)
        features = weight_value.shape[0]  # type: ignore[index]
        assert isinstance(features, int)
        name = packed.name.removesuffix(".weight_packed")
        dequantised = ir.node(
            "DequantizeLinear", [weight_value, groups],
            {"axis": 0, "block_size": features // _shape(scale)[1]}, name=f"{name}.dequantize",
        )  # fmt: skip
        last = ir.node("MatMul", [x, dequantised.outputs[0]], name=f"{name}.matmul")
        nodes += [dequantised, last]
        if bias is not None:
            last = ir.node("Add", [last.outputs[0], _cast(bias, kind, nodes)], name=f"{name}.add")
            nodes.append(last)
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, last.outputs)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
    model.opset_imports.pop(DOMAIN, None)
    graph.opset_imports.pop(DOMAIN, None)


def halve_tables(model: ir.Model) -> None:
    """Store float32 tables that rows are taken from (embeddings) in half precision, where that changes no bit."""
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or table.dtype != ir.DataType.FLOAT:
            continue
        if len(table.uses()) > 1 or node.outputs[0].is_graph_output():
            continue
        values = table.const_value.numpy()
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if values.nbytes < _LEAST_TABLE_BYTES or not np.array_equal(half, values):
            continue
        table.const_value, table.dtype = ir.tensor(half, name=table.name), ir.DataType.FLOAT16
        rows = node.outputs[0]
        cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}.float")
        wide = cast.outputs[0]
        wide.shape, wide.dtype, rows.dtype = rows.shape, ir.DataType.FLOAT, ir.DataType.FLOAT16
        rows.replace_all_uses_with(wide)
        cast.replace_input_with(0, rows)
        model.graph.insert_after(node, cast)


def _register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initialiser, or the one of that name if a shared layer made it before."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        graph.register_initializer(
            ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)  # type: ignore[arg-type]
        )
    return graph.initializers[tensor.name]


def _weight(graph: ir.Graph, packed: ir.Value, bits: int) -> ir.Value:
    """Bytes (O, I * bits / 8) as an INT4 or INT8 initialiser (I, O), made when the file is written."""
    outs, row = _shape(packed)
    kind = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    shape = ir.Shape([row * 8 // bits, outs])
    name = f"{packed.name}.T"
    assert packed.const_value is not None  # else _shape would have said so
    make = functools.partial(_transposed, packed.const_value, bits, name)
    return _register(graph, ir.LazyTensor(make, kind, shape, name=name))


def _shape(value: ir.Value) -> tuple[int, int]:
    """Rows and columns of an initialiser."""
    assert value.const_value is not None, f"{value.name} is not an initialiser"
    rows, columns = value.const_value.shape.numpy()
    return rows, columns


def _transposed(packed: ir.TensorProtocol, bits: int, name: str) -> ir.TensorProtocol:
    integers = unpack(torch.from_numpy(packed.numpy().copy()), bits).T.contiguous()
    if bits == 8:
        return ir.tensor(integers.numpy(), name=name)
    # ONNX packs the flattened tensor, lower nibble first; I is even, so the count is.
    flat = pack(integers.view(1, -1), bits).flatten().numpy()
    return ir.PackedTensor(flat, ir.DataType.INT4, shape=integers.shape, name=name)


def _cast(value: ir.Value, kind: ir.DataType, nodes: list[ir.Node]) -> ir.Value:
    """An initialiser in the activations' precision: by a Cast that is added to `nodes`, if it is stored in another."""
    if value.dtype == kind:
        return value
    nodes.append(ir.node("Cast", [value], {"to": kind}, name=f"{value.name}.cast"))
    return nodes[-1].outputs[0]


def _scale(graph: ir.Graph, scale: ir.Value) -> ir.Value:
    """(O, G) as (G, O), made when the file is written."""
    outs, groups = _shape(scale)
    stored = scale.const_value
    assert stored is not None
    name = f"{scale.name}.T"

    def make() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(stored.numpy().T), name=name)

    return _register(graph, ir.LazyTensor(make, stored.dtype, ir.Shape([groups, outs]), name=name))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of a model's weights."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def save(
    model: ir.Model, path: Path, *, journal: Path | None = None, what: str = "", progress: Progress = silent
) -> None:
    """Write `path` and, above 1 MB of weights, `path` + ".data", where the model's weights are from then on.

    Args:
        journal: notes what of the data is written, to go on from there after a kill; None begins anew.
        what: what to call this in `progress`, which is told of stretches of the data written.

    Raises:
        DiskError: the disk has too little room.
        OSError: the disk is full nevertheless.
    """
    if weight_bytes(model) > INLINE_BYTES:
        large = [v for v in model.graph.initializers.values() if v.const_value and v.const_value.nbytes > _LEAST_BESIDE]
        tensors = [v.const_value for v in large if v.const_value is not None]
        written = data.write(path.with_name(f"{path.name}.data"), tensors, journal, what, progress)
        for value, tensor in zip(large, written, strict=True):
            value.const_value = tensor
    ir.save(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals; a user can do nothing about them."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
