"""FlowMatch gives the values of diffusers' scheduler, and refuses unsupported configs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeprune.common.errors import InputError
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.sampling.scheduler_classes import solver_of
from edgeprune.sampling.solvers import SOLVERS, Step, euler, visited

CONFIGS: list[dict[str, Any]] = [
    {},
    {"shift": 3.0},
    {"shift": 1.7, "num_train_timesteps": 500},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0, "max_image_seq_len": 1024},
    {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    {"shift": 3.0, "shift_terminal": 0.1},
    {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    {"shift": 3.0, "use_karras_sigmas": True},
    {"use_dynamic_shifting": True, "use_exponential_sigmas": True},
    {"shift": 3.0, "use_beta_sigmas": True, "shift_terminal": 0.1},
]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("DPMSolverMultistepScheduler", FLOW),
    ("DPMSolverMultistepScheduler", FLOW | {"flow_shift": 3.0, "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", FLOW | {"solver_order": 1, "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", FLOW | {"use_dynamic_shifting": True}),
    ("DPMSolverSinglestepScheduler", FLOW | {"flow_shift": 3.0, "lower_order_final": True}),
    ("UniPCMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0, "num_train_timesteps": 500}),
    ("UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0, "shift_terminal": 0.1}),
    ("UniPCMultistepScheduler", FLOW | {"use_dynamic_shifting": True}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("steps", [2, 4, 20, 50])
def test_sigmas_and_steps_equal_diffusers(config: dict[str, Any], steps: int) -> None:
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = FlowMatch.from_config(dict(theirs.config))
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


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize(("kind", "config"), OTHERS, ids=str)
@pytest.mark.parametrize("steps", [4, 19])
def test_other_schedulers_take_the_same_way(kind: str, config: dict[str, Any], steps: int) -> None:
    torch = pytest.importorskip("torch")
    theirs = getattr(pytest.importorskip("diffusers"), kind)(**config)
    ours = FlowMatch.of(theirs)
    mu = {"mu": ours.mu(900)} if config.get("use_dynamic_shifting") else {}
    theirs.set_timesteps(steps, **mu)
    solver = solver_of({"_class_name": kind} | config)
    sigmas = ours.sigmas(steps, tokens=900, levels=None)
    sigmas = sigmas[visited(solver, sigmas.tolist())]
    np.testing.assert_allclose(sigmas, theirs.sigmas.numpy(), rtol=0, atol=1e-6)

    def velocity(x: Any, sigma: float) -> Any:
        return torch.sin(3 * x) + (1 - sigma) * 0.7 * x - sigma

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine, past = x, ()
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(velocity(x, sigmas[i]), t, x, return_dict=False)[0]
        mine, past = SOLVERS[solver](Step(sigmas, i, mine, velocity(mine, sigmas[i]), past))
        np.testing.assert_allclose(mine, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": False}),
        ("DPMSolverMultistepScheduler", {"flow_shift": "3"}),
        ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"prediction_type": "epsilon"}),
        ("UniPCMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}),
        ("UniPCMultistepScheduler", {"lower_order_final": False}),
        ("FlowMatchHeunDiscreteScheduler", {"use_dynamic_shifting": True}),
    ],
    ids=str,
)
def test_what_our_solvers_lack_is_refused_by_name(kind: str, changed: dict[str, Any]) -> None:
    config = {"_class_name": kind, "shift": 3.0, "invert_sigmas": False} | (FLOW if "Flow" not in kind else {})
    assert FlowMatch.from_config(config).kind == kind
    with pytest.raises(InputError, match=f"^x: {next(iter(changed))}: found .*, expected "):
        FlowMatch.from_config(config | changed, where="x")


def test_refused_classes_say_what_to_put_there() -> None:
    for kind, instead in (
        ("FlowMatchLCMScheduler", "noise at every step; put FlowMatchEulerDiscreteScheduler"),
        ("DDIMScheduler", "put the model's own scheduler there"),
    ):
        with pytest.raises(InputError, match=f"_class_name: found '{kind}', expected one of .*: .*{instead}"):
            FlowMatch.from_config({"_class_name": kind})


def test_only_one_spacing_at_a_time() -> None:
    with pytest.raises(InputError, match="use_beta_sigmas: found true, expected false, because use_karras"):
        FlowMatch.from_config({"use_karras_sigmas": True, "use_beta_sigmas": True})


def test_one_step() -> None:
    np.testing.assert_array_equal(FlowMatch().sigmas(1), np.float32([1, 0]))
    with pytest.raises(InputError, match="shift_terminal"):
        FlowMatch(shift_terminal=0.1).sigmas(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_karras_sigmas", 1.5),
        ("use_exponential_sigmas", "on"),
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
        FlowMatch.from_config({field: value})


def test_a_later_option_that_is_off_is_harmless() -> None:
    config = {"a_later_option": False, "_diffusers_version": "9", "use_beta_sigmas": None}
    assert FlowMatch.from_config(config) == FlowMatch()
