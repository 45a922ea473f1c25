"""What else runs on the device: the torch reference, training, data, metrics."""

from __future__ import annotations

import math
from typing import Any

from edgeprune.experiments.hardware.checks.drawing import compare_image
from edgeprune.experiments.hardware.place import Place
from edgeprune.experiments.hardware.registry import Failed, check

_NEEDS = ("diffusers", "transformers", "safetensors")


@check("`eager` draws an image on the device; its rows of memory", seconds=60, needs=_NEEDS)
def eager(place: Place) -> str:
    """Compare the image with the processor's."""
    found, runtime = compare_image(place, place.small("sd3"), "eager", least=30, device=place.device.type)
    rows = runtime.backend.memory()
    said = ", ".join(f"{name} {row.bytes / 1e6:.0f} MB" for name, row in rows.items())
    return f"{found:.0f} dB from the processor's; {said}"


@check("`distill`, four steps in bfloat16 (Accelerator)", seconds=120, needs=(*_NEEDS, "accelerate"))
def distillation(place: Place) -> str:
    """Train on a few drawn samples."""
    return _trained(place, "distill")


@check("`distill --states`: states, then four steps of the tail", seconds=120, needs=(*_NEEDS, "accelerate", "nncf"))
def tail(place: Place) -> str:
    """Train what follows the removed block from a few states."""
    return _trained(place, "tail", states=6)


@check("`distill --train lora:4`: four steps of additions to the weights", seconds=120,
       needs=(*_NEEDS, "accelerate", "peft"))  # fmt: skip
def lora(place: Place) -> str:
    """Train low-rank additions on a few drawn samples."""
    return _trained(place, "lora", train="lora:4")


def _trained(place: Place, name: str, **changes: Any) -> str:
    from edgeprune.planning.options import PlanOptions
    from edgeprune.stages import analyze, distill, plan, prune
    from edgeprune.stages.options import AnalyzeOptions, DataOptions
    from edgeprune.training.recipe import DistillOptions

    ws = place.workspace(place.small("sd3"), name)
    analyze.run(ws, AnalyzeOptions(count=1, estimator="gates"))
    plan.run(ws, PlanOptions("manual", blocks="1"))
    prune.run(ws)
    losses: list[str] = []

    def progress(label: str, done: int = 0, total: int = 0, text: str = "", *_: Any) -> None:
        if label == "distill":
            losses.append(text)

    precision = "bf16" if place.device.type in ("cuda", "mps") else "no"  # autocast knows torch's own devices
    options = DistillOptions(steps=4, batch=4, mixed_precision=precision, **changes)
    with place.peak() as peak:
        distill.run(ws, options, DataOptions("shapes", 8), progress)
    stage = ws.manifest.stages["distill"]
    if not math.isfinite(stage["last_loss"]) or not peak():
        raise Failed(f"loss {stage['last_loss']}, {peak()} bytes on the device")
    return f"{len(losses)} steps, {losses[-1] if losses else ''}"


@check("`verify`: text encoders, a step and the VAE against diffusers' own", seconds=60, needs=_NEEDS)
def verify(place: Place) -> str:
    """Verify the small SD3."""
    from edgeprune.common.progress import silent
    from edgeprune.residency.compute import Compute
    from edgeprune.sampling.generation import Generation
    from edgeprune.verify.finding import FAIL
    from edgeprune.verify.run import run
    from edgeprune.verify.subject import Subject

    folder = place.small("sd3")
    findings = run(Subject(folder, Compute(place.device), Generation.load(folder), None, silent))
    if failed := [f"{f.check} {f.part}: {f.figure} {f.advice}" for f in findings if f.verdict == FAIL]:
        raise Failed("; ".join(failed))
    return ", ".join(f"{f.check} {f.part} {f.figure:.2g}" for f in findings if f.figure is not None)


@check("`cache` with its encoders on the device", seconds=60, needs=_NEEDS)
def cache(place: Place) -> str:
    """Encode a few images."""
    import numpy as np
    from PIL import Image

    from edgeprune.common.memory import ComputeOptions
    from edgeprune.data.settings import CacheOptions
    from edgeprune.sampling.generation import Generation
    from edgeprune.stages.caching import Caching

    folder, images = place.small("sd3"), place.scratch / "images"
    images.mkdir(parents=True)
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (80, 64, 3), np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {i}")
    options, generation = CacheOptions(str(images)), Generation.load(folder)

    compute = ComputeOptions(str(place.device))
    made = Caching(folder, generation, options, place.scratch / "cached", compute).make(workers=2)
    if made.samples != 8:
        raise Failed(f"found {made.samples} samples, expected 8")
    return f"{made.samples} samples in {made.seconds:.1f} s"


@check(
    "metrics on the device: CLIPScore and LPIPS, of small random models",
    seconds=60,
    needs=("transformers", "safetensors"),
)
def metrics(place: Place) -> str:
    """Score an image against itself and against another."""
    import numpy as np
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPConfig, CLIPModel

    from edgeprune.artefact.synth.tiny import _clip_tokenizer
    from edgeprune.metrics import lpips_distance, of_images
    from edgeprune.metrics.clip_model import ImageProcessor
    from edgeprune.metrics.pretrained import placed

    if placed("auto").type != place.device.type:
        raise Failed(f"metrics run on {placed('auto')}")
    folder = place.scratch / "clip"
    narrow = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16, "hidden_size": 32}
    text = {"vocab_size": 90, "bos_token_id": 88, "eos_token_id": 89, "pad_token_id": 89, "intermediate_size": 64}
    vision = {"image_size": 32, "patch_size": 8, "intermediate_size": 64}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text | narrow, vision_config=vision | narrow, projection_dim=16)).save_pretrained(
        folder
    )
    _clip_tokenizer(place.scratch / "clip-tokenizer").save_pretrained(folder)
    ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    weights = {n: torch.rand(shape) / np.sqrt(np.prod(shape[1:])) for n, shape in lpips_distance.shapes().items()}
    save_file(weights, place.scratch / "lpips.safetensors")
    first, other = (np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8) for i in (0, 1))
    clip = of_images("clip", {"clip": str(folder)}).score([first, other], ["a", "b"], None)
    lpips = of_images("lpips", {"lpips": str(place.scratch / "lpips.safetensors")}).score(
        [first, first], ["", ""], [first, other]
    )
    if not all(map(math.isfinite, clip)) or abs(lpips[0]) > 1e-5 or lpips[1] <= 0:
        raise Failed(f"CLIPScore {clip}, LPIPS {lpips}")
    return f"CLIPScore {clip[0]:.3f}, LPIPS of an image and itself {lpips[0]:.1g}, of two {lpips[1]:.3g}"
