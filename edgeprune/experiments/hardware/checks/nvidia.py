"""CUDA's runtime, NVML, TensorRT, torch's INT4 kernel, and ONNX Runtime's providers for NVIDIA GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.experiments.hardware.checks.drawing import compare_image
from edgeprune.experiments.hardware.place import Place, best_seconds, difference
from edgeprune.experiments.hardware.registry import Failed, LeftOut, check

_HALF = 1e-2
"""Largest difference of two runs in half precision, of the largest value."""
_TRT = ("diffusers", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "cuda.bindings.runtime")


@check("cuda-bindings: device memory, copies, a stream, a captured graph", seconds=20, needs=("cuda.bindings.runtime",))
def cuda_runtime(place: Place) -> str:
    """Copy numbers up, copy them on the device by a graph, and back."""
    import numpy as np

    from edgeprune.runtimes.gpu import open_gpu

    gpu = open_gpu("trt")
    sent, back = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    one, two, stream = gpu.allocate(sent.nbytes), gpu.allocate(sent.nbytes), gpu.stream()
    kind = gpu._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    graph = gpu.capture(stream, lambda: gpu.call("cudaMemcpyAsync", two, one, sent.nbytes, kind, stream))
    gpu.upload(one, sent, stream)
    gpu.replay(graph, stream)
    gpu.download(back, two, stream)
    gpu.synchronize(stream)
    gpu.destroy_graph(graph)
    gpu.destroy_stream(stream)
    gpu.free(one)
    gpu.free(two)
    if not (sent == back).all():
        raise Failed("the numbers that came back are others")
    return f"{sent.nbytes} bytes there and back; rows {sorted(gpu.memory())}"


@check("NVML: bytes of this process on the GPU", seconds=20, needs=("pynvml",))
def nvml(place: Place) -> str:
    """Ask for the row."""
    import torch

    from edgeprune.runtimes.gpu import nvml_row

    block = torch.zeros(10**8, dtype=torch.uint8, device=place.device)
    place.wait()
    row = nvml_row()
    if not row:
        raise LeftOut("NVML reports nothing of this process: in a container it may have another id")
    size = row["gpu_process_bytes"].bytes
    if size < block.nbytes:
        raise Failed(f"found {size / 1e6:.0f} MB, and torch holds {block.nbytes / 1e6:.0f} MB")
    return f"{size / 1e6:.0f} MB, torch's part {torch.cuda.memory_reserved() / 1e6:.0f} MB"


@check(
    "TensorRT: build, compare with the checkpoint, draw an image, with and without CUDA graphs", seconds=240, needs=_TRT
)
def tensorrt(place: Place) -> str:
    """Export the small SD3."""
    out, vendor = _engines(place)
    plain, graphs = (compare_image(place, out, "trt", least=25, cuda_graph=graph)[0] for graph in (False, True))
    return f"{vendor.__name__} {vendor.__version__}: {plain:.0f} dB from torch's image, {graphs:.0f} with graphs"


@check("TensorRT: weights that are streamed from the host, with and without CUDA graphs", seconds=240, needs=_TRT)
def tensorrt_streams(place: Place) -> str:
    """Run the transformer's engine with all of its weights on the GPU, and with none that can be elsewhere."""
    import numpy as np

    from edgeprune.runtimes import load
    from edgeprune.runtimes.gpu import open_gpu
    from edgeprune.runtimes.trt import TrtNetwork

    out, vendor = _engines(place)
    with load(out, "trt") as model:
        text, pooled = model.backend.encode(["a red circle"])
        settings = model.settings
    sides = settings.generation.height // settings.factor, settings.generation.width // settings.factor
    latents = np.random.default_rng(0).standard_normal((1, settings.channels, *sides), dtype=np.float32)
    feed = settings.family.inputs(settings.config, latents, text, pooled, np.full(1, 0.5, np.float32), 1.0)
    gpu, engine, found = open_gpu("trt"), out / "transformer" / "model.engine", []
    streamable = 0
    for limit, graph in ((None, False), (0, False), (0, True)):
        network = TrtNetwork(engine, vendor, gpu, limit=limit, cuda_graph=graph)
        if limit is not None:
            streamable, budget = network._engine.streamable_weights_size, network._engine.weight_streaming_budget_v2
            if not streamable or budget:
                raise Failed(f"of {streamable} bytes that can be streamed, {budget} stayed on the GPU at a limit of 0")
        for _ in range(2):  # a graph is recorded in the first call
            (output,) = network(**feed).values()
        found.append(output)
        network.close()
    whole, *streamed = found
    worst = max(float(np.abs(one - whole).max() / np.abs(whole).max()) for one in streamed)
    if worst > _HALF:
        raise Failed(f"streamed, the largest difference is {worst:.2g} of the largest value")
    return f"{streamable} of {engine.stat().st_size} bytes streamed: differs by {worst:.2g} of the largest value"


def _engines(place: Place) -> tuple[Path, Any]:
    """Return the export of the small SD3, made once, and the TensorRT that built it."""
    import edgeprune
    from edgeprune.api import export
    from edgeprune.runtimes.trt import first_vendor

    vendor = first_vendor()
    if vendor is None:
        raise LeftOut("neither tensorrt nor tensorrt_rtx can be imported")
    if len(edgeprune.__path__) > 1:  # see __main__.py
        raise LeftOut("engines are built in a process of their own, which needs: pip install --no-deps -e .")
    out = place.scratch / "trt"
    if not out.is_dir():
        export(place.small("sd3"), out, "trt", device="rtx" if vendor.__name__ == "tensorrt_rtx" else "cuda-server")
    return out, vendor


@check("torch's INT4 kernel against unpacked weights: a layer of SD3.5 Large, by rows", seconds=60)
def int4_kernel(place: Place) -> str:
    """Compare and time both."""
    import torch

    from edgeprune.quantization import int4_kernel
    from edgeprune.quantization.int4 import dequantize, pack

    draw = torch.Generator().manual_seed(0)
    inputs, outputs = 2432, 6 * 2432
    packed = pack(torch.randint(-8, 8, (outputs, inputs), generator=draw), 4).to(place.device)
    scale = (torch.rand(outputs, inputs // 64, generator=draw) / 100).half().to(place.device)
    one = torch.randn(1, inputs, generator=draw).to(place.device, torch.bfloat16)
    if not int4_kernel.takes(one, packed, scale, 4):
        raise LeftOut("torch has no such kernel for this device")
    said = []
    for rows in (1, 2, 16, 64, 128, 256):
        x = torch.randn(rows, inputs, generator=draw).to(place.device, torch.bfloat16)

        def unpacked(x: torch.Tensor = x) -> torch.Tensor:
            return torch.nn.functional.linear(x, dequantize(packed, scale, 4, x.dtype))

        def kernel(x: torch.Tensor = x) -> torch.Tensor:
            return int4_kernel.linear(x, packed, scale)

        worst = difference(kernel(), unpacked())
        if worst > 0.02:
            raise Failed(f"{rows} rows: the kernel is {worst:.2g} of the largest number from unpacked weights")
        times = (1000 * best_seconds(way, place.wait) for way in (kernel, unpacked))
        said.append(f"{rows} rows {' against '.join(f'{ms:.3g}' for ms in times)} ms, {worst:.1e} apart")
    return "; ".join(said)


@check("ONNX Runtime's CUDA and TensorRT providers draw an image", seconds=180,
       needs=("diffusers", "onnx", "onnx_ir", "onnxscript", "onnxruntime"))  # fmt: skip
def onnx_providers(place: Place) -> str:
    """Draw with each that is installed."""
    import onnxruntime

    from edgeprune.api import export
    from edgeprune.runtimes.providers import PROVIDERS

    here = [n for n in ("cuda", "tensorrt") if PROVIDERS[n][0] in onnxruntime.get_available_providers()]
    if not here:
        raise LeftOut("the installed onnxruntime has neither provider; install onnxruntime-gpu")
    out = place.scratch / "onnx"
    export(place.small("sd3"), out, "onnx")
    found = {name: compare_image(place, out, "ort", least=25, provider=name)[0] for name in here}
    return ", ".join(f"{name} {value:.0f} dB from torch's image" for name, value in found.items())
