"""Flow matching's noise levels in numpy, equal to diffusers' FlowMatchEulerDiscreteScheduler to 1e-6. Torch-free.

A sample moves from sigma 1 (noise) to 0 (image) along the predicted velocity, see solvers.py. Karras, exponential and
beta sigmas, inverted sigmas, stochastic sampling and user-given timesteps are not supported; a config that enables one
is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown

_MOST_MU = 30.0
_LARGEST = 10**6
_OFF = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")


@dataclass(frozen=True)
class FlowMatchEuler:
    """The fields of scheduler_config.json that matter here, with diffusers' names and defaults."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    """Shift by image size (`mu`) instead of the constant `shift`."""
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    """Stretch the sigmas so that the last one before 0 has this value."""
    time_shift_type: str = "exponential"

    @classmethod
    def from_config(cls, config: dict[str, Any], *, where: str = "scheduler_config.json") -> FlowMatchEuler:
        """Read a scheduler_config.json.

        Raises:
            InputError: it names another scheduler class, or sets an unsupported field or an impossible value.
        """
        class_name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if class_name != "FlowMatchEulerDiscreteScheduler":
            raise InputError(
                f"{where}: _class_name: found {shown(class_name)}, expected 'FlowMatchEulerDiscreteScheduler': other "
                "samplers are not supported; put the model's own scheduler there"
            )
        supported = {f.name for f in fields(cls)}
        for field, value in config.items():
            # A field of a later diffusers is harmless while it is off.
            if field in _OFF or (field not in supported and not field.startswith("_")):
                if value not in (None, False):
                    raise InputError(
                        f"{where}: {shown(field)}: found {shown(value)}, expected it off: it is not supported"
                    )
            elif field in supported and not _valid(field, value):
                raise InputError(f"{where}: {field}: found {shown(value)}, expected {_EXPECTED.get(field, 'a number')}")
        made = cls(**{k: v for k, v in config.items() if k in supported})
        if made.base_image_seq_len == made.max_image_seq_len:
            raise InputError(
                f"{where}: max_image_seq_len: found {made.max_image_seq_len}, the same as base_image_seq_len"
            )
        return made

    def mu(self, tokens: int) -> float:
        """Return the dynamic shift for an image of `tokens` tokens, linear in their number."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + self.base_shift - slope * self.base_image_seq_len

    def sigmas(
        self,
        steps: int,
        *,
        tokens: int = 0,
        levels: NDArray[np.float64] | None = None,
        mu: float | None = None,
    ) -> NDArray[np.float32]:
        """Return the noise level before each step, then 0: (steps + 1,), decreasing.

        Args:
            steps: denoising steps.
            tokens: image tokens; used only by dynamic shifting.
            levels: unshifted noise levels (steps,) that the pipeline sets; None for the scheduler's own.
            mu: dynamic shift that the pipeline sets; None for the scheduler's own.

        Raises:
            InputError: there is one step, which cannot both start at 1 and end at `shift_terminal`, or the shift is
                out of range.
        """
        if self.shift_terminal and steps < 2:
            raise InputError(f"steps: found {steps}, expected at least 2 with shift_terminal {self.shift_terminal}")
        n = self.num_train_timesteps
        lowest, highest = np.float32(1) / np.float32(n), 1.0
        if not self.use_dynamic_shifting:
            # diffusers shifts its training sigmas once here and the picked ones again below; so does this.
            lowest = np.float32(self.shift) * lowest / (1 + np.float32(self.shift - 1) * lowest)
        picked = np.linspace(highest * n, float(lowest) * n, steps) / n if levels is None else levels
        if not self.use_dynamic_shifting:
            picked = self.shift * picked / (1 + (self.shift - 1) * picked)
        else:
            mu = self.mu(tokens) if mu is None else mu
            if not (0 if self.time_shift_type == "linear" else -_MOST_MU) < mu < _MOST_MU:
                raise InputError(
                    f"scheduler_config.json: base_shift, max_shift: found a shift of {mu:g} for this size, out of range"
                )
            level = math.exp(mu) if self.time_shift_type == "exponential" else mu
            picked = level / (level + (1 / picked - 1))
        if self.shift_terminal:
            rest = 1 - picked
            if not rest[-1] > 0:
                raise InputError(f"scheduler_config.json: shift_terminal: found {self.shift_terminal}, expected null")
            picked = 1 - rest * (1 - self.shift_terminal) / rest[-1]
        return np.append(picked, 0.0).astype(np.float32)


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
