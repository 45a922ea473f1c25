"""Forecasts the device memory of one process of a distillation, from configs and a plan, before anything is loaded.

Weights, gradients, moments and the average are counted parameter by parameter, sharded as in training. Activations are
those that autograd saves in one pass on torch's fake tensors, which run the device's kernels without memory. Not
counted: workspace of kernels, communication buffers, fragmentation, and mixed-precision copies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode  # meta tensors lack fused attention and would save the attention matrix

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.artefact.surgery import structure
from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.sampling.denoising import Conditioning, VelocityInputs, network_inputs
from edgeprune.sampling.forward import forward
from edgeprune.training import lora
from edgeprune.training.eight_bit import moments_bytes
from edgeprune.training.recipe import EIGHT_BIT, DistillOptions, Placement, Recipe, adapt, parameter_groups
from edgeprune.training.rounding import Rounding
from edgeprune.training.tail import cut
from edgeprune.training.teaching import block_weights, frozen_weights, lower, narrowed
from edgeprune.training.trained import ALL


@dataclass(frozen=True)
class ProcessLayout:
    """How the processes of a run divide a model among them."""

    processes: int = 1
    sharded: bool = False
    """FSDP2: each process holds a shard of every weight of both models."""
    offloaded: bool = False
    """The shards are kept on the CPU."""

    @classmethod
    def of_launch_file(cls, path: Path) -> ProcessLayout:
        """Read the layout from a launch config of accelerate.

        Raises:
            InputError: the file is not readable, or its distributed type is not supported.
        """
        from accelerate.commands.config.config_args import load_config_from_file

        try:
            launch = load_config_from_file(str(path))
            kind, count = str(launch.distributed_type.value), int(launch.num_processes)
            fsdp = dict(getattr(launch, "fsdp_config", None) or {})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not usable as a config of accelerate ({error})") from error
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
            raise InputError(f"{path}: distributed_type: found {kind}, expected NO, MULTI_GPU or FSDP")
        return cls(processes=max(1, count), sharded=kind == "FSDP", offloaded=bool(fsdp.get("fsdp_offload_params")))

    def bytes_per_rank(self, tensors: Iterable[torch.Tensor]) -> int:
        """Return the bytes of these parameters in rank 0; shards are whole rows, rounded up."""
        ways = self.processes if self.sharded else 1
        return sum(t.nbytes // max(1, len(t)) * -(-len(t) // ways) if t.dim() else t.nbytes for t in tensors)


def forecast_rank(
    family: Family,
    config: Config,
    plan: PrunePlan,
    report: ContributionReport | None,
    options: DistillOptions,
    recipe: Recipe,
    placement: Placement,
    layout: ProcessLayout,
    sample: VelocityInputs,
) -> dict[str, int]:
    """Return the bytes in rank 0 by what they are used for, their sum, and the number of processes.

    Args:
        config: the original transformer's config.
        sample: the inputs of one image.

    Raises:
        InputError: nothing is left to train, the batch cannot be divided among the processes, or an option is not for
            shards.
    """
    micro_batches = placement.micro_batches(options.batch, layout.processes)
    if layout.sharded:
        placement.check_sharded(options.optimizer)
    teacher = family.build(config, list(range(family.block_count(config))), frozenset())
    lower(family, teacher, options.teacher_precision)
    narrow = narrowed(options, plan, sharded=layout.sharded)
    if narrow:
        _narrow(teacher, block_weights(family, teacher))
    if recipe.states:
        cut(family, teacher, plan.first_pruned)
    student: Any = structure(family, config, plan)
    adapt(family, student, plan, recipe, options)
    groups = parameter_groups(family, student, plan, report, recipe, options.rate)
    trained = [p for group in groups for p in group["params"]]
    trained_bytes = layout.bytes_per_rank(trained)
    # States leave nothing of the student before its first trained block, and no teacher unless features are compared.
    held = copy.deepcopy(student)
    if recipe.states:
        cut(family, held, plan.first_pruned)
        if options.train != ALL and options.mixed_precision != "no":
            held.to(torch.bfloat16)
            held.load_state_dict(
                {n: t.float() for n, t in held.state_dict().items() if lora.is_trained(n)}, False, True
            )
    elif narrow:
        _narrow(held, frozen_weights(family, held, plan, options, recipe))
    student_bytes = layout.bytes_per_rank(held.parameters()) + _buffers(held)
    teacher_bytes = layout.bytes_per_rank(teacher.parameters()) + _buffers(teacher)
    absent = placement.teacher_offload or (recipe.states and not recipe.lambda_feature)
    eight_bit = options.optimizer == EIGHT_BIT
    rows = {
        "teacher_bytes": 0 if absent else teacher_bytes,
        "student_bytes": student_bytes,
        "gradients_bytes": trained_bytes,
        "moments_bytes": moments_bytes(trained) if eight_bit else 2 * trained_bytes + 4 * len(trained),
        "average_bytes": trained_bytes if options.ema and not placement.ema_offload else 0,
        "gathered_bytes": 0,
    }
    if layout.sharded:
        blocks = [*family.blocks(student), *family.blocks(teacher)]
        largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
        rows |= dict.fromkeys(rows, 0) if layout.offloaded else {}
        rows["gathered_bytes"] = 2 * largest  # one block computes while the next one is gathered
    rows["activations_bytes"] = _activations(family, student, options, sample, options.batch // micro_batches)
    return rows | {"rank_bytes": sum(rows.values()), "processes": layout.processes}


def _narrow(model: nn.Module, names: Iterable[str]) -> None:
    """Convert these weights to 16 bits, in place."""
    model.load_state_dict({name: model.get_parameter(name).bfloat16() for name in names}, strict=False, assign=True)


def _buffers(model: nn.Module) -> int:
    return sum(b.nbytes for b in model.buffers())


def _activations(family: Family, student: Any, options: DistillOptions, sample: VelocityInputs, batch: int) -> int:
    """Return the bytes that autograd saves in the student's forward pass.

    With checkpointing these are the blocks' outputs and the activations of the largest block.

    Args:
        batch: the number of images in the pass.
    """
    latents, condition, sigma, guidance = sample
    sizes = [(batch, *t.shape[1:]) for t in (latents, condition.hidden, condition.pooled, sigma)]
    saved: dict[int, tuple[int, int]] = {}  # (block, bytes) by storage; block -1 is outside of all blocks
    streams, current = [0] * len(family.blocks(student)), [-1]

    def begin(index: int, out: Any = None) -> None:
        current[0] = index
        if out is not None:
            tensors = out if isinstance(out, tuple) else (out,)
            streams[index] = sum(t.nbytes for t in tensors if t is not None and t.requires_grad)
            current[0] = -1

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved.setdefault(storage._cdata, (current[0], storage.nbytes()))
        return tensor

    if options.int4_group_size is not None:
        rounding = Rounding(family, student, options.int4_group_size)
        # Rounding frozen layers does not change their size.
        rounding.layers = [(layer, size) for layer, size in rounding.layers if layer.weight.requires_grad]
        rounding.begin()
    for index, block in enumerate(family.blocks(student)):
        block.register_forward_pre_hook(lambda *_, index=index: begin(index))
        block.register_forward_hook(lambda _, __, out, index=index: begin(index, out))
    with FakeTensorMode(allow_non_fake_inputs=True):
        student.to_empty(device="cpu")
        weights = {t.untyped_storage()._cdata for t in (*student.parameters(), *student.buffers())}
        noisy, hidden, pooled, levels = (torch.empty(size) for size in sizes)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            inputs = network_inputs(student, noisy, Conditioning(hidden, pooled), levels, guidance)
            alive = forward(family, student, inputs)
        del alive
    by_block = [sum(size for place, size in saved.values() if place == b) for b in range(len(streams))]
    outside = sum(size for place, size in saved.values() if place < 0)
    if options.gradient_checkpointing:
        return outside + sum(streams) + max(by_block)
    return outside + sum(by_block)
