"""Images that are drawn together: what is done once for all of them, and what is in memory for a group at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fakes import SETTINGS, FakeBackend, fake_runtime

from edgeprune.runtimes import base
from edgeprune.runtimes.base import GROUP
from edgeprune.sampling.scheduler import FlowMatch


class Recording(FakeBackend):
    """Notes the texts that are encoded, and the rows that are asked for before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[list[str]] = []
        self.rows: list[int] = []

    def encode(self, prompts: list[str]) -> tuple[base.Array, base.Array]:
        self.encoded.append(prompts)
        return super().encode(prompts)

    def modulate(self, pooled: base.Array, sigma: base.Array, guidance: float) -> bool:
        assert len(pooled) == len(sigma) and guidance == 2.0
        self.rows.append(len(pooled))
        return True


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """One image in a batch, so that a group is GROUP batches."""
    monkeypatch.setattr("edgeprune.sampling.generation.TOKENS_AT_ONCE", 1)
    return Recording()


def drawn(backend: Recording, prompts: Sequence[str], seeds: Sequence[int]) -> list[Any]:
    return [np.asarray(i) for i in base.Runtime(backend, SETTINGS, FlowMatch()).draw(prompts, seeds)]


@pytest.mark.parametrize("count", [GROUP, 3 * GROUP])
def test_a_prompt_is_encoded_once_for_several_seeds(backend: Recording, count: int) -> None:
    images = drawn(backend, ["a star"] * count, range(count))
    assert backend.encoded == [["", "a star"]] and backend.ahead == []
    assert len({image.tobytes() for image in images}) == count


def test_of_many_prompts_those_of_a_group_are_encoded_together(backend: Recording) -> None:
    prompts = [f"{i // 2} stars" for i in range(4 * GROUP)]
    images = drawn(backend, prompts, range(len(prompts)))
    assert backend.ahead == [["", *dict.fromkeys(prompts)]]
    groups = [prompts[start : start + GROUP] for start in range(0, len(prompts), GROUP)]
    assert backend.encoded == [["", *dict.fromkeys(group)] for group in groups]
    alone = [fake_runtime().generate(p, seed=i)[0] for i, p in enumerate(prompts)]
    np.testing.assert_array_equal(images, [np.asarray(image) for image in alone])


def test_modulation_is_computed_once_for_each_group(backend: Recording) -> None:
    """For all of its images, both halves of guidance and all three steps."""
    drawn(backend, [f"{i} stars" for i in range(GROUP + 3)], range(GROUP + 3))
    assert backend.rows == [2 * 3 * GROUP, 2 * 3 * 3]


def test_noise_is_drawn_when_its_images_are(backend: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand images do not wait for all of it."""
    seen, real = list[int](), base.initial_latents

    def counted(settings: base.Settings, seeds: Sequence[int], height: int, width: int) -> base.Array:
        seen.extend(seeds)
        return real(settings, seeds, height, width)

    monkeypatch.setattr(base, "initial_latents", counted)
    model = base.Runtime(backend, SETTINGS, FlowMatch())
    images = model.draw(["a star"] * 1000, range(1000))
    next(images)
    assert seen == list(range(GROUP))
