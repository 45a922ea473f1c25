"""The training state on disk: one safetensors file, written atomically, so that an interrupted run resumes exactly.

Random state is not stored: training loops derive each step's generator from (seed, step), see `step_generator`.
Tensors are stored unsharded, so any number of processes can resume.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import parse_json
from edgeprune.common.tensors import Tensors, save_tensors


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of all randomness of one training step; it is the same after a resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's shard of a tensor, sharing its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a possibly sharded tensor. Collective: every rank must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _sharded(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """Shard a full tensor like another one of its shape."""
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def save_state(path: Path, modules: dict[str, Tensors], optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
    """Write state dicts, the optimizer's moments and JSON `meta` to `path`, atomically.

    Collective: every rank must call it; rank 0 writes.
    """
    named = {f"{name}/{key}": t for name, state in modules.items() for key, t in state.items()}
    for index, slots in optimizer.state_dict()["state"].items():
        named |= {
            f"optimizer/{index}/{key}": t if hasattr(t, "full_tensor") else torch.as_tensor(t)
            for key, t in slots.items()
        }
    tensors = {}
    for name, tensor in named.items():
        full = gathered(tensor)
        if processes.is_main():
            tensors[name] = full
    if processes.is_main():
        save_tensors(path, tensors, {"meta": json.dumps(meta)})


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter, apart from its step count."""
Slots = dict[int, Tensors]
"""An optimizer's state (moments and step count) by the index of the parameter."""


def load_state(path: Path, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Read a state written by `save_state`: return its state dicts by name and its meta, and fill `optimizer` in place.

    Raises:
        InputError: the file is not a training state, or is of other parameters.
    """
    modules, slots, meta = read_state(path)
    fill_optimizer(path, optimizer, slots)
    return modules, meta


def read_state(path: Path) -> tuple[dict[str, Tensors], Slots, dict[str, Any]]:
    """Read a state written by `save_state`: return its state dicts by name, optimizer state and meta.

    Raises:
        InputError: the file is not a training state.
    """
    modules: dict[str, Tensors] = {}
    slots: Slots = {}
    meta = _meta(path)
    try:
        with safe_open(path, framework="pt") as file:
            for full in file.keys():  # noqa: SIM118
                name, _, key = full.partition("/")
                if name == "optimizer":
                    index, _, slot = key.partition("/")
                    slots.setdefault(int(index), {})[slot] = file.get_tensor(full)
                else:
                    modules.setdefault(name, {})[key] = file.get_tensor(full)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a training state ({error}); delete it to start over") from error
    return modules, slots, meta


def steps_done(path: Path, inputs_digest: str) -> int:
    """Return how many steps a state has seen; 0 if there is none of these inputs.

    Raises:
        InputError: the file is not a training state.
    """
    if not path.exists():
        return 0
    meta = _meta(path)
    return int(meta["step"]) if meta.get("inputs") == inputs_digest else 0


def precision_of(path: Path) -> str | None:
    """Return the number format that a state was trained in; None if there is none, or it does not say.

    Raises:
        InputError: the file is not a training state.
    """
    found = _meta(path).get("mixed_precision") if path.exists() else None
    return None if found is None else str(found)


def losses_of(path: Path) -> list[float]:
    """Return the loss of each step that a state has seen.

    Raises:
        InputError: the file is not a training state.
    """
    found: list[float] = _meta(path)["losses"]
    return found


def _meta(path: Path) -> dict[str, Any]:
    """Read what a state says of itself; its tensors are not read."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = parse_json(file.metadata()["meta"])
            if not isinstance(meta, dict):
                raise ValueError("meta is not an object")
            return meta
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a training state ({error}); delete it to start over") from error


def fill_optimizer(path: Path, optimizer: torch.optim.Optimizer, slots: Slots) -> None:
    """Load an optimizer's state that was read from `path`.

    Raises:
        InputError: the state is of other parameters, or of another optimizer.
    """
    # DeepSpeed replaces the parameters in its groups by flat ones.
    parameters = getattr(optimizer, "parameters", [p for group in optimizer.param_groups for p in group["params"]])
    _check_slots(path, slots, parameters)
    placed = {i: {n: _sharded(t, parameters[i]) if t.dim() else t for n, t in s.items()} for i, s in slots.items()}
    try:
        optimizer.load_state_dict({"state": placed, "param_groups": optimizer.state_dict()["param_groups"]})
    except ValueError as error:
        raise InputError(f"{path}: {error}; delete the file to start over") from None


def _check_slots(path: Path, slots: Slots, parameters: list[torch.Tensor]) -> None:
    """Check that moments have their parameter's shape."""
    for index, moments in slots.items():
        if not 0 <= index < len(parameters):
            raise InputError(
                f"{path}: optimizer/{index}: expected an index below {len(parameters)}; delete the file to start over"
            )
        for name, tensor in moments.items():
            if name in MOMENTS and tensor.shape != parameters[index].shape:
                raise InputError(
                    f"{path}: optimizer/{index}/{shown(name)}: found {tuple(tensor.shape)}, expected "
                    f"{tuple(parameters[index].shape)}; delete the file to start over"
                )


class Ema:
    """An exponential moving average of parameters, in float32, updated in place.

    In bf16 it would lose what a step adds, which is less than half of bf16's last digit. Rounding up or down at random
    keeps it on average, but takes ten times as long as the update, and leaves noise of 0.2 to 1.3 % of a weight at a
    decay of 0.99 (docs/distill.md).

    Early steps use the smaller decay (1 + t) / (10 + t), so that the average forgets the initial weights. With a decay
    of 0 the average is the parameters themselves, and takes no memory.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float, *, host: bool = False) -> None:
        self.live, self.decay, self.host = parameters, decay, host and bool(decay)
        if self.host:
            self.average = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
        else:
            self.average = {name: p.detach().clone() if decay else p.detach() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the current weights after optimizer step `step` (from 0)."""
        if not self.decay:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        if self.host:  # a weight at a time, so that the host holds no second copy of all
            for name, average in self.average.items():
                average.lerp_(self.live[name].detach().cpu(), weight)
            return
        live = [local(self.live[name].detach()) for name in self.average]
        torch._foreach_lerp_([local(tensor) for tensor in self.average.values()], live, weight)


@torch.no_grad()
def fill(tensors: Mapping[str, torch.Tensor], state: Tensors) -> None:
    """Copy a saved state into tensors, strictly by name.

    Raises:
        InputError: the state is of another model.
    """
    if state.keys() != tensors.keys():
        raise InputError("training state: its weights belong to another model; delete it to start over")
    for name, tensor in state.items():
        if tensor.shape != tensors[name].shape:
            raise InputError(f"training state: {name}: its weights have another shape; delete it to start over")
        tensors[name].copy_(_sharded(tensor, tensors[name]))
