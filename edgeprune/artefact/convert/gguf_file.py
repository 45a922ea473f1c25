"""Weights of a GGUF file. The header is read here, so that a file can be named without the package `gguf`.

    magic, version, number of tensors, number of fields         24 bytes
    each field:  name, type, value
    each tensor: name, axes (the last one first), type, offset   offsets count from the end of the header, aligned
    data

ComfyUI-GGUF reshapes tensors whose rows do not fill whole blocks, and keeps their shape in `comfy.gguf.orig_shape.X`.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgeprune.artefact.convert.stored import FLOATS, as_rows, widened
from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.fields import shown
from edgeprune.families import Shape

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
}  # fmt: skip
"""Name, numbers in a block and bytes of a block, by the type's number."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SHAPE = "comfy.gguf.orig_shape."
_MOST_TENSORS, _MOST_AXES, _LONGEST_AXIS, _LONGEST_NAME = 1_000_000, 8, 2**31 - 1, 65_536
_MOST_FIELDS, _MOST_ITEMS = 100_000, 1_000_000


class Gguf:
    """The weights of a GGUF file, by name.

    Args:
        path: the file.

    Raises:
        InputError: the file is damaged, or a tensor has a type that is not read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.shapes: dict[str, Shape] = {}
        self.kinds: dict[str, str] = {}
        self.rules: dict[str, int] = {}
        self._stored: dict[str, tuple[int, int, Shape]] = {}
        """By name: the number of its type, where it begins, and its shape in the file."""
        try:
            with path.open("rb") as file:
                self.fields = self._read_header(_Reader(file, path.stat().st_size))
        except (_Damage, struct.error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not a whole GGUF file ({error}); download or make it again") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from error

    def _read_header(self, file: _Reader) -> dict[str, Any]:
        if file.take(4) != MAGIC:
            raise _Damage("it does not begin with GGUF")
        version, tensors, fields = file.numbers("IQQ")
        if version not in _VERSIONS:
            raise _Damage(f"version {version}, expected {' or '.join(map(str, _VERSIONS))}")
        file.most(tensors, _MOST_TENSORS, "tensors")
        file.most(fields, _MOST_FIELDS, "fields")
        out: dict[str, Any] = {}
        for _ in range(fields):
            name = file.text(_LONGEST_NAME)
            out[name] = file.value(file.numbers("I")[0])
        found = [self._tensor(file) for _ in range(tensors)]
        step = out.get("general.alignment", 32)
        if type(step) is not int or step < 1:
            raise _Damage(f"general.alignment is {shown(step)}")
        start = -(-file.at // step) * step
        for name, axes, number, offset in found:
            kind, block, size = TYPES.get(number, (f"type {number}", 0, 0))
            if not block:
                known = ", ".join(name for name, _, _ in TYPES.values())
                raise InputError(f"{self._path}: {shown(name)}: found {kind}, expected one of {known}")
            count = math.prod(axes)
            if name in self.shapes or (axes and axes[-1] % block) or start + offset + count // block * size > file.size:
                raise _Damage(f"{shown(name)} is there twice, fills no whole blocks, or ends after the file does")
            shape = out.get(f"{_SHAPE}{name}", axes)
            whole = isinstance(shape, (tuple, list)) and all(type(side) is int and side > 0 for side in shape)
            if not whole or math.prod(shape) != count:
                raise _Damage(f"{_SHAPE}{name} is {shown(shape)}, which does not fit {axes}")
            self._stored[name] = number, start + offset, axes
            self.shapes[name], self.kinds[name] = tuple(shape), kind
        return out

    def _tensor(self, file: _Reader) -> tuple[str, Shape, int, int]:
        name = file.text(_LONGEST_NAME)
        (count,) = file.numbers("I")
        file.most(count, _MOST_AXES, "axes")
        axes = tuple(reversed(file.numbers("Q" * count)))
        for side in axes:
            file.most(side, _LONGEST_AXIS, "numbers along an axis")
        number, offset = file.numbers("IQ")
        return name, axes, number, offset

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Return one tensor, or some rows of it; see `Stored`.

        Raises:
            InputError: the file cannot be read.
            MissingExtraError: the tensor is quantised, and the package `gguf` is not installed.
        """
        axes, shape = self._stored[name][2], self.shapes[name]
        if rows is None or not (len(axes) > 1 and axes == shape):
            count, width = as_rows(axes) if len(axes) > 1 else (1, math.prod(axes))
            whole = self._rows(name, 0, count, width).reshape(shape)
            return whole if rows is None else whole[slice(*rows)]
        return self._rows(name, *rows, math.prod(shape[1:])).reshape(-1, *shape[1:])

    def _rows(self, name: str, first: int, last: int, width: int) -> torch.Tensor:
        """Return some rows as they lie in the file, of `width` numbers each."""
        import numpy as np
        import torch

        number, at, _ = self._stored[name]
        kind, block, size = TYPES[number]
        row_bytes = width // block * size

        def raw(start: int, end: int) -> Any:
            offset = at + (first + start) * row_bytes
            return np.fromfile(self._path, np.uint8, (end - start) * row_bytes, offset=offset).reshape(-1, row_bytes)

        try:
            if kind in FLOATS:
                types = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
                return torch.from_numpy(raw(0, last - first)).view(types[kind])
            with needs("gguf"):
                from gguf import GGMLQuantizationType, dequantize
            quantised = GGMLQuantizationType(number)
            return widened(
                last - first, width, lambda a, b: torch.from_numpy(dequantize(raw(a, b), quantised).astype(np.float32))
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{self._path}: {name}: cannot be read ({error})") from error


class _Damage(Exception):
    """The header is not one of a GGUF file."""


class _Reader:
    """Reads the header, and no more than the file has."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self.size, self.at = file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _Damage("it ends within its header")
        self.at += count
        return self._file.read(count)

    def numbers(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def most(self, count: int, most: int, what: str) -> None:
        if count > most:
            raise _Damage(f"{count} {what}, expected up to {most}")

    def text(self, most: int) -> str:
        (length,) = self.numbers("Q")
        self.most(length, most, "bytes in a name")
        return self.take(length).decode("utf-8")

    def value(self, kind: int) -> Any:
        """Return a field's value. Long texts are skipped: they are tokenizers' and licenses."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            (length,) = self.numbers("Q")
            content = self.take(length)
            return content[:_LONGEST_NAME].decode("utf-8", "replace")
        if kind != _ARRAY:
            raise _Damage(f"a field of type {kind}")
        item, count = self.numbers("IQ")
        self.most(count, _MOST_ITEMS, "items in a field")
        if item in _SCALARS:
            return list(self.numbers(f"{count}{_SCALARS[item]}"))
        return [self.value(item) for _ in range(count)] if item == _STRING else self.value(-1)
