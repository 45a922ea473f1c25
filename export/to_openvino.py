"""Exports an artefact, or any diffusers folder of a family, to OpenVINO IR (`openvino_model.xml` and `.bin`).

    export(Path("compressed"), Path("ir"), device=targets.load("intel-igpu"))

Each network is traced to the same ONNX that to_onnx.py writes, read by OpenVINO, saved as IR, and compared with torch
on the CPU in float32. INT4 and INT8 constants stay those of the checkpoint. Other constants are stored in half
precision if that changes no value, which holds for everything that the checkpoint stores in half precision. OpenVINO's
own `compress_to_fp16` would round the rest too, and that fails parity (5.8e-3 on a tiny model, from the timestep's
frequencies). On devices that compute in half precision or bf16, the angles of timestep and positions stay float32.
Shapes are dynamic; the runtime fixes them for the NPU. genai.py adds what OpenVINO GenAI needs, which cannot run a
transformer whose modulation is apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.errors import EdgepruneError, InputError, ParityError
from edgeprune.common.extras import needs
from edgeprune.common.files import cannot_write, need_space
from edgeprune.common.progress import Progress, silent
from edgeprune.export import INSIDE, genai, ir, parity, precisions, to_onnx
from edgeprune.export.folder import write
from edgeprune.runtimes.modulation import ROWS
from edgeprune.targets import Target

MODEL = "openvino_model.xml"
"""As optimum-intel names it."""
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""OpenVINO's defaults are activations rounded to int8 in groups, and bf16 on CPUs that have it."""
_LEAST_BYTES = 1024  # a smaller constant is not worth a Convert


def export(
    artefact: Path, out: Path, *, device: Target, modulation: str = INSIDE, progress: Progress = silent
) -> dict[str, Any]:
    """Write the folder `out`, which is the same for every device that supports the artefact's group size.

    If the artefact has `transformer_int4`, its integers are kept; otherwise weights are as exact as in the artefact.

    Args:
        artefact: the artefact's folder, or a diffusers folder.
        out: the folder to write.
        device: what the export is for.
        modulation: APART or INSIDE; OpenVINO GenAI opens the transformer that has it inside.
        progress: see progress.Progress.

    Returns:
        The content of edgeprune_export.json.

    Raises:
        MissingExtraError: openvino or openvino_tokenizers is not installed.
        InputError: `artefact` is not a pipeline of a family or is damaged, or `out` holds something other than an
            export.
        ParityError: a network does not compute what its checkpoint computes.
        DiskError: the disk is full, or `out` cannot be written; the next call resumes.
    """
    with needs("openvino"):
        import openvino
        import openvino_tokenizers
    version = {"openvino": openvino.get_version(), "openvino_tokenizers": openvino_tokenizers.__version__}
    return write(
        artefact, out, "openvino", version | {"modulation": modulation},
        lambda work: to_onnx.networks(artefact, work, modulation, progress, opened=converted) | version,
        lambda folder: _genai(folder, progress),
        lambda folder: precisions.measured(folder, progress),
    )  # fmt: skip


def _genai(folder: Path, progress: Progress) -> dict[str, Any]:
    """Add what OpenVINO GenAI needs, if it can open the folder; return further content of edgeprune_export.json."""
    if (folder / ROWS).is_dir():
        progress(
            "openvino: OpenVINO GenAI cannot open an export with a separate modulation/; use --modulation inside for it"
        )
        return {}
    return genai.write(folder)


class Compiled:
    """Saved IR on the CPU, as a parity.Runner. Of a large network only some blocks are compiled at one time."""

    steps = 1

    def __init__(self, path: Path) -> None:
        import torch

        from edgeprune.runtimes.openvino import OpenVinoFile

        threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._file, self._name = OpenVinoFile(path, "CPU", EXACT | threads), path.parent.name

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, Any], *, step: Callable[[], None] = lambda: None
    ) -> Sequence[Any]:
        """Return the outputs of these names, or all.

        Raises:
            ParityError: OpenVINO cannot compile or run what it saved.
        """
        from edgeprune.common.memory import resident
        from edgeprune.runtimes.openvino import OpenVinoNetwork
        from edgeprune.runtimes.piecewise import PiecewiseNetwork

        try:
            needs = self._file.graph({name: np.shape(value) for name, value in feeds.items()}).measured().needs()
            whole = resident() + needs.whole <= parity.MEMORY
            network = OpenVinoNetwork(self._file) if whole else PiecewiseNetwork(self._file, parity.MEMORY)
            results = network(**feeds)
        except InputError as error:
            raise ParityError(str(error)) from None
        step()
        return [results[name] for name in names or results]


def converted(path: Path) -> parity.Runner:
    """Convert an ONNX file to MODEL in the same folder, remove the ONNX file and open the result.

    Raises:
        ParityError: OpenVINO cannot read the ONNX file, or what it saved.
        DiskError: the disk has too little room, or is full nevertheless.
        EdgepruneError: the weights grew: OpenVINO unpacked the integers.
    """
    import openvino

    from edgeprune.runtimes.mapped import evicting
    from edgeprune.runtimes.openvino import core

    onnx_files = [path, *path.parent.glob(f"{path.name}.data")]
    before = sum(file.stat().st_size for file in onnx_files)
    target = path.with_name(MODEL)
    need_space(target.parent, before)
    try:
        with evicting(Path(f"{path}.data")):
            model = core().read_model(path)
            halve(model)
            angles = exact_angles(model)
            count_names(model)
            names = {node.get_friendly_name() for node in angles}
            del angles
            ir.save(model, target, precise=names, source=Path(f"{path}.data"))
            del model  # it maps the ONNX files
        runner = Compiled(target)
    except InputError as error:
        raise ParityError(str(error)) from error
    except OSError as error:
        raise cannot_write(target, error) from error
    except RuntimeError as error:
        if "iostream error" in str(error):  # OpenVINO's only hint of a failed write
            raise cannot_write(target, error) from error
        raise ParityError(f"{path.parent.name}: OpenVINO cannot convert it ({' '.join(str(error).split())})") from error
    after = target.with_suffix(".bin").stat().st_size
    if after > before:
        raise EdgepruneError(
            f"{path.parent.name}: found {after} bytes of weights, expected at most {before}, as in its ONNX file; "
            f"OpenVINO {openvino.get_version()} unpacked the integers"
        )
    for file in onnx_files:
        file.unlink()
    return runner


def count_names(model: Any) -> None:
    """Number the unnamed nodes within the model, in place: OpenVINO's own numbers count on through the process."""
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}_{index}")


def exact_angles(model: Any) -> list[Any]:
    """Return all sines and cosines and the nodes they are computed from; note in the model that it has exact angles.

    A timestep goes up to 1000, where neighbouring bf16 numbers are four radians apart. Without exact angles, one step
    of a model of SD3.5 Large's shape was off by 0.24 of the velocity, with them by 0.008 (OpenVINO 2026.4 on the CPU).
    """
    from openvino import opset13

    from edgeprune.runtimes.openvino import ANGLES

    by_id: dict[int, Any] = {}
    todo = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]
    while todo:
        node = todo.pop()
        if (key := node.get_instance_id()) in by_id:
            continue
        todo += [value.get_node() for value in node.input_values()]
        if node.get_type_name() == "Unsqueeze" and _is_last(node):
            # the CPU plugin would turn it into a Reshape and lose the mark
            shape = np.array([0] * (node.get_output_partial_shape(0).rank.get_length() - 1) + [1])
            reshape = opset13.reshape(node.input_value(0), shape, special_zero=True)
            reshape.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(reshape.output(0))
            node = reshape
        by_id[key] = node
    if by_id:
        model.set_rt_info("float32", list(ANGLES))
    return list(by_id.values())


def _is_last(unsqueeze: Any) -> bool:
    """Return whether an Unsqueeze adds the last axis."""
    axis = unsqueeze.input_value(1).get_node()
    rank = unsqueeze.get_output_partial_shape(0).rank
    return (
        rank.is_static and axis.get_type_name() == "Constant" and axis.data.tolist() in ([-1], [rank.get_length() - 1])
    )


def halve(model: Any) -> None:
    """Store float32 constants in half precision if no value changes; in place."""
    from openvino import Type, opset13

    for node in model.get_ordered_ops():
        constant = node.get_type_name() == "Constant" and node.get_element_type() == Type.f32
        if not constant or node.get_byte_size() < _LEAST_BYTES:
            continue
        values = node.data
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half, values):
            users = list(node.output(0).get_target_inputs())
            narrow = opset13.constant(half, name=node.get_friendly_name())
            wide = opset13.convert(narrow, "f32")
            for user in users:
                user.replace_source_output(wide.output(0))
