"""What accelerate is told: one student to train and one frozen teacher, in one process or several, sharded or not.

Every process draws the same global batch and takes its rows of it, so that the number of processes, and of portions
that gradients are accumulated over, change nothing but the order of sums. What it leaves out: starting processes, see
launch.py, and what a step computes, see distill.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgeprune import processes
from edgeprune.errors import InputError
from edgeprune.recipe import Placement
from edgeprune.resume import whole


class Engine:
    """An Accelerator with a batch to share out."""

    def __init__(self, mixed_precision: str, batch: int, placement: Placement) -> None:
        """Join the other processes.

        Raises:
            InputError: the batch cannot be shared out, or accelerate's config says otherwise.
        """
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

        self.offload, accumulate = placement.teacher_offload, placement.accumulate
        portions = processes.count() * accumulate
        if accumulate < 1 or batch % portions:
            raise InputError(
                f"--batch: found {batch}, expected a multiple of {portions}, the number of processes times --accumulate"
            )
        said = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if said not in ("no", mixed_precision):
            raise InputError(
                f"--mixed-precision: found {mixed_precision}, but accelerate's config says {said}; say one thing"
            )
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            raise InputError(
                "accelerate's config: distributed_type: found DEEPSPEED, expected FSDP, which shards the same"
            )
        processes.join()
        self.accelerator = Accelerator(
            mixed_precision=mixed_precision,
            cpu=not torch.cuda.is_available(),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.accelerator.distributed_type == "MULTI_CPU":
            self._shard_on_cpu()
        if self.accelerator.distributed_type == "FSDP" and not self.accelerator.is_fsdp2:
            raise InputError("accelerate's config: fsdp_version: found 1, expected 2")
        if self.accelerator.distributed_type == "FSDP" and self.offload:
            raise InputError(
                "--teacher-offload: FSDP shards the teacher; set fsdp_offload_params in accelerate's config"
            )
        self.device: torch.device = self.accelerator.device
        size = batch // portions
        first = processes.index() * accumulate
        self.rows = [slice(i * size, (i + 1) * size) for i in range(first, first + accumulate)]
        """Of the global batch, portion by portion."""

    def _shard_on_cpu(self) -> None:
        """Accelerate's state has FSDP on GPUs alone, and would go on with DDP; what it calls then runs on CPUs."""
        from accelerate import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        if self.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
        self.accelerator.state.fsdp_plugin = plugin
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP  # from which the state is filled again

    def train(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The student as it is to be called, and the optimizer as it is to be stepped."""
        with warnings.catch_warnings():
            # Buffers are fixed tables. What is to take the place of `broadcast_buffers` older torches do not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            net, stepped = self.accelerator.prepare(student, optimizer)
        return net, stepped

    def teach(self, teacher: nn.Module) -> None:
        """Put a frozen teacher where it computes."""
        teacher.eval().requires_grad_(False)
        if self.accelerator.distributed_type == "FSDP":
            from accelerate.utils import fsdp2_prepare_model

            sharded: Any = fsdp2_prepare_model(self.accelerator, teacher)
            for module in sharded.modules():
                if hasattr(module, "set_reshard_after_forward"):  # for a backward pass that never comes it would wait
                    module.set_reshard_after_forward(True, recurse=False)
        elif self.offload:
            from accelerate import cpu_offload

            cpu_offload(teacher, execution_device=self.device)
        else:
            teacher.to(self.device)

    def release(self, teacher: nn.Module) -> None:
        """Put the teacher back, unless it stays sharded."""
        if self.offload:
            from accelerate.hooks import remove_hook_from_submodules

            remove_hook_from_submodules(teacher)
        elif self.accelerator.distributed_type != "FSDP":
            teacher.to("cpu")

    @contextmanager
    def portion(self, net: Any) -> Iterator[None]:
        """For one portion, forward and backward. Gradients are summed over processes after the last one alone."""
        with warnings.catch_warnings(), self.accelerator.accumulate(net):
            # Which an operation in place would spoil; the losses have none.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            yield

    def clip(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Limit the norm of the whole gradient to 1; what it was."""
        return whole(self.accelerator.clip_grad_norm_(parameters, 1.0))

    def mean(self, *values: float) -> list[float]:
        """Each value's mean over processes."""
        found: list[float] = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.device), "mean"
        ).tolist()
        return found
