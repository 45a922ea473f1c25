"""Exports an artefact to a folder of TensorRT engines for one device, with the checkpoint's INT4 integers.

    export(Path("compressed"), Path("engines"), device=targets.load("rtx"))

Each network is traced in half precision, written as ONNX, compared in ONNX Runtime with the float32 checkpoint, and
built by `tensorrt` or by `tensorrt_rtx`, which needs no GPU to build. If half precision exceeds the error bound (for
example by an overflow), the network is built in float32, and the manifest says so. On a machine with a GPU the engine
itself is compared as well. The ONNX files are not kept, because an engine contains its weights. There is one
optimisation profile; activations in INT8 and refitting are not supported.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.artefact.resolve import read_config
from edgeprune.common.errors import EdgepruneError, InputError, MissingExtraError
from edgeprune.common.progress import Progress, Steps, silent
from edgeprune.export import INSIDE, external_data, forms, graph, modules, parity, to_onnx
from edgeprune.export.engine import Profile, Spec
from edgeprune.export.folder import write
from edgeprune.export.modulation import Modulation
from edgeprune.export.sizes import generation_for
from edgeprune.export.to_onnx import Module, NetworkSource
from edgeprune.export.unfinished import Unfinished
from edgeprune.families import Axes
from edgeprune.runtimes.base import Settings, read_settings
from edgeprune.runtimes.gpu import open_gpu
from edgeprune.runtimes.modulation import AT_ONCE
from edgeprune.runtimes.trt import VENDORS, TrtNetwork, first_vendor
from edgeprune.sampling.generation import longest_prompt
from edgeprune.targets import Target

ENGINE, CACHE = "model.engine", "timing.cache"
RTX_DEVICES = ("rtx",)
"""The targets that tensorrt_rtx builds for."""
_KILLED = -9
"""Exit status of a process that SIGKILL ended; Windows has neither that status nor `signal.SIGKILL`."""

Range = tuple[int, int, int]
"""Smallest, best and largest size of a dynamic axis."""


def export(
    artefact: Path, out: Path, *, device: Target, modulation: str = INSIDE, progress: Progress = silent
) -> dict[str, Any]:
    """Write the folder `out` for `device`; reuses the timing cache of a previous or interrupted export.

    Args:
        artefact: the artefact's folder, or a diffusers folder.
        out: the folder to write.
        device: what the export is for.
        modulation: APART or INSIDE.
        progress: see progress.Progress.

    Returns:
        The content of edgeprune_export.json.

    Raises:
        MissingExtraError: no TensorRT that builds for this device is installed.
        InputError: `artefact` is not a pipeline of a family or is damaged, or `out` holds something other than an
            export.
        ParityError: a network does not compute what its checkpoint computes.
        EdgepruneError: TensorRT cannot build a network.
        DiskError: the disk is full, or `out` cannot be written; the next call resumes.
    """
    trt = builder(device)
    options = {
        "device": dataclasses.asdict(device), "builder": [trt.__name__, trt.__version__], "modulation": modulation
    }  # fmt: skip
    return write(
        artefact, out, "trt", options,
        lambda work: _networks(artefact, out, work, device, trt, modulation, progress),
    )  # fmt: skip


def builder(device: Target) -> Any:
    """Return the TensorRT package that builds for a device.

    Raises:
        MissingExtraError: it is not installed.
    """
    trt = first_vendor()
    if trt is None or (trt.__name__ == "tensorrt_rtx" and device.name not in RTX_DEVICES):
        name = "tensorrt_rtx" if device.name in RTX_DEVICES else "tensorrt"
        raise MissingExtraError(name, VENDORS[name])
    return trt


# ------------------------------------------------------------------------------------- the networks


def _networks(
    artefact: Path, out: Path, work: Unfinished, device: Target, trt: Any, modulation: str, progress: Progress
) -> dict[str, Any]:
    """Write one engine after the other; return further content of edgeprune_export.json."""
    generation = generation_for(artefact, device)
    generation.save(work.folder)
    settings = dataclasses.replace(read_settings(artefact), generation=generation)
    config, family = read_config(artefact)
    tokens = family.text_tokens(longest_prompt(artefact), settings.generation.max_sequence_length)
    caches = [folder / CACHE for folder in (work.folder, out) if (folder / CACHE).is_file()]
    # A copy of all weights in the host's memory, which streaming takes, has no use where the GPU shares that memory.
    streams = device.own_memory
    engine_builder = Builder(trt, caches[0].read_bytes() if caches else b"", progress, streams=streams)
    sizes = axis_ranges(device, settings, family.latents(config).largest, tokens)
    halved = device.activations == "float16"
    for source in to_onnx.sources(artefact, work.has, modulation=modulation, half=halved, progress=progress):
        name, examples = source.name, source.examples
        progress(name)
        if isinstance(source.module, modules.TextEncoder | modules.LayeredEncoder):
            longest = source.examples[0]["input_ids"].shape[1]
            sizes["sequence_length"] = (1, longest, longest)
        # Rows of the modulation are those of all steps, not of one batch of images.
        batch = {"batch_size": (1, AT_ONCE, AT_ONCE)} if isinstance(source.module, Modulation) else {}
        profile = profile_of(source.inputs, source.traced, sizes | batch)
        half, rounding, references = _half_precision(source, device, progress)
        if half:
            examples = [source.trial, *examples[1:]]  # whose first one has its reference
        model = source.to_ir(half=half)
        forms.per_output(model)
        forms.whole_tables(model)
        engine = work.begin(name) / ENGINE
        path = engine.with_name("model.onnx")
        weight_bytes = external_data.weight_bytes(model)
        to_onnx.save(name, model, path, progress)
        del model
        gc.collect()  # a traced program refers to itself, and TensorRT needs the memory
        if source.reread is not None:
            references = []  # they are of the network that was written
        module = source.checkpoint()
        record = parity.check(
            name, source.runner(parity.session(path)), module, examples, list(module.outputs),
            half=half, references=references, progress=progress,
        )  # fmt: skip
        began = time.monotonic()
        layers = engine_builder.build(name, path, profile, engine)
        for onnx_file in path.parent.glob(f"{path.name}*"):
            onnx_file.unlink()
        details = {
            "precision": "float16" if half else "float32",
            "half_rms_relative": rounding,
            **layers,
            "onnx_weight_bytes": weight_bytes,
            "streams": streams,
            "engine_bytes": engine.stat().st_size,
            "build_s": round(time.monotonic() - began, 2),
            "profile": {tensor: [list(shape) for shape in shapes] for tensor, shapes in profile.items()},
            "engine_parity": _engine_parity(source, engine, module, sizes, trt, half=half),
        }
        if timings := engine_builder.timing_cache():
            (work.folder / CACHE).write_bytes(timings)
        work.finish(name, {"parity": record, "network": details} | to_onnx.width_of(module))
        del source, module, examples
    return to_onnx.recorded_width(work) | {
        "opset": graph.OPSET,
        "device": device.name,
        "builder": {"name": trt.__name__, "version": trt.__version__},
        "parity": work.recorded("parity"),
        "networks": work.recorded("network"),
    }


def _half_precision(
    source: NetworkSource, device: Target, progress: Progress = silent
) -> tuple[bool, float | None, list[list[torch.Tensor]]]:
    """Try a network in half precision, in PyTorch, which rounds after every operation as a GPU does.

    ONNX Runtime on the CPU computes chains of operations in float32, so it would not see an overflow. The inputs are
    text of real prompts, whose values are far larger than random ones (text.py).

    Returns:
        Whether half precision stays within the bound; its error (None if it is infinite, or if the device computes in
        float32); and `references` for parity.check.
    """
    if device.activations != "float16":
        return False, None, []
    inputs, halved = modules.half_inputs(source.trial), source.half()
    step = Steps(f"{source.name}: tried in half precision", 2 * parity.torch_steps(source.module), progress)
    expected = parity.reference(source.module, inputs, step)
    with torch.no_grad(), parity.stepping(halved, step):
        outputs = halved(*inputs.values())
    error = max(parity.relative_error(a.float().numpy(), b.numpy())[1] for a, b in zip(outputs, expected, strict=True))
    good = error <= parity.HALF_BOUND
    return good, error if np.isfinite(error) else None, [expected] if good else []


def _engine_parity(
    source: NetworkSource, engine: Path, module: Module, sizes: Mapping[str, Range], trt: Any, *, half: bool
) -> dict[str, Any] | None:
    """Compare the engine itself at the smallest sizes, but with all tokens; return None if there is no GPU."""
    try:
        gpu = open_gpu(VENDORS[trt.__name__])
    except (InputError, MissingExtraError):
        return None
    network = TrtNetwork(engine, trt, gpu)
    try:
        runner, example = source.runner(_OnDevice(network)), _smallest(module, sizes)
        return parity.check(source.name, runner, module, [example], list(module.outputs), half=half)
    finally:
        network.close()


def _smallest(module: Module, sizes: Mapping[str, Range]) -> dict[str, torch.Tensor]:
    """Return example inputs of the smallest sizes, with all tokens."""
    least = {name: size[0] for name, size in sizes.items()}
    batch = least["batch_size"]
    if isinstance(module, modules.VaeDecoder):
        return module.example(batch=batch, height=least["latent_height"], width=least["latent_width"])
    if isinstance(module, Modulation):
        return module.example(batch=batch)
    tokens = sizes["sequence_length"][2]
    if isinstance(module, modules.Transformer):
        patch = module.family.latents(module.model.config).patch
        return module.example(
            batch=batch, height=least["height"] // patch, width=least["width"] // patch, tokens=tokens
        )
    return module.example(batch=batch, tokens=tokens)


class _OnDevice:
    """A TrtNetwork as a parity.Runner."""

    steps = 1

    def __init__(self, network: TrtNetwork) -> None:
        self._network = network

    def run(
        self, names: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]], *, step: Callable[[], None] = lambda: None
    ) -> list[NDArray[Any]]:
        """Return the outputs of these names, or all."""
        outputs = self._network(**feeds)
        step()
        return [outputs[name] for name in names or outputs]


# ------------------------------------------------------------------------------------- shapes


def axis_ranges(device: Target, settings: Settings, table: int | None, tokens: int) -> dict[str, Range]:
    """Return the sizes of every dynamic axis: the device's, clipped to what the model can do.

    Args:
        device: gives the range of the batch and of image sides in pixels.
        settings: gives the model's default size; the range starts there if all of the device's sizes are larger.
        table: largest number of image tokens on a side; None for no limit.
        tokens: text tokens of a prompt, including zero tokens.
    """
    unit = settings.factor * settings.patch

    def side(default: int) -> Range:
        largest = min(device.side[1], table * unit if table else device.side[1]) // unit * unit
        least = -(-min(device.side[0], default, largest) // unit) * unit
        return (
            least // settings.factor,
            min(max(default, least), largest) // settings.factor,
            largest // settings.factor,
        )

    least, largest = device.batch
    height, width = side(settings.generation.height), side(settings.generation.width)
    multiple = settings.family.latents(settings.config).multiple
    counts = [h * w // settings.patch**2 for h, w in zip(height, width, strict=True)]
    packed = [-(-count // multiple) * multiple for count in counts]
    return {
        "batch_size": (least, min(max(2, least), largest), largest),  # guidance takes two per image
        "height": height,
        "width": width,
        "latent_height": height,
        "latent_width": width,
        "packed_height_width": (packed[0], packed[1], packed[2]),
        "sequence_length": (1, tokens, tokens),
    }


def profile_of(inputs: Axes, example: Mapping[str, torch.Tensor], sizes: Mapping[str, Range]) -> Profile:
    """Return the shapes of a network's inputs; axes without a name keep the example's size."""
    return {
        name: tuple(
            tuple(sizes[axes[i]][k] if i in axes else n for i, n in enumerate(example[name].shape)) for k in range(3)
        )
        for name, axes in inputs.items()
    }


# ------------------------------------------------------------------------------------- TensorRT


class Builder:
    """Builds engines with a TensorRT package, each in its own process (engine.py), and keeps the timing cache."""

    def __init__(self, trt: Any, cache: bytes, progress: Progress, *, streams: bool) -> None:
        self._trt, self._cache, self._progress, self._streams = trt, cache, progress, streams

    def build(self, name: str, onnx_path: Path, profile: Profile, engine: Path) -> dict[str, Any]:
        """Write `engine`.

        Returns:
            How many layers of the network that TensorRT parsed have INT4 and INT8 weights.

        Raises:
            EdgepruneError: TensorRT cannot read the ONNX file or build from it, or runs out of memory.
            OSError: the disk is full.
        """
        cache = engine.with_name(CACHE)
        if self._cache:
            cache.write_bytes(self._cache)
        spec = Spec(
            vendor=self._trt.__name__,
            name=name,
            onnx=str(onnx_path),
            engine=str(engine),
            profile=profile,
            cache=str(cache),
            streams=self._streams,
        )
        command = [sys.executable, "-m", "edgeprune.export.engine", json.dumps(dataclasses.asdict(spec))]
        last: dict[str, Any] = {}
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    if line.startswith("{"):  # vendors may print other lines
                        last = json.loads(line)
                        if "progress" in last:
                            self._progress(*last["progress"])
            except BaseException:
                process.kill()
                raise
            process.wait()
            errors.seek(0)
            last_words = errors.read().strip().splitlines()[-1:]
        if last.get("errno"):
            raise OSError(last["errno"], last["error"])
        if "error" in last:
            raise EdgepruneError(last["error"])
        if "built" not in last:
            killed = process.returncode == _KILLED
            why = (
                "the system kills a process that takes too much memory"
                if killed
                else " ".join(last_words) or "no reason given"
            )
            raise EdgepruneError(
                f"{name}: {self._trt.__name__} ended with {process.returncode} while building the engine: {why}"
            )
        if cache.is_file():
            self._cache = cache.read_bytes()
            cache.unlink()
        built: dict[str, Any] = last["built"]
        return built

    def timing_cache(self) -> bytes:
        """Return the builder's timings, for the next build on the same device; empty if it does no timing."""
        return self._cache
