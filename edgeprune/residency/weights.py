"""Weights in a folder, in diffusers' layout: read one tensor at a time, written shard by shard, resumed after a kill.

A folder holds `diffusion_pytorch_model.safetensors`, or shards and `….safetensors.index.json`. Reading looks at headers
at once and at data when asked, so a model of any size takes the memory of one tensor. Files are opened for each tensor
anew: what stays open stays mapped, and counts as memory. What it leaves out: hashes (checkpoint.py), and what a tensor
means.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import inside, read_json, write_json
from edgeprune.common.tensors import Tensors, save_tensors
from edgeprune.families.base import Shape

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
SHARD_BYTES = 200_000_000
"""A shard is closed once it has as much: one block of a full-size model, or the whole of a small one."""
WORTH_TELLING = 10**9
"""Bytes of a stage from which on it tells of bytes; a smaller one is over before they are read."""
MARK = "unfinished.json"
"""Says what shards are of, until whoever wrote them has noted that they are done."""
_FLOATS = ("F32", "F16", "BF16", "F64")
_KINDS = (*_FLOATS, "U8", "I8", "I32", "I64", "BOOL")
_MOST_TENSORS, _MOST_AXES, _LONGEST_AXIS = 1_000_000, 8, 2**31 - 1


class Weights:
    """The tensors of a folder (or of one file) by name, each read when asked for.

    Raises:
        InputError: no weights there, a shard is missing or damaged, or the index and the shards disagree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self._paths: dict[str, Path] = {}
        index = folder / INDEX
        listed = _listed(index) if index.is_file() else {}
        alone = folder / FILE if folder.is_dir() else folder
        for path in sorted({folder / file for file in listed.values()}) or [alone]:
            for name, (shape, kind) in header(path).items():
                if kind not in ("U8",) if name.endswith(".weight_packed") else kind not in _FLOATS:
                    expected = "U8" if name.endswith(".weight_packed") else ", ".join(_FLOATS)
                    raise InputError(f"{path}: {shown(name)}: found {kind}, expected {expected}")
                if listed and listed.get(name) != path.name:
                    raise InputError(
                        f"{index}: {shown(name)}: found {listed.get(name)!r}, expected {path.name!r}, which holds it"
                    )
                self.shapes[name], self._paths[name] = shape, path
        if missing := sorted(listed.keys() - self.shapes.keys()):
            raise InputError(f"{index}: {shown(missing[0])}: found no such tensor in {listed[missing[0]]}")

    def __getitem__(self, name: str) -> torch.Tensor:
        """One tensor, in its own dtype.

        Raises:
            InputError: the file has no such tensor, or cannot be read.
        """
        if name not in self._paths:
            raise InputError(f"{self.folder}: {name}: found no such tensor")
        path = self._paths[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: {name}: cannot be read ({error})") from error
        return tensor

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Refuse weights that are not exactly a model's.

        Raises:
            InputError: says the first name that does not fit.
        """
        wrong = sorted(n for n in expected.keys() | self.shapes.keys() if expected.get(n) != self.shapes.get(n))
        if wrong:
            name = wrong[0]
            raise InputError(
                f"{self._paths.get(name, self.folder)}: {shown(name)}: found {self.shapes.get(name, 'none')}, "
                f"expected {expected.get(name, 'none')}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            )


def _listed(index: Path) -> dict[str, str]:
    """File by tensor, of an index; only files beside it."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(f"{index}: weight_map: found {type(files).__name__}, expected file names by tensor")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: {shown(name)}: found {shown(file)}, expected the name of a .safetensors file beside it"
            )
        inside(index.parent, file, index)
    return files


def header(path: Path) -> dict[str, tuple[Shape, str]]:
    """Shape and dtype (as safetensors calls it) by name of one file's tensors.

    The library itself refuses a header over 100 MB, one that is longer than the file, names given twice, tensors that
    overlap or leave gaps, bytes that do not fit shape and dtype, and what is left at the end. Here go dtypes and
    numbers of axes and of tensors that no model has: a shape of a zero and a huge number takes no bytes.

    Raises:
        InputError: no such file, or one of these.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not whole safetensors ({error}); download or make it again") from error
    if len(found) > _MOST_TENSORS:
        raise InputError(f"{path}: found {len(found)} tensors, expected up to {_MOST_TENSORS}")
    for name, (shape, kind) in found.items():
        if len(shape) > _MOST_AXES or any(side > _LONGEST_AXIS for side in shape):
            raise InputError(f"{path}: {shown(name)}: found shape {shown(shape)}, expected one of a model")
        if kind not in _KINDS:
            raise InputError(f"{path}: {shown(name)}: found {kind}, expected one of {', '.join(_KINDS)}")
    return found


class ShardWriter:
    """Shards of one folder, each written atomically; a new writer of the same inputs goes on after the last one.

        writer = ShardWriter(folder, groups, inputs)
        for i in range(len(groups)):
            if not writer.has(i):
                writer.put(i, {name: ... for name in groups[i]})
        writer.finish()

    Args:
        folder: where the shards go; what another run left there is kept only if its `inputs` are the same.
        groups: names of the tensors, shard by shard.
        inputs: digest of everything that the tensors depend on.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[str]], inputs: str) -> None:
        self.folder, self.groups = folder, [list(g) for g in groups]
        if not is_of(folder, inputs, len(groups)):
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / MARK, {"inputs": inputs, "shards": len(groups)})

    def path(self, index: int) -> Path:
        """A shard's file."""
        count = len(self.groups)
        stem, dot, kind = FILE.partition(".")
        return self.folder / (FILE if count == 1 else f"{stem}-{index + 1:05}-of-{count:05}{dot}{kind}")

    def has(self, index: int) -> bool:
        """Whether a shard is there. Written under a temporary name, it is there whole or not at all."""
        return self.path(index).is_file()

    def put(self, index: int, tensors: Tensors) -> None:
        """Write a shard.

        Raises:
            DiskError: the disk is full; the shards before stay.
        """
        if sorted(tensors) != sorted(self.groups[index]):
            raise AssertionError(f"shard {index}: other tensors than it was planned for")
        save_tensors(self.path(index), tensors, {"format": "pt"})

    def finish(self) -> None:
        """Write the index: the folder is what diffusers and `Weights` read. Its mark stays."""
        if len(self.groups) > 1:
            files = {name: self.path(i).name for i, group in enumerate(self.groups) for name in group}
            size = sum(self.path(i).stat().st_size for i in range(len(self.groups)))
            write_json(self.folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})


def is_of(folder: Path, inputs: str, count: int) -> bool:
    """Whether a folder's mark says that its shards, finished or not, are so many and of these inputs."""
    try:
        return read_json(folder / MARK) == {"inputs": inputs, "shards": count}
    except InputError:
        return False


def shards(sizes: Sequence[int]) -> list[list[int]]:
    """Which parts of these bytes go into which shard, in order: it is closed once it has SHARD_BYTES."""
    out: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if filled >= SHARD_BYTES:
            out.append([])
            filled = 0
        out[-1].append(index)
        filled += size
    return out


class Speed:
    """Tells how a stage goes whose shards have known bytes: `3.10 of 12.70 GB, 410 MB/s` beside the bar."""

    def __init__(self, what: str, sizes: Sequence[int], progress: Callable[[str, int, int, str], None]) -> None:
        self._what, self._sizes, self._progress = what, sizes, progress
        self._began, self._found = time.monotonic(), 0

    def done(self, count: int, *, found: bool = False) -> None:
        """The first `count` shards are there; `found` by this run, which did not write the last of them."""
        done = sum(self._sizes[:count])
        self._found = done if found else self._found
        speed = (done - self._found) / max(1e-6, time.monotonic() - self._began)
        total = sum(self._sizes)
        note = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e6:,.0f} MB/s" if total >= WORTH_TELLING else ""
        self._progress(self._what, count, len(self._sizes), note)
