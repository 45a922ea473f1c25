"""Blocks of their real size, SD3.5 Large and FLUX.1: speed, reading them while they run, memory that is held, gates."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

from edgeprune.experiments.hardware.place import Place, best_seconds, difference
from edgeprune.experiments.hardware.registry import Failed, check

_NEEDS = ("diffusers", "transformers", "safetensors")
SD3, FLUX = "sd3.5-large", "flux.1-dev"
_HALF = 0.05
"""Most difference between two ways of computing in half precision, as a share of the largest number."""


def _opened(place: Place, name: str) -> tuple[Any, Any]:
    """Return a large model on disk, and its inputs for one evaluation of its image size, on the device."""
    import torch

    from edgeprune.artefact.loading import open_transformer
    from edgeprune.artefact.resolve import read_config
    from edgeprune.sampling.denoising import Conditioning
    from edgeprune.sampling.generation import Generation
    from edgeprune.stages.costs import sample

    folder = place.large(name)
    stored = open_transformer(folder, quantized=False)
    generation = Generation.load(folder)
    config, family = read_config(folder)
    latents, text, sigma, guidance = sample(family, config, folder, generation)
    draw = torch.Generator().manual_seed(0)
    latents, hidden, pooled = (
        torch.randn(like.shape, generator=draw).to(place.device) for like in (latents, text.hidden, text.pooled)
    )
    return stored, (latents, Conditioning(hidden, pooled), (sigma + 0.5).to(place.device), guidance)


def _speeds(place: Place, name: str) -> str:
    """Time one block of each kind in each dtype."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from edgeprune.residency.streaming import filled
    from edgeprune.sampling.denoising import model_inputs

    stored, inputs = _opened(place, name)
    family, said = stored.family, []
    for label, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        model = stored.running(dtype, place.device)
        with torch.no_grad():
            given = model_inputs(model, *inputs)
            image, text, modulation = family.embed(model, given)
            positions = family.positions(model, given)
            kinds = {type(block).__name__: block for block in reversed(family.blocks(model)[:-1])}
            for kind, block in kinds.items():
                run = partial(family.run, block, image, text, modulation, positions)
                with filled(block):
                    with FlopCounterMode(display=False) as counter:
                        finite = run()[0].isfinite().all()
                    seconds = best_seconds(run, place.wait, 3)
                if not finite:
                    raise Failed(f"{kind} in {label}: found numbers that are not finite")
                speed = counter.get_total_flops() / seconds / 1e12
                short = kind.removesuffix("TransformerBlock")
                said.append(f"{short} {label} {1000 * seconds:.3g} ms ({speed:.3g} TFLOP/s)")
    return ", ".join(said)


@check("one block of SD3.5 Large at 1024x1024, time in each dtype", seconds=120, needs=_NEEDS)
def block_sd3(place: Place) -> str:
    """Time it."""
    return _speeds(place, SD3)


@check("one block of FLUX.1 of each kind at 1024x1024, time in each dtype", seconds=120, needs=_NEEDS)
def block_flux(place: Place) -> str:
    """Time it."""
    return _speeds(place, FLUX)


@check("torch's kernels of attention at 1024x1024: 2 x 38 heads, 4,429 tokens, bfloat16", seconds=30)
def attention(place: Place) -> str:
    """Time each kernel that accepts the shape."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens = (place.pixels // 16) ** 2 + 333
    q = torch.randn(2, 38, tokens, 64, dtype=torch.bfloat16, device=place.device)
    said = []
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                seconds = best_seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), place.wait, 3)
        except RuntimeError:
            said.append(f"{name.lower()}: not for this shape")
        else:
            said.append(f"{name.lower()} {1000 * seconds:.3g} ms")
    return ", ".join(said)


def _streamed(place: Place, name: str) -> str:
    """Compare blocks that are read when they run with blocks that stay, in results, bytes and time."""
    import torch

    from edgeprune.residency.compute import Compute
    from edgeprune.residency.running import check_room
    from edgeprune.sampling.denoising import evaluate

    stored, inputs = _opened(place, name)
    dtype, before = torch.bfloat16, place.taken()
    _, forecast = check_room(stored, Compute(place.device), dtype)
    found = {}
    for label, keep in (("read", 0), ("kept", 10**11)):
        with place.peak() as peak, torch.no_grad():
            model = stored.running(dtype, place.device, keep=keep)
            began = time.perf_counter()
            velocity = evaluate(model, *inputs)
            place.wait()
            found[label] = velocity.float().cpu(), peak() - before, time.perf_counter() - began
            del model, velocity
    (one, read_bytes, read_s), (two, kept_bytes, kept_s) = found.values()
    worst, weights = difference(one, two), sum(map(math.prod, stored.weights.shapes.values())) * 2
    if worst > _HALF or read_bytes > 1.25 * forecast:
        raise Failed(
            f"{read_bytes / 1e9:.2f} GB where {forecast / 1e9:.2f} were forecast; results differ by {worst:.2g}"
        )
    return (
        f"read {read_bytes / 1e9:.2f} GB, forecast {forecast / 1e9:.2f}, kept {kept_bytes / 1e9:.2f} with weights of "
        f"{weights / 1e9:.2f}; an evaluation takes {read_s:.2f} s read, {kept_s:.2f} s kept; {worst:.1e} apart"
    )


@check("blocks of SD3.5 Large are read when they run: memory against the forecast", seconds=120, needs=_NEEDS)
def streaming_sd3(place: Place) -> str:
    """Compare with blocks that stay."""
    return _streamed(place, SD3)


@check("blocks of FLUX.1 are read when they run: memory against the forecast", seconds=120, needs=_NEEDS)
def streaming_flux(place: Place) -> str:
    """Compare with blocks that stay."""
    return _streamed(place, FLUX)


@check("`--memory` is held: an image of SD3.5 Large's size, of a few of its blocks", seconds=120, needs=_NEEDS)
def memory_held(place: Place) -> str:
    """Draw an image in the least memory that is accepted and 1 GB more."""
    from edgeprune.artefact.loading import open_transformer
    from edgeprune.residency.compute import Compute
    from edgeprune.residency.running import check_room
    from edgeprune.sampling.denoising import generate

    folder = place.large(SD3)
    _, least = check_room(open_transformer(folder, quantized=False), Compute(place.device))
    memory, before = least + 10**9, place.taken()
    ws = place.workspace(folder, "held", memory=memory)
    with place.peak() as peak:
        generate(ws.pipe, ["a red circle"], [0], ws.generation)
        most = peak() - before
    if most > memory:
        raise Failed(f"--memory {memory / 1e9:.2f} GB: the device held {most / 1e9:.2f} GB")
    return f"given {memory / 1e9:.2f} GB, at most {most / 1e9:.2f} GB were held"


@check("`analyze`, gates of SD3.5 Large's blocks at 1024x1024: forward and backward", seconds=120, needs=_NEEDS)
def gates_large(place: Place) -> str:
    """Analyze one prompt."""
    from edgeprune.analysis.contribution import ContributionReport
    from edgeprune.stages import analyze
    from edgeprune.stages.options import AnalyzeOptions

    ws, before = place.workspace(place.large(SD3), "gates-large", memory=16 * 10**9), place.taken()
    with place.peak() as peak:
        began = time.perf_counter()
        analyze.run(ws, AnalyzeOptions(count=1, estimator="gates"))
        seconds, most = time.perf_counter() - began, peak() - before
    drops = [drop.drop for drop in ContributionReport.load(ws.report_path).contributions().values()]
    if not all(map(math.isfinite, drops)) or max(drops) <= 0:
        raise Failed(f"contributions: found {drops[:4]}")
    return f"{len(drops)} contributions in {seconds:.1f} s, {most / 1e9:.2f} GB"
