"""What `compress` would cost, from configs alone: work, least time on this machine, memory, bytes written.

Work is counted by torch on a model without weights; the least time is that work at the speed of one large matrix
product, measured now, so a run takes longer (activation functions, small matrices, reading). What it leaves out:
activations, and the report's images.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeprune import checkpoint
from edgeprune.families import Config, Family
from edgeprune.files import read_json
from edgeprune.generation import Generation, longest_prompt
from edgeprune.metrics import metric_named
from edgeprune.pipeline import CompressOptions, analysis_groups, rehearse
from edgeprune.sampling import Conditioning, velocity


def forecast(source: Path, options: CompressOptions, generation: Generation) -> dict[str, Any]:
    """Rows of the forecast, units in their names.

    In training, teacher, student, gradients, two moments, the average and (where training rounds) rounded weights are
    held in float32.

    Args:
        source: the pipeline's folder.

    Raises:
        BudgetError: the plan's budget cannot be met, whatever the scores.
        InputError: an option or a config is not usable.
    """
    config, family = checkpoint.read_config(source)
    plan = rehearse(source, generation, options)
    before, after = plan.before, plan.after

    scored = len(analysis_groups(family, config, options.analyze)) + 1
    per_step = 2 if family.guided(config, generation.guidance_scale) else 1
    per_score = metric_named(options.analyze.metric).evaluations(generation, options.analyze.count, per_step)
    training, rounded = options.distill, options.distill is not None and options.distill.int4_group_size is not None
    # A training step is one evaluation of the teacher, and three of the student: forward, and twice that backward, but
    # one of a frozen prefix.
    taught = training.steps * training.batch if training else 0
    made = options.data.samples if training and _teacher_draws(options.data.source) else 0
    drawn = made * generation.num_inference_steps * per_step
    flops = flops_per_evaluation(family, config, source, generation)
    speed = matmul_flops_per_s()
    share = after.parameters / before.parameters
    prefix = plan.first_pruned / plan.num_blocks if training and training.freeze_prefix else 0.0
    float32 = 2 * before.bf16_bytes
    return {
        "blocks": family.block_count(config),
        "parameters": before.parameters,
        "parameters_left": after.parameters,
        "int4_bytes": after.int4_bytes,
        "analyze_parts": scored,
        "analyze_prompts": options.analyze.count,
        "analyze_evaluations": scored * per_score,
        "analyze_floor_s": round(scored * per_score * flops / speed, 1),
        "distill_steps": training.steps if training else 0,
        "data_evaluations": drawn,
        "data_floor_s": round(drawn * flops / speed, 1),
        "distill_floor_s": round(taught * (1 + prefix + 3 * max(0.0, share - prefix)) * flops / speed, 1),
        "evaluation_flops": flops,
        "matmul_flops_per_s": round(speed),
        "analyze_weights_bytes": float32,
        "distill_weights_bytes": float32 + (5 + rounded) * 2 * after.bf16_bytes if training else 0,
        "written_bytes": after.bf16_bytes + after.int4_bytes,
    }


def _teacher_draws(source: str | None) -> bool:
    """Whether the training images are made by the teacher: not those of shapes world, nor those of a folder."""
    return source != "shapes" and not (source and Path(source).is_dir())


def flops_per_evaluation(family: Family, config: Config, source: Path, generation: Generation) -> int:
    """Floating-point operations of one sample through the transformer, counted by torch on the meta device."""
    model = family.build(config, list(range(family.block_count(config))), frozenset())
    widths = read_json(source / "vae" / "config.json").get("block_out_channels", [0] * 4)
    factor = 2 ** (len(widths) - 1)
    size = family.latents(config).channels, generation.height // factor, generation.width // factor
    tokens = family.text_tokens(longest_prompt(source), generation.max_sequence_length)
    text, pooled = family.text_widths(config)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        condition = Conditioning(torch.empty(1, tokens, text), torch.empty(1, pooled))
        velocity(model, torch.empty(1, *size), condition, torch.empty(1), generation.guidance_scale)
    return int(counter.get_total_flops())


def matmul_flops_per_s(size: int = 1024, repeats: int = 5) -> float:
    """Speed of a float32 matrix product of this size on this machine: the best of `repeats`."""
    a = torch.ones(size, size)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)
