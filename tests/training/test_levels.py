"""Noise levels of training: the scheduler's shift, the sampler's levels, and what is drawn."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import tiny_flux, tiny_flux2, tiny_transformer

from edgeprune.families import family_of_model
from edgeprune.sampling.schedule import NoiseSchedule, shifted
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.training.levels import LEVELS, SHARE_ON_STEPS, default_levels, draw_levels

TURBO = FlowMatchEulerDiscreteScheduler(shift=3.0)
"""The scheduler of SD3.5 Large Turbo."""
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}
SHAPE = (16, 128, 128)
COUNT = 100_000


def schedule(model: Any, scheduler: Any = TURBO, steps: int = 4) -> NoiseSchedule:
    return NoiseSchedule(FlowMatch.of(scheduler), family_of_model(model), model.config, steps)


def drawn(kind: str, shift: float = 3.0) -> torch.Tensor:
    sampled = schedule(tiny_transformer()).sigmas(SHAPE)[:-1]
    return draw_levels(kind, COUNT, shift, sampled, torch.Generator().manual_seed(0))


def test_levels_of_turbo_are_where_it_is_sampled() -> None:
    """It is sampled at 1.0, 0.858, 0.602 and 0.009: half of its steps are above 0.85."""
    turbo = schedule(tiny_transformer())
    assert turbo.shift(SHAPE) == 3
    assert turbo.sigmas(SHAPE).tolist() == pytest.approx([1.0, 0.8583, 0.6018, 0.0089, 0.0], abs=1e-3)
    levels = drawn("shifted", turbo.shift(SHAPE))
    assert float(levels.median()) == pytest.approx(0.75, abs=0.01)
    assert 0.2 < float((levels > 0.858).float().mean()) < 0.27  # 24 % in theory
    assert float((drawn("shifted", 1.0) > 0.858).float().mean()) < 0.04  # without the shift


def test_a_share_is_exactly_on_the_steps() -> None:
    levels, steps = drawn("steps"), schedule(tiny_transformer()).sigmas(SHAPE)[:-1]
    shares = [float((levels == step).float().mean()) for step in steps]
    assert shares == pytest.approx([SHARE_ON_STEPS / 4] * 4, abs=0.01)
    others = levels[~torch.isin(levels, steps)]
    assert float(others.median()) == pytest.approx(0.75, abs=0.02)


def test_uniform_levels_are_not_shifted() -> None:
    levels = drawn("uniform")
    assert torch.quantile(levels, torch.tensor([0.25, 0.5, 0.75])).tolist() == pytest.approx(
        [0.25, 0.5, 0.75], abs=0.01
    )


def test_all_levels_are_in_range_and_follow_the_generator() -> None:
    for kind in LEVELS:
        levels, again = drawn(kind), drawn(kind)
        assert float(levels.min()) >= 0 and float(levels.max()) <= 1
        assert torch.equal(levels, again)


def test_few_step_models_are_trained_on_their_steps() -> None:
    assert [default_levels(steps) for steps in (1, 4, 8, 9, 28)] == ["steps", "steps", "steps", "shifted", "shifted"]


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_transformer, {"shift": 3.0}),
        (tiny_flux, {"shift": 3.0}),
        (tiny_flux, DYNAMIC),
        (tiny_flux, DYNAMIC | {"time_shift_type": "linear"}),
        (tiny_flux2, DYNAMIC),
    ],
)
@pytest.mark.parametrize("size", [32, 128])
def test_training_shifts_as_the_samplers_do(make: Any, config: dict[str, Any], size: int) -> None:
    """The same function as in diffusers, and as in the runtimes on a device."""
    steps, shape = 20, (16, size, size)
    own = schedule(make(), FlowMatchEulerDiscreteScheduler(**config), steps)
    family, tokens = own.family, size * size // own.family.latents(own.config).patch ** 2
    levels = family.levels(steps)
    even = np.linspace(1, 1 / steps, steps)
    expected = own.scheduler.sigmas(steps, tokens=tokens, levels=even, mu=family.shift(tokens, steps))[:-1]
    found = shifted(torch.tensor(even), own.shift(shape))
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    if levels is not None:
        assert own.sigmas(shape)[:-1].tolist() == pytest.approx(
            shifted(torch.tensor(levels), own.shift(shape)).tolist()
        )


def test_larger_images_are_noisier_with_a_dynamic_shift() -> None:
    own = schedule(tiny_flux(), FlowMatchEulerDiscreteScheduler(**DYNAMIC))
    assert own.shift((16, 32, 32)) < own.shift((16, 128, 128)) == pytest.approx(np.exp(1.15))
