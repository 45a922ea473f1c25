"""The weights of an ONNX file in a file beside it, written in stretches; a killed run is gone on with.

Tensors follow each other without gaps, each made when it is written. The hash of every whole stretch is noted in a
journal. Another run reads what is there, goes on at the first stretch that is not as noted, and so ends with the same
bytes. What it leaves out: what the tensors are (graph.py), and removing the journal (unfinished.py).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, need_space, read_json, write_json
from edgeprune.residency.weights import Speed, shards


def write(
    path: Path,
    tensors: Sequence[ir.TensorProtocol],
    journal: Path | None,
    what: str,
    progress: Callable[[str, int, int, str], None],
) -> list[ir.ExternalTensor]:
    """Write `path`; the same tensors, to be found there.

    Args:
        path: the file, beside the ONNX file that will refer to it.
        tensors: what goes into it, in this order.
        journal: notes what is written, to go on from there; None begins anew.
        what: what to call this in `progress`, which is told of stretches, bytes and speed.

    Raises:
        DiskError: the disk has too little room.
        OSError: the disk is full nevertheless.
    """
    groups = shards([tensor.nbytes for tensor in tensors])
    sizes = [sum(tensors[i].nbytes for i in group) for group in groups]
    layout = digest([[t.name, str(t.dtype), t.shape.numpy()] for t in tensors])
    hashes = _noted(journal, layout) if journal is not None and path.is_file() else []
    speed = Speed(what, sizes, progress)
    with path.open("r+b" if hashes else "wb") as file:
        hashes = hashes[: _whole(file, sizes, hashes)]
        there = sum(sizes[: len(hashes)])
        file.truncate(there)
        file.seek(there)
        need_space(path, sum(sizes) - there)
        for index, group in enumerate(groups):
            found = index < len(hashes)
            if not found:
                hashes.append(_stretch(file, [tensors[i] for i in group]))
                if journal is not None:
                    write_json(journal, {"layout": layout, "stretches": hashes})
            speed.done(index + 1, found=found)
    return _external(path, tensors)


def _noted(journal: Path, layout: str) -> list[str]:
    """The hashes of stretches that were written of these tensors."""
    with contextlib.suppress(InputError):  # none, or damaged
        noted = read_json(journal)
        if noted.get("layout") == layout:
            return [str(sha256) for sha256 in noted["stretches"]]
    return []


def _whole(file: BinaryIO, sizes: Sequence[int], hashes: Sequence[str]) -> int:
    """How many stretches, from the first on, are in the file as noted."""
    for index, (size, expected) in enumerate(zip(sizes, hashes, strict=False)):
        state, left = hashlib.sha256(), size
        while left and (content := file.read(min(left, 1 << 20))):
            state.update(content)
            left -= len(content)
        if left or state.hexdigest() != expected:
            return index
    return len(hashes)


def _stretch(file: BinaryIO, tensors: Sequence[ir.TensorProtocol]) -> str:
    """Write tensors, one at a time in memory; their hash."""
    state = hashlib.sha256()
    for tensor in tensors:
        content = tensor.tobytes()
        state.update(content)
        file.write(content)
    file.flush()  # before it is noted
    return state.hexdigest()


def _external(path: Path, tensors: Sequence[ir.TensorProtocol]) -> list[ir.ExternalTensor]:
    out, offset = [], 0
    for tensor in tensors:
        assert isinstance(tensor.shape, ir.Shape) and tensor.name is not None
        out.append(
            ir.ExternalTensor(
                path.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=path.parent,
            )  # fmt: skip
        )
        offset += tensor.nbytes
    return out
