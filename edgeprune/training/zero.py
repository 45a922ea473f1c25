"""DeepSpeed's ZeRO behind the interfaces of the rest of training: accelerate's plugin, shards of weights, an optimizer.

ZeRO-2 shards gradients and moments, ZeRO-3 weights as well. A `FlatShard` has those methods of torch's DTensor, the
shard of FSDP2, that resume.py uses. Offloading to NVMe is not supported, nor are DeepSpeed's own bf16 and fp16 modes,
which store weights in half precision; `torch_autocast` computes as training without DeepSpeed does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeprune.common import extras, processes
from edgeprune.common.errors import InputError
from edgeprune.training.resume import MOMENTS


def plugin(mixed_precision: str, accumulate: int, images: int) -> Any:
    """Return accelerate's DeepSpeed plugin, from the settings that its launcher has put into the environment.

    Args:
        mixed_precision: no or bf16.
        accumulate: micro-batches per step in this process.
        images: images per micro-batch.

    Raises:
        InputError: accelerate's config requests anything other than ZeRO-2 or 3 with weights in float32.
        MissingExtraError: DeepSpeed is not installed.
    """
    extras.require(("deepspeed",), "deepspeed")
    from accelerate import DeepSpeedPlugin

    made = DeepSpeedPlugin(gradient_accumulation_steps=accumulate, gradient_clipping=1.0)
    config = made.deepspeed_config
    if made.zero_stage not in (2, 3):
        raise InputError(f"accelerate's config: zero_stage: found {made.zero_stage}, expected 2 or 3")
    if "nvme" in (made.offload_optimizer_device, made.offload_param_device):
        raise InputError("accelerate's config: offload device: found nvme, expected none or cpu")
    if clashing := [name for name in ("bf16", "fp16", "optimizer", "scheduler") if name in config]:
        raise InputError(f"accelerate's config: deepspeed_config_file: {clashing[0]}: edgeprune sets this; remove it")
    if mixed_precision == "fp16":
        raise InputError("--mixed-precision: found fp16, expected no or bf16 with DeepSpeed")
    config |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": images,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,  # use torch's AdamW on the CPU too, so states work without DeepSpeed
        # Without this list weights would be gathered in bf16 and rounded to INT4 from bf16.
        "torch_autocast": {
            "enabled": mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    return made


def shard(teacher: nn.Module, settings: dict[str, Any]) -> None:
    """Shard a frozen model with ZeRO-3. DeepSpeed gathers each layer when it runs.

    Args:
        teacher: a model with weights in float32 or bf16.
        settings: the `zero_optimization` settings of the student.
    """
    import deepspeed

    zero = {name: value for name, value in settings.items() if name != "offload_optimizer"}
    half = next(teacher.parameters()).dtype == torch.bfloat16
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "bf16": {"enabled": half}}
    deepspeed.initialize(model=teacher, config=config)


class FlatShard:
    """This process's flat shard of a tensor. All shards have the same length; the last one may end in padding."""

    def __init__(self, flat: torch.Tensor, shape: torch.Size) -> None:
        """Wrap a flat tensor.

        Args:
            shape: the shape of the full tensor.
        """
        self.flat, self.shape = flat, shape

    def to_local(self) -> torch.Tensor:
        """Return the flat tensor itself."""
        return self.flat

    def detach(self) -> FlatShard:
        """Return this shard: autograd does not track it."""
        return self

    def clone(self) -> FlatShard:
        """Return a copy in memory of its own."""
        return FlatShard(self.flat.detach().clone(), self.shape)

    def full_tensor(self) -> torch.Tensor:
        """Gather the full tensor. Collective: every rank must call it."""
        from deepspeed.accelerator import get_accelerator

        here = self.flat.detach().to(get_accelerator().current_device_name())  # it may be offloaded to the host
        shards = [torch.empty_like(here) for _ in range(processes.count())]
        torch.distributed.all_gather(shards, here)
        return torch.cat(shards)[: self.shape.numel()].view(self.shape)

    def cut(self, full: torch.Tensor) -> torch.Tensor:
        """Return this process's flat shard of another full tensor of the same shape."""
        size = self.flat.numel()
        values = full.flatten()[processes.index() * size : (processes.index() + 1) * size]
        padded = torch.zeros_like(self.flat)
        padded[: len(values)].copy_(values)
        return padded

    def copy_(self, full: torch.Tensor) -> FlatShard:
        """Overwrite this shard with its part of a full tensor."""
        self.flat.copy_(self.cut(full))
        return self


def shard_of(tensor: Any) -> Any:
    """Return the `FlatShard` of a parameter that ZeRO-3 has sharded; return any other tensor unchanged."""
    return FlatShard(tensor.ds_tensor, tensor.ds_shape) if hasattr(tensor, "ds_tensor") else tensor


class _Moment:
    """A moment of a sharded parameter; gathered only by `full_tensor`."""

    def __init__(self, parameter: nn.Parameter, name: str) -> None:
        self.parameter, self.name = parameter, name

    def full_tensor(self) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        full: torch.Tensor = safe_get_full_optimizer_state(self.parameter, self.name)
        return full


class ZeroOptimizer:
    """An AdamW whose parameters DeepSpeed has flattened and sharded; its state is still addressed by parameter.

    All parameters have taken the same number of steps: DeepSpeed treats a missing gradient as zeros.
    """

    def __init__(self, wrapped: Any, groups: list[list[nn.Parameter]]) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        self._originals = [p for group in groups for p in group]
        self.parameters = [shard_of(p) for p in self._originals]
        zero, self._adam = wrapped.optimizer, wrapped.optimizer.optimizer
        sharded = hasattr(self._originals[0], "ds_tensor")
        self._flat: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
        )
        # torch creates this state at the first step, which is too late for resuming; and DeepSpeed 0.19 looks for the
        # moments of all groups after the step of the first group.
        for flat in self._flat:
            self._adam.state[flat] = {"step": torch.tensor(0.0)} | {n: torch.zeros_like(flat) for n in MOMENTS}
        if not sharded:
            for group, flat in zip(groups, self._flat, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self._adam.state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of flat parameters, with their learning rates."""
        groups: list[dict[str, Any]] = self._adam.param_groups
        return groups

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        """The state of this process's flat parameters."""
        state: dict[torch.Tensor, Any] = self._adam.state
        return state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: DeepSpeed clears the gradients after its step."""

    def step(self) -> None:
        """Do nothing: DeepSpeed clips gradients and takes its step at the end of the last backward pass."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state in the form of a torch optimizer; `full_tensor` gathers each moment."""
        step = self._adam.state[self._flat[0]]["step"].clone()
        state = {
            i: {"step": step.clone()} | {name: _Moment(p, name) for name in MOMENTS}
            for i, p in enumerate(self._originals)
        }
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, loaded: dict[str, Any]) -> None:
        """Load full moments by parameter; parameters without saved moments keep zeros."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        slots = loaded["state"]
        step = max((float(s["step"]) for s in slots.values()), default=0.0)
        for flat in self._flat:
            self._adam.state[flat]["step"].fill_(step)
        for index, (parameter, shard) in enumerate(zip(self._originals, self.parameters, strict=True)):
            for name in MOMENTS if index in slots else ():
                if isinstance(shard, FlatShard):  # safe_set_full_optimizer_state does not handle padding
                    safe_set_local_optimizer_state(parameter, shard.cut(slots[index][name]), name)
                else:
                    safe_set_full_optimizer_state(parameter, slots[index][name].to(parameter.device), name)
