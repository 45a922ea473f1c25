"""Distributes training with accelerate: one trained student and one frozen teacher, sharded or not.

Every process draws the same global batch and takes its own rows of it. So the number of processes, and of micro-batches
that gradients are accumulated over, changes nothing but the order of sums. launch.py starts the processes, distill.py
computes the steps.
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
from edgeprune.training.recipe import ADAMW, Placement
from edgeprune.training.resume import gathered
from edgeprune.training.zero import ZeroOptimizer, plugin, shard


def sharded() -> bool:
    """Return whether accelerate's config shards models or optimizer over processes: FSDP or DeepSpeed."""
    return any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))


class Parallel:
    """An Accelerator, and this process's share of the batch."""

    def __init__(self, mixed_precision: str, batch: int, placement: Placement) -> None:
        """Join the other processes.

        Raises:
            InputError: see `check`, or accelerate's config or the hardware does not support an option.
        """
        self.check(mixed_precision, batch, placement)
        self.offload, accumulate = placement.teacher_offload, placement.accumulate
        self.ema_offload = placement.ema_offload
        size = batch // placement.micro_batches(batch, processes.count())
        self.precision = mixed_precision
        self._accelerate(accumulate, size)
        self.device: torch.device = self.accelerator.device
        first = processes.index() * accumulate
        self.rows = [slice(i * size, (i + 1) * size) for i in range(first, first + accumulate)]
        """The rows of the global batch that each micro-batch of this process takes."""

    @staticmethod
    def check(mixed_precision: str, batch: int, placement: Placement, optimizer: str = ADAMW) -> None:
        """Check what can be checked before anything is computed.

        Raises:
            InputError: the batch cannot be divided among the processes, the number format needs a GPU, accelerate's
                config says another, or it shards what cannot be sharded.
        """
        placement.micro_batches(batch, processes.count())
        configured = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if configured not in ("no", mixed_precision):
            raise InputError(
                f"--mixed-precision: found {mixed_precision}, but accelerate's config says {configured}; "
                "set both to the same value"
            )
        if sharded():
            placement.check_sharded(optimizer)
        if mixed_precision == "fp16" and not torch.cuda.is_available():  # accelerate would silently use float32
            raise InputError("--mixed-precision: found fp16, expected no or bf16 without a CUDA GPU")

    def _accelerate(self, accumulate: int, size: int) -> None:
        """Create the Accelerator.

        Args:
            accumulate: micro-batches per step in this process.
            size: samples per micro-batch.

        Raises:
            InputError: accelerate's config or the hardware does not support an option.
        """
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

        zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        deepspeed: Any = plugin(self.precision, accumulate, size) if zero else None
        processes.join()
        self.accelerator = Accelerator(
            mixed_precision="no" if zero else self.precision,  # DeepSpeed's precision is set in its plugin
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
        """Whether each process holds a shard of every weight, the teacher's included."""
        if self.shards and self.offload:
            option = "offload_param_device" if zero else "fsdp_offload_params"
            raise InputError(f"--teacher-offload: the teacher is sharded; set {option} in accelerate's config")

    def _shard_on_cpu(self) -> None:
        """Make accelerate use FSDP on CPUs: it enables FSDP on GPUs only, although FSDP itself runs on CPUs."""
        from accelerate import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        if self.accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(self.accelerator.mixed_precision)
        self.accelerator.state.fsdp_plugin = plugin
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState().distributed_type = DistributedType.FSDP  # accelerate restores its state from this one

    def _zero_on_cpu(self, deepspeed: Any) -> None:
        """Make accelerate use DeepSpeed on CPUs, where DeepSpeed itself runs."""
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
        """Return the module to call in the student's place, and the optimizer to step."""
        with warnings.catch_warnings():
            # Buffers are constant tables. Older versions of torch lack the replacement for `broadcast_buffers`.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            groups = [list(group["params"]) for group in optimizer.param_groups]
            net, prepared = self.accelerator.prepare(student, optimizer)
        zero = self.accelerator.distributed_type == "DEEPSPEED"
        return net, ZeroOptimizer(prepared, groups) if zero else prepared

    def teach(self, teacher: nn.Module) -> None:
        """Freeze the teacher, and shard it or move it to the device."""
        teacher.eval().requires_grad_(False)
        if self.accelerator.distributed_type == "FSDP":
            from accelerate.utils import fsdp2_prepare_model

            sharded: Any = fsdp2_prepare_model(self.accelerator, teacher)
            for module in sharded.modules():
                if hasattr(module, "set_reshard_after_forward"):  # the root waits for a backward pass, but none comes
                    module.set_reshard_after_forward(True, recurse=False)
        elif self.shards:
            shard(teacher, self.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"])
        elif self.offload:
            from accelerate import cpu_offload

            cpu_offload(teacher, execution_device=self.device)
        else:
            teacher.to(self.device)

    def release(self, teacher: nn.Module) -> None:
        """Move the teacher back to the CPU, unless it is sharded."""
        if self.offload:
            from accelerate.hooks import remove_hook_from_submodules

            remove_hook_from_submodules(teacher)
        elif not self.shards:
            teacher.to("cpu")

    def free(self) -> None:
        """Forget the models and optimizers of a training, so that their memory is free and another one can begin."""
        self.accelerator.free_memory()

    def autocast(self) -> AbstractContextManager[None]:
        """Return the mixed-precision context of a forward pass."""
        if self.accelerator.distributed_type == "DEEPSPEED":  # accelerate has no autocast for it
            return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    @contextmanager
    def micro_batch(self, net: Any) -> Iterator[None]:
        """Wrap the forward and backward pass of one micro-batch; only the last one sums gradients over processes."""
        with warnings.catch_warnings(), self.accelerator.accumulate(net):
            # In-place operations on the view would be wrong; the losses use none.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            yield

    def clip(self, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Clip the norm of the whole gradient to 1, and return the norm before clipping. Collective.

        DeepSpeed has already clipped the gradients and taken its step; only the norm is returned.
        """
        norm = self.accelerator.clip_grad_norm_(parameters, 1.0)
        if self.accelerator.distributed_type == "DEEPSPEED":  # -1 or None means that it is not finite
            return torch.tensor(norm if norm is not None and norm >= 0 else torch.nan)
        return gathered(norm)

    def mean(self, *values: float) -> list[float]:
        """Return each value's mean over the processes. Collective."""
        means: list[float] = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=self.device), "mean"
        ).tolist()
        return means
