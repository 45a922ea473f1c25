"""The schedulers of diffusers that are our solvers on our levels, and how levels are spaced. Torch-free.

A config is supported where it asks for nothing else: no noise at every step, no inverted levels, no orders above 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.common import extras
from edgeprune.sampling.solvers import EULER, HEUN

EULER_CLASS = "FlowMatchEulerDiscreteScheduler"
UNIPC_CLASS = "UniPCMultistepScheduler"

Levels = NDArray[np.float64]


def _karras(high: float, low: float, steps: int) -> Levels:
    """Return levels that are even in their seventh root (Karras et al., 2022, https://arxiv.org/abs/2206.00364)."""
    return np.asarray(np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7)


def _exponential(high: float, low: float, steps: int) -> Levels:
    """Return levels that are even in their logarithm."""
    return np.asarray(np.exp(np.linspace(math.log(high), math.log(low), steps)))


def _beta(high: float, low: float, steps: int) -> Levels:
    """Return levels at the quantiles of a beta distribution (Lee et al., 2024, https://arxiv.org/abs/2407.12173)."""
    extras.require(("scipy",), "compress")
    from scipy.stats import beta

    return np.asarray(low + beta.ppf(1 - np.linspace(0, 1, steps), 0.6, 0.6) * (high - low))


SPACINGS: dict[str, Callable[[float, float, int], Levels]] = {
    "use_karras_sigmas": _karras,
    "use_exponential_sigmas": _exponential,
    "use_beta_sigmas": _beta,
}
"""By the field that turns it on: how levels between the highest and the lowest are spaced."""


@dataclass(frozen=True)
class SchedulerClass:
    """A scheduler of diffusers, as far as it is one of our solvers on our levels."""

    solver: str
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """By field: diffusers' default, then the values that are supported; the first of these is told to users."""
    unused: frozenset[str] = frozenset()
    """Fields that do not matter to the levels of flow matching."""
    shift: str = "shift"
    """The field of the constant shift."""
    levels: Callable[[int, int], Levels] | None = None
    """Unshifted levels from the training steps and the steps, which no pipeline replaces; None for flow matching's."""


_OFF = (False, False, None)
_MULTISTEP: dict[str, tuple[object, ...]] = {
    "use_flow_sigmas": (False, True),
    "prediction_type": ("epsilon", "flow_prediction"),
    "final_sigmas_type": ("zero", "zero"),
    "thresholding": _OFF,
    **dict.fromkeys(SPACINGS, _OFF),
    **dict.fromkeys(("invert_sigmas", "stochastic_sampling"), _OFF),
}
_UNUSED = frozenset({
    *("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "timestep_spacing"),
    *("steps_offset", "dynamic_thresholding_ratio", "sample_max_value", "shift"),
})  # fmt: skip
_DPM = _MULTISTEP | {
    "solver_order": (2, 2, 1), "algorithm_type": ("dpmsolver++", "dpmsolver++"), "variance_type": (None, None),
    "solver_type": ("midpoint", "midpoint"), "time_shift_type": ("exponential", "exponential"),
    "use_lu_lambdas": _OFF, "shift_terminal": _OFF,
}  # fmt: skip
_DPM_UNUSED = _UNUSED | {"lower_order_final", "euler_at_final", "lambda_min_clipped"}


def _dpm_levels(training: int, steps: int) -> Levels:
    return np.linspace(1 - 1 / training, 0, steps + 1)[:-1]


CLASSES: dict[str, SchedulerClass] = {
    EULER_CLASS: SchedulerClass(EULER, dict.fromkeys(("invert_sigmas", "stochastic_sampling"), _OFF)),
    "FlowMatchHeunDiscreteScheduler": SchedulerClass(
        HEUN,
        dict.fromkeys(
            ("invert_sigmas", "stochastic_sampling", "use_dynamic_shifting", "shift_terminal", *SPACINGS), _OFF
        ),
        frozenset({"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"}),
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        "dpmpp_2m", _DPM, _DPM_UNUSED, "flow_shift", _dpm_levels
    ),
    "DPMSolverSinglestepScheduler": SchedulerClass("dpmpp_2s", _DPM, _DPM_UNUSED, "flow_shift", _dpm_levels),
    UNIPC_CLASS: SchedulerClass(
        "unipc",
        _MULTISTEP
        | {
            "solver_order": (2, 2), "predict_x0": (True, True), "solver_type": ("bh2", "bh2"),
            "lower_order_final": (True, True), "disable_corrector": ([], []), "solver_p": (None, None),
        },
        _UNUSED | {"sigma_min", "sigma_max"},
        "flow_shift",
        lambda training, steps: np.linspace(1, 1 / training, steps + 1)[:-1],
    ),
}  # fmt: skip
"""By name in diffusers."""
REMEDIES = {
    "FlowMatchLCMScheduler": f"it draws new noise at every step; put {EULER_CLASS} there",
}
"""What to do about classes that are close to these."""


def solver_of(config: Mapping[str, Any]) -> str:
    """Return the solver of a scheduler_config.json; Euler's for one that is refused elsewhere."""
    found = CLASSES.get(str(config.get("_class_name", EULER_CLASS)), CLASSES[EULER_CLASS])
    return EULER if config.get("solver_order") == 1 else found.solver  # of first order all are Euler's
