"""Checks that an ONNX file's external weights are in its own folder and inside the files it names; needs no vendor.

Recent versions of ONNX Runtime and OpenVINO check the same, older ones do not. The rest of the file is not checked; the
vendors do that.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import inside

_BELOW = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""By message of onnx.proto, the fields that can lead to external data."""
_LENGTHS = {1: 8, 5: 4}
"""Lengths of protobuf's fixed-size wire types, in bytes."""


def check_external(path: Path) -> set[str]:
    """Return the names of an ONNX file's data files; refuse one outside its folder, and bytes beyond its end.

    Raises:
        InputError: there is one, or the file is missing or not protobuf.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            entries = list(_entries(data))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a complete ONNX model: {error}; export again") from None
    for entry in entries:
        data_file = inside(path.parent, entry.get("location", ""), f"{path}: external data")
        if not data_file.is_file():
            raise InputError(f"{path}: external data: found {shown(entry.get('location'))}, which is not a file")
        try:
            begin, length = (int(entry.get(name, "0")) for name in ("offset", "length"))
        except ValueError:
            begin, length = -1, 0
        if begin < 0 or length < 0 or begin + length > data_file.stat().st_size:
            raise InputError(
                f"{path}: external data: found {shown(entry)}, expected bytes that are in {data_file.name}"
            )
    return {entry["location"] for entry in entries}


def _entries(data: mmap.mmap) -> Iterator[dict[str, str]]:
    """Yield the `external_data` of every tensor."""
    waiting = [("model", 0, len(data))]
    while waiting:
        kind, begin, end = waiting.pop()
        entry: dict[str, str] = {}
        for number, low, high in _fields(data, begin, end):
            below = _BELOW[kind].get(number)
            if below == "entry":
                pair = {n: data[a:b].decode() for n, a, b in _fields(data, low, high) if n in (1, 2)}
                entry[pair.get(1, "")] = pair.get(2, "")
            elif below:
                waiting.append((below, low, high))
        if entry:
            yield entry


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, begin and end of a message's length-delimited fields."""
    while at < end:
        key, at = _varint(data, at, end)
        wire = key & 7
        if wire == 0:
            _, at = _varint(data, at, end)
            continue
        if wire == 2:
            length, at = _varint(data, at, end)
        elif wire in _LENGTHS:
            length = _LENGTHS[wire]
        else:
            raise ValueError(f"wire type {wire}")
        if at + length > end:
            raise ValueError("a field is longer than its message")
        if wire == 2:
            yield key >> 3, at, at + length
        at += length


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number does not end")
