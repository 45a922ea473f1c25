"""What stages do, counted from shapes, and how fast this machine does it.

`least` takes evaluations at a matrix product's speed, for forecasts that say "at least". `measured` times blocks of the
transformer, for choices that have to keep to a time. Both time a write to the disk and a rounding.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.artefact.loading import empty_part
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.staged import can_stage
from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.files import read_json
from edgeprune.common.progress import Progress
from edgeprune.common.tables import duration
from edgeprune.families import Config, Family
from edgeprune.families.encoders import LONG, text_encoders
from edgeprune.families.parts import BY_ROW, vae_channels
from edgeprune.planning.fit import read_shapes
from edgeprune.quantization.int4 import round_int4
from edgeprune.residency.compute import Compute, is_small
from edgeprune.residency.running import running
from edgeprune.residency.stored import StoredTransformer
from edgeprune.residency.streaming import is_streamed
from edgeprune.sampling.denoising import VelocityInputs, evaluate, network_inputs
from edgeprune.sampling.generation import Generation, latent_factor, longest_prompt
from edgeprune.sampling.latents import decoded, encoded_mean
from edgeprune.shapes import World, world_of
from edgeprune.stages.costs import evaluation_seconds, evaluations_by_step, matmul_flops_per_s, sample

ROUNDING = 3.0
"""Time of NNCF's rounding and packing of a weight, over that of the plain rounding of one thread (measured on weights
of SD3.5 Large, as in docs/full-size.md)."""
CALIBRATED = {"none": 1.0, "feedback": 5.0}
"""Time of choosing a weight's integer by calibration, without running the model, over that of rounding it alone: about
what it takes at the size of SD3.5 Large."""
_SAMPLE_BYTES = 64_000_000
_WORTH_SAYING_S = 60.0


@dataclass(frozen=True)
class Subject:
    """A pipeline and how it draws: what work depends on."""

    source: Path
    family: Family
    config: Config
    generation: Generation

    @property
    def world(self) -> World | None:
        """The world that it draws; None for other models."""
        return world_of(self.source)

    @property
    def numbers(self) -> int:
        """Weights of the transformer."""
        return sum(map(math.prod, self.family.tensor_shapes(self.config).values()))

    @property
    def per_step(self) -> int:
        """Evaluations of a sampling step in which guidance acts."""
        return 2 if self.family.guided(self.config, self.generation.guidance_scale) else 1

    def by_step(self, steps: int) -> list[int]:
        """Return the evaluations of each step of an image that is drawn in so many."""
        generation = replace(self.generation, num_inference_steps=steps)
        return evaluations_by_step(self.family, self.config, self.source, generation)

    @property
    def per_image(self) -> int:
        """Evaluations of an image."""
        return sum(self.by_step(self.generation.num_inference_steps))


@dataclass(frozen=True)
class Work:
    """What a stage does."""

    evaluations: float = 0.0
    """Of the original transformer, for one sample."""
    flops: float = 0.0
    """Of text encoders and the VAE."""
    moved: float = 0.0
    """Bytes written, and those read that no evaluation reads."""
    rounded: float = 0.0
    """Weights rounded to INT4."""

    def __add__(self, other: Work) -> Work:
        """Return both, one after the other."""
        return Work(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


@dataclass(frozen=True)
class Speeds:
    """How fast a machine does it."""

    evaluation_s: float
    """Seconds of an evaluation of the original transformer for one sample."""
    flops: float = math.inf
    """A second, in text encoders and the VAE."""
    moved: float = math.inf
    """Bytes a second."""
    rounded: float = math.inf
    """Weights a second."""

    def seconds(self, work: Work) -> float:
        """Return the time of some work."""
        rest = work.flops / self.flops + work.moved / self.moved + work.rounded / self.rounded
        return work.evaluations * self.evaluation_s + rest


@dataclass(frozen=True)
class Pace:
    """What work takes here at least, and how long it may take."""

    subject: Subject
    compute: Compute
    longest_s: float | None
    """See `ComputeOptions.longest_s`."""
    speeds: Callable[[], Speeds]
    """Measures them, which takes a second."""

    def check(
        self,
        stage: str,
        work: Work,
        ways: Iterable[tuple[str, Work]],
        progress: Progress,
        *,
        memory: int = 0,
        written: int = 0,
    ) -> None:
        """Say what a stage takes at least, unless it is small, and refuse it if that is too long.

        Args:
            stage: its name.
            work: what it does.
            ways: options that make it shorter, each with the work that is left; the first that suffices is named.
            progress: gets the line.
            memory: bytes of memory that it needs at least, see memory.py; 0 does not say.
            written: bytes that it leaves on the disk.

        Raises:
            InputError: it takes more memory than was given, or longer than `longest_s`.
        """
        check_memory(stage, memory, self.compute)
        speeds = self.speeds()

        def seconds(some: Work) -> float:
            return speeds.seconds(some) / processes.count()

        takes = f"{stage}: at least {duration(seconds(work))} here, on {self.compute.device}"
        if self.longest_s is None or seconds(work) <= self.longest_s:
            if seconds(work) > _WORTH_SAYING_S or not is_small(self.subject.numbers):
                progress(takes + self._said(work, memory, written))
            return
        known = list(ways)
        short = [way for way in known if seconds(way[1]) <= self.longest_s] or known[-1:]
        cheaper = f"{short[0][0]} takes {duration(seconds(short[0][1]))}; " if short else ""
        raise InputError(f"{takes}; {cheaper}--yes runs it anyway")

    def _said(self, work: Work, memory: int, written: int) -> str:
        """Return what else a line says of a stage."""
        budget = self.compute.memory
        parts = [f"in at most {budget / 1e9:.2f} GB of memory"] if budget and memory else []
        parts += [f"in {memory / 1e9:.2f} GB of memory or more"] if memory and not budget else []
        parts += [f"writes {written / 1e9:.2f} GB"] if written else []
        parts += [f"{work.evaluations:,.0f} evaluations of the transformer"] if work.evaluations else []
        return "".join(f", {part}" for part in parts)


def check_memory(stage: str, needed: int, compute: Compute) -> None:
    """Refuse a stage that needs more bytes of memory than were given.

    Raises:
        InputError: it does; says how much it takes.
    """
    if compute.memory is not None and needed > compute.memory:
        given = f"{compute.memory / 1e9:.2f} GB"
        raise InputError(f"--memory: found {given}, expected at least {needed / 1e9:.2f} GB here for {stage}")


def least(subject: Subject, compute: Compute, scratch: Path) -> Speeds:
    """Return speeds that no real run exceeds by much: evaluations at that of a matrix product.

    Of a small model nothing but evaluations takes time.

    Args:
        subject: the pipeline.
        compute: where it runs.
        scratch: a folder on the disk that is written to.
    """
    one = evaluation_seconds(subject.family, subject.config, subject.source, subject.generation, compute)
    if is_small(subject.numbers):
        return Speeds(one)
    flops = matmul_flops_per_s(device=compute.device)
    return Speeds(one, flops, bytes_moved_per_s(scratch), weights_rounded_per_s())


def measured(subject: Subject, stored: StoredTransformer, compute: Compute, scratch: Path) -> Speeds:
    """Return the speeds of this machine, with evaluations timed block by block.

    Args:
        subject: the pipeline.
        stored: its transformer.
        compute: where it runs.
        scratch: a folder on the disk that is written to.
    """
    model = running(copy.deepcopy(stored), compute, keep=False)
    one = sample(subject.family, subject.config, subject.source, subject.generation)
    evaluation_s = block_by_block_s(subject.family, model, one)
    del model
    compute.collect()
    return replace(least(subject, compute, scratch), evaluation_s=evaluation_s)


@torch.no_grad()
def block_by_block_s(family: Family, model: Any, one: VelocityInputs) -> float:
    """Return the seconds of one evaluation; of a streamed model, from one block of each kind, with its reading.

    In a real run many samples share a reading, so there it is less.
    """
    blocks, seconds = family.blocks(model), 0.0
    if not is_streamed(blocks[0]):
        return fastest(lambda: evaluate(model, *one))
    latents, condition, sigma, guidance = one
    like = next(p for p in model.parameters() if not p.is_meta and p.is_floating_point())
    inputs = network_inputs(model, latents.to(like), condition.to(like), sigma, guidance)
    image, text, modulation = family.embed(model, inputs)
    positions = family.positions(model, inputs)
    for indices in family.kinds(model.config).values():
        if indices:

            def run(block: Any = blocks[indices[0]]) -> None:
                family.run(block, image, text, modulation, positions)[0].flatten()[0].item()  # waits for a GPU

            seconds += len(indices) * fastest(run)
    return seconds


def bytes_moved_per_s(folder: Path) -> float:
    """Measure how fast a file is written to a folder and read again; writes 64 MB and deletes them.

    A folder that cannot be written to counts as fast as the one of temporary files.
    """
    data, path = os.urandom(_SAMPLE_BYTES), _new_file(folder)

    def move() -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.read_bytes()

    try:
        return len(data) / fastest(move)
    finally:
        path.unlink(missing_ok=True)


def _new_file(folder: Path) -> Path:
    """Create an empty file under a name that no other has, in a folder or, where that is refused, a temporary one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="edgeprune-", dir=folder)
    except OSError:
        handle, name = tempfile.mkstemp(prefix="edgeprune-")
    os.close(handle)
    return Path(name)


def weights_rounded_per_s() -> float:
    """Measure how fast one thread rounds weights to INT4; other processes do not count."""
    weight, threads = torch.randn(1024, 4096), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return weight.numel() / fastest(lambda: round_int4(weight, 64), time.thread_time) / ROUNDING
    finally:
        torch.set_num_threads(threads)


def fastest(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the best of three runs, which other processes disturb least."""
    times = []
    for _ in range(3):
        began = clock()
        work()
        times.append(clock() - began)
    return min(times)


def encoding(subject: Subject, prompts: int, *, pooled: bool = False) -> Work:
    """Return the work of encoding prompts: each encoder is read once, and each token goes through all of its layers.

    Args:
        subject: the pipeline.
        prompts: how many.
        pooled: leave out T5 and Qwen3, which pooled text does without.
    """
    work = Work()
    for kind, in_layers, numbers in _encoders(subject.source) if prompts else ():
        if not (pooled and kind in LONG):
            length = subject.generation.max_sequence_length if kind in LONG else longest_prompt(subject.source)
            work += Work(flops=2.0 * in_layers * length * prompts, moved=2.0 * numbers)
    return work


@functools.cache
def _encoders(source: Path) -> list[tuple[str, int, int]]:
    """Return the class of each text encoder, its weights without tables of tokens and positions, and all of them.

    Of Qwen3 what is not read does not count: layers after the last state that is, and words that no prompt has.
    """
    found, states = [], {encoder.name: encoder.states for encoder in read_config(source)[1].encoders}
    for name, kind in text_encoders(source).items():
        shapes = read_shapes(source / name, kind, states.get(name, ())).items()
        read = {tensor: shape for tensor, shape in shapes if tensor != BY_ROW}
        sizes = {tensor: math.prod(shape) for tensor, shape in read.items()}
        in_layers = sum(size for tensor, size in sizes.items() if "embed" not in tensor and "shared" not in tensor)
        found.append((kind, in_layers, sum(sizes.values())))
    return found


def drawing(subject: Subject, images: int) -> Work:
    """Return the work of drawing images, each of another prompt."""
    return Work(evaluations=images * subject.per_image, flops=images * _vae_flops(subject)) + encoding(
        subject, images + 1
    )


def reading(subject: Subject, images: int) -> Work:
    """Return the work of encoding images, each with a caption of its own."""
    return Work(flops=images * _vae_flops(subject, encoder=True)) + encoding(subject, images + 1)


def shapes_per_task(quick: bool) -> int:
    """Return how many images of each model and task of shapes world the report of a teacher draws."""
    return 2 if quick else 15


def report_images(quick: bool) -> int:
    """Return how many images of each model the report draws, of a model that draws no shapes world."""
    return 2 if quick else 8


def reporting(subject: Subject, images: int, left: float, per_image: int) -> Work:
    """Return the work of a report: images of both models, and a step of two samples of each that is timed.

    Of a large model, one block of each kind is timed instead, which is not counted.

    Args:
        subject: the original.
        images: of each model.
        left: share of the parameters of the compressed model.
        per_image: evaluations of an image of the compressed model.
    """
    timed = 2 if is_small(subject.numbers) else 0
    original, compressed = images * subject.per_image + timed, images * per_image + timed
    decoded = 2 * images * _vae_flops(subject)
    return Work(evaluations=original + compressed * left, flops=decoded) + encoding(subject, images + 1)


def _vae_flops(subject: Subject, *, encoder: bool = False) -> float:
    """Return the operations of decoding one image, or of encoding it."""
    return _counted_flops(subject.source, subject.generation.height, subject.generation.width, encoder)


@functools.cache
def _counted_flops(source: Path, height: int, width: int, encoder: bool) -> float:
    """Count the operations of the VAE for one image, on the meta device; 0 for a VAE that is not read here."""
    if not can_stage(source):
        return 0.0
    folder = source / "vae"
    config = read_json(folder / "config.json")
    model, factor = empty_part(folder, config["_class_name"]), latent_factor(config, folder / "config.json")
    channels = vae_channels(config["_class_name"], config, folder / "config.json")[1]
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        if encoder:
            encoded_mean(model, torch.zeros(1, 3, height, width))
        else:
            decoded(model, torch.zeros(1, channels, height // factor, width // factor))
    return float(counter.get_total_flops())
