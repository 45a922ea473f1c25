"""Writes an ONNX file and, next to it, its weights (`model.onnx.data`); an interrupted write resumes.

    save(model, Path("model.onnx"), journal=Path("unfinished.json"))

Tensors follow each other without gaps, and each is computed when it is written, so one is in memory at a time. The
journal lists the hash of every finished shard (a group of consecutive tensors). A later run verifies the shards in the
file against it and continues after the last good one, so it ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from edgeprune.common.errors import InputError
from edgeprune.common.files import digest, need_space, read_json, write_json
from edgeprune.common.progress import Progress, silent
from edgeprune.residency.shards import Speed, group_into_shards

INLINE_BYTES = 1_000_000
"""A model with more weights than this gets a data file; ONNX itself cannot hold 2 GB in one file."""
_LEAST_EXTERNAL = 256  # bytes; smaller tensors (shapes, axes) stay in the ONNX file


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of a model's weights."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def save(
    model: ir.Model, path: Path, *, journal: Path | None = None, what: str = "", progress: Progress = silent
) -> None:
    """Write `path` and, above INLINE_BYTES of weights, `path` + ".data"; the model then refers to that file.

    Args:
        model: what to write; its weights may be lazy.
        path: the ONNX file.
        journal: records the finished shards, so that an interrupted write can resume; None starts from scratch.
        what: name of this step in `progress`, which is called after each shard.
        progress: see progress.Progress.

    Raises:
        DiskError: the disk has too little room.
        OSError: the disk is full nevertheless.
    """
    if weight_bytes(model) > INLINE_BYTES:
        values = model.graph.initializers.values()
        large = [v for v in values if v.const_value and v.const_value.nbytes > _LEAST_EXTERNAL]
        tensors = [v.const_value for v in large if v.const_value is not None]
        written = write(path.with_name(f"{path.name}.data"), tensors, journal, what, progress)
        for value, tensor in zip(large, written, strict=True):
            value.const_value = tensor
    ir.save(model, path)


def write(
    path: Path,
    tensors: Sequence[ir.TensorProtocol],
    journal: Path | None,
    what: str,
    progress: Progress,
) -> list[ir.ExternalTensor]:
    """Write tensors to `path` and return them as references into that file.

    Args:
        path: the data file, in the folder of the ONNX file that will refer to it.
        tensors: what to write, in this order.
        journal: records the finished shards, so that an interrupted write can resume; None starts from scratch.
        what: name of this step in `progress`.
        progress: called with `what`, shards done, shards in all, and a note with bytes and speed.

    Raises:
        DiskError: the disk has too little room.
        OSError: the disk is full nevertheless.
    """
    groups = group_into_shards([tensor.nbytes for tensor in tensors])
    sizes = [sum(tensors[i].nbytes for i in group) for group in groups]
    layout = digest([[t.name, str(t.dtype), t.shape.numpy()] for t in tensors])
    hashes = _recorded(journal, layout) if journal is not None and path.is_file() else []
    speed = Speed(what, sizes, progress)
    with path.open("r+b" if hashes else "wb") as file:
        hashes = hashes[: _intact(file, sizes, hashes)]
        written = sum(sizes[: len(hashes)])
        file.truncate(written)
        file.seek(written)
        need_space(path, sum(sizes) - written)
        for index, group in enumerate(groups):
            is_written = index < len(hashes)
            if not is_written:
                hashes.append(_write_shard(file, [tensors[i] for i in group]))
                if journal is not None:
                    write_json(journal, {"layout": layout, "stretches": hashes})
            speed.done(index + 1, found=is_written)
    return _references(path, tensors)


def _recorded(journal: Path, layout: str) -> list[str]:
    """Return the hashes of finished shards from the journal; none if it describes other tensors."""
    with contextlib.suppress(InputError):  # absent or damaged
        record = read_json(journal)
        if record.get("layout") == layout:
            return [str(sha256) for sha256 in record["stretches"]]
    return []


def _intact(file: BinaryIO, sizes: Sequence[int], hashes: Sequence[str]) -> int:
    """Count the leading shards in the file that match their recorded hashes."""
    for index, (size, expected) in enumerate(zip(sizes, hashes, strict=False)):
        state, left = hashlib.sha256(), size
        while left and (content := file.read(min(left, 1 << 20))):
            state.update(content)
            left -= len(content)
        if left or state.hexdigest() != expected:
            return index
    return len(hashes)


def _write_shard(file: BinaryIO, tensors: Sequence[ir.TensorProtocol]) -> str:
    """Write tensors, one in memory at a time, and return the SHA-256 of their bytes."""
    state = hashlib.sha256()
    for tensor in tensors:
        content = tensor.tobytes()
        state.update(content)
        file.write(content)
    file.flush()  # before the journal records it
    return state.hexdigest()


def _references(path: Path, tensors: Sequence[ir.TensorProtocol]) -> list[ir.ExternalTensor]:
    """Describe where each tensor is in the file."""
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
