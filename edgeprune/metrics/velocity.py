"""The relative velocity error against the unmodified model along its own trajectory; needs no images or other models.

For each prompt, the unmodified model's states x_t and conditional velocities v_T are stored. The score is
-||v - v_T|| / ||v_T|| over these states, so the unmodified model scores 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from edgeprune.common.progress import Progress, Steps, silent
from edgeprune.common.splits import Split
from edgeprune.residency.spill import Spill
from edgeprune.sampling.denoising import (
    Conditioning,
    Start,
    VelocityInputs,
    at_once,
    batches_of,
    denoise_all,
    encode_with_empty,
    evaluate,
    evaluate_all,
    groups,
    latent_shape,
    model_inputs,
    noise,
    passes_of,
    sigmas,
)
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.solvers import visited

STATES = 6
"""The number of states per trajectory: the sampler runs with at most this many steps."""


class VelocityError:
    """The velocity metric of a pipeline; see the module's docstring."""

    name = "velocity"

    @torch.no_grad()
    def __init__(
        self,
        pipe: Any,
        generation: Generation,
        prompts: list[str],
        *,
        split: Split,
        compares: bool = True,
        spill: Spill | None = None,
        progress: Progress = silent,
    ) -> None:
        """Sample the trajectories of the pipeline's transformer, which must be the unmodified one.

        Args:
            compares: also measure its velocities, which `score` compares with.
            spill: keeps the states, so that a run after a kill goes on with them; None keeps them in memory.
            progress: called after each step of the sampler.
        """
        self.pipe, self.count, self.progress = pipe, len(prompts), progress
        self.spill = spill or Spill()
        """What estimators keep of the states goes there, too."""
        generation = replace(generation, num_inference_steps=min(STATES, generation.num_inference_steps))
        condition, self.empty = encode_with_empty(pipe, prompts, generation.max_sequence_length)
        shape = latent_shape(pipe, generation)
        self.batch = at_once(pipe.transformer, shape)
        levels = sigmas(pipe, generation, shape)
        passes = passes_of(pipe.transformer, generation)
        batches, states = batches_of(self.count, self.batch), []
        step = Steps("trajectories", len(batches) * (len(levels) - 2), progress)
        for group in groups(pipe, batches, shape, condition.hidden.shape[1], passes=passes):
            starts = []
            for rows in group:
                x = noise(split.seeds(rows.stop - rows.start, rows.start), shape).to(condition.hidden)
                starts.append(Start(x, condition[rows], f"trajectory.{rows.start}"))
            # Nothing reads the clean latents: the sampler's last step is not run.
            path = denoise_all(pipe.transformer, starts, levels[:-1], self.empty, generation, spill=spill, step=step)
            states.append(torch.stack([torch.cat([one.latents for one in reached]) for reached in path]))
        self.states = torch.cat(states, dim=1).flatten(0, 1)  # (steps * prompts, C, h, w)
        steps = len(levels) - 1
        self.sigmas = levels[:-1].to(self.states).repeat_interleave(self.count)
        self.guidance = generation.guidance_scale
        self._condition, self._prompt_of = condition, torch.arange(self.count).repeat(steps)
        self.reference = self._velocities() if compares else None

    @property
    def condition(self) -> Conditioning:
        """The encoded prompt of each state."""
        return self.condition_of(slice(None))

    def condition_of(self, rows: slice) -> Conditioning:
        """Return the encoded prompts of some states."""
        return self._condition[self._prompt_of[rows]]

    @staticmethod
    def evaluations(generation: Generation, prompts: int) -> int:
        """Return how many samples pass through the transformer for one score: one per state that the solver visits."""
        steps = min(STATES, generation.num_inference_steps)
        return prompts * (len(visited(generation.solver, range(steps + 1))) - 1)

    @staticmethod
    def preparing(generation: Generation, prompts: int, by_step: Callable[[int], list[int]]) -> int:
        """Return how many samples pass through it at creation: those of the trajectory, without the comparison.

        Its last step is not run. `by_step` returns the samples of each step of an image of so many steps.
        """
        return prompts * sum(by_step(min(STATES, generation.num_inference_steps))[:-1])

    def velocity(self, rows: slice) -> torch.Tensor:
        """Return the conditional velocities of the transformer as it is now, at some states (by step, then prompt)."""
        return evaluate(self.pipe.transformer, *self._arguments(rows))

    def inputs(self, rows: slice) -> dict[str, torch.Tensor]:
        """Return the transformer's inputs at some states, by name."""
        return model_inputs(self.pipe.transformer, *self._arguments(rows))

    def _arguments(self, rows: slice) -> VelocityInputs:
        return self.states[rows], self.condition_of(rows), self.sigmas[rows], self.guidance

    def _velocities(self) -> torch.Tensor:
        found, text = [], self._condition.hidden.shape[1]
        for group in groups(self.pipe, batches_of(len(self.states), self.batch), self.states.shape[1:], text):
            found += evaluate_all(self.pipe.transformer, map(self._arguments, group))
        return torch.cat(found)

    def per_prompt(self, squares: torch.Tensor) -> torch.Tensor:
        """Return the norm over all states of each prompt (P,) from the square of each state's norm (S,)."""
        return squares.view(-1, self.count).sum(0).sqrt()

    @torch.no_grad()
    def score(self) -> list[float]:
        """Return minus the relative error per prompt."""
        assert self.reference is not None, "made with compares=False"
        error = self.per_prompt(squares(self._velocities() - self.reference))
        return [0.0 - float(e) for e in error / self.per_prompt(squares(self.reference))]


def squares(values: torch.Tensor) -> torch.Tensor:
    """Return the square of each state's norm (S,)."""
    return values.flatten(1).square().sum(1)
