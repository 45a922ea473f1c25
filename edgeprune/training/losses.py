"""The distillation objective: pure functions of tensors.

L = task * L_task + output * MSE(student velocity, teacher velocity) + feature * sum over kept blocks of MSE(features),
with features paired by original block index and stream (HierarchicalPrune, arXiv 2508.04663).

L_task is the mean squared error of the velocity, as BK-SDM's is of what its network predicts. HierarchicalPrune's code
compares clean latents instead, which weighs a sample's velocity error by sigma squared; its own recipe gives the term
no weight, so only baselines use it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

Streams = dict[str, torch.Tensor]
"""Outputs of a block by stream: `image` (B, N, D) and, if the block outputs it, `context` (B, M, D). A block with one
stream for both outputs `image` (B, M + N, D)."""
Features = dict[int, Streams]
"""Streams by the original index of the block."""


@dataclass(frozen=True)
class LossWeights:
    """The weights (lambdas) of the three terms of the objective."""

    task: float = 0.0
    output: float = 1.0
    feature: float = 1e-4


def feature_loss(student: Features, teacher: Features) -> torch.Tensor:
    """Return the sum, over the student's blocks, of the mean squared error of each stream that both models output."""
    terms = [
        F.mse_loss(tensor.float(), teacher[index][stream].float())
        for index, streams in student.items()
        for stream, tensor in streams.items()
        if stream in teacher[index]
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def distillation_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    student_features: Features,
    teacher_features: Features,
    weights: LossWeights,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the weighted sum, and its unweighted terms as numbers.

    Args:
        student, teacher: velocities (B, C, h, w).
        target: the flow-matching velocity, noise minus clean latents (B, C, h, w).
    """
    output = F.mse_loss(student.float(), teacher.float())
    task = F.mse_loss(student.float(), target.float())
    feature = feature_loss(student_features, teacher_features)
    total = weights.output * output
    if weights.task:
        total = total + weights.task * task
    if weights.feature:
        total = total + weights.feature * feature
    return total, {"output": output.item(), "task": task.item(), "feature": feature.item()}
