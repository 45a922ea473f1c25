"""FlowMatchEuler gives the values of diffusers' scheduler, and refuses unsupported configs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeprune.common.errors import InputError
from edgeprune.sampling.scheduler import FlowMatchEuler
from edgeprune.sampling.solvers import Step, euler

CONFIGS: list[dict[str, Any]] = [
    {},
    {"shift": 3.0},
    {"shift": 1.7, "num_train_timesteps": 500},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 1024},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"shift": 3.0, "shift_terminal": 0.1},
    {"use_dynamic_shifting": True, "shift_terminal": 0.02},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("steps", [2, 4, 20, 50])
def test_sigmas_and_steps_equal_diffusers(config: dict[str, Any], steps: int) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = FlowMatchEuler.from_config(dict(theirs.config))
    tokens = 900
    mu = None
    if config.get("use_dynamic_shifting"):
        c = theirs.config
        mu = calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
        assert ours.mu(tokens) == pytest.approx(mu, abs=1e-12)
    theirs.set_timesteps(steps, mu=mu)
    sigmas = ours.sigmas(steps, tokens=tokens)
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, theirs.sigmas.numpy(), rtol=0, atol=1e-6)

    rng = np.random.default_rng(0)
    mine = rng.standard_normal((2, 3, 4, 4), dtype=np.float32)
    sample = torch.from_numpy(mine.copy())
    for i, t in enumerate(theirs.timesteps):
        velocity = rng.standard_normal(mine.shape, dtype=np.float32)
        sample = theirs.step(torch.from_numpy(velocity), t, sample, return_dict=False)[0]
        mine, _ = euler(Step(sigmas, i, mine, velocity, ()))
    np.testing.assert_allclose(mine, sample.numpy(), rtol=0, atol=5e-6)  # values of size 4 after up to 50 sums


def test_one_step() -> None:
    np.testing.assert_array_equal(FlowMatchEuler().sigmas(1), np.float32([1, 0]))
    with pytest.raises(InputError, match="shift_terminal"):
        FlowMatchEuler(shift_terminal=0.1).sigmas(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_karras_sigmas", True),
        ("use_exponential_sigmas", True),
        ("use_beta_sigmas", True),
        ("invert_sigmas", True),
        ("stochastic_sampling", True),
        ("a_later_option", "on"),
        ("shift", "3"),
        ("num_train_timesteps", 0),
        ("time_shift_type", "cubic"),
        ("shift_terminal", 1.5),
        ("use_dynamic_shifting", 1),
        ("_class_name", "DDIMScheduler"),
    ],
)
def test_refuses_by_name(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        FlowMatchEuler.from_config({field: value})


def test_a_later_option_that_is_off_is_harmless() -> None:
    config = {"a_later_option": False, "_diffusers_version": "9", "use_beta_sigmas": None}
    assert FlowMatchEuler.from_config(config) == FlowMatchEuler()
