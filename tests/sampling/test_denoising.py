"""Sampling with torch: bounded batches, and tensors that are on another device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from edgeprune import residency
from edgeprune.artefact.loading import open_transformer
from edgeprune.common.splits import Split
from edgeprune.families import family_of_model
from edgeprune.metrics.velocity import VelocityError
from edgeprune.residency.compute import Compute
from edgeprune.residency.running import running, within
from edgeprune.residency.streaming import PACKED, any_streamed, stream
from edgeprune.sampling.denoising import Conditioning, at_once, decode, encode_images, evaluate, generate
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.together import row_bytes

GENERATION = Generation(2, 3.0, 64, 64, 0)
PROMPTS = ["a red circle", "two stars", "a ring"]


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny.tiny_pipeline(tmp_path / "pipeline")


def batches(module: torch.nn.Module) -> list[int]:
    """Return a list that grows by the number of samples whenever the module runs."""
    seen: list[int] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(("side", "expected"), [(1, 64), (8, 64), (16, 16), (64, 1), (128, 1)])
def test_a_batch_is_bounded_by_its_tokens(side: int, expected: int) -> None:
    assert at_once(tiny.tiny_transformer(), (8, side, side)) == expected


def test_the_vae_gets_one_image_at_a_time(pipe: Any) -> None:
    encoder, decoder = batches(pipe.vae.encoder), batches(pipe.vae.decoder)
    images = generate(pipe, PROMPTS, [0, 1, 2], GENERATION)
    encode_images(pipe, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert images.shape == (3, 64, 64, 3) and decoder == encoder == [1, 1, 1]


def test_large_images_are_sampled_one_by_one(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together = generate(pipe, PROMPTS, [0, 1, 2], GENERATION)
    monkeypatch.setattr("edgeprune.sampling.generation.TOKENS_AT_ONCE", 64)
    seen = batches(pipe.transformer)
    alone = generate(pipe, PROMPTS, [0, 1, 2], GENERATION)
    assert set(seen) == {2}  # guidance
    assert np.abs(alone.astype(int) - together).max() <= 1
    seen.clear()
    VelocityError(pipe, GENERATION, PROMPTS, split=Split.ANALYSIS).score()
    assert set(seen) == {1, 2}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("fits", "expected"), [(6, [6]), (5, [5, 1]), (3, [3, 3]), (1, [1] * 6), (0, [1] * 6)])
def test_rows_run_in_as_many_calls_as_the_memory_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool, fits: int, expected: list[int]
) -> None:
    """Three images with guidance are six rows; with room for three, its halves are two calls."""
    tiny.tiny_pipeline(tmp_path / "tiny")
    stored = open_transformer(tmp_path / "tiny", quantized=False)
    model = running(stored, Compute(memory=10**12 if streamed else None))
    family, draw = family_of_model(model), torch.Generator().manual_seed(0)
    assert any_streamed(family.blocks(model)) is streamed
    rows = [torch.randn(6, *shape, generator=draw) for shape in ((8, 8, 8), (16, 64), (64,))]
    arguments = rows[0], Conditioning(*rows[1:]), torch.full((6,), 0.5), 3.0
    with torch.no_grad():
        whole = evaluate(model, *arguments)
        one, seen, collected = row_bytes(family, model.config, (8, 8, 8), 16, 4), batches(model.pos_embed), []
        reading = residency.running._block_bytes(model)
        monkeypatch.setattr(residency.running, "_LEAST_WORKING_BYTES", 0)
        monkeypatch.setattr(Compute, "left", lambda _: reading + 2 * fits * one)
        monkeypatch.setattr(Compute, "collect", lambda _: collected.append(1))
        found = evaluate(within(model, Compute()), *arguments)
        assert seen == expected and bool(collected) is (fits < 6)
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
        # Of a memory that was given it is a share, whatever is free: the same rows run together in every run.
        seen.clear()
        monkeypatch.setattr(Compute, "left", lambda _: 0)
        monkeypatch.setattr(residency.running, "PROCESS_BYTES", -(10**12))
        again = evaluate(within(model, Compute(memory=6 * fits * one)), *arguments)
    assert seen == expected and torch.equal(again, found)


def test_what_has_to_be_free_anyway_is_not_counted(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(_: Compute) -> int:
        raise AssertionError("small models ask at every step")

    monkeypatch.setattr(Compute, "left", left)
    within(pipe.transformer, Compute())
    assert generate(pipe, PROMPTS, [0, 1, 2], GENERATION).shape == (3, 64, 64, 3)


@pytest.mark.parametrize(("solver", "visits"), [("ab2", 4), ("heun", 7)])
def test_states_are_those_that_the_solver_visits(pipe: Any, solver: str, visits: int) -> None:
    generation = replace(GENERATION, num_inference_steps=4, solver=solver)
    found = VelocityError(pipe, generation, PROMPTS, split=Split.ANALYSIS)
    assert len(found.states) == VelocityError.evaluations(generation, len(PROMPTS)) == visits * len(PROMPTS)


class _OnDevice(torch.Tensor):
    """A tensor that numpy cannot read, as one on a GPU."""

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_decode_takes_latents_of_a_gpu() -> None:
    vae = SimpleNamespace(
        config={"scaling_factor": 2.0, "shift_factor": 0.5},
        dtype=torch.float32,
        decode=lambda z: SimpleNamespace(sample=z.repeat_interleave(8, 2).repeat_interleave(8, 3)),
    )
    latents = torch.tensor([-3.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    images = decode(SimpleNamespace(vae=vae), latents.as_subclass(_OnDevice))
    assert images.shape == (2, 16, 16, 3) and set(images.flatten().tolist()) == {0, 255}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_quantised_model_is_read_block_by_block(kind: str) -> None:
    """Outside its blocks, FLUX.2 then has nothing but packed weights."""
    model = tiny.KINDS[kind]()
    family = family_of_model(model)
    tiny.quantize(family, model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):  # as `running` loads them
        if tensor.is_floating_point() and not name.endswith(PACKED):
            tensor.data = tensor.data.float()
    step = tiny.tiny_step()
    with torch.no_grad():
        expected = evaluate(model, *step)
        weights = dict(model.state_dict())
        prefixes = [family.block_prefix(model, index) for index in range(len(family.blocks(model)))]
        layers = [
            (block.to("meta"), {name: f"{prefix}{name}" for name in block.state_dict()})
            for prefix, block in zip(prefixes, family.blocks(model), strict=True)
        ]
        stream(layers, weights.__getitem__, device=torch.device("cpu"), dtype=torch.float32)
        found = evaluate(model, *step)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
