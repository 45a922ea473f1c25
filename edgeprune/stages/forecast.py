"""What `compress` and `analyze` would cost: work, time on this machine, memory, bytes written.

`compress` is forecast from configs alone, `analyze` from one timed evaluation of the loaded transformer.

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

from edgeprune.analysis.estimators import estimator_named
from edgeprune.artefact import checkpoint
from edgeprune.common.files import read_json
from edgeprune.data.encode import is_drawn
from edgeprune.families import Config, Family
from edgeprune.metrics import evaluations, preparing
from edgeprune.sampling.denoising import Conditioning, velocity
from edgeprune.sampling.generation import Generation, latent_factor, longest_prompt
from edgeprune.sampling.prompts import PROMPTS
from edgeprune.stages.pipeline import AnalyzeOptions, CompressOptions, Workspace, analysis_groups, rehearse
from edgeprune.training.rank_memory import Layout, forecast_rank
from edgeprune.training.recipe import DistillOptions, Placement


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

    wanted = [(), *analysis_groups(family, config, options.analyze)]
    estimator = estimator_named(options.analyze.estimator, options.analyze.metric)
    per_step = 2 if family.guided(config, generation.guidance_scale) else 1
    per_score = evaluations(options.analyze.metric, generation, options.analyze.count, per_step)
    analysed = round(estimator.evaluations(wanted, family.block_count(config), per_score))
    training, rounded = options.distill, options.distill is not None and options.distill.int4_group_size is not None
    # A training step is one evaluation of the teacher, and three of the student: forward, and twice that backward, but
    # of a frozen prefix one, or none while the student does not round and has it of the teacher.
    taught = training.steps * training.batch if training else 0
    made = options.data.samples if training and is_drawn(options.data.source or str(PROMPTS)) else 0
    drawn = made * generation.num_inference_steps * per_step
    flops = flops_per_evaluation(family, config, source, generation)
    speed = matmul_flops_per_s()
    share = after.parameters / before.parameters
    prefix = plan.first_pruned / plan.num_blocks if training and training.freeze_prefix else 0.0
    own = prefix if rounded else 0.0
    float32 = 2 * before.bf16_bytes
    return {
        "blocks": family.block_count(config),
        "parameters": before.parameters,
        "parameters_left": after.parameters,
        "int4_bytes": after.int4_bytes,
        "analyze_parts": len(wanted),
        "analyze_prompts": options.analyze.count,
        "analyze_evaluations": analysed,
        "analyze_floor_s": round(analysed * flops / speed, 1),
        "distill_steps": training.steps if training else 0,
        "data_evaluations": drawn,
        "data_floor_s": round(drawn * flops / speed, 1),
        "distill_floor_s": round(taught * (1 + own + 3 * max(0.0, share - prefix)) * flops / speed, 1),
        "evaluation_flops": flops,
        "matmul_flops_per_s": round(speed),
        "analyze_weights_bytes": float32,
        "distill_weights_bytes": float32 + (5 + rounded) * 2 * after.bf16_bytes if training else 0,
        "written_bytes": after.bf16_bytes + after.int4_bytes,
    }


def forecast_analysis(source: Path, options: AnalyzeOptions, generation: Generation) -> dict[str, Any]:
    """Rows of the forecast of `analyze`, units in their names. Weights are loaded in float32, and run three times.

    Evaluations are of one sample; in batches they take less time each. `held_bytes` is what the estimator holds beside
    weights and the activations of a forward pass.

    Args:
        source: the pipeline's folder.

    Raises:
        InputError: an option or a config is not usable.
    """
    config, family = checkpoint.read_config(source)
    estimator = estimator_named(options.estimator, options.metric)
    wanted = analysis_groups(family, config, options)
    per_step = 2 if family.guided(config, generation.guidance_scale) else 1
    per_score, count = evaluations(options.metric, generation, options.count, per_step), family.block_count(config)
    before = preparing(options.metric, generation, options.count, per_step)
    needed = estimator.evaluations([(), *wanted], count, per_score) + before
    model = checkpoint.load_transformer(source, quantized=False)
    model.requires_grad_(False)
    sample = _sample(family, config, source, generation)
    stream = list[int]()

    def measure_stream(_: Any, __: Any, out: Any) -> None:
        stream.append(sum(t.nbytes for t in (out if isinstance(out, tuple) else (out,)) if t is not None))

    with torch.no_grad():
        handle = family.blocks(model)[0].register_forward_hook(measure_stream)
        velocity(model, *sample)
        handle.remove()
        began = time.perf_counter()
        velocity(model, *sample)
        evaluation_s = time.perf_counter() - began
    saved = _saved_bytes(model, sample) if estimator.backward else 0
    return {
        "blocks": count,
        "groups": len(wanted) + 1,
        "evaluations": round(needed),
        "evaluation_s": round(evaluation_s, 4),
        "analysis_s": round(needed * evaluation_s, 1),
        "weights_bytes": sum(p.nbytes for p in model.parameters()),
        "held_bytes": estimator.held(stream[0], saved, per_score),
    }


def _saved_bytes(model: Any, sample: tuple[torch.Tensor, Conditioning, torch.Tensor, float]) -> int:
    """What autograd keeps of one sample's forward pass for its backward pass, without gradients of weights."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    latents, condition, sigma, guidance = sample
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive = velocity(
            model, latents.requires_grad_(), condition, sigma, guidance
        )  # or storages are freed and counted as one
    del alive
    return sum(kept.values())


def forecast_training(
    ws: Workspace, options: DistillOptions, placement: Placement, config: Path | None
) -> dict[str, int]:
    """Rows of the forecast of `distill`: bytes that one process holds, see rank_memory.py.

    Args:
        config: of accelerate's; None for one process.

    Raises:
        InputError: there is no plan yet, or an option or the config is not usable.
    """
    options.check()
    layout = Layout.of_config(config) if config else Layout()
    sample = _sample(ws.family, ws.config, ws.source, ws.generation)
    return forecast_rank(ws.family, ws.config, ws.plan(), ws.report(), options, placement, layout, sample)


def flops_per_evaluation(family: Family, config: Config, source: Path, generation: Generation) -> int:
    """Floating-point operations of one sample through the transformer, counted by torch on the meta device."""
    model = family.build(config, list(range(family.block_count(config))), frozenset())
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        velocity(model, *_sample(family, config, source, generation))
    return int(counter.get_total_flops())


def _sample(
    family: Family, config: Config, source: Path, generation: Generation
) -> tuple[torch.Tensor, Conditioning, torch.Tensor, float]:
    """What `velocity` takes, of the sizes of one image; all zeros."""
    vae = source / "vae" / "config.json"
    factor = latent_factor(read_json(vae), vae)
    size = family.latents(config).channels, generation.height // factor, generation.width // factor
    tokens = family.text_tokens(longest_prompt(source), generation.max_sequence_length)
    text, pooled = family.text_widths(config)
    condition = Conditioning(torch.zeros(1, tokens, text), torch.zeros(1, pooled))
    return torch.zeros(1, *size), condition, torch.zeros(1), generation.guidance_scale


def matmul_flops_per_s(size: int = 1024, repeats: int = 5) -> float:
    """Speed of a float32 matrix product of this size on this machine: the best of `repeats`."""
    a = torch.ones(size, size)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)
