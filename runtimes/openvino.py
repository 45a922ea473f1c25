"""Runs networks in OpenVINO on the CPU, an Intel GPU or an NPU, with numpy inputs and outputs.

Needs openvino and tokenizers, not torch. Opens both IR (`openvino_model.xml`, with memory-mapped weights) and ONNX. On
the CPU text encoders and VAE compute in float32, and the transformer in what `precision.choose` finds fast and exact
enough; OpenVINO's own defaults are bf16 on CPUs that have it and activations rounded to int8. It uses one stream and
synchronous requests.
It was executed only on the CPU; the settings for GPU and NPU follow OpenVINO's documentation.
"""

from __future__ import annotations

# This file has its vendor's name: with this folder on sys.path (as for a script in it) `import openvino` would find it.
if __name__ != "edgeprune.runtimes.openvino":
    raise ImportError(f"import this module as edgeprune.runtimes.openvino, not as {__name__}; it is not OpenVINO's own")

import functools
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.extras import needs
from edgeprune.common.fields import whole_number
from edgeprune.common.files import read_json
from edgeprune.common.pieces import Needs
from edgeprune.common.read_ahead import read_ahead
from edgeprune.common.threads import usable
from edgeprune.runtimes.base import Array, Settings
from edgeprune.runtimes.external import check_external
from edgeprune.runtimes.mapped import evicting, spans
from edgeprune.runtimes.memory import Reading
from edgeprune.runtimes.networks import Network, NetworkBackend, Shapes, room_here
from edgeprune.runtimes.openvino_graph import Graph, Piece
from edgeprune.runtimes.openvino_vae import OpenVinoStrips
from edgeprune.runtimes.piecewise import PiecewiseNetwork
from edgeprune.runtimes.precision import AUTO, EXACT, choose
from edgeprune.runtimes.strip_decoder import INPUT, StripDecoder, in_strips

with needs("openvino"):
    import openvino

FILES = {"openvino": "openvino_model.xml", "onnx": "model.onnx"}
"""The name of a network's file, by the folder's format."""
ANGLES = ("edgeprune", "angles")
"""Path of the rt_info that marks a model whose angles stay float32 (export/to_openvino.py)."""
_PRECISION = "INFERENCE_PRECISION_HINT"
_DYNAMIC = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
_LARGE = 100_000
"""Fewest bytes of a weight that is worth reading ahead."""
_EXACT: dict[str, dict[str, Any]] = {
    "CPU": {_PRECISION: "f32", _DYNAMIC: "0"},
    "GPU": {_DYNAMIC: "0"},  # computes in float16
    "NPU": {},
}
"""The most exact settings, by kind of device; the NPU has none."""


@functools.cache
def core() -> openvino.Core:
    """Return the only OpenVINO core of this process.

    Two cores can crash (2026.4): each CPU plugin installs its own signal stack and restores the previous one when it is
    destroyed. If the first core is destroyed first, the second one restores a stack that is already freed, and the next
    signal, including Ctrl-C, is a segmentation fault.
    """
    return openvino.Core()


class OpenVinoFile:
    """One IR or ONNX file, from which models are read and compiled; maps OpenVINO's errors to InputError."""

    def __init__(self, path: Path, device: str, config: dict[str, Any], why: str = "") -> None:
        if not path.exists():
            raise InputError(f"{path}: no such file, expected an OpenVINO or ONNX model; export again")
        self.path, self.device, self._config, self.why = path, device, config, why
        self._remove_links: Callable[[], object] = lambda: None
        self._file = self._unlinked(check_external(path)) if path.suffix == ".onnx" else path
        self._weights = path.with_suffix(".bin") if path.suffix == ".xml" else Path(f"{self._file}.data")
        model = self._read()
        self.kinds = {port.any_name: port.element_type.to_dtype() for port in model.inputs}
        """The type of each input, by name."""
        self.exact_angles = _has_exact_angles(model)
        """Whether sines and cosines stay float32 in any precision; otherwise the whole network computes in it."""
        if _PRECISION in config and not self.exact_angles:
            self._config = config | {_PRECISION: "f32"}

    def _unlinked(self, data: set[str]) -> Path:
        """Return an ONNX file whose external data is no symlink: OpenVINO refuses data that is in another folder.

        In a hub's cache every file is a symlink to another folder. Hard links take no room, but have to be on the same
        disk. They stay as long as this object, which maps them.
        """
        path = self.path
        if not any((path.parent / name).is_symlink() for name in data):
            return path
        try:
            folder = Path(tempfile.mkdtemp(prefix=".edgeprune-", dir=(path.parent / min(data)).resolve().parent))
            self._remove_links = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            shutil.copyfile(path, folder / path.name)
            for name in data:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.link((path.parent / name).resolve(), folder / name)
        except OSError as error:
            raise InputError(
                f"{path}: OpenVINO does not follow links to external data, and they cannot be replaced by hard links "
                f"({error.strerror}); copy the export to a folder of its own: cp -rL {path.parent.parent} export"
            ) from None
        return folder / path.name

    def _unusable(self, error: RuntimeError) -> InputError:
        return InputError(f"{self.path}: OpenVINO cannot open it on {self.device}: {_line(error)}; export again")

    def _read(self) -> openvino.Model:
        try:
            return core().read_model(self._file)
        except RuntimeError as error:
            raise self._unusable(error) from None

    def read(self, shapes: Mapping[str, Sequence[int]]) -> openvino.Model:
        """Return the model with inputs of these shapes. Its weights stay in the file.

        Raises:
            InputError: an input is missing, or the model does not take one of this shape.
        """
        if missing := set(self.kinds) - set(shapes):
            raise InputError(f"{self.path}: inputs: the model also needs {sorted(missing)}, found {sorted(shapes)}")
        model = self._read()
        try:
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        except RuntimeError as error:
            raise self._failed(error, shapes) from None
        return model

    def compiled(self, model: openvino.Model, *, part: bool = False) -> Compiled:
        """Return the model, or a part of it, ready to run on the device; no cache keeps parts, which limits change."""
        config = {key: value for key, value in self._config.items() if not part or key != "CACHE_DIR"}
        try:
            with evicting(self._weights, kept=True):
                return Compiled(self, model, core().compile_model(model, self.device, config))
        except RuntimeError as error:
            raise self._unusable(error) from None

    def graph(self, shapes: Mapping[str, Sequence[int]]) -> Graph:
        """Return the operations of the model with inputs of these shapes.

        Raises:
            InputError: an input is missing, or the model does not take one of this shape.
        """
        return Graph(self.read(shapes))

    def opened(self, part: Piece) -> Compiled:
        """Return a part of a graph, ready to run on the device."""
        return self.compiled(part.model, part=True)

    def ahead(self, part: Piece) -> None:
        """Ask the operating system to read the weights of a part, which is opened soon."""
        nodes = (node for node in part.model.get_ops() if node.get_type_name() == "Constant")
        read_ahead(self._weights, spans(self._weights, (node.data for node in nodes if node.get_byte_size() >= _LARGE)))

    def strips(self, shape: Sequence[int]) -> OpenVinoStrips:
        """Return the decoder for latents of this shape, in segments.

        Raises:
            InputError: strips cannot compute it.
        """
        return OpenVinoStrips(self, shape)

    def evicting(self) -> AbstractContextManager[None]:
        """Evict the mapped weights inside this context, in which the caller holds the model that maps them."""
        return evicting(self._weights, kept=True)

    def _failed(self, error: RuntimeError, shapes: Mapping[str, Sequence[int]]) -> InputError:
        return InputError(f"{self.path}: OpenVINO failed: {_line(error)}; inputs were {dict(shapes)}")

    def failed(self, error: RuntimeError, feed: Sequence[Array]) -> InputError:
        """Return the error of a run."""
        return InputError(f"{self.path}: OpenVINO failed: {_line(error)}; inputs were {[a.shape for a in feed]}")

    def close(self) -> None:
        """Remove what was written for it."""
        self._remove_links()


class Compiled:
    """A model, or a piece of one, on its device."""

    def __init__(self, file: OpenVinoFile, source: openvino.Model, model: openvino.CompiledModel) -> None:
        self._file, self.model = file, model
        self._source: openvino.Model | None = source
        """What maps the weights; None once they are repacked."""
        self.names = [port.names for port in model.outputs]
        """The names of each output."""

    def __call__(self, feed: Sequence[Array]) -> list[Array]:
        """Return copies of all outputs, in their order, for all inputs in theirs."""
        try:
            # The CPU repacks weights at their first use.
            with self._file.evicting() if self._source else nullcontext():
                values = self.model(list(feed), share_inputs=True, share_outputs=True)
            self._source = None
        except RuntimeError as error:
            raise self._file.failed(error, feed) from None
        return [np.array(value) for value in values.values()]

    def rest(self) -> None:
        """Free what it has for values until the next run."""
        self.model.release_memory()


class OpenVinoNetwork:
    """A whole network, with inputs and outputs by name.

    It is compiled for the sizes of the first call, and again when they change. The NPU requires fixed sizes, and on the
    CPU a model with dynamic sizes keeps the activations of every block (70 MB per block of SD3.5 Large at 512x512).
    """

    def __init__(self, file: OpenVinoFile) -> None:
        self._file: OpenVinoFile | None = file
        self._shapes: dict[str, list[int]] | None = None
        self._compiled: Compiled | None = None
        self.provider, self.why = file.device, file.why

    def largest_batch(self, name: str) -> None:
        """Return None: the sizes of an export's models are dynamic."""
        return None

    def __call__(self, **arrays: Any) -> dict[str, Array]:
        """Return the outputs by name, float32."""
        if self._file is None:
            raise InputError("the runtime is closed; load the folder again")
        shapes = {name: list(np.shape(value)) for name, value in arrays.items()}
        if self._compiled is None or shapes != self._shapes:
            self._compiled = None  # frees its memory before the next one needs it
            self._compiled, self._shapes = self._file.compiled(self._file.read(shapes)), shapes
        values = self._compiled([np.asarray(arrays[name], kind) for name, kind in self._file.kinds.items()])
        named = zip(self._compiled.names, values, strict=True)
        return {name: np.asarray(value, np.float32) for names, value in named for name in names}

    def close(self) -> None:
        """Drop the compiled model; OpenVINO then frees its memory."""
        self._compiled = None
        if self._file is not None:
            self._file.close()
        self._file = None


def _has_exact_angles(model: openvino.Model) -> bool:
    """Return whether sines and cosines stay exact: near 1000, bf16 has only every fourth timestep."""
    wavy = any(node.get_type_name() in ("Sin", "Cos") for node in model.get_ops())
    return not wavy or (_heeds_marks() and model.has_rt_info(list(ANGLES)))


def _marks_angles(path: Path, device: str, exact: dict[str, Any]) -> bool:
    """Return whether a network's angles stay float32 in bf16; older exports do not mark them."""
    file = OpenVinoFile(path, device, exact)
    try:
        return file.exact_angles
    finally:
        file.close()


def _heeds_marks() -> bool:
    """Return whether this OpenVINO computes operations that are marked as precise in float32; it did not before 2026.4.

    The marked angles then had an error of 3e-2 of the velocity's largest value in bf16, instead of 5e-3.
    """
    year, number = re.findall(r"\d+", openvino.__version__)[:2]
    return (int(year), int(number)) >= (2026, 4)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def offered(target: str, device: str = "CPU") -> tuple[str, ...]:
    """Return the precisions of a device besides its most exact one, the fastest first, for an export's format.

    An ONNX file cannot say which angles bf16 would spoil.
    """
    kind = device.partition(".")[0]
    if kind == "CPU" and target == "openvino" and _heeds_marks():
        return "int8-bf16", "int8", "bf16"
    return () if kind == "NPU" else ("int8",)


def settings_of(
    device: str,
    *,
    threads: int = 0,
    precision: str = EXACT,
    group_size: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Return OpenVINO's properties for these options of `open_backend`.

    Args:
        device: CPU, GPU (or GPU.1, ...) or NPU.
        threads: on the CPU; 0 for as many as affinity, quota and cores allow.
        precision: EXACT, or one of those that are `offered`.
        group_size: INT4 weights that share a scale. In int8 the CPU then rounds groups of as many activations; with
            larger groups it would round none, with smaller ones (its default is 32) it is slower.
        cache_dir: keeps compiled models.

    Raises:
        InputError: OpenVINO finds no such device, the device lacks the option, or the cache cannot be written.
    """
    kind = device.partition(".")[0]
    seen = core().available_devices
    if kind not in _EXACT or not any(name == device or name.startswith(f"{device}.") for name in seen):
        raise InputError(f"device: found {device!r}, expected CPU, GPU or NPU; OpenVINO finds here: {', '.join(seen)}")
    config = dict(_EXACT[kind])
    if "int8" in precision:
        del config[_DYNAMIC]
        if group_size and kind == "CPU":
            config[_DYNAMIC] = str(group_size)
    if "bf16" in precision:
        config[_PRECISION] = "bf16"
    if threads < 0 or (threads and kind != "CPU"):
        raise InputError(f"threads: found {threads} for {device}, expected 0 or more for CPU, 0 elsewhere")
    if kind == "CPU":
        config["INFERENCE_NUM_THREADS"] = threads or usable()
    if cache_dir is not None:
        try:
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache_dir: {cache_dir}: {error.strerror}, expected a writable folder") from None
        config["CACHE_DIR"] = str(cache_dir)
    return config


@dataclass(frozen=True)
class OpenVinoEngine:
    """Opens networks on one device."""

    file: str
    """The name of a network's file."""
    device: str
    config: Mapping[str, Any]
    """OpenVINO's properties for the transformer."""
    exact: Mapping[str, Any]
    """Those for all other networks."""
    activations: str
    why: str
    """Why the transformer is computed there, and in what."""
    text_activations: str
    """What the most exact settings compute in."""
    name: str = "openvino"
    counts_values: bool = True

    def open(self, folder: Path, limit: int | None) -> Network:
        """Open a network: whole, in pieces, or a VAE's decoder in strips."""
        file = self._file(folder)
        if limit is None:
            return OpenVinoNetwork(file)
        return StripDecoder(file, limit) if INPUT in file.kinds else PiecewiseNetwork(file, limit)

    def _file(self, folder: Path) -> OpenVinoFile:
        config = self.config if folder.name == "transformer" else self.exact
        return OpenVinoFile(folder / self.file, self.device, dict(config), self.why)

    def needs(self, folder: Path, shapes: Shapes) -> Needs:
        """Return the bytes that a network takes; it is read, without its weights."""
        file = self._file(folder)
        try:
            return in_strips(file, shapes, file.graph(shapes).measured().needs())
        finally:
            file.close()

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
    device: str = "CPU",
    threads: int = 0,
    precision: str = AUTO,
    cache_dir: str | Path | None = None,
    memory: int | None = None,
    keep_embeddings: str | Path | None = None,
) -> NetworkBackend:
    """Open an export folder of format openvino or onnx.

    Args:
        folder: the export.
        settings: that folder's settings.
        device: CPU, GPU (or GPU.1, ...) or NPU.
        threads: on the CPU; 0 for as many as affinity, quota and cores allow.
        precision: what the transformer's activations are computed in: `exact` (float32; float16 on GPU and NPU, but of
            a family that overflows it float32 on the GPU), `int8` (CPU and GPU: inputs of INT4 layers are rounded, on
            the CPU in groups as large as those of the weights), `bf16` (CPU, not from ONNX, nor from an export that
            does not mark angles, which stay float32), `int8-bf16` (both), or `auto`: on the CPU the fastest that the
            export measured to be exact enough, elsewhere `exact`. On the CPU a precision without its instructions is
            refused.
        cache_dir: keeps compiled models there, so that the next start is faster.
        memory: most bytes of the process; None takes most of what is free. Networks that do not fit together are open
            one after the other, and blocks that do not fit are opened and closed at each step.
        keep_embeddings: keeps encoded prompts in this folder, so that each is encoded once.

    Raises:
        InputError: a file is missing, damaged or not as the export wrote it, or an option does not fit the device.
    """
    path = folder / "edgeprune_export.json"
    exported = read_json(path)
    exact = settings_of(device, threads=threads, cache_dir=cache_dir)
    kind, file = device.partition(".")[0], FILES[exported["target"]]
    if settings.family.overflows and kind == "NPU":
        raise InputError(
            f"device: found {device}, which computes in float16, expected CPU or GPU: values of "
            f"{settings.family.name} models exceed float16"
        )
    names, measured = offered(exported["target"], device), exported if kind == "CPU" else None
    chosen = choose(precision, names, measured)
    if "bf16" in chosen.name and not _marks_angles(folder / "transformer" / file, device, exact):
        if precision != AUTO:
            raise InputError(
                f"precision: found {precision!r}, but {folder} does not mark the angles that bf16 would spoil: export "
                "again"
            )
        chosen = choose(precision, [name for name in names if "bf16" not in name], measured)
    group_size = 0 if exported.get("group_size") is None else whole_number(exported, "group_size", path)
    config = settings_of(device, threads=threads, precision=chosen.name, group_size=group_size, cache_dir=cache_dir)
    whole = "fp32" if kind == "CPU" else "fp16"
    wide = whole
    if settings.family.overflows and kind == "GPU":
        config, wide = config | {_PRECISION: "f32"}, "fp32"
    activations = wide if chosen.name == EXACT else "int8" if "int8" in chosen.name else chosen.name
    why = "; ".join(filter(None, (f"device={device}", chosen.why)))
    return NetworkBackend(
        OpenVinoEngine(file, device, config, exact, activations, why, text_activations=whole),
        folder,
        settings,
        memory=memory,
        keep_embeddings=keep_embeddings,
    )
