"""A runtime without a vendor, which computes with arithmetic instead of networks; and a worker of bench."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeprune.bench.results import MEASURES
from edgeprune.common.errors import InputError
from edgeprune.families import family_of
from edgeprune.runtimes import base
from edgeprune.runtimes.memory import Meter, Reading
from edgeprune.sampling.generation import Generation, images_at_once
from edgeprune.sampling.scheduler import FlowMatch

CONFIG = {"_class_name": "SD3Transformer2DModel", "in_channels": 4, "patch_size": 2, "pos_embed_max_size": 99}
SETTINGS = base.Settings(Generation(3, 2.0, 32, 16, 0), 8, family_of(CONFIG), CONFIG)


class FakeBackend:
    """The velocity is the latents plus the mean of the text, so every input affects the output."""

    name, provider, why, precision = "fake", "cpu", "the only one it has", "fp32"

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.decoded: list[int] = []
        self.meter = Meter()
        self.batches: list[int] = []
        self.ahead: list[list[str]] = []
        self.closed = False

    def open(self) -> None:
        pass

    def prepare(self, height: int, width: int) -> None:
        pass

    def encode(self, prompts: list[str]) -> tuple[base.Array, base.Array]:
        if self.closed:
            raise InputError("the runtime is closed; load the folder again")
        lengths = np.asarray([len(p) for p in prompts], np.float32)
        return np.tile(lengths[:, None, None], (1, 4, 6)), np.tile(lengths[:, None], (1, 3))

    def encode_ahead(self, prompts: list[str]) -> None:
        self.ahead.append(prompts)

    def modulate(self, pooled: base.Array, sigma: base.Array, guidance: float) -> bool:
        return False

    def step(
        self, latents: base.Array, text: base.Array, pooled: base.Array, sigma: base.Array, guidance: float
    ) -> base.Array:
        self.batches.append(len(latents))
        if self.most is not None and len(latents) > self.most:
            raise InputError(f"found the shape ({len(latents)}, ...), expected at most {self.most}")
        assert len(text) == len(pooled) == len(sigma) == len(latents)
        return latents + text.mean((1, 2))[:, None, None, None] / 100

    def largest_batch(self) -> int | None:
        return self.most

    def images_together(self, height: int, width: int, rows: int) -> int:
        size = images_at_once(height // 16 * (width // 16))
        return size if self.most is None else max(1, min(size, self.most // rows))

    def decode(self, latents: base.Array) -> base.Array:
        self.decoded.append(len(latents))
        return np.tanh(latents[:, :3].repeat(8, axis=2).repeat(8, axis=3))

    def memory(self) -> dict[str, Reading]:
        return self.meter.rows()

    def close(self) -> None:
        self.closed = True


def fake_runtime(most: int | None = None) -> base.Runtime:
    """Open the fake: 3 steps, guidance 2, images 16 wide and 32 high, at most `most` rows in one step."""
    return base.Runtime(FakeBackend(most), SETTINGS, FlowMatch())


def worker_reply(variant: Any, *_: object) -> dict[str, Any]:
    """Stands in for `bench.run._worker`: `compressed` takes 0.4 of everything, at once."""
    values: dict[str, Any] = dict.fromkeys(MEASURES, 40.0 if variant.name == "compressed" else 100.0)
    known = {"runtime": "eager", "provider": "cpu", "provider_why": "the only one here", "memory_of": "process"}
    return values | known | {"precision": "fp32", "steps_s": [1.0] * 5, "images_s": [1.0], "how": {}}
