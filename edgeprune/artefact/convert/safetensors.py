"""Weights of safetensors files, also in float8 with scales, as ComfyUI writes them.

`X.weight` in float8 stands for `X.weight * X.scale_weight`; newer files call the scale `X.weight_scale`. One number
scales all of a weight, or each row has its own. The scale of a layer's input (`scale_input`, `input_scale`) changes how
fast a GPU multiplies, not the weight, and is not needed; nor are the markers `scaled_fp8` and `X.comfy_quant`, once
they say float8. https://github.com/comfyanonymous/ComfyUI/blob/master/QUANTIZATION.md
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from edgeprune.artefact.convert.stored import FLOATS, as_rows, widened
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import parse_json
from edgeprune.families import Shape
from edgeprune.residency.weights import FLOAT8, KINDS, header

if TYPE_CHECKING:
    import torch

_ORIGINAL = "give the original's weights, in 16 or 32 bits"
_OTHER_KINDS = ("F8_E8M0", "F4", "I16", "U16", "U32", "U64", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")
_SCALE = re.compile(r"(.+)\.(scale_weight|weight_scale)")
_INPUT_SCALE = re.compile(r".+\.(scale_input|input_scale)")
_MARKER = re.compile(r"(.+\.)?scaled_fp8")
_QUANT = re.compile(r"(.+)\.comfy_quant")
_FLOAT8_FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fn_rowwise")
_LARGEST_NOTE = 4096
"""In bytes; the content of `comfy_quant` has about thirty."""
_QUANTISED = (
    (r"\.(absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)|bitsandbytes__", "bitsandbytes (NF4 or FP4)"),
    (r"\.SCB$", "bitsandbytes (INT8)"),
    (r"\.(wscales|wtscale|smooth_factor|smooth_orig|wzeros)$", "SVDQuant (nunchaku)"),
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\._(data|scale|shift)$|\.weight_qtype$", "quanto"),
    (r"(_qdata|:_data|_weight_qdata|tensor_impl[._]\w+|\.int_data)$", "torchao"),
    (r"\.weight_scale_2$", "NVFP4"),
    (r"\.weight_scale_inv$", "float8 in blocks"),
)
"""Weights whose numbers need more than one scale: a part of a tensor's name, and who wrote it."""


class Safetensors:
    """The weights of safetensors files, by name.

    Args:
        paths: one file, or the shards of a part.

    Raises:
        InputError: a file is damaged, or weights are stored in a way that is not read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        found: dict[str, tuple[Path, Shape, str]] = {}
        for path in paths:
            for name, (shape, kind) in header(path, kinds=(*KINDS, *FLOAT8, *_OTHER_KINDS)).items():
                if name in found:
                    other = found[name][0].name
                    raise InputError(f"{path}: {shown(name)}: found it here and in {other}, expected it once")
                found[name] = path, shape, kind
            _check_note(path)
        _check_not_quantised({name: path for name, (path, _, _) in found.items()})
        self._paths = {name: path for name, (path, _, _) in found.items()}
        self._scales: dict[str, str] = {}
        """Name of the scale of each weight that has one."""
        self.shapes: dict[str, Shape] = {}
        self.kinds: dict[str, str] = {}
        self.rules: dict[str, int] = {}
        for name, (path, shape, kind) in found.items():
            if what := _extra(name):
                self.rules[what] = self.rules.get(what, 0) + 1
            else:
                self.shapes[name], self.kinds[name] = shape, kind
            if match := _SCALE.fullmatch(name):
                self._scales[f"{match[1]}.weight"] = name
            elif _QUANT.fullmatch(name):
                _check_quant(path, name, shape)
        self._check_kinds()
        self._check_scales({name: found[scale][1:] for name, scale in self._scales.items()})

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return one tensor, or some rows of it; see `Stored`.

        Raises:
            InputError: its file cannot be read.
        """
        import torch

        tensor = self._tensor(name, rows)
        if self.kinds[name] in FLOATS:
            return tensor
        if name not in self._scales:
            return tensor.to(torch.bfloat16)
        count, width = as_rows(tuple(tensor.shape))
        flat, scale = tensor.reshape(count, width), self._tensor(self._scales[name]).float().reshape(-1, 1)
        if rows is not None and len(scale) > 1:
            scale = scale[slice(*rows)]
        scale = scale.expand(count, 1)
        return widened(count, width, lambda a, b: flat[a:b].float() * scale[a:b]).reshape(tensor.shape)

    def _tensor(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        path = self._paths[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_slice(name)[slice(*rows)] if rows else file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: {name}: cannot be read ({error})") from error
        return tensor

    def _check_kinds(self) -> None:
        """Check that every weight is a floating-point number, and has its scale where the file says so."""
        for name, kind in self.kinds.items():
            if kind not in (*FLOATS, *FLOAT8):
                expected = ", ".join((*FLOATS, *FLOAT8))
                raise InputError(f"{self._paths[name]}: {shown(name)}: found {kind}, expected {expected}; {_ORIGINAL}")
        for marker in filter(_MARKER.fullmatch, self._paths):
            prefix = marker.removesuffix("scaled_fp8")
            for name, kind in self.kinds.items():
                inside = name.startswith(prefix) and name.endswith(".weight")
                if inside and kind in FLOAT8 and name not in self._scales:
                    raise InputError(
                        f"{self._paths[name]}: {shown(name)}: found no scale_weight, expected one, since the file has "
                        f"{shown(marker)}; download or make it again"
                    )

    def _check_scales(self, scales: Mapping[str, tuple[Shape, str]]) -> None:
        """Check that every scale belongs to a float8 weight, and is one number or one for each row."""
        for name, (shape, kind) in scales.items():
            where = f"{self._paths[self._scales[name]]}: {shown(self._scales[name])}"
            if name not in self.kinds or self.kinds[name] not in FLOAT8:
                raise InputError(f"{where}: found a scale of {self.kinds.get(name, 'no tensor')}, expected float8")
            rows = self.shapes[name][:1]
            if kind not in FLOATS or (math.prod(shape) != 1 and shape not in (rows, (*rows, 1))):
                raise InputError(
                    f"{where}: found {kind} {shape}, expected one number or one for each row of "
                    f"{self.shapes[name]}; {_ORIGINAL}"
                )


def _extra(name: str) -> str | None:
    """Return what a tensor is that is no weight."""
    if _SCALE.fullmatch(name):
        return "scales of weights"
    if _INPUT_SCALE.fullmatch(name):
        return "scales of inputs"
    return "markers of float8" if _MARKER.fullmatch(name) or _QUANT.fullmatch(name) else None


def _check_not_quantised(paths: Mapping[str, Path]) -> None:
    """Refuse weights that need more than one scale to read."""
    for name, path in paths.items():
        for pattern, who in _QUANTISED:
            if re.search(pattern, name):
                raise InputError(f"{path}: {shown(name)}: found weights quantised by {who}; {_ORIGINAL}")


def _check_quant(path: Path, name: str, shape: Shape) -> None:
    """Check the format that a layer's `comfy_quant` names."""
    if len(shape) != 1 or shape[0] > _LARGEST_NOTE:
        raise InputError(f"{path}: {shown(name)}: found shape {shown(shape)}, expected a short text in JSON")
    with safe_open(path, framework="np") as file:
        text = bytes(file.get_tensor(name)).decode("utf-8", "replace")
    try:
        note = parse_json(text)
    except ValueError:
        note = text
    _check_format(note, f"{path}: {shown(name)}")


def _check_note(path: Path) -> None:
    """Check what the file's own description says of its quantisation."""
    with safe_open(path, framework="np") as file:
        note = (file.metadata() or {}).get("_quantization_metadata")
    if note is None:
        return
    try:
        layers = parse_json(note).get("layers", {})
    except (ValueError, AttributeError):
        layers = None
    if not isinstance(layers, dict):
        raise InputError(f"{path}: _quantization_metadata: found {shown(note)}, expected the formats of layers in JSON")
    for layer, said in layers.items():
        _check_format(said, f"{path}: {shown(layer)}")


def _check_format(note: object, where: str) -> None:
    said = note.get("format") if isinstance(note, dict) else note
    if said not in _FLOAT8_FORMATS:
        raise InputError(f"{where}: found weights in the format {shown(said)}, expected float8; {_ORIGINAL}")
