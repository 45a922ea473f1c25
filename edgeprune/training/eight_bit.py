"""AdamW whose two moments take a byte a parameter each, by bitsandbytes, which needs no compiler and runs on CPUs too.

The state is saved as the codes and scales that it is, so a resumed run goes on to the same bytes.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from edgeprune.common.extras import needs

BLOCK = 256
"""Numbers that share a scale."""
LEAST = 4096
"""Weights of fewer numbers keep their moments in float32."""
_TABLES = {"qmap1", "qmap2"}
"""What each code of a moment stands for: the library's constants, 2 kB that all weights share."""


def moments_bytes(parameters: list[torch.nn.Parameter]) -> int:
    """Return the bytes of both moments of these parameters."""
    small = sum(8 * p.numel() for p in parameters if p.numel() < LEAST)
    large = [p.numel() for p in parameters if p.numel() >= LEAST]
    return small + sum(2 * count + 8 * -(-count // BLOCK) for count in large)


def adamw(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Return the optimizer, as torch's own is made; its `state_dict` holds plain tensors.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    with needs("adamw8bit"):
        base: Any = importlib.import_module("bitsandbytes.optim").AdamW8bit

    class Plain(base):  # type: ignore[misc]
        def state_dict(self) -> dict[str, Any]:
            """Return the state of each parameter by index, without the library's tables of codes."""
            found: dict[str, Any] = torch.optim.Optimizer.state_dict(self)
            slots = found["state"].items()
            return found | {"state": {i: {n: v for n, v in s.items() if n not in _TABLES} for i, s in slots}}

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            """Copy a state into fresh slots, so that nothing of another shape reaches the library's kernels.

            Raises:
                ValueError: the state is of other parameters.
            """
            for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
                group.update({name: value for name, value in saved.items() if name != "params"})
            places = [
                (group, p, at, i) for at, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])
            ]
            for index, slots in state_dict["state"].items():
                group, parameter, at, i = places[index]
                self.init_state(group, parameter, at, i)
                fresh = self.state[parameter]
                if slots.keys() != fresh.keys() - _TABLES:
                    raise ValueError(f"optimizer/{index}: found {sorted(slots)}, expected {sorted(fresh)}")
                for name, value in slots.items():
                    if name == "step":
                        fresh[name] = int(value)
                    elif (value.shape, value.dtype) != (fresh[name].shape, fresh[name].dtype):
                        found, wanted = ((tuple(t.shape), t.dtype) for t in (value, fresh[name]))
                        raise ValueError(f"optimizer/{index}/{name}: found {found}, expected {wanted}")
                    else:
                        fresh[name] = value.to(parameter.device, copy=True)

    optimizer: torch.optim.Optimizer = Plain(groups, **options, min_8bit_size=LEAST)
    return optimizer
