"""Opens ONNX models in ONNX Runtime and runs them; maps its errors to InputError."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.heap import returned, trim
from edgeprune.common.threads import usable
from edgeprune.runtimes.external import check_external
from edgeprune.runtimes.providers import Choice

with needs("onnx"):
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as vendor

Options = Callable[[], onnxruntime.SessionOptions]
"""Creates new session options at each call."""
ACCURACY = "session.qdq_matmulnbits_accuracy_level"
VENDOR_ERRORS = (
    vendor.EPFail,
    vendor.Fail,
    vendor.InvalidArgument,
    vendor.InvalidGraph,
    vendor.InvalidProtobuf,
    vendor.NoModel,
    vendor.NoSuchFile,
    vendor.NotImplemented,
    vendor.RuntimeException,
)


def check(path: Path) -> set[str]:
    """Return the names of a model's data files.

    Raises:
        InputError: the model is missing or damaged, or one of these files is not as the model says.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file, expected an ONNX model; export again")
    return check_external(path)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Map ONNX Runtime's errors; afterwards, nothing is left of the copies that it makes of weights.

    Without `returned`, opening 1.5 GB of INT4 weights peaked at 3.0 GB, of which 1.4 GB stayed in the heap; with it, at
    1.8 GB, and it was no slower.
    """
    try:
        with returned():
            yield
    except VENDOR_ERRORS as error:
        raise InputError(f"{path}: ONNX Runtime cannot open it: {_line(error)}; export again") from None
    finally:
        trim()


def ran(
    path: Path, session: onnxruntime.InferenceSession, outputs: Sequence[str], feed: Mapping[str, Any]
) -> Sequence[Any]:
    """Return the outputs of these names.

    Raises:
        InputError: ONNX Runtime reports an error.
    """
    try:
        with returned():  # without reuse, freed values would leave holes in the heap: 700 MB for a block
            values: Sequence[Any] = session.run(list(outputs), dict(feed))
    except VENDOR_ERRORS as error:
        shapes = {k: v.shape for k, v in feed.items()}
        raise InputError(f"{path}: ONNX Runtime failed: {_line(error)}; inputs were {shapes}") from None
    return values


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def session_of(
    model: Path | bytes, options: onnxruntime.SessionOptions, choice: Choice
) -> onnxruntime.InferenceSession:
    """Open a model, given as a file or as its bytes."""
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=list(choice.providers))


def session_options(*, int8: bool = False, threads: int = 0, reuse: bool = True) -> onnxruntime.SessionOptions:
    """Return session options that favour exactness and low memory.

    Args:
        int8: MatMulNBits rounds its inputs to int8 (accuracy level 4) instead of computing in float32 (level 1). On
            random weights of SD3.5 Large's and Medium's shapes that was no faster (docs/run.md).
        threads: threads inside one operator; 0 for as many as affinity, quota and cores allow.
        reuse: give values the buffers of others that were read. These stay until the last value: 277 instead of 102 MB
            for a block of SD3.5 Large at 512x512, in the same time.

    Raises:
        InputError: threads are below 0.
    """
    if threads < 0:
        raise InputError(f"threads: found {threads}, expected 0 or more")
    options = onnxruntime.SessionOptions()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads or usable()
    # An arena never frees the largest step's activations; a memory pattern is useless because image sizes change.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.enable_mem_reuse = reuse
    options.log_severity_level = 3
    options.add_session_config_entry(ACCURACY, "4" if int8 else "1")
    return options
