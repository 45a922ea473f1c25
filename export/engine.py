"""Builds a TensorRT engine from an ONNX file, in a process of its own: python -m edgeprune.export.engine SPEC.

to_trt.py starts it. While TensorRT builds, it holds the weights about four times, once of them mapped from the ONNX
file (these pages are evicted). A process of its own does not also hold what tracing and comparing need, and if the
system kills it for lack of memory, the export survives and reports that. SPEC is JSON with the fields of `Spec`.
Standard output has one JSON object per line: the progress, then what was built or an error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.common.errors import EdgepruneError
from edgeprune.runtimes import mapped
from edgeprune.runtimes.trt import logger

Profile = dict[str, tuple[tuple[int, ...], ...]]
"""Smallest, best and largest shape, by input name."""


@dataclass(frozen=True)
class Spec:
    """Describes an engine to build."""

    vendor: str
    """`tensorrt` or `tensorrt_rtx`."""
    name: str
    """The network's name, for messages."""
    onnx: str
    engine: str
    profile: Profile
    cache: str
    """Path of a timing cache: read if it exists, then written (regular TensorRT only)."""
    streams: bool
    """Whether the engine can keep weights in the host's memory, and read them from there as it runs."""


def build(spec: Spec, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Write the engine.

    Returns:
        How many layers of the network that TensorRT parsed have INT4 and INT8 weights.

    Raises:
        EdgepruneError: TensorRT cannot read the ONNX file or build from it.
    """
    trt = importlib.import_module(spec.vendor)
    log = logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(spec.onnx):
        raise EdgepruneError(f"{spec.name}: {spec.vendor} cannot read its ONNX: {_errors(parser)}")
    kinds = Counter(
        layer.get_input(0).dtype
        for layer in map(network.get_layer, range(network.num_layers))
        if layer.type == trt.LayerType.DEQUANTIZE
    )
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    for tensor, (least, best, largest) in spec.profile.items():
        shapes.set_shape(tensor, tuple(least), tuple(best), tuple(largest))
    config.add_optimization_profile(shapes)
    if spec.streams:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    config.progress_monitor = _monitor(trt, spec.name, progress)
    cache, timings = Path(spec.cache), None
    if trt.__name__ == "tensorrt":  # tensorrt_rtx does no timing while it builds
        timings = config.create_timing_cache(cache.read_bytes() if cache.is_file() else b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    with mapped.evicting(Path(f"{spec.onnx}.data")):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EdgepruneError(f"{spec.name}: {spec.vendor} cannot build it: {log.take()}")
    with Path(spec.engine).open("wb") as file:
        file.write(plan)
    if timings is not None:
        cache.write_bytes(bytes(timings.serialize()))
    return {"int4_layers": kinds[trt.DataType.INT4], "int8_layers": kinds[trt.DataType.INT8]}


def _errors(parser: Any) -> str:
    """Return the parser's errors on one line."""
    return " ".join("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)).split())[:400]


def _monitor(trt: Any, name: str, progress: Callable[[str, int, int], None]) -> Any:
    """Return a monitor that reports the steps of each top-level phase of the build to `progress`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # pybind refuses super().__init__()

            self._steps: dict[str, tuple[int, int]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if not parent:
                self._steps[phase] = (0, steps)
                progress(f"{name}: {phase}", 0, steps)

        def phase_finish(self, phase: str) -> None:
            if steps := self._steps.pop(phase, None):
                progress(f"{name}: {phase}", steps[1], steps[1])

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                self._steps[phase] = (step + 1, self._steps[phase][1])
                progress(f"{name}: {phase}", *self._steps[phase])
            return True

    return Monitor()


def _print_json(**line: Any) -> None:
    """Print one line of JSON; end quietly if the reader is gone."""
    try:
        print(json.dumps(line), flush=True)
    except BrokenPipeError:
        os._exit(1)


def main() -> None:
    """Build the engine that the first argument describes."""
    spec = Spec(**json.loads(sys.argv[1]))
    try:
        _print_json(built=build(spec, lambda what, done, total: _print_json(progress=[what, done, total])))
    except EdgepruneError as error:
        _print_json(error=str(error))
    except OSError as error:
        _print_json(errno=error.errno, error=f"{spec.name}: {error.strerror}")


if __name__ == "__main__":
    main()
