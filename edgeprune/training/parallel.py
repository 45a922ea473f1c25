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


class Parallel:
    """An Accelerator, and this process's share of the batch."""

    def __init__(self, mixed_precision: str, batch: int, placement: Placement, device: torch.device) -> None:
        """Join the other processes.

        Args:
            mixed_precision: no, bf16 or fp16.
            batch: samples per step, of all processes.
            placement: micro-batches, and what stays on the CPU.
            device: to train on. Of several processes, each takes the device that accelerate gives it.

        Raises:
            InputError: see `check`, or accelerate's config or the hardware does not support an option.
        """
        self.check(mixed_precision, batch, placement, device)
        self.offload, accumulate = placement.teacher_offload, placement.accumulate
        self.ema_offload = placement.ema_offload
        size = batch // placement.micro_batches(batch, processes.count())
        self.precision = mixed_precision
        self._accelerate(accumulate, size, device)
        self.device: torch.device = self.accelerator.device
        first = processes.index() * accumulate
        self.rows = [slice(i * size, (i + 1) * size) for i in range(first, first + accumulate)]
        """The rows of the global batch that each micro-batch of this process takes."""

    @staticmethod
    def check(
        mixed_precision: str, batch: int, placement: Placement, device: torch.device, optimizer: str = ADAMW
    ) -> None:
        """Check what can be checked before anything is computed.

        Raises:
            InputError: the batch cannot be divided among the processes, the device lacks the number format or the
                optimizer, accelerate's config says another device or format, or it shards what cannot be sharded.
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
        _check_device(mixed_precision, device, optimizer)

    def _accelerate(self, accumulate: int, size: int, device: torch.device) -> None:
        """Create the Accelerator.

        Args:
            accumulate: micro-batches per step in this process.
            size: samples per micro-batch.
            device: see `__init__`.

        Raises:
            InputError: accelerate's config or the hardware does not support an option.
        """
        from accelerate import Accelerator, PartialState
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

        zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        deepspeed: Any = plugin(self.precision, accumulate, size) if zero else None
        processes.join(device)
        self.accelerator = Accelerator(
            mixed_precision="no" if zero else self.precision,  # DeepSpeed's precision is set in its plugin
            deepspeed_plugin=deepspeed,
            cpu=PartialState().device.type == "cpu",
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
        place = self.device if processes.count() > 1 else None  # mps, where one process trains, has no float64
        means: list[float] = self.accelerator.reduce(
            torch.tensor(values, dtype=torch.float64, device=place), "mean"
        ).tolist()
        return means


def sharded() -> bool:
    """Return whether accelerate's config shards models or optimizer over processes: FSDP or DeepSpeed."""
    return any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))


def _check_device(mixed_precision: str, device: torch.device, optimizer: str) -> None:
    """Refuse a device that accelerate does not take here, and what cannot be trained on it.

    Raises:
        InputError: see `Parallel.check`.
    """
    if processes.placed():
        on_gpu = torch.cuda.is_available() and not processes.on_cpu()
        own = torch.device("cuda", processes.local_index() % torch.cuda.device_count()) if on_gpu else None
        own = own or torch.device("cpu")
        if device not in (own, torch.device(own.type)):
            raise InputError(
                f"--device: found {device}, but accelerate starts this process to train on {own}; give {own.type}, or "
                "train in a process that it does not start"
            )
    elif processes.on_cpu() and device.type != "cpu":
        raise InputError(f"--device: found {device}, but accelerate's config says use_cpu: true; give cpu")
    if mixed_precision == "fp16" and device.type != "cuda":  # accelerate would silently use float32 on a processor
        raise InputError(f"--mixed-precision: found fp16, expected no or bf16 on {device.type}: it needs a CUDA GPU")
    if mixed_precision == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise InputError("--mixed-precision: found bf16, expected no on mps before macOS 14")
    if optimizer != ADAMW and device.type == "mps":
        raise InputError(f"--optimizer: found {optimizer}, expected {ADAMW} on mps, for which bitsandbytes has no step")
