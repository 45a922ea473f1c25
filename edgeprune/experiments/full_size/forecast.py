"""What a row will take on this machine: its work divided by speeds that are measured now, in a few seconds.

Arithmetic is measured in time of the processor, so a forecast is that of a machine with nothing else to do. It is right
within a factor of about two, which keeps a row that takes hours from starting.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from edgeprune.artefact.synth.drawing import draw
from edgeprune.residency.compute import multiplies_bf16
from edgeprune.stages.work import bytes_moved_per_s, fastest, weights_rounded_per_s

MOST_SECONDS, MOST_BYTES = 45 * 60, 45 * 10**9
"""Limits of one row."""
_START_S = 8.0
"""Of a command: imports, checks and hashes of configs."""


@dataclass(frozen=True)
class Work:
    """What a row does, counted from shapes."""

    commands: int = 1
    drawn: float = 0
    """Random numbers."""
    moved: float = 0
    """Bytes written, or read where they are hashed or compared."""
    rounded: float = 0
    """Weights rounded to INT4."""
    flops: float = 0
    """Operations in float32."""
    given: float = 0
    """Seconds that its commands are told to take."""
    large_flops: float = 0
    """Operations of a large model: in bf16 where the processor multiplies that, else in float32."""


@dataclass(frozen=True)
class Speeds:
    """What this machine does per second, by the names of `Work`."""

    drawn: float
    moved: float
    rounded: float
    flops: float
    large_flops: float

    @classmethod
    def measure(cls, out: Path) -> Speeds:
        """Measure each for about a second; writes and deletes a file of 64 MB in `out`."""
        threads, side = torch.get_num_threads(), 1024
        square = torch.ones(side, side)
        large = square.to(torch.bfloat16 if multiplies_bf16() else torch.float32)
        torch.set_num_threads(1)
        try:
            return cls(
                drawn=4 * side**2 / fastest(lambda: draw("speed.weight", (side, 4 * side)), time.thread_time),
                moved=bytes_moved_per_s(out),
                rounded=weights_rounded_per_s(),
                flops=threads * 2 * side**3 / fastest(lambda: square @ square, time.thread_time),
                large_flops=threads * 2 * side**3 / fastest(lambda: large @ large, time.thread_time),
            )
        finally:
            torch.set_num_threads(threads)


def seconds(work: Work, speeds: Speeds) -> float:
    """Return the forecast of a row."""
    return (
        work.commands * _START_S
        + work.given
        + sum(float(getattr(work, n) / speed) for n, speed in asdict(speeds).items())
    )


def refusal(row: str, expected_s: float, size: int, out: Path) -> str | None:
    """Return why a row is not measured; None if it fits the limits and the disk."""
    if expected_s > MOST_SECONDS:
        return f"{row}: forecast {expected_s / 60:.0f} minutes, at most {MOST_SECONDS // 60}"
    if size > MOST_BYTES:
        return f"{row}: writes {size / 1e9:.1f} GB, at most {MOST_BYTES // 10**9}"
    if (free := shutil.disk_usage(out).free) < size:
        return f"{row}: writes {size / 1e9:.1f} GB, the disk of {out} has {free / 1e9:.1f} GB left"
    return None
