"""Stages on small models: blocks and text encoders are read onto the device, results are the processor's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgeprune.experiments.hardware.place import Place, difference
from edgeprune.experiments.hardware.registry import Failed, check

if TYPE_CHECKING:
    from edgeprune.stages.workspace import Workspace

_NEEDS = ("diffusers", "transformers", "safetensors")
_SCORES = 0.02
"""Most difference from the processor, as a share of the largest score."""
_NETWORK = 0.01
"""Most of a network's outputs: GPUs round the inputs of float32 convolutions to ten bits."""


def _within(place: Place, worst: float, bound: float) -> str:
    if not worst <= min(bound, place.within):
        raise Failed(f"differs by {worst:.2g} of the largest number, at most {min(bound, place.within):g} expected")
    return f"{worst:.1e} from the processor's"


def _scores(place: Place, kind: str, estimator: str) -> str:
    from edgeprune.analysis.contribution import ContributionReport
    from edgeprune.stages import analyze
    from edgeprune.stages.options import AnalyzeOptions

    def run(ws: Any) -> dict[str, Any]:
        analyze.run(ws, AnalyzeOptions(count=1, estimator=estimator, components=estimator == "gates"))
        drops = ContributionReport.load(ws.report_path).contributions().values()
        return {"drops": [drop.drop for drop in drops]}

    return _within(place, place.worst(kind, f"analyze-{kind}-{estimator}", run), _SCORES)


@check("`analyze`, gates: forward and backward, SD3", seconds=60, needs=_NEEDS)
def gates_sd3(place: Place) -> str:
    """Compare scores."""
    return _scores(place, "sd3", "gates")


@check("`analyze`, gates: forward and backward, FLUX", seconds=60, needs=_NEEDS)
def gates_flux(place: Place) -> str:
    """Compare scores."""
    return _scores(place, "flux", "gates")


@check("`analyze`, velocities without each block", seconds=60, needs=_NEEDS)
def velocities(place: Place) -> str:
    """Compare scores."""
    return _scores(place, "sd3", "exhaustive")


@check("`plan`, the modulation's mean and directions", seconds=60, needs=_NEEDS)
def modulation(place: Place) -> str:
    """Compare the mean, and the projection onto the directions."""
    from safetensors.torch import load_file

    from edgeprune.planning.options import PlanOptions
    from edgeprune.stages import plan
    from edgeprune.stages.modulation import MODULATION

    def run(ws: Any) -> dict[str, Any]:
        plan.run(ws, PlanOptions("manual", blocks="1", modulation_rank=2))
        found = load_file(ws.out / MODULATION)
        return {"mean": found["mean"], "projection": found["basis"].T @ found["basis"]}

    return _within(place, place.worst("sd3", "modulation", run), _NETWORK)


@check("`quantize --calibration feedback`: moments of inputs, their factor and the rounding on the device", seconds=120,
       needs=(*_NEEDS, "nncf"))  # fmt: skip
def feedback(place: Place) -> str:
    """Compare the integers with those of the processor."""
    from edgeprune.stages import quantize
    from edgeprune.stages.options import QuantizeOptions

    return _same_bytes(
        place, "sd3", "transformer_int4", lambda ws: quantize.run(ws, QuantizeOptions(calibration="feedback"))
    )


@check("the INT4 of a T5: moments of inputs, rounding and error, layer by layer on the device", seconds=120,
       needs=_NEEDS)  # fmt: skip
def text_int4(place: Place) -> str:
    """Compare the integers with those of the processor."""
    from edgeprune.stages import encoders

    return _same_bytes(place, "flux", "text_encoder_2_int4", lambda ws: encoders.run(ws, "int4", 64))


def _same_bytes(place: Place, kind: str, subfolder: str, run: Callable[[Workspace], object]) -> str:
    """Compare INT4 that is made on the device with the processor's: one that differs changes those after it in its row.

    Args:
        place: where.
        kind: of the small model, which is pruned first.
        subfolder: that `run` writes.
        run: makes INT4.
    """
    from safetensors.torch import load_file

    from edgeprune.planning.options import PlanOptions
    from edgeprune.stages import plan, prune

    found: list[dict[str, Any]] = []
    for name, device in (("cpu", "cpu"), ("device", None)):
        ws = place.workspace(place.small(kind), f"{subfolder}-{name}", device=device)
        plan.run(ws, PlanOptions("manual", blocks="1"))
        prune.run(ws)
        run(ws)
        tensors = [load_file(path) for path in (ws.out / subfolder).glob("*.safetensors")]
        found.append({n: t for each in tensors for n, t in each.items() if n.endswith("_packed")})
    one, two = found
    if not one or one.keys() != two.keys():
        raise Failed(f"{subfolder}: found {len(two)} packed tensors, expected {len(one)}, at least 1")
    same = sum(int((one[name] == two[name]).sum()) for name in one) / sum(tensor.numel() for tensor in one.values())
    if same < 0.9:
        raise Failed(f"{same:.1%} of the bytes are the processor's, at least 90% expected")
    return f"{same:.2%} of the bytes are the processor's"


@check("`report`: images of both models, and the time of a step", seconds=120, needs=(*_NEEDS, "nncf"))
def report(place: Place) -> str:
    """Compare the original's images."""
    from edgeprune.common.progress import silent
    from edgeprune.metrics.psnr import mean_decibels
    from edgeprune.planning.options import PlanOptions
    from edgeprune.report.measure import measure
    from edgeprune.stages import plan, prune, quantize
    from edgeprune.stages.options import QuantizeOptions

    images, ratio = {}, 0.0
    for name in ("cpu", str(place.device)):
        ws = place.workspace(place.small("sd3"), f"report-{name.replace(':', '-')}", device=name)
        plan.run(ws, PlanOptions("manual", blocks="1"))
        prune.run(ws)
        quantize.run(ws, QuantizeOptions(calibration="none"))
        summary, made = measure(ws, quick=True, progress=silent, images=1)
        images[name], ratio = made["original"], summary["step_ratio"]
    decibels = mean_decibels(*(list(found) for found in images.values()))
    if decibels < 30:
        raise Failed(f"images: {decibels:.1f} dB from the processor's, at least 30 expected")
    return f"images {decibels:.0f} dB from the processor's; a step of two blocks of three takes {ratio:.2f}"


@check("text encoders (CLIP, T5) that are read layer by layer", seconds=60, needs=_NEEDS)
def encoders(place: Place) -> str:
    """Compare hidden and pooled text."""
    from edgeprune.sampling.denoising import encode_prompts

    def run(ws: Any) -> dict[str, Any]:
        text = encode_prompts(ws.encoders, ["", "a red circle", "two cats"], ws.generation.max_sequence_length)
        return {"hidden": text.hidden, "pooled": text.pooled}

    return _within(place, place.worst("flux", "encoders", run), _NETWORK)


@check("the VAE: encode and decode, whole and in tiles", seconds=60, needs=_NEEDS)
def vae(place: Place) -> str:
    """Compare latents and pixels."""
    import torch

    from edgeprune.artefact.staged import StagedPipeline
    from edgeprune.metrics.psnr import mean_decibels
    from edgeprune.residency.compute import Compute
    from edgeprune.sampling.denoising import decode, encode_images

    # A tile has sides of 512 pixels.
    images = torch.randint(0, 255, (1, 3, 528, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for memory in (None, 1):  # too little for an image: tiles
        found = []
        for device in (torch.device("cpu"), place.device):
            pipe = StagedPipeline(place.small("sd3"), torch.nn.Module(), Compute(device, memory))
            latents = encode_images(pipe, images)
            found.append((latents, decode(pipe, latents)))
            if pipe.vae.use_tiling is not (memory is not None):
                raise Failed(f"tiles: found {pipe.vae.use_tiling} with memory {memory}")
        (one, expected), (two, pixels) = found
        worst = max(worst, difference(two, one))
        if (decibels := mean_decibels(list(pixels), list(expected))) < 40:
            raise Failed(f"pixels: {decibels:.1f} dB from the processor's, at least 40 expected")
    return _within(place, worst, _NETWORK)
