"""What one evaluation of the transformer costs, for the forecasts of the stages.

torch counts the operations, on a model without weights. Divided by the speed of one large matrix product, measured now,
they give the least time; a real run takes longer (activation functions, small matrices, reading weights).
"""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.common.files import read_json
from edgeprune.families import Config, Family, Shape, family_of
from edgeprune.families.encoders import text_encoders
from edgeprune.planning.fit import stored_shapes
from edgeprune.residency.compute import Compute
from edgeprune.residency.stored import CPU
from edgeprune.sampling.denoising import Conditioning, VelocityInputs, network_inputs
from edgeprune.sampling.forward import forward
from edgeprune.sampling.generation import Generation, latent_factor, longest_prompt
from edgeprune.sampling.schedule import NoiseSchedule
from edgeprune.sampling.solvers import visited


def sample(family: Family, config: Config, source: Path, generation: Generation) -> VelocityInputs:
    """Return arguments for `velocity` in the sizes of one image, all zeros.

    Args:
        family: the transformer's.
        config: the transformer's.
        source: the pipeline's folder.
        generation: size of the image and length of the prompt.
    """
    vae = source / "vae" / "config.json"
    factor = latent_factor(read_json(vae), vae)
    size = family.latents(config).channels, generation.height // factor, generation.width // factor
    tokens = family.text_tokens(longest_prompt(source), generation.max_sequence_length)
    text, pooled = family.text_widths(config)
    condition = Conditioning(torch.zeros(1, tokens, text), torch.zeros(1, pooled))
    return torch.zeros(1, *size), condition, torch.zeros(1), generation.guidance_scale


@functools.cache
def surroundings_bytes(source: Path) -> int:
    """Return the bytes in float32 of a pipeline's text encoders and VAE.

    Args:
        source: the pipeline's folder; only the headers of its files are read.

    Raises:
        InputError: a file is missing or damaged.
    """
    shapes = (stored_shapes(source / name).values() for name in (*text_encoders(source), "vae"))
    return 4 * sum(math.prod(shape) for of_one in shapes for shape in of_one)


def evaluations_by_step(family: Family, config: Config, source: Path, generation: Generation) -> list[int]:
    """Return the rows of each call of the transformer for an image: two where classifier-free guidance acts.

    Solvers call it once a step, Heun's twice in each step but the last.

    Args:
        family: the transformer's.
        config: the transformer's.
        source: the pipeline's folder; its scheduler is read where guidance has a range.
        generation: steps and guidance.
    """
    steps = generation.num_inference_steps
    *called, _ = visited(generation.solver, range(steps, -1, -1))
    if not family.guided(config, generation.guidance_scale):
        return [1] * len(called)
    if generation.guides(0.0) and generation.guides(1.0):
        return [2] * len(called)
    shape = tuple(sample(family, config, source, generation)[0].shape[1:])
    levels = NoiseSchedule.load(source, family, config, steps).sigmas(shape)
    return [2 if generation.guides(float(levels[index])) else 1 for index in called]


def flops_per_evaluation(family: Family, config: Config, source: Path, generation: Generation) -> int:
    """Count the floating-point operations of one sample through the transformer, on the meta device."""
    latents, condition, _, guidance = sample(family, config, source, generation)
    text = tuple(condition.hidden.shape), tuple(condition.pooled.shape)
    return _flops(json.dumps(config), tuple(latents.shape), *text, guidance)


@functools.lru_cache(maxsize=16)
def _flops(config_text: str, latents: Shape, hidden: Shape, pooled: Shape, guidance: float) -> int:
    """Count the operations at inputs of these shapes; half a second, which a grid need not spend on each row."""
    config = json.loads(config_text)
    family = family_of(config)
    model: Any = family.build(config, list(range(family.block_count(config))), frozenset())
    condition = Conditioning(torch.zeros(hidden), torch.zeros(pooled))
    given = network_inputs(model, torch.zeros(latents), condition, torch.zeros(1), guidance)
    inputs = {name: value.to("meta") for name, value in given.items()}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        forward(family, model, inputs)
    return int(counter.get_total_flops())


def evaluation_seconds(family: Family, config: Config, source: Path, generation: Generation, compute: Compute) -> float:
    """Return the least time of one sample through the transformer, in seconds, where and in the dtype that it runs in.

    Args:
        family: the transformer's.
        config: the transformer's.
        source: the pipeline's folder.
        generation: size of the image and length of the prompt.
        compute: where it runs.
    """
    numbers = sum(map(math.prod, family.tensor_shapes(config).values()))
    dtype = compute.dtype(torch.bfloat16, numbers, fits_half=not family.overflows)
    speed = matmul_flops_per_s(dtype=dtype, device=compute.device)
    return flops_per_evaluation(family, config, source, generation) / speed


@functools.cache
def matmul_flops_per_s(
    size: int = 1024, repeats: int = 5, *, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> float:
    """Measure the speed of a matrix product of this size on this machine, once; return the best of `repeats`."""
    on_gpu = device.type != "cpu"
    size, calls = (4 * size, 10) if on_gpu else (size, 1)  # a GPU takes less time for a small one than for a call
    a = torch.ones(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(calls):
            product = torch.mm(a, a)
        product[0, 0].item()  # waits for a GPU
        times.append((time.perf_counter() - began) / calls)
    return 2 * size**3 / min(times)
