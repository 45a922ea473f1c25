"""Named tensors, and writing them atomically to a safetensors file."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from edgeprune.common import hashes, traffic
from edgeprune.common.files import cannot_write

Tensors = dict[str, torch.Tensor]
"""A state dict."""

_KINDS = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls each dtype, in the order in which it writes them: a file's tensors stay aligned."""


def load_tensors(path: Path) -> Tensors:
    """Return all tensors of a safetensors file.

    Raises:
        OSError: the file cannot be read.
        SafetensorError: it is damaged.
    """
    tensors: Tensors = load_file(path)
    traffic.add(read=sum(tensor.nbytes for tensor in tensors.values()))
    return tensors


def save_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, *, hashed: bool = False) -> None:
    """Write a safetensors file under a temporary name, then rename it.

    Args:
        path: the file.
        tensors: its content.
        metadata: texts for its header.
        hashed: hash it on the way, for a manifest or an index that will ask, see hashes.py.

    Raises:
        DiskError: the disk is full or the folder is not writable; the old file at `path` is untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = hashlib.sha256() if hashed else None
        write_safetensors(temporary, tensors, metadata, state.update if state else _nobody)
        os.replace(temporary, path)
        if state:
            hashes.note(path, state.hexdigest())
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def write_safetensors(
    path: Path, tensors: Tensors, metadata: dict[str, str] | None, seen: Callable[[Any], None]
) -> None:
    """Write a file with the bytes that safetensors' own `save_file` writes. `seen` gets them, piece by piece.

    The format: the header's length in 8 bytes, the header as JSON, the tensors in the header's order.
    https://github.com/huggingface/safetensors#format
    """
    places = {kind: place for place, kind in enumerate(_KINDS)}
    names = sorted(tensors, key=lambda name: (places[tensors[name].dtype], name.encode()))
    header: dict[str, object] = {"__metadata__": metadata} if metadata is not None else {}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        for part in itertools.chain([len(text).to_bytes(8, "little"), text], (_bytes(tensors[n]) for n in names)):
            seen(part)
            file.write(part)
    traffic.add(written=8 + len(text) + end)


def _nobody(data: Any) -> None:
    """See nothing."""


def _bytes(tensor: torch.Tensor) -> Any:
    """Return a tensor's bytes as an array, without a copy of what is contiguous already."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
