"""Where blocks are read when they run, many samples pass through each before the next is read."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import config_of, tiny_flux_pipeline, tiny_pipeline, tiny_transformer

from edgeprune import runtimes
from edgeprune.analysis.estimators import estimator_named
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.common import traffic
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.splits import Split
from edgeprune.common.tensors import Tensors
from edgeprune.data.encode import make_cache
from edgeprune.data.settings import CacheOptions, settings_of
from edgeprune.families import family_of
from edgeprune.families.encoders import text_encoders
from edgeprune.metrics.velocity import VelocityError
from edgeprune.residency import running
from edgeprune.residency.compute import Compute, name_of
from edgeprune.residency.spill import Spill
from edgeprune.residency.streaming import is_streamed
from edgeprune.residency.weights import Weights
from edgeprune.sampling import denoising
from edgeprune.sampling.denoising import generate, groups
from edgeprune.sampling.together import batches_together, sample_bytes
from edgeprune.stages import analyze
from edgeprune.stages.options import AnalyzeOptions
from edgeprune.stages.workspace import Workspace

PROMPTS = ["a", "two stars", "a ring", "a red circle", "a blue square"]
SEEDS = [3, 1, 4, 1, 5]
EVERYTHING = 10**12


@pytest.fixture(params=["sd3", pytest.param("flux", marks=pytest.mark.slow)])  # test_seam.py reads FLUX's blocks, too
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    {"sd3": tiny_pipeline, "flux": tiny_flux_pipeline}[request.param](tmp_path / "tiny")
    return tmp_path / "tiny"


def opened(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch, *, most: int = 1) -> Workspace:
    """Open a model whose blocks are all read when they run, `most` samples at once."""
    monkeypatch.setattr("edgeprune.residency.running._WORKING_BYTES", EVERYTHING)  # no block is kept
    for module in ("sampling.denoising", "metrics.velocity"):
        monkeypatch.setattr(f"edgeprune.{module}.at_once", lambda *_: most)
    return Workspace(out, str(source), compute=ComputeOptions("cpu", 100 * 10**9))


def give(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Let so many batches pass together, whatever the memory."""
    monkeypatch.setattr(denoising, "batches_together", lambda room, each, count: min(batches, count))


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the readings of each tensor in blocks from now on; call it before a model is opened."""
    reads, real = Counter[str](), Weights.__getitem__

    def read(self: Weights, name: str) -> torch.Tensor:
        if "transformer_blocks." in name:
            reads[name] += 1
        return real(self, name)

    monkeypatch.setattr(Weights, "__getitem__", read)
    return reads


def readings(reads: Counter[str]) -> int:
    """Return how often each block was read since the last call, which is the same for all."""
    (found,) = set(reads.values())
    reads.clear()
    return found


@pytest.mark.parametrize(("together", "groups"), [(None, 1), (2, 3), (1, 5)])
def test_a_block_is_read_once_for_each_group_and_step(
    together: int | None, groups: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = counted_reads(monkeypatch)
    ws = opened(tmp_path / "out", model, monkeypatch)
    if together:
        give(monkeypatch, together)
    pipe, steps = ws.pipe, ws.generation.num_inference_steps
    reads.clear()
    metric = VelocityError(pipe, ws.generation, PROMPTS, split=Split.ANALYSIS, compares=False)
    assert readings(reads) == groups * (steps - 1)
    metric._velocities()
    assert readings(reads) == -(-len(PROMPTS) * steps // (together or 99))
    images = generate(pipe, PROMPTS, SEEDS, ws.generation)
    assert readings(reads) == groups * steps and len(images) == len(PROMPTS)


@pytest.mark.parametrize(("together", "groups"), [(None, 1), (2, 3)])
def test_images_of_a_runtime_read_each_block_once_per_step(
    together: int | None, groups: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = counted_reads(monkeypatch)
    monkeypatch.setattr("edgeprune.residency.running._WORKING_BYTES", EVERYTHING)  # no block is kept
    for module in ("sampling.denoising", "runtimes.eager"):
        monkeypatch.setattr(f"edgeprune.{module}.at_once", lambda *_: 1)
    with runtimes.load(model, "eager", memory=100 * 10**9) as opened:
        if together:
            give(monkeypatch, together)
        reads.clear()
        begun = traffic.total()
        images = opened.generate(PROMPTS, seed=SEEDS, steps=2)
        assert readings(reads) == groups * 2
        taken = traffic.total().since(begun).read_bytes
        begun = traffic.total()
        (alone,) = opened.generate(PROMPTS[:1], seed=SEEDS[:1], steps=2)
        one = traffic.total().since(begun).read_bytes
        # The first reads text encoders and VAE as well, the second finds its text.
        parts = [sum(map(math.prod, Weights(model / name).shapes.values())) for name in (*text_encoders(model), "vae")]
        assert taken - 2 * sum(parts) == groups * one
        assert abs(np.asarray(images[0], int) - np.asarray(alone)).max() <= 1
        again = opened.draw([*PROMPTS, *PROMPTS], [*SEEDS, *SEEDS], steps=2)
        np.testing.assert_array_equal([np.asarray(image) for image in again], [np.asarray(i) for i in images * 2])


def test_training_data_that_is_drawn_reads_each_block_once_per_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.data.encoder.at_once", lambda *_: 1)
    reads, options, shards, done = counted_reads(monkeypatch), CacheOptions("captions", 5), [], list[int]()
    for together, passes in ((9, 1), (2, 3)):
        ws = opened(tmp_path / str(together), model, monkeypatch)
        give(monkeypatch, together)
        folder, settings = tmp_path / f"data-{together}", settings_of(model, ws.generation, options, computed_in="")
        load = functools.partial(ws.original.encoding, drawing=True)
        note = lambda count, *_: done.append(count)  # noqa: E731
        make_cache(load, model, folder, settings, ws.generation, options, progress=note)
        assert readings(reads) == passes * ws.generation.num_inference_steps
        shards.append((folder / "shard-00000.safetensors").read_bytes())
    assert shards[0] == shards[1] and done[:4] == [0, 0, 0, 1] and max(done) == 5


def test_no_text_encoder_is_in_memory_while_training_data_is_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    made, held, real = list[weakref.ref[torch.Tensor]](), list[int](), StagedPipeline._streamed

    def streamed(*arguments: Any, **options: Any) -> Any:
        encoder = real(*arguments, **options)
        made.extend(weakref.ref(parameter) for parameter in encoder.parameters() if not parameter.is_meta)
        return encoder

    monkeypatch.setattr(StagedPipeline, "_streamed", streamed)
    ws, options = opened(tmp_path / "out", model, monkeypatch), CacheOptions("captions", 2)
    pipe = ws.original.encoding(drawing=True)
    for block in ws.family.blocks(pipe.transformer):
        block.register_forward_pre_hook(lambda *_: held.append(sum(one() is not None for one in made)))
    gc.disable()  # layers and their hooks refer to each other
    request.addfinalizer(gc.enable)
    settings = settings_of(model, ws.generation, options, computed_in="")
    make_cache(lambda: pipe, model, tmp_path / "data", settings, ws.generation, options)
    assert made and held and set(held) == {0}


@pytest.mark.parametrize(("kind", "most"), [("fp32", 1), ("fp32", 2), ("bf16", 1)])
def test_results_do_not_depend_on_what_passes_together(
    kind: str, most: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two at once, the halves of guidance of a batch are four rows in two parts, those of the last one are two."""
    if kind == "bf16":
        for module in ("compute", "running"):
            monkeypatch.setattr(f"edgeprune.residency.{module}.is_small", lambda numbers: False)
        monkeypatch.setattr("edgeprune.residency.compute.multiplies_bf16", lambda: True)
    ws, found = opened(tmp_path / "out", model, monkeypatch, most=most), []
    assert name_of(ws.original.dtype) == kind
    short = replace(ws.generation, num_inference_steps=2)
    for together in (1, 2, 9):
        give(monkeypatch, together)
        metric = VelocityError(ws.pipe, short, PROMPTS[:3], split=Split.ANALYSIS)
        found.append((metric.states, metric.reference, generate(ws.pipe, PROMPTS[:3], SEEDS[:3], short)))
    for states, reference, images in found[1:]:
        assert torch.equal(states, found[0][0]) and torch.equal(reference, found[0][1])
        np.testing.assert_array_equal(images, found[0][2])


@pytest.mark.parametrize("estimator", ["exhaustive", "reuse"])
def test_an_analysis_does_not_depend_on_it(
    estimator: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    for together in (1, 9):
        ws = opened(tmp_path / str(together), model, monkeypatch)
        give(monkeypatch, together)
        analyze.run(ws, AnalyzeOptions(count=2, states=2, estimator=estimator, components=False))
        reports.append(ws.report_path.read_bytes())
    assert reports[0] == reports[1]


def test_reuse_reads_the_block_that_it_records_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = counted_reads(monkeypatch)
    ws = opened(tmp_path / "out", source, monkeypatch)
    give(monkeypatch, 1)
    metric = VelocityError(ws.pipe, ws.generation, PROMPTS[:2], split=Split.ANALYSIS)
    reads.clear()
    list(estimator_named("reuse", "velocity")(ws.family, metric, torch.zeros(64)).estimate([((1, None),)]))
    assert {count for name, count in reads.items() if name.startswith("transformer_blocks.0.")} == {1}


def test_a_run_that_was_killed_goes_on_with_other_groups(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed anywhere, and each next run has another budget; half of a block runs again each time, no more."""
    ws, left, ran = opened(tmp_path / "out", model, monkeypatch), [10**6], [0]
    monkeypatch.setattr(denoising, "KEEP_S", -1.0)
    short = replace(ws.generation, num_inference_steps=3)

    def enter(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        ran[0] += 1

    for block in ws.family.blocks(ws.pipe.transformer):
        block.register_forward_pre_hook(enter)

    def run(folder: str) -> tuple[torch.Tensor, Any]:
        spill = Spill(tmp_path / folder, identity="the same")
        metric = VelocityError(ws.pipe, short, PROMPTS[:4], split=Split.ANALYSIS, compares=False, spill=spill)
        images = generate(ws.pipe, PROMPTS[:4], SEEDS[:4], short, spill=spill)
        assert not list((tmp_path / folder).glob("*.step.safetensors"))
        return metric.states, images

    give(monkeypatch, 1)
    whole, undisturbed = run("whole"), ran[0]
    found, kills, ran[0] = None, 0, 0
    while found is None and kills < 999:
        left[0] = 11
        give(monkeypatch, (9, 2, 1, 3)[kills % 4])
        try:
            found = run("kept")
        except KeyboardInterrupt:
            kills += 1
    assert found is not None and torch.equal(found[0], whole[0]) and kills > 5
    np.testing.assert_array_equal(found[1], whole[1])
    assert undisturbed <= ran[0] <= undisturbed + kills


def test_what_was_kept_of_another_step_is_not_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between a step's result and its streams leaves both."""
    ws = opened(tmp_path / "out", source, monkeypatch)
    monkeypatch.setattr(denoising, "KEEP_S", -1.0)
    whole, drop, dropped = generate(ws.pipe, PROMPTS, SEEDS, ws.generation), Spill.drop, list[str]()

    def killed(self: Spill, key: str) -> None:
        if len(dropped) == 2:
            raise KeyboardInterrupt
        dropped.append(key)
        drop(self, key)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Spill, "drop", killed)
        generate(ws.pipe, PROMPTS, SEEDS, ws.generation, spill=Spill(tmp_path / "kept", identity="the same"))
    assert (tmp_path / "kept" / "images.2.1.step.safetensors").exists()
    assert (tmp_path / "kept" / "images.2.1.safetensors").exists()
    spill = Spill(tmp_path / "kept", identity="the same")
    np.testing.assert_array_equal(generate(ws.pipe, PROMPTS, SEEDS, ws.generation, spill=spill), whole)
    assert not list((tmp_path / "kept").glob("*.step.safetensors"))


def test_keeping_takes_a_tenth_of_the_time_at_most(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws, clock, kept, real = opened(tmp_path / "out", source, monkeypatch), [0.0], list[float](), Spill.put

    def put(self: Spill, key: str, tensors: Tensors) -> None:
        if key.endswith(".step"):
            kept.append(clock[0])
            clock[0] += 4.0
        real(self, key, tensors)

    monkeypatch.setattr(denoising, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(Spill, "put", put)
    for block in ws.family.blocks(ws.pipe.transformer):
        block.register_forward_hook(lambda *_: clock.__setitem__(0, clock[0] + 8.0))
    short = replace(ws.generation, num_inference_steps=1)
    generate(ws.pipe, PROMPTS, SEEDS, short, spill=Spill(tmp_path / "kept"))
    begun = [at for at, before in zip(kept, [-9.0, *kept], strict=False) if at - before > 4.0]
    assert begun[0] == 32.0 and len(begun) > 1  # two halves of two batches, and KEEP_S is 30
    for at, after in itertools.pairwise(begun):
        took = 4.0 * sum(at <= one < after for one in kept)
        assert max(30.0, 10 * took) < after - at - took <= max(30.0, 10 * took) + 16.0


def test_a_model_in_memory_takes_one_batch_after_the_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    for module in ("sampling.denoising", "metrics.velocity"):
        monkeypatch.setattr(f"edgeprune.{module}.at_once", lambda *_: 1)
    entered, alone = list[int](), [slice(0, 2), slice(2, 4)]
    assert is_streamed(ws.family.blocks(ws.pipe.transformer)[0]) is False
    assert [list(group) for group in groups(ws.pipe, alone, (8, 8, 8), 16)] == [[one] for one in alone]
    for index, block in enumerate(ws.family.blocks(ws.pipe.transformer)):
        block.register_forward_pre_hook(lambda *_, index=index: entered.append(index))
    generate(ws.pipe, PROMPTS, SEEDS, ws.generation)
    every = list(range(len(set(entered))))
    assert entered == every * (len(PROMPTS) * ws.generation.num_inference_steps)


def test_groups_follow_the_memory_that_is_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, sizes = opened(tmp_path / "out", source, monkeypatch, most=2), []
    pipe, batches = ws.pipe, [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    one = sample_bytes(ws.family, ws.config, (8, 8, 8), 16, 4)
    needed = running._block_bytes(pipe.transformer) + 100 * 10**9 // 6
    for room in (0, 8 * one - 1, 8 * one, 12 * one, EVERYTHING):
        monkeypatch.setattr(Compute, "left", lambda _, room=room: needed + 2 * room)
        sizes.append([len(group) for group in groups(pipe, batches, (8, 8, 8), 16, passes=2)])
    assert sizes == [[1] * 4, [1] * 4, [2, 2], [3, 1], [4]]


def test_freed_memory_is_collected_before_groups_are_small(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ws, left = opened(tmp_path / "out", source, monkeypatch), [0]
    transformer = ws.pipe.transformer
    monkeypatch.setattr(Compute, "left", lambda _: left[0])
    monkeypatch.setattr(Compute, "collect", lambda _: left.__setitem__(0, EVERYTHING))
    assert running.spare(transformer, ws.original.compute, 10**9) > 10**9


def test_a_sample_takes_no_more_than_is_counted(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, sizes, real = opened(tmp_path / "out", model, monkeypatch), [], Spill.put

    def put(self: Spill, key: str, tensors: Tensors) -> None:
        if key.endswith(".step"):
            sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        real(self, key, tensors)

    monkeypatch.setattr(Spill, "put", put)
    monkeypatch.setattr(denoising, "KEEP_S", -1.0)
    generate(ws.pipe, PROMPTS[:1], [1], ws.generation, spill=Spill(tmp_path / "kept"))
    text = ws.family.text_tokens(16, 0)
    assert 0 < max(sizes) <= 2 * sample_bytes(ws.family, ws.config, (8, 8, 8), text, 4) < 4 * max(sizes)


def test_samples_of_sd35_large_at_1024() -> None:
    """Image, text and modulation in bf16, and six latents in float32: 28 prompts with guidance take 1.6 GB."""
    config = config_of(tiny_transformer()) | {
        "num_attention_heads": 38, "attention_head_dim": 64, "patch_size": 2, "in_channels": 16,
    }  # fmt: skip
    one = sample_bytes(family_of(config), config, (16, 128, 128), 77 + 256, 2)
    assert one == 2 * (4096 + 333 + 16) * 2432 + 6 * 4 * 16 * 128 * 128
    assert [batches_together(room, 2 * one, 28) for room in (0, 10**8, 10**9, 10**10)] == [1, 1, 17, 28]
