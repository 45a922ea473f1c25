"""A stand-in for coremltools on a Mac: packages are computed by the reference evaluator."""

from __future__ import annotations

import dataclasses
import enum
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.export.mil_reference import Package
from edgeprune.runtimes import coreml

import coremltools as ct  # isort: skip  # after edgeprune.export, which keeps it quiet


class ComputeUnit(enum.Enum):
    ALL, CPU_AND_NE, CPU_AND_GPU, CPU_ONLY = range(4)


@dataclasses.dataclass(eq=False)
class FakeModel:
    """An opened package."""

    predict: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]


class FakeCoreML:
    """The part of coremltools that runtimes/coreml.py uses; packages are computed by the reference evaluator."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.loaded: list[tuple[str, ComputeUnit]] = []
        self.batches: list[int] = []
        self.alive: weakref.WeakSet[FakeModel] = weakref.WeakSet()
        self.ComputeUnit = ComputeUnit
        self.utils = SimpleNamespace(load_spec=ct.utils.load_spec)
        self.models = SimpleNamespace(
            utils=SimpleNamespace(compile_model=self.compile_model), CompiledMLModel=self.open
        )

    def compile_model(self, package: str, destination: str) -> str:
        if "damaged" in package:
            raise Exception("compiler error:\n  no such operation")
        assert destination.endswith(".mlmodelc")
        Path(destination).mkdir()
        (Path(destination) / "of").write_text(package)
        self.compiled.append(Path(package).name)
        return destination

    def open(self, compiled: str, units: ComputeUnit) -> FakeModel:
        package = Package(Path((Path(compiled) / "of").read_text()))
        self.loaded.append((package.path.parent.name, units))

        def predict(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            for value in package.spec.description.input:
                allowed, whole = coreml.shapes(value.type.multiArrayType)
                array = arrays[value.name]
                assert array.shape in allowed and array.dtype == (np.int32 if whole else np.float32)
            self.batches.append(len(array))
            return dict(zip(package.outputs, package.run(None, arrays), strict=True))

        model = FakeModel(predict)
        self.alive.add(model)
        return model
