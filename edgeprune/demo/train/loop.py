"""What every training loop needs: a line of progress, the learning rate, one step of the optimizer."""

from __future__ import annotations

import time

import torch

CHECKPOINT_STEPS = 250
"""An interrupted training loses fewer steps than this."""


class ProgressLine:
    """Prints a line every `every` steps: step, mean loss, speed, time left."""

    def __init__(self, name: str, start: int, total: int, every: int = 50) -> None:
        self.name, self.start, self.total, self.every, self.began = name, start, total, every, time.monotonic()
        self.losses: list[float] = []

    def __call__(self, step: int, loss: float) -> None:
        """Note a step's loss, and print a line when it is due."""
        self.losses.append(loss)
        if step % self.every == 0 or step == self.total:
            speed = (time.monotonic() - self.began) / (step - self.start)
            left = speed * (self.total - step)
            mean = sum(self.losses) / len(self.losses)
            print(
                f"{self.name} {step}/{self.total} loss {mean:.4f} {speed:.3f} s/step {left / 60:.1f} min left",
                flush=True,
            )
            self.losses.clear()


def falling(step: int, total: int, peak: float, *, warmup: int = 100) -> float:
    """Return the learning rate: linear warm-up, constant, then linear to zero over the second half."""
    return peak * min(1.0, (step + 1) / warmup, max(0.0, (total - step) / (0.5 * total)))


def descend(loss: torch.Tensor, module: torch.nn.Module, optimizer: torch.optim.Optimizer, *, rate: float) -> None:
    """Take one optimizer step at this learning rate, with gradients clipped to norm 1."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
