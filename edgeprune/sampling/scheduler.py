"""The noise levels of flow matching in numpy, equal to diffusers' schedulers to 1e-6. Torch-free.

A sample moves from sigma 1 (noise) to 0 (image) along the predicted velocity, see solvers.py. scheduler_classes.py says
which schedulers of diffusers are supported.

diffusers' multistep schedulers show the transformer whole timesteps, such as 873 for a level of 0.8739. Here it sees
the level itself, as with flow matching's own schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.common.files import read_json
from edgeprune.sampling.scheduler_classes import (
    CLASSES,
    EULER_CLASS,
    REMEDIES,
    SPACINGS,
    UNIPC_CLASS,
    Levels,
)

_MOST_MU = 30.0
_LARGEST = 10**6
_MOST = 1 - 1e-6
"""UniPC's highest level: the signal-to-noise ratio at 1 has no logarithm."""


@dataclass(frozen=True)
class FlowMatch:
    """The fields of scheduler_config.json that matter here, with diffusers' names and defaults."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    """`flow_shift` of multistep schedulers."""
    use_dynamic_shifting: bool = False
    """Shift by image size (`mu`) instead of the constant `shift`."""
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    """Stretch the sigmas so that the last one before 0 has this value."""
    time_shift_type: str = "exponential"
    spacing: str | None = None
    """One of SPACINGS; None leaves the levels as they are shifted."""
    kind: str = EULER_CLASS
    """One of CLASSES."""

    @classmethod
    def load(cls, folder: Path) -> FlowMatch:
        """Read the scheduler of a pipeline's folder.

        Raises:
            InputError: see `from_config`.
        """
        path = folder / "scheduler" / "scheduler_config.json"
        return cls.from_config(read_json(path), where=str(path))

    @classmethod
    def of(cls, scheduler: Any) -> FlowMatch:
        """Return what a scheduler of diffusers does.

        Raises:
            InputError: see `from_config`.
        """
        return cls.from_config({**scheduler.config, "_class_name": type(scheduler).__name__})

    @classmethod
    def from_config(cls, config: dict[str, Any], *, where: str = "scheduler_config.json") -> FlowMatch:
        """Read a scheduler_config.json.

        Raises:
            InputError: it names another scheduler class, or sets an unsupported field or an impossible value.
        """
        kind = config.get("_class_name", EULER_CLASS)
        if not isinstance(kind, str) or kind not in CLASSES:
            remedy = REMEDIES.get(str(kind), "other samplers are not supported; put the model's own scheduler there")
            raise InputError(
                f"{where}: _class_name: found {shown(kind)}, expected one of {', '.join(CLASSES)}: {remedy}"
            )
        known = CLASSES[kind]
        for name, (default, *supported) in known.only.items():
            value = config.get(name, default)
            if not any(value is one or (type(value) is type(one) and value == one) for one in supported):
                raise InputError(
                    f"{where}: {name}: found {shown(value)}, expected {shown(supported[0])}: {kind} is supported with "
                    "that alone"
                )
        own = {one.name for one in fields(cls)} - {"spacing", "kind"}
        values = {name: value for name, value in config.items() if name in own and name not in known.unused}
        if known.shift != "shift":
            values |= {"shift": config[known.shift]} if known.shift in config else {}
        for name, value in config.items():
            # A field of a later diffusers is harmless while it is off.
            taken = name in own or name in known.only or name in known.unused or name in (known.shift, *SPACINGS)
            if not (taken or name.startswith("_") or value in (None, False)):
                raise InputError(f"{where}: {shown(name)}: found {shown(value)}, expected it off: it is not supported")
        for name, value in values.items():
            if not _valid(name, value):
                said = known.shift if name == "shift" else name
                raise InputError(f"{where}: {said}: found {shown(value)}, expected {_EXPECTED.get(name, 'a number')}")
        made = cls(**values, spacing=_spacing(config, where), kind=kind)
        if made.base_image_seq_len == made.max_image_seq_len:
            raise InputError(
                f"{where}: max_image_seq_len: found {made.max_image_seq_len}, the same as base_image_seq_len"
            )
        return made

    def mu(self, tokens: int) -> float:
        """Return the dynamic shift for an image of `tokens` tokens, linear in their number."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + self.base_shift - slope * self.base_image_seq_len

    def shifted_by(self, tokens: int, mu: float | None = None) -> float:
        """Return the number s by which levels are shifted: s sigma / (1 + (s - 1) sigma).

        Args:
            tokens: image tokens; used only by dynamic shifting.
            mu: dynamic shift that the pipeline sets; None for the scheduler's own.

        Raises:
            InputError: the shift is out of range.
        """
        if not self.use_dynamic_shifting:
            return self.shift
        mu = self.mu(tokens) if mu is None else mu
        if not (0 if self.time_shift_type == "linear" else -_MOST_MU) < mu < _MOST_MU:
            raise InputError(
                f"scheduler_config.json: base_shift, max_shift: found a shift of {mu:g} for this size, out of range"
            )
        return math.exp(mu) if self.time_shift_type == "exponential" else mu

    def sigmas(
        self, steps: int, *, tokens: int = 0, levels: Levels | None = None, mu: float | None = None
    ) -> NDArray[np.float32]:
        """Return the noise level before each step, then 0: (steps + 1,), decreasing.

        Args:
            steps: denoising steps.
            tokens: image tokens; used only by dynamic shifting.
            levels: unshifted noise levels (steps,) that the pipeline sets, where it may; None for the scheduler's own.
            mu: dynamic shift that the pipeline sets; None for the scheduler's own.

        Raises:
            InputError: there is one step, which cannot both start at 1 and end at `shift_terminal`, or the shift is
                out of range.
        """
        if self.shift_terminal and steps < 2:
            raise InputError(f"steps: found {steps}, expected at least 2 with shift_terminal {self.shift_terminal}")
        shift = self.shifted_by(tokens, mu)
        if own := CLASSES[self.kind].levels:
            picked = own(self.num_train_timesteps, steps)
        else:
            picked = self._even(steps) if levels is None else levels
        picked = shift * picked / (1 + (shift - 1) * picked)
        if self.shift_terminal:
            rest = 1 - picked
            if not rest[-1] > 0:
                raise InputError(f"scheduler_config.json: shift_terminal: found {self.shift_terminal}, expected null")
            picked = 1 - rest * (1 - self.shift_terminal) / rest[-1]
        if self.spacing:
            picked = SPACINGS[self.spacing](float(picked[0]), float(picked[-1]), steps)
        if self.kind == UNIPC_CLASS:
            picked = np.minimum(picked, _MOST)
        return np.append(picked, 0.0).astype(np.float32)

    def _even(self, steps: int) -> Levels:
        """Return even levels from 1 to the lowest of training."""
        n = self.num_train_timesteps
        lowest = np.float32(1) / np.float32(n)
        if not self.use_dynamic_shifting:
            # diffusers shifts its training sigmas once here and the picked ones again below; so does this.
            lowest = np.float32(self.shift) * lowest / (1 + np.float32(self.shift - 1) * lowest)
        return np.linspace(1.0 * n, float(lowest) * n, steps) / n


def _spacing(config: Mapping[str, Any], where: str) -> str | None:
    on = []
    for name in SPACINGS:
        if config.get(name) not in (None, False, True):
            raise InputError(f"{where}: {name}: found {shown(config[name])}, expected true or false")
        on += [name] if config.get(name) else []
    if len(on) > 1:
        raise InputError(f"{where}: {on[1]}: found true, expected false, because {on[0]} is true")
    return on[0] if on else None


_EXPECTED = {
    "num_train_timesteps": "an integer above 0",
    "use_dynamic_shifting": "true or false",
    "time_shift_type": "'exponential' or 'linear'",
    "shift_terminal": "null or a number between 0 and 1",
}


def _valid(field: str, value: object) -> bool:
    """Return whether a config field has a usable value."""
    if field == "use_dynamic_shifting":
        return isinstance(value, bool)
    if field == "time_shift_type":
        return value in ("exponential", "linear")
    if field == "shift_terminal" and value is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if field == "num_train_timesteps":
        return isinstance(value, int) and 0 < value <= _LARGEST
    if field == "shift":
        return 1e-3 <= value <= _LARGEST
    return 0 <= value < 1 if field == "shift_terminal" else abs(value) <= _LARGEST
