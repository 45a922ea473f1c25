"""What accelerate is told: one student to train and one frozen teacher, in one process or several, sharded or not.

Every process draws the same global batch and takes its rows of it, so that the number of processes, and of portions
that gradients are accumulated over, change nothing but the order of sums. What it leaves out: starting processes, see
launch.py, and what a step computes, see distill.py.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.training.recipe import Placement
from edgeprune.training.resume import whole
from edgeprune.training.zero import ZeroOptimizer, plugin, shard


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
        size = batch // portions
        zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        deepspeed: Any = plugin(mixed_precision, accumulate, size) if zero else None
        if mixed_precision == "fp16" and not torch.cuda.is_available():  # accelerate would go on in float32, unsaid
            raise InputError("--mixed-precision: found fp16, expected no or bf16 without a CUDA GPU")
        self.precision = mixed_precision
        processes.join()
        self.accelerator = Accelerator(
            mixed_precision="no" if zero else mixed_precision,  # DeepSpeed's is in its plugin
            deepspeed_plugin=deepspeed,
            cpu=not torch.cuda.is_available(),
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.accelerator.distributed_type == "MULTI_CPU":
            self._shard_on_cpu()
        if zero and self.accelerator.distributed_type != "DEEPSPEED":
            self._zero_on_cpu(deepspeed)
        if self.accelerator.distributed_type == "FSDP" and not self.accelerator.is_fsdp2:
            raise InputError("accelerate's config: fsdp_version: found 1, expected 2")
        self.shards = self.accelerator.distributed_type == "FSDP" or (zero and deepspeed.zero_stage == 3)
        """Whether a process holds a part of every weight, of the teacher too."""
        if self.shards and self.offload:
            option = "offload_param_device" if zero else "fsdp_offload_params"
            raise InputError(f"--teacher-offload: the teacher is sharded; set {option} in accelerate's config")
        self.device: torch.device = self.accelerator.device
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

    def _zero_on_cpu(self, deepspeed: Any) -> None:
        """The same of DeepSpeed, which itself knows CPUs."""
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        if processes.count() == 1:
            raise InputError("accelerate's config: num_processes: found 1, expected several with DeepSpeed on a CPU")
        deepspeed.set_mixed_precision("no")
        deepspeed.select(_from_accelerator_state=True)
        self.accelerator.state.deepspeed_plugins = deepspeed
        self.accelerator.state.distributed_type = DistributedType.DEEPSPEED
        PartialState().distributed_type = DistributedType.DEEPSPEED

    def train(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The student as it is to be called, and the optimizer as it is to be stepped."""
        with warnings.catch_warnings():
            # Buffers are fixed tables. What is to take the place of `broadcast_buffers` older torches do not have.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            groups = [list(group["params"]) for group in optimizer.param_groups]
            net, stepped = self.accelerator.prepare(student, optimizer)
        zero = self.accelerator.distributed_type == "DEEPSPEED"
        return net, ZeroOptimizer(stepped, groups) if zero else stepped

    def teach(self, teacher: nn.Module) -> None:
        """Put a frozen teacher where it computes."""
        teacher.eval().requires_grad_(False)
        if self.accelerator.distributed_type == "FSDP":
            from accelerate.utils import fsdp2_prepare_model

            sharded: Any = fsdp2_prepare_model(self.accelerator, teacher)
            for module in sharded.modules():
                if hasattr(module, "set_reshard_after_forward"):  # for a backward pass that never comes it would wait
                    module.set_reshard_after_forward(True, recurse=False)
        elif self.shards:
            shard(teacher, self.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"])
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
        elif not self.shards:
            teacher.to("cpu")

    def autocast(self) -> AbstractContextManager[None]:
        """Around a forward pass."""
        if self.accelerator.distributed_type == "DEEPSPEED":  # for which accelerate has none
            return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        found: AbstractContextManager[None] = self.accelerator.autocast()
        return found

    @contextmanager
    def portion(self, net: Any) -> Iterator[None]:
        """For one portion, forward and backward. Gradients are summed over processes after the last one alone."""
        with warnings.catch_warnings(), self.accelerator.accumulate(net):
            # Which an operation in place would spoil; the losses have none.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            yield

    def clip(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Limit the norm of the whole gradient to 1; what it was. DeepSpeed has, and taken its step."""
        found = self.accelerator.clip_grad_norm_(parameters, 1.0)
        if self.accelerator.distributed_type == "DEEPSPEED":  # -1 or None stand for what is not finite
            return torch.tensor(found if found is not None and found >= 0 else torch.nan)
        return whole(found)

    def mean(self, *values: float) -> list[float]:
        """Each value's mean over processes."""
        found: list[float] = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.device), "mean"
        ).tolist()
        return found
