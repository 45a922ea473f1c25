"""The tensors of a T5 or Qwen3 text encoder as they are stored: rounded when they are read, or packed already.

precision.py has the forms. `prepare_text_encoder` gives a T5EncoderModel or a Qwen3 the layers that hold them.

Notation: O outputs, I inputs, G groups, V words, K width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from edgeprune.families import Shape
from edgeprune.families.encoders import T5
from edgeprune.families.parts import tensor_of
from edgeprune.quantization.int4 import HalfLinear, PackedEmbedding, dequantize, pack
from edgeprune.quantization.precision import TEXT_INT8, Precision, is_text_linear, text_precision_of
from edgeprune.quantization.quantize import empty_packed, linear_layers, replace, round_to_nearest
from edgeprune.residency.streaming import PACKED
from edgeprune.residency.weights import Weights

WORDS = "shared.weight"
"""The table of words; in a T5EncoderModel it also is `encoder.embed_tokens.weight`."""

_ROWS = 2048
"""Rows of the table that are rounded together."""


class TextTensors(Protocol):
    """The tensors of a T5 or Qwen3 after `prepare_text_encoder`, by name."""

    def precision(self, name: str, shape: Shape) -> Precision:
        """Return how a tensor of the model as it was is stored."""
        ...

    def __call__(self, name: str) -> torch.Tensor:
        """Return integers uint8 (O, I * bits / 8), of the table int8 (V, K), scales float16 (O, G), a weight in half
        precision (I, O), or a tensor of half-precision values.
        """
        ...


def prepare_text_encoder(model: nn.Module, precision: Callable[[str, Shape], Precision]) -> nn.Module:
    """Give a T5 or Qwen3 empty layers that hold what is stored, in place.

    Args:
        model: a T5EncoderModel or a Qwen3, usually on the meta device.
        precision: of each weight, as `TextTensors.precision`.
    """
    for name, linear in linear_layers(model).items():
        p = precision(f"{name}.weight", tuple(linear.weight.shape))
        with torch.device(linear.weight.device):
            half = p.bits == 16
            layer = HalfLinear(linear.in_features, linear.out_features) if half else empty_packed(linear, p)
        replace(model, name, layer)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    words = next(name for name, module in model.named_modules() if module is table)
    if precision(f"{words}.weight", tuple(table.weight.shape)).bits == 8:
        with torch.device(table.weight.device):
            packed = PackedEmbedding(*table.weight.shape)
        model.set_input_embeddings(packed)  # type: ignore[operator]
    return model


class RoundedText:
    """Tensors that are rounded to the nearest when they are read.

    Only scales are kept, which are a few megabytes: both exporters and layers read them right after the integers.

    Args:
        read: reads a tensor of the model as it was, by name.
        form: one of precision.py.
        group_size: weights that share a scale in INT4.
    """

    def __init__(self, read: Callable[[str], torch.Tensor], form: str = TEXT_INT8, *, group_size: int = 64) -> None:
        self._read, self._form, self._group_size = read, form, group_size
        self._scales: dict[str, torch.Tensor] = {}

    def precision(self, name: str, shape: Shape) -> Precision:
        """See TextTensors."""
        return text_precision_of(name, shape, self._form, group_size=self._group_size)

    def __call__(self, name: str) -> torch.Tensor:
        """See TextTensors."""
        weight = unpacked_name(name)
        if name.endswith("_scale") and weight in self._scales:
            return self._scales[weight]
        tensor = self._read(weight)
        if weight == name:  # embeddings have half-precision values in their own dtype, norms stay
            return tensor.half().to(tensor.dtype) if tensor.ndim == 2 else tensor
        if name.endswith("_half"):
            return tensor.half().T.contiguous()
        p = self.precision(weight, tuple(tensor.shape))
        if is_words(weight):  # row by row, since the table is much larger than a layer
            rounded = (round_to_nearest(rows, p) for rows in tensor.split(_ROWS))
            tables, scales = zip(*((values.to(torch.int8), s) for values, s in rounded), strict=True)
            packed, scale = torch.cat(tables), torch.cat(scales)
        else:
            values, scale = round_to_nearest(tensor, p)
            packed = pack(values, p.bits)
        self._scales[weight] = scale
        return scale if name.endswith("_scale") else packed


class PackedText:
    """Tensors that an artefact stores, as stages/encoders.py writes them.

    Args:
        weights: the tensors on disk; those of the table are named as `WORDS`.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def precision(self, name: str, shape: Shape) -> Precision:
        """See TextTensors."""
        layer, shapes = stored_name(name).removesuffix(".weight"), self._weights.shapes
        if f"{layer}.weight_packed" not in shapes:
            return Precision(16)
        packed, scale = (shapes.get(f"{layer}{suffix}", (0, 1)) for suffix in PACKED[:2])
        return Precision(8 * packed[-1] // shape[1], shape[1] // max(1, scale[-1]))

    def __call__(self, name: str) -> torch.Tensor:
        """See TextTensors."""
        tensor = self._weights[stored_name(name)]
        return tensor.view(torch.int8) if is_words(name) and name.endswith("_packed") else tensor

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in its file."""
        return self._weights.dtype(stored_name(name))

    def ahead(self, names: Iterable[str]) -> None:
        """Ask the operating system to read these tensors, or what is stored in their place, in the background."""
        layers = {unpacked_name(stored_name(name)).removesuffix(".weight") for name in names}
        kinds = (".weight", *PACKED[:2])
        self._weights.ahead(f"{n}{kind}" for n in layers for kind in kinds if f"{n}{kind}" in self._weights.shapes)

    def check(self, model: nn.Module) -> None:
        """Check that names and shapes are exactly those of a model after `prepare_text_encoder`.

        Raises:
            InputError: names the first tensor that differs.
        """
        self._weights.check({stored_name(name): tuple(t.shape) for name, t in model.state_dict().items()})


def plain(tensors: TextTensors, name: str, shape: Shape) -> torch.Tensor:
    """Return a tensor of the model as it was with the values that are stored: what the integers stand for."""
    layer, p = name.removesuffix(".weight"), tensors.precision(name, shape)
    if p.bits < 16:
        packed = tensors(f"{layer}.weight_packed").view(torch.uint8)
        return dequantize(packed, tensors(f"{layer}.weight_scale"), p.bits, torch.float32)
    return tensors(f"{layer}.weight_half").T if is_text_linear(name, shape) else tensors(name)


def quantize_text_encoder(model: nn.Module, form: str = TEXT_INT8) -> nn.Module:
    """Store a T5 or Qwen3 in memory in a form, rounded to the nearest, in place."""
    rounded = RoundedText(dict(model.state_dict()).__getitem__, form)
    prepare_text_encoder(model, rounded.precision)
    model.load_state_dict({name: rounded(name) for name in model.state_dict()}, strict=True, assign=True)
    model.set_input_embeddings(model.get_input_embeddings())  # type: ignore[operator]  # one tensor, two names
    return model


def unpacked_name(name: str) -> str:
    """Return the name of the weight of which a tensor of a packed layer is made; other names stay."""
    for suffix in PACKED:
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix)}.weight"
    return name


def is_words(name: str) -> bool:
    """Return whether a tensor is the table of words, or is made of it."""
    return name.startswith(("shared.", "encoder.embed_tokens.", "model.embed_tokens."))


def stored_name(name: str) -> str:
    """Return a tensor's name in an artefact: the table has one name."""
    weight = unpacked_name(name)
    return (tensor_of(T5, weight) or weight).removesuffix(".weight") + name[len(weight.removesuffix(".weight")) :]
