"""Runs ONNX networks in ONNX Runtime, with numpy inputs and outputs.

Needs onnxruntime, tokenizers and, to count and cut networks on the CPU, onnx; not torch. The INT4 weights are
DequantizeLinear + MatMul pairs, which ONNX Runtime fuses to MatMulNBits. providers.py chooses where it computes,
prepack.py keeps prepacked weights on disk. I/O binding and the providers' own options are not used. It was executed
only on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.pieces import Needs, UncountableError
from edgeprune.runtimes import prepack
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.gpu import nvml_row
from edgeprune.runtimes.mapped import evicting
from edgeprune.runtimes.memory import Reading
from edgeprune.runtimes.networks import Engine, Network, NetworkBackend, Shapes, WholeEngine, files_of, room_here
from edgeprune.runtimes.ort_session import (
    ACCURACY,
    VENDOR_ERRORS,
    Options,
    check,
    opening,
    ran,
    session_of,
    session_options,
)
from edgeprune.runtimes.piecewise import PiecewiseNetwork
from edgeprune.runtimes.providers import Choice, choose
from edgeprune.runtimes.strip_decoder import INPUT, StripDecoder, in_strips

if TYPE_CHECKING:
    from edgeprune.runtimes.ort_pieces import OrtFile

with needs("onnx"):
    import onnxruntime

_FILE = "model.onnx"
_ROUNDED = "transformer"
"""The only network that `precision=int8` is for."""
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


class OrtNetwork:
    """One ONNX file, with inputs and outputs by name.

    Args:
        path: the file.
        options: creates new session options at each call.
        choice: where to compute.
        cache_dir: where prepacked weights are kept; None does not prepack.

    Raises:
        InputError: the file is missing, damaged or not ONNX, the requested provider does not start, or the cache
            cannot be written.
    """

    def __init__(self, path: Path, options: Options, choice: Choice, cache_dir: Path | None = None) -> None:
        check(path)
        with opening(path):
            if cache_dir is None:
                with evicting(Path(f"{path}.data")):
                    session = session_of(path, options(), choice)
            else:
                session = _prepacked_session(path, options, choice, cache_dir)
        self._session: onnxruntime.InferenceSession | None = session
        self._path = path
        self._inputs = {i.name: _TYPES.get(i.type, np.float32) for i in session.get_inputs()}
        self._outputs = [o.name for o in session.get_outputs()]
        self.provider: str = session.get_providers()[0]
        self.why = choice.started(self.provider)

    def largest_batch(self, name: str) -> None:
        """Return None: the sizes of an export's models are dynamic."""
        return None

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32."""
        if self._session is None:
            raise InputError("the runtime is closed; load the folder again")
        missing = set(self._inputs) - set(arrays)
        if missing:
            raise InputError(f"{self._path}: inputs: the model also needs {sorted(missing)}, found {sorted(arrays)}")
        feed = {name: np.asarray(arrays[name], dtype) for name, dtype in self._inputs.items()}
        values = ran(self._path, self._session, self._outputs, feed)
        return {k: np.asarray(v, np.float32) for k, v in zip(self._outputs, values, strict=True)}

    def close(self) -> None:
        """Drop the session; ONNX Runtime then frees its memory."""
        self._session = None


def _prepacked_session(path: Path, options: Options, choice: Choice, cache_dir: Path) -> onnxruntime.InferenceSession:
    """Open the prepacked copy; if ONNX Runtime rejects it, make it again once."""
    config = {"accuracy_level": options().get_session_config_entry(ACCURACY)}
    for attempt in range(2):
        copy = prepack.prepacked(path, cache_dir, config, options)
        as_is = options()
        as_is.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return session_of(copy, as_is, choice)
        except VENDOR_ERRORS:
            prepack.forget(copy)
            if attempt:
                raise
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class CpuEngine:
    """Opens networks on the CPU."""

    options_of: Callable[[str], Options]
    """The session options of a network, by its name."""
    choice: Choice
    activations: str
    """What the transformer computes in; all other networks compute in float32."""
    limited: bool
    """Whether the user named a limit."""
    text_activations: str = "fp32"
    name: str = "ort"
    counts_values: bool = True

    def open(self, folder: Path, limit: int | None) -> Network:
        """Open a network: whole, in pieces, or a VAE's decoder in strips."""
        if limit is None:
            return OrtNetwork(folder / _FILE, self.options_of(folder.name), self.choice)
        file = self._file(folder)
        return StripDecoder(file, limit) if INPUT in file.kinds else PiecewiseNetwork(file, limit)

    def _file(self, folder: Path) -> OrtFile:
        from edgeprune.runtimes.ort_pieces import OrtFile  # onnx is needed only where networks are counted

        int8 = folder.name == _ROUNDED and self.activations == "int8"
        return OrtFile(folder / _FILE, self.options_of(folder.name), self.choice, int8=int8)

    def needs(self, folder: Path, shapes: Shapes) -> Needs:
        """Return the bytes that a network takes; it is read, without its weights.

        Raises:
            InputError: a limit was named, and what the network takes cannot be counted.
        """
        try:
            file = self._file(folder)
            whole, least = (file.graph(shapes, sliced=sliced).measured().needs() for sliced in (False, True))
        except UncountableError:
            if self.limited:
                raise
            return files_of(folder)
        return in_strips(file, shapes, Needs(whole.whole, least.least))

    def room(self) -> tuple[int, int]:
        """Return the bytes that the process has now, and may have at most."""
        return room_here()

    def memory(self) -> dict[str, Reading]:
        """Return nothing: the process has the memory."""
        return {}


def open_backend(
    folder: Path,
    settings: Settings,
    *,
    provider: str | None = None,
    precision: str = "exact",
    threads: int = 0,
    cache_dir: str | Path | None = None,
    memory: int | None = None,
    keep_embeddings: str | Path | None = None,
) -> NetworkBackend:
    """Open an export folder.

    Args:
        folder: an export of format onnx.
        settings: that folder's settings.
        provider: cuda, tensorrt, coreml, openvino or cpu; None takes the first of these that is present.
        precision: what the transformer's activations are computed in: `exact` (float32), or on the CPU `int8`, see
            `session_options`. All other networks compute in float32.
        threads: threads inside one operator; 0 for as many as affinity, quota and cores allow.
        cache_dir: keeps prepacked weights there and maps them (CPU only, without `memory`). The first start creates
            them, which takes more time and memory.
        memory: most bytes of the process; None takes most of what is free. Networks that do not fit together are open
            one after the other. On the CPU the values of a network count, too, and blocks that do not fit are opened
            and closed at each step; other providers open every network whole, and count its files.
        keep_embeddings: keeps encoded prompts in this folder, so that each is encoded once.

    Raises:
        InputError: a file is missing, damaged or not as the export wrote it, or an option does not fit.
    """
    # A cache implies the CPU: weights are prepacked only there.
    choice = choose(onnxruntime.get_available_providers(), "cpu" if cache_dir and not provider else provider)
    known = ("exact", "int8") if choice.name == "cpu" else ("exact",)
    if precision not in known:
        raise InputError(f"precision: found {precision!r}, expected {' or '.join(known)} on {choice.providers[0]}")

    def options_of(name: str) -> Options:
        int8 = name == _ROUNDED and precision == "int8"
        return functools.partial(session_options, int8=int8, threads=threads, reuse=choice.name != "cpu")

    options_of(_ROUNDED)()  # checks the options before anything is opened
    if cache_dir is not None and choice.name != "cpu":
        raise InputError(f"cache_dir: found it for {choice.providers[0]}, expected it for provider=cpu only")
    if cache_dir is not None and memory is not None:
        raise InputError("cache_dir: found it with memory, expected one of them: prepacked weights are opened whole")
    activations = "int8" if precision == "int8" else "fp32"
    engine: Engine
    if choice.name == "cpu" and cache_dir is None:
        engine = CpuEngine(options_of, choice, activations, limited=memory is not None)
    else:
        cache = None if cache_dir is None else Path(cache_dir)
        engine = WholeEngine(
            "ort",
            lambda path: OrtNetwork(path / _FILE, options_of(path.name), choice, cache),
            activations=activations,
            rows=nvml_row if choice.name in ("tensorrt", "cuda") else dict,
        )
    return NetworkBackend(engine, folder, settings, memory=memory, keep_embeddings=keep_embeddings)
