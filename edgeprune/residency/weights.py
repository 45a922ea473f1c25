"""Read weights from a folder in the layout of diffusers or transformers, or from one file, one tensor at a time.

model_files.py finds the files: in diffusers one `diffusion_pytorch_model.safetensors`, or shards and their index;
shards.py writes such folders. `Weights` reads headers at once and data on request, so a model of any size takes the
memory of one tensor. Each read opens the file again: a file that stays open stays mapped and counts as memory.
Importing this module does not load torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from edgeprune.common import traffic
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.read_ahead import read_ahead
from edgeprune.families import Shape
from edgeprune.residency.model_files import PartWeights, any_weights_of, read_weight_map, weights_of, without_weights

if TYPE_CHECKING:
    import torch

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
_FLOATS = ("F32", "F16", "BF16", "F64")
KINDS = (*_FLOATS, "U8", "I8", "I32", "I64", "BOOL")
"""Dtypes that a model is stored in, in safetensors' words."""
FLOAT8 = ("F8_E4M3", "F8_E5M2")
"""Dtypes that only `edgeprune convert` reads."""
_MOST_TENSORS, _MOST_AXES, _LONGEST_AXIS = 1_000_000, 8, 2**31 - 1


class Weights:
    """The tensors of a folder (or of one file) by name, each read on request.

    Args:
        folder: one part of a pipeline, or a safetensors file.
        variant: of the weights, see model_files.py.
        needed: whether a tensor of this name is needed; the others are ignored, whatever they are.

    Raises:
        InputError: there are no weights, a shard is missing or damaged, or index and shards disagree.
    """

    def __init__(
        self, folder: Path, variant: str | None = None, *, needed: Callable[[str], bool] = lambda name: True
    ) -> None:
        self.folder = folder
        self.shapes: dict[str, Shape] = {}
        self.kinds: dict[str, str] = {}
        """The dtype of each tensor in safetensors' words, such as BF16."""
        self._paths: dict[str, Path] = {}
        self._offsets: dict[Path, dict[str, tuple[int, int]]] = {}
        self._finite: set[str] = set()
        """Tensors that were read once, and found finite."""
        if folder.is_dir() and not any_weights_of(folder):
            raise InputError(f"{folder}: {without_weights(folder)}")
        # Without a folder, the error names the file that is expected in it.
        found = weights_of(folder, variant) or PartWeights(None, (FILE,), None)
        index = folder / (found.index or "")
        listed = read_weight_map(index) if found.index else {}
        for path in [folder / file for file in found.files] if folder.is_dir() else [folder]:
            for name, (shape, kind) in header(path, needed, (*KINDS, *FLOAT8)).items():
                if kind in FLOAT8:
                    whole = folder.parent
                    raise InputError(
                        f"{path}: {shown(name)}: found {kind}, expected {', '.join(_FLOATS)}; first write the model in "
                        f"16 bits: edgeprune convert {whole} -o {whole}-bf16"
                    )
                if kind not in ("U8",) if name.endswith(".weight_packed") else kind not in _FLOATS:
                    expected = "U8" if name.endswith(".weight_packed") else ", ".join(_FLOATS)
                    raise InputError(f"{path}: {shown(name)}: found {kind}, expected {expected}")
                if listed and listed.get(name) != path.name:
                    raise InputError(
                        f"{index}: {shown(name)}: found {listed.get(name)!r}, expected {path.name!r}, which holds it"
                    )
                self.shapes[name], self.kinds[name], self._paths[name] = shape, kind, path
        if missing := sorted(n for n in listed.keys() - self.shapes.keys() if needed(n)):
            raise InputError(f"{index}: {shown(missing[0])}: found no such tensor in {listed[missing[0]]}")

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored dtype.

        Raises:
            InputError: there is no such tensor, its file cannot be read, or it holds NaN or infinity.
        """
        import torch

        if name not in self._paths:
            raise InputError(f"{self.folder}: {name}: found no such tensor")
        path = self._paths[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
            traffic.add(read=tensor.nbytes)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: {name}: cannot be read ({error})") from error
        if name not in self._finite:
            # The sum needs no second copy; a finite one has no NaN among its terms.
            suspect = tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite()
            if suspect and not tensor.isfinite().all():
                raise InputError(f"{path}: {name}: found NaN or infinity; download or make the file again")
            self._finite.add(name)
        return tensor

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Read some rows (R, D) of a tensor (V, D) in their order, in its stored dtype.

        Raises:
            InputError: its file cannot be read, or a row holds NaN or infinity.
        """
        import torch

        path = self._paths[name]
        try:
            with safe_open(path, framework="pt") as file:
                table = file.get_slice(name)
                found = torch.cat([table[index : index + 1] for index in indices])
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: {name}: cannot be read ({error})") from error
        traffic.add(read=found.nbytes)
        if not found.isfinite().all():
            raise InputError(f"{path}: {name}: found NaN or infinity; download or make the file again")
        return found

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        import torch

        floats = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return floats.get(self.kinds[name], torch.uint8)

    def ahead(self, names: Iterable[str]) -> None:
        """Ask the operating system to read these tensors in the background; it may ignore that, or not know how."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._paths[name], []).append(name)
        for path, wanted in by_file.items():
            if path not in self._offsets:
                self._offsets[path] = _offsets(path)
            spans = [self._offsets[path][name] for name in wanted]
            begin, end = min(span[0] for span in spans), max(span[1] for span in spans)
            read_ahead(path, [(begin, end)])

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Check that names and shapes are exactly those of a model.

        Raises:
            InputError: names the first tensor that differs.
        """
        wrong = sorted(n for n in expected.keys() | self.shapes.keys() if expected.get(n) != self.shapes.get(n))
        if wrong:
            name = wrong[0]
            raise InputError(
                f"{self._paths.get(name, self.folder)}: {shown(name)}: found {self.shapes.get(name, 'none')}, "
                f"expected {expected.get(name, 'none')}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
            )


def header(
    path: Path, needed: Callable[[str], bool] = lambda name: True, kinds: Collection[str] = KINDS
) -> dict[str, tuple[Shape, str]]:
    """Read shape and dtype (in safetensors' words) of each needed tensor of one file.

    safetensors itself refuses a header over 100 MB or longer than the file, duplicate names, tensors that overlap or
    leave gaps, bytes that do not fit shape and dtype, and trailing bytes. This function also refuses dtypes, numbers of
    axes and numbers of tensors that no model has: a shape with a zero and a huge number takes no bytes.

    Raises:
        InputError: the file does not exist, or is refused.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys() if needed(name)}  # noqa: SIM118
            tensors = {name: (tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not whole safetensors ({error}); download or make it again") from error
    if len(tensors) > _MOST_TENSORS:
        raise InputError(f"{path}: found {len(tensors)} tensors, expected up to {_MOST_TENSORS}")
    for name, (shape, kind) in tensors.items():
        if len(shape) > _MOST_AXES or any(side > _LONGEST_AXIS for side in shape):
            raise InputError(f"{path}: {shown(name)}: found shape {shown(shape)}, too large for a model")
        if kind not in kinds:
            remedy = "; give the weights before they were rounded to 8 bits" if kind in FLOAT8 else ""
            raise InputError(f"{path}: {shown(name)}: found {kind}, expected one of {', '.join(kinds)}{remedy}")
    return tensors


def _offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Return where the bytes of each tensor begin and end in a safetensors file that `header` has read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    first = 8 + length
    spans = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
    return {name: (first + begin, first + end) for name, (begin, end) in spans.items()}
