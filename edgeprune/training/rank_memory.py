"""What one process of a distillation holds on its device: forecast from configs and a plan, before anything is loaded.

Weights, gradients, moments and the average are counted parameter by parameter, as they are sharded; activations by
autograd, from one pass on torch's fake tensors, which have a device's kernels but no memory. What it leaves out: what
kernels, communication and the allocator take beside it, and casts of mixed precision.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode  # meta tensors have no fused attention, and would keep its matrix

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.artefact.surgery import structure
from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family
from edgeprune.planning.plan import PrunePlan
from edgeprune.sampling.denoising import Conditioning, velocity
from edgeprune.training.recipe import DistillOptions, Placement, parameter_groups
from edgeprune.training.rounding import Rounding
from edgeprune.training.teaching import lower

Sample = tuple[torch.Tensor, Conditioning, torch.Tensor, float]
"""What `velocity` takes beside a model."""


@dataclass(frozen=True)
class Layout:
    """How processes share a model."""

    processes: int = 1
    sharded: bool = False
    """FSDP2: each process holds a part of every weight of both models."""
    offloaded: bool = False
    """And holds it on the CPU."""

    @classmethod
    def of_config(cls, path: Path) -> Layout:
        """As a config of accelerate's says.

        Raises:
            InputError: it is not readable, or of an engine that is not known.
        """
        from accelerate.commands.config.config_args import load_config_from_file

        try:
            config = load_config_from_file(str(path))
            kind, count = str(config.distributed_type.value), int(config.num_processes)
            fsdp = dict(getattr(config, "fsdp_config", None) or {})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: not usable as a config of accelerate ({error})") from error
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
            raise InputError(f"{path}: distributed_type: found {kind}, expected NO, MULTI_GPU or FSDP")
        return cls(max(1, count), kind == "FSDP", bool(fsdp.get("fsdp_offload_params")))

    def held(self, tensors: Iterable[torch.Tensor]) -> int:
        """Bytes of these parameters that the first process holds: shards are of rows, rounded up."""
        ways = self.processes if self.sharded else 1
        return sum(t.nbytes // max(1, len(t)) * -(-len(t) // ways) if t.dim() else t.nbytes for t in tensors)


def forecast_rank(
    family: Family,
    config: Config,
    plan: PrunePlan,
    report: ContributionReport | None,
    options: DistillOptions,
    placement: Placement,
    layout: Layout,
    sample: Sample,
) -> dict[str, int]:
    """Bytes by what they are for, of the first process.

    Args:
        config: of the original transformer.
        sample: of one image.

    Raises:
        InputError: nothing is left to train, or the batch cannot be shared out.
    """
    portions = layout.processes * placement.accumulate
    if options.batch % portions:
        raise InputError(f"--batch: found {options.batch}, expected a multiple of {portions}")
    teacher = family.build(config, list(range(family.block_count(config))), frozenset())
    lower(family, teacher, options.teacher_precision)
    student: Any = structure(family, config, plan)
    groups = parameter_groups(family, student, plan, report, options)
    trained = [p for group in groups for p in group["params"]]
    weights = layout.held(student.parameters()) + _buffers(student)
    once = layout.held(trained)
    taught = layout.held(teacher.parameters()) + _buffers(teacher)
    rows = {
        "teacher_bytes": 0 if placement.teacher_offload else taught,
        "student_bytes": weights,
        "gradients_bytes": once,
        "moments_bytes": 2 * once + 4 * len(trained),
        "average_bytes": once,
        "gathered_bytes": 0,
    }
    if layout.sharded:
        blocks = [*family.blocks(student), *family.blocks(teacher)]
        largest = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
        rows |= dict.fromkeys(rows, 0) if layout.offloaded else {}
        rows["gathered_bytes"] = 2 * largest  # one is computed with while the next one comes
    rows["activations_bytes"] = _activations(family, student, options, sample, options.batch // portions)
    return rows | {"rank_bytes": sum(rows.values()), "processes": layout.processes}


def _buffers(model: nn.Module) -> int:
    return sum(b.nbytes for b in model.buffers())


def _activations(family: Family, student: Any, options: DistillOptions, sample: Sample, batch: int) -> int:
    """What autograd keeps of the student's pass for this many images; with checkpoints, of one block at a time."""
    latents, condition, sigma, guidance = sample
    sizes = [(batch, *t.shape[1:]) for t in (latents, condition.hidden, condition.pooled, sigma)]
    kept: dict[int, tuple[int, int]] = {}  # by storage: block, bytes
    streams, current = [0] * len(family.blocks(student)), [-1]

    def begin(index: int, out: Any = None) -> None:
        current[0] = index
        if out is not None:
            tensors = out if isinstance(out, tuple) else (out,)
            streams[index] = sum(t.nbytes for t in tensors if t is not None and t.requires_grad)
            current[0] = -1

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept.setdefault(storage._cdata, (current[0], storage.nbytes()))
        return tensor

    if options.int4_group_size is not None:
        rounding = Rounding(family, student, options.int4_group_size)
        rounding.layers = [
            found for found in rounding.layers if found[0].weight.requires_grad
        ]  # others keep their size
        rounding.begin()
    for index, block in enumerate(family.blocks(student)):
        block.register_forward_pre_hook(lambda *_, index=index: begin(index))
        block.register_forward_hook(lambda _, __, out, index=index: begin(index, out))
    with FakeTensorMode(allow_non_fake_inputs=True):
        student.to_empty(device="cpu")
        known = {t.untyped_storage()._cdata for t in (*student.parameters(), *student.buffers())}
        noisy, hidden, pooled, levels = (torch.empty(size) for size in sizes)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            alive = velocity(student, noisy, Conditioning(hidden, pooled), levels, guidance)
        del alive
    by_block = [sum(size for place, size in kept.values() if place == b) for b in range(len(streams))]
    outside = sum(size for place, size in kept.values() if place < 0)
    if options.gradient_checkpointing:
        return outside + sum(streams) + max(by_block)
    return outside + sum(by_block)
