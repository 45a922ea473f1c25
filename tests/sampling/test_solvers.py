"""Solvers: equal to diffusers' own, of the order that they claim, the same in numpy and torch and after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from fakes import FakeBackend, fake_runtime

from edgeprune.cli.options import noise_levels
from edgeprune.common.errors import InputError
from edgeprune.residency.spill import Spill
from edgeprune.runtimes import load
from edgeprune.sampling import denoising
from edgeprune.sampling.generation import Generation, GenerationOptions, heed
from edgeprune.sampling.solvers import SOLVERS, Step, visited


def field(x: Any, sigma: float) -> Any:
    """A velocity that bends."""
    return torch.sin(3 * x) + (1 - sigma) * 0.7 * x - sigma


def solved(name: str, levels: list[float], x: Any) -> Any:
    past: tuple[Any, ...] = ()
    levels = [levels[i] for i in visited(name, levels)]
    for index in range(len(levels) - 1):
        x, past = SOLVERS[name](Step(levels, index, x, field(x, levels[index]), past))
    return x


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize("first", [1.0, 0.97])
@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [("dpmpp_2m", DPMSolverMultistepScheduler, {"euler_at_final": False}), ("unipc", UniPCMultistepScheduler, {})],
)
def test_it_is_the_solver_of_diffusers(name: str, kind: Any, options: dict[str, Any], first: float) -> None:
    even = np.linspace(first, 0.05, 9)
    levels = [*(3 * even / (1 + 2 * even)).tolist(), 0.0]
    theirs = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, **options)
    theirs.set_timesteps(9)
    theirs.sigmas = torch.tensor([min(level, 1 - 1e-6) for level in levels], dtype=torch.float64)
    x = noise()
    for level, timestep in zip(levels[:-1], theirs.timesteps, strict=True):
        x = theirs.step(field(x, level), timestep, x).prev_sample
    torch.testing.assert_close(solved(name, levels, noise()), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("heun", 2), ("ab2", 2), ("dpmpp_2m", 2), ("dpmpp_2s", 2), ("unipc", 3)]
)
def test_half_the_step_divides_the_error_by_two_to_the_order(name: str, order: int) -> None:
    def levels(steps: int) -> list[float]:
        return [float(level) for level in np.linspace(0.9, 0.1, steps + 1)]

    exact = solved("ab2", levels(5000), noise())
    errors = [(solved(name, levels(steps), noise()) - exact).abs().max() for steps in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("name", SOLVERS)
def test_numpy_and_torch_take_the_same_steps(name: str) -> None:
    levels = [1.0, 0.8, 0.5, 0.2, 0.0]
    start, rest = noise().float(), torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found: list[Any] = []
    for velocities, x in ((rest, start), (rest.numpy(), start.numpy())):
        past: tuple[Any, ...] = ()
        for index in range(4):
            x, past = SOLVERS[name](Step(levels, index, x, velocities[index], past))
        found.append(x)
    assert found[1].dtype == np.float32
    np.testing.assert_allclose(found[0].numpy(), found[1], rtol=0, atol=1e-6)


GENERATION = Generation(5, 3.0, 64, 64, 0, "unipc", (0.6, 1.0))


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.tiny_pipeline(tmp_path_factory.mktemp("solvers") / "pipeline")


def test_a_killed_run_goes_on_with_what_the_solver_knew(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = denoising.generate(pipe, ["two stars"], [0], GENERATION)
    spill, count = Spill(), [0]
    evaluate = denoising.evaluate

    def dies(*args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(denoising, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        denoising.generate(pipe, ["two stars"], [0], GENERATION, spill=spill)
    again = denoising.generate(pipe, ["two stars"], [0], GENERATION, spill=spill)
    np.testing.assert_array_equal(again, whole)
    assert count == [4 + 2]


def test_torch_and_the_runtimes_draw_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    pipe = tiny.tiny_pipeline(folder)
    GENERATION.save(folder)
    with load(folder, "eager") as model:
        assert model.settings.generation == GENERATION
        (image,) = model.generate("two stars", seed=3)
        (plain,) = model.generate("two stars", seed=3, solver="euler", guidance_range=(0.0, 1.0))
    drawn = denoising.generate(pipe, ["two stars"], [3], GENERATION)[0]
    assert np.abs(np.asarray(image).astype(int) - drawn).max() <= 1
    assert np.abs(np.asarray(plain).astype(int) - drawn).max() > 1


def test_guidance_outside_of_its_range_takes_one_evaluation() -> None:
    model = fake_runtime()
    model.generate("x", steps=4, guidance_range=(0.6, 1.0))
    assert isinstance(model.backend, FakeBackend)
    sigmas = model.scheduler.sigmas(4)[:-1]
    assert model.backend.batches == [2 if sigma >= 0.6 else 1 for sigma in sigmas] and {1, 2} <= {
        *model.backend.batches
    }


def test_settings_are_kept_and_older_folders_read(tmp_path: Path) -> None:
    Generation().save(tmp_path)
    path = tmp_path / "generation.json"
    assert json.loads(path.read_text(encoding="utf-8"))["solver"] == "euler" and "solver" not in Generation().to_json()
    GENERATION.save(tmp_path)
    assert Generation.checked(json.loads(path.read_text(encoding="utf-8")), "x") == GENERATION


@pytest.mark.parametrize(
    ("name", "value"),
    [("solver", "rk4"), ("solver", 3), ("solver", ["unipc"]), ("guidance_range", [1, 0]), ("guidance_range", [0, 2]),
     ("guidance_range", "0:1"), ("guidance_range", [0, True])],
)  # fmt: skip
def test_what_is_no_setting_is_refused(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"x: {name}: found .* expected "):
        Generation.checked({name: value}, "x")


def test_the_option_reads_noise_levels() -> None:
    assert noise_levels("0.5") == (0.5, 1.0) and noise_levels("0.2:0.8") == (0.2, 0.8) and noise_levels(None) is None
    for text in ("1", "0.5:0.4", "a", "0:2", ""):
        with pytest.raises(InputError, match="--guidance-range: found"):
            noise_levels(text)
    assert GenerationOptions(guidance_range=(0.2, 0.8)).given() == {"guidance_range": (0.2, 0.8)}


def test_a_folder_draws_with_the_solver_of_its_scheduler(tmp_path: Path) -> None:
    """As diffusers' own pipeline, whose second evaluation of a level follows Heun's first."""
    folder = tmp_path / "pipeline"
    pipe = tiny.tiny_pipeline(folder)
    replace(GENERATION, solver="euler", guidance_range=(0.0, 1.0)).save(folder)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("MatchEuler", "MatchHeun"))
    assert Generation.load(folder).solver == "euler"  # the file says so
    (folder / "generation.json").unlink()
    own = replace(Generation.load(folder), num_inference_steps=5, guidance_scale=3.0, height=64, width=64)
    assert own.solver == "heun"
    with load(folder, "eager") as model:
        latents = model.generate_latents("two stars", seed=3, steps=5, guidance_scale=3.0, height=64, width=64)
    start = denoising.noise([3], denoising.latent_shape(pipe, own))
    theirs = pipe(
        "two stars", latents=start, num_inference_steps=5, guidance_scale=3.0, height=64, width=64, output_type="latent"
    ).images
    np.testing.assert_allclose(latents, theirs.numpy(), rtol=0, atol=1e-4)
    drawn = denoising.generate(pipe, ["two stars"], [3], own)
    assert np.abs(drawn.astype(int) - denoising.decode(pipe, theirs)).max() <= 1


@pytest.mark.parametrize("name", SOLVERS)
def test_levels_that_coincide_are_a_step_of_first_order(name: str) -> None:
    found = solved(name, [1.0, 1 - 1e-7, 0.5, 0.5, 0.5, 0.2, 0.0], noise())
    assert found.isfinite().all()
    assert (found - solved(name, [1.0, 0.5, 0.2, 0.0], noise())).abs().max() < 1


def test_a_range_of_guidance_that_does_not_act_is_said(tmp_path: Path) -> None:
    tiny.tiny_pipeline(tmp_path / "pipeline")
    asked = {"guidance_range": (0.5, 1.0)}
    assert heed(tmp_path / "pipeline", asked) == asked  # guided
    with pytest.warns(UserWarning, match="guidance range: ignored"):
        heed(tmp_path / "pipeline", asked | {"guidance_scale": 1.0})
