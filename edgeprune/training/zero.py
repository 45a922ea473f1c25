"""DeepSpeed's ZeRO in the terms of the rest of training: a plugin of accelerate's, parts of weights, an optimizer.

ZeRO-2 cuts up gradients and moments, ZeRO-3 weights as well. A `Part` has the methods of torch's DTensor, which FSDP2
cuts weights up into, that resume.py asks for. What it leaves out: NVMe, and precision by DeepSpeed's own bf16 and fp16,
which hold weights in half; `torch_autocast` computes as it is done without DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeprune.common import extras, processes
from edgeprune.common.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of a parameter, beside its count of steps."""


def plugin(mixed_precision: str, accumulate: int, images: int) -> Any:
    """What accelerate is told of DeepSpeed, from what its launcher has set.

    Args:
        mixed_precision: no or bf16.
        accumulate: portions of a step.
        images: of a portion in one process.

    Raises:
        InputError: accelerate's config asks for something else than ZeRO-2 or 3 of weights in float32.
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
    if given := [name for name in ("bf16", "fp16", "optimizer", "scheduler") if name in config]:
        raise InputError(f"accelerate's config: deepspeed_config_file: {given[0]}: edgeprune sets this; remove it")
    if mixed_precision == "fp16":
        raise InputError("--mixed-precision: found fp16, expected no or bf16 with DeepSpeed")
    config |= {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": images,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 1.0,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, on the CPU too: states go from engine to engine
        # Without a list weights are gathered in bf16, and rounded to INT4 from there.
        "torch_autocast": {
            "enabled": mixed_precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }
    return made


def shard(teacher: nn.Module, settings: dict[str, Any]) -> None:
    """Cut up a frozen model as ZeRO-3 does a trained one: an engine of its own gathers each layer as it is run.

    Args:
        teacher: with weights in float32 or bf16.
        settings: `zero_optimization` of the trained one.
    """
    import deepspeed

    zero = {name: value for name, value in settings.items() if name != "offload_optimizer"}
    half = next(teacher.parameters()).dtype == torch.bfloat16
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "bf16": {"enabled": half}}
    deepspeed.initialize(model=teacher, config=config)


class Part:
    """What this process holds of a tensor: as many numbers as the others, the last ones perhaps padding."""

    def __init__(self, part: torch.Tensor, shape: torch.Size) -> None:
        self.part, self.shape = part, shape
        """Flat; and of the whole."""

    def to_local(self) -> torch.Tensor:
        """The numbers themselves."""
        return self.part

    def detach(self) -> Part:
        """Itself: autograd knows of none."""
        return self

    def clone(self) -> Part:
        """In memory of its own."""
        return Part(self.part.detach().clone(), self.shape)

    def full_tensor(self) -> torch.Tensor:
        """The whole, in every process; all have to ask."""
        from deepspeed.accelerator import get_accelerator

        own = self.part.detach().to(get_accelerator().current_device_name())  # from the host, where it is offloaded
        parts = [torch.empty_like(own) for _ in range(processes.count())]
        torch.distributed.all_gather(parts, own)
        return torch.cat(parts)[: self.shape.numel()].view(self.shape)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The same part of another tensor of this shape."""
        size = self.part.numel()
        own = whole.flatten()[processes.index() * size : (processes.index() + 1) * size]
        padded = torch.zeros_like(self.part)
        padded[: len(own)].copy_(own)
        return padded

    def copy_(self, whole: torch.Tensor) -> Part:
        """Take over this part of a whole tensor."""
        self.part.copy_(self.cut(whole))
        return self


def held(tensor: Any) -> Any:
    """A tensor, or the `Part` that ZeRO-3 has left of a parameter."""
    return Part(tensor.ds_tensor, tensor.ds_shape) if hasattr(tensor, "ds_tensor") else tensor


class _Moment:
    """Of a parameter; made whole only when it is asked for."""

    def __init__(self, parameter: nn.Parameter, name: str) -> None:
        self.parameter, self.name = parameter, name

    def full_tensor(self) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        found: torch.Tensor = safe_get_full_optimizer_state(self.parameter, self.name)
        return found


class ZeroOptimizer:
    """An AdamW whose parameters DeepSpeed has made flat and cut up: its state by the parameters that it was given.

    All parameters have taken the same number of steps: DeepSpeed takes one that had no gradient for one of zeros.
    """

    def __init__(self, wrapped: Any, groups: list[list[nn.Parameter]]) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        self._given = [p for group in groups for p in group]
        self.parameters = [held(p) for p in self._given]
        zero, self._adam = wrapped.optimizer, wrapped.optimizer.optimizer
        sharded = hasattr(self._given[0], "ds_tensor")
        self._flat: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups
        )
        # As torch does at the first step, which is too late for a state that is resumed; and DeepSpeed 0.19 looks for
        # the moments of all groups after the first one's step.
        for flat in self._flat:
            self._adam.state[flat] = {"step": torch.tensor(0.0)} | {n: torch.zeros_like(flat) for n in MOMENTS}
        if not sharded:
            for group, flat in zip(groups, self._flat, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, self._adam.state)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """With their rates, of flat parameters."""
        found: list[dict[str, Any]] = self._adam.param_groups
        return found

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        """Of the flat parameters of this process."""
        found: dict[torch.Tensor, Any] = self._adam.state
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: DeepSpeed does it after its step."""

    def step(self) -> None:
        """Nothing: DeepSpeed has clipped gradients and taken its step at the end of the last backward pass."""

    def state_dict(self) -> dict[str, Any]:
        """As of a torch optimizer, with moments that become whole by `full_tensor`."""
        step = self._adam.state[self._flat[0]]["step"].clone()
        state = {
            i: {"step": step.clone()} | {name: _Moment(p, name) for name in MOMENTS} for i, p in enumerate(self._given)
        }
        return {"state": state, "param_groups": self.param_groups}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Take over whole moments by parameter; one without any has zeros."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        slots = found["state"]
        step = max((float(s["step"]) for s in slots.values()), default=0.0)
        for flat in self._flat:
            self._adam.state[flat]["step"].fill_(step)
        for index, (given, part) in enumerate(zip(self._given, self.parameters, strict=True)):
            for name in MOMENTS if index in slots else ():
                if isinstance(part, Part):  # the other call of DeepSpeed's does not know of padding
                    safe_set_local_optimizer_state(given, part.cut(slots[index][name]), name)
                else:
                    safe_set_full_optimizer_state(given, slots[index][name].to(given.device), name)
