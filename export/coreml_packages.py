"""Writes Core ML packages of one network and compares them with torch; packages of chunks run one after the other.

    convert_network("transformer", chunks, reference, examples, folder, chunks=len(chunks)) -> record

On a Mac the packages run in Core ML itself; elsewhere mil_reference.py evaluates them.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgeprune.common.errors import EdgepruneError, ParityError
from edgeprune.common.extras import needs
from edgeprune.common.progress import Progress, Steps, silent
from edgeprune.export import parity
from edgeprune.export.coreml_chunks import Tensors
from edgeprune.export.mil_conversion import convert, quiet  # before coremltools: it silences the import
from edgeprune.export.modules import widen
from edgeprune.export.unfinished import SCRATCH
from edgeprune.quantization.int4 import PackedLinear

with needs("coreml"):
    import coremltools as ct

    from edgeprune.export.mil_reference import Package

BOUND = 2e-3
"""Largest relative error that passes if arithmetic is float32: the cost of half-precision weights."""
DEVICE_BOUND = 5e-2
"""Largest relative error that passes if Core ML itself computes, in half precision."""


def convert_network(
    name: str,
    modules: Iterable[Any],
    reference: nn.Module,
    examples: Sequence[Tensors],
    folder: Path,
    *,
    chunks: int = 1,
    half: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Convert, save and compare one network. A package that an interrupted run saved is not converted again.

    Args:
        name: the network's name, for messages.
        modules: the network, or its chunks in the order in which they run.
        reference: the whole network, to compare with.
        examples: inputs to compare at, of different batch sizes.
        folder: gets `model.mlpackage`, or `chunk_1.mlpackage` and so on.
        chunks: how many modules there are.
        half: compute in half precision; otherwise in float32.
        progress: see progress.Progress.

    Returns:
        The errors, for edgeprune_export.json.

    Raises:
        EdgepruneError: coremltools cannot convert the network.
        ParityError: the packages compute something else, or overflow in half precision.
    """
    widen(reference).requires_grad_(False)
    if not half:
        _widen_scales(reference)
    batches = [len(next(iter(example.values()))) for example in examples]
    tensors, paths, returned = dict(examples[-1]), [], list[str]()
    for i, module in enumerate(modules, 1):
        if not half:
            _widen_scales(module)
        path = folder / ("model.mlpackage" if chunks == 1 else f"chunk_{i}.mlpackage")
        feeds, outputs = {key: tensors[key] for key in module.inputs}, list(module.outputs)
        try:
            with quiet(), torch.no_grad():
                if not path.exists():
                    _save(convert(module, feeds, outputs, batches, half=half), path)
                    gc.collect()  # a program refers to itself, and to all of its weights
        except (ValueError, RuntimeError, NotImplementedError, AssertionError, KeyError) as error:
            raise EdgepruneError(f"{name}: coremltools cannot convert it: {' '.join(str(error).split())}") from error
        if i < chunks:  # a program does not depend on the values that it is traced with
            tensors |= zip(outputs, _zeros_like_outputs(module, feeds), strict=True)
        # What no later package reads is what the network returns.
        returned = [key for key in returned if key not in module.inputs] + outputs
        paths.append(path)
        progress(f"{name}: converted", i, chunks)
    chain = Chain(paths, Prediction if sys.platform == "darwin" else Package)
    if sys.platform == "darwin":
        record = parity.check(name, chain, reference, examples, returned, bound=DEVICE_BOUND, progress=progress)
        return record | {"by": "prediction"}
    record = parity.check(name, chain, reference, examples, returned, bound=BOUND, progress=progress)
    return record | {"by": "mil_reference", "half_relative": _half_error(name, chain, examples[-1], returned, progress)}


def _widen_scales(network: nn.Module) -> None:
    """Set the scales of quantised layers to float32: a program's weights have the precision of their scales."""
    for layer in network.modules():
        if isinstance(layer, PackedLinear):
            layer.weight_scale = layer.weight_scale.float()


def _zeros_like_outputs(module: nn.Module, feeds: Tensors) -> list[torch.Tensor]:
    """Return zeros with the shapes and types of a module's outputs, without computing these."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs = module(*(mode.from_tensor(value) for value in feeds.values()))
    return [torch.zeros(value.shape, dtype=value.dtype) for value in outputs]


def _save(model: Any, path: Path) -> None:
    """Write a package under a temporary name and rename it, so that `path` is never incomplete."""
    scratch = path.with_name(SCRATCH + path.name)
    model.save(str(scratch))
    shutil.rmtree(model.package_path)  # coremltools would keep its copy until the process ends
    scratch.rename(path)


def _half_error(name: str, chain: Chain, example: Tensors, outputs: Sequence[str], progress: Progress) -> float:
    """Return the largest relative error if every value is rounded to half precision; only a finite one is required.

    It is relative to the chain's latest results: the same example in float32, which passed the comparison.
    """
    expected = chain.latest
    step = Steps(f"{name}: compared in half precision", chain.steps, progress)
    rounded = chain.run(outputs, {key: value.numpy() for key, value in example.items()}, half=True, step=step)
    worst = max(parity.relative_error(a, b)[0] for a, b in zip(rounded, expected, strict=True))
    if not np.isfinite(worst):
        raise ParityError(f"{name}: its activations overflow in half precision, which Core ML computes in")
    return worst


class Chain:
    """Packages run one after the other, one open at a time; each reads inputs and earlier outputs by name."""

    def __init__(self, paths: Sequence[Path], opened: Callable[[Path], Package | Prediction] = Package) -> None:
        self._paths, self._opened = paths, opened
        self.latest: list[NDArray[Any]] = []
        """Results of the last run."""

    @property
    def steps(self) -> int:
        """The number of packages."""
        return len(self._paths)

    def run(
        self,
        names: Sequence[str] | None,
        feeds: Mapping[str, Any],
        *,
        half: bool = False,
        step: Callable[[], None] = lambda: None,
    ) -> list[NDArray[Any]]:
        """Return the outputs `names`, or all of the last package; call `step` after each package."""
        arrays, outputs = dict(feeds), list[str]()
        for path in self._paths:
            package = self._opened(path)
            inputs, outputs = {name: arrays[name] for name in package.inputs}, package.outputs
            arrays |= zip(outputs, package.run(None, inputs, half=half), strict=True)
            del package  # before the next is opened
            step()
        self.latest = [arrays[name] for name in names or outputs]
        return self.latest


class Prediction:
    """A package run by Core ML itself, on the CPU of a Mac."""

    def __init__(self, path: Path) -> None:
        self._model: Any = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.CPU_ONLY)
        description = self._model.get_spec().description
        self.inputs, self.outputs = ([v.name for v in side] for side in (description.input, description.output))

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, half: bool = True) -> list[NDArray[Any]]:
        """Return outputs as Package.run does; Core ML always computes in half precision."""
        kinds: dict[str, Any] = {
            name: np.int32 if np.asarray(a).dtype.kind == "i" else np.float32 for name, a in feeds.items()
        }
        results = self._model.predict({name: np.asarray(array, kinds[name]) for name, array in feeds.items()})
        return [np.asarray(results[name], np.float32) for name in names or self.outputs]
