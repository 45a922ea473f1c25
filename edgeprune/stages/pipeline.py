"""compress(): the stages in order, each a function of its own on the same folder, each resumable and a no-op when done.

analyze -> plan -> prune -> distill -> quantize. A stage's identity is the digest of its inputs, which contains the
digest of the stage before; a stage found done with other inputs is refused unless `fresh`. What it leaves out: how
things look on screen (cli.py) and on the page (report.py).
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from edgeprune import targets
from edgeprune.analysis.contribution import (
    ContributionReport,
    Group,
    analyze,
    fingerprint,
    groups,
    partials_of,
)
from edgeprune.analysis.estimators import estimator_named
from edgeprune.artefact import checkpoint
from edgeprune.artefact.checkpoint import HALF, INT4, MANIFEST, Manifest
from edgeprune.artefact.surgery import build, prune_state, prune_tensor
from edgeprune.common import processes
from edgeprune.common.errors import BudgetError, InputError, StaleStageError
from edgeprune.common.files import digest, read_json, sha256_file, sha256_unless_known, write_json, write_text
from edgeprune.common.lock import LOCK, Lock, hold, is_free
from edgeprune.common.tensors import Tensors, save_tensors
from edgeprune.data.cache import Index, is_cache, made_by, open_pairs
from edgeprune.data.encode import CacheOptions, make_cache, settings_of, source_digest
from edgeprune.families import Config, Family
from edgeprune.families.base import CHANGED
from edgeprune.metrics import VELOCITY, check_analysis, of_pipeline, tasks_of
from edgeprune.planning.baselines import baselines
from edgeprune.planning.fit import Fit, fit
from edgeprune.planning.modulation import GRID, choose_rank, embedder_alone, modulation_inputs, ranks, subspace
from edgeprune.planning.plan import (
    DEFAULT,
    MODULATION_BELOW,
    NEEDED,
    PlanOptions,
    PrunePlan,
    is_projectable,
    modulation_width,
    plan_for,
    remaining_shapes,
    shorter_config,
    tensor_sources,
)
from edgeprune.planning.planners import PLANNERS, Measured
from edgeprune.quantization.quantize import CALIBRATIONS, prepare, quantize_part
from edgeprune.residency.stored import PACKED
from edgeprune.residency.weights import Weights
from edgeprune.sampling.denoising import encode_prompts, latent_shape, sigmas
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.prompts import PROMPTS, read_prompts
from edgeprune.training.distill import distill
from edgeprune.training.recipe import HERE, DistillOptions, Placement
from edgeprune.training.teaching import lower

STAGES = ("analyze", "plan", "prune", "distill", "quantize")
MODULATION = "modulation.safetensors"
"""Mean (D) and basis (R, D) of the modulation input, where the plan projects it."""
Progress = Callable[[str, int, int, str], None]
"""Called with what is done, how much of how much, and a word on it."""


def silent(what: str, done: int, total: int, note: str = "") -> None:
    """No progress."""


CAPTIONS = 16
"""Of each task of shapes world, to calibrate the built-in model's modulation on."""


@dataclass(frozen=True)
class AnalyzeOptions:
    """Options of `analyze`."""

    metric: str = "velocity"
    prompts: str | None = None
    """A text file; by default the metric's own or, for the built-in model, shapes world's, never
    held-out ones; else a list of ours."""
    count: int = 28
    components: bool = True
    weights: dict[str, str] = field(default_factory=dict)
    """Of the metric, see metrics.KNOWN."""
    joint: bool = False
    """Groups of a block's components as well, see contribution.py."""
    pairs: bool = False
    """Any two parts as well."""
    estimator: str = "exhaustive"
    """How scores are come by, see estimators/."""


@dataclass(frozen=True)
class DataOptions:
    """What `distill` learns from, see data.py."""

    source: str | None = None
    samples: int = 1024


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of `quantize`."""

    group_size: int = 64
    calibration: str = "none"


@dataclass(frozen=True)
class CompressOptions:
    """Everything `compress` can be told."""

    analyze: AnalyzeOptions = field(default_factory=AnalyzeOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    data: DataOptions = field(default_factory=DataOptions)
    distill: DistillOptions | None = field(default_factory=DistillOptions)
    """None leaves distillation out."""
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)


def preset(name: str, *, builtin: bool) -> CompressOptions:
    """`default`, or `quick` for a first look and for CI.

    The built-in model is small and takes a larger step. Of it components go rather than blocks: it hardly uses its
    context MLPs, and at the same bytes much more of the velocity is kept (README.md has the figures).

    Raises:
        InputError: unknown name.
    """
    if name not in ("default", "quick"):
        raise InputError(f"--preset: found {name!r}, expected default or quick")
    options = CompressOptions(plan=DEFAULT)
    if builtin:
        training = DistillOptions(steps=400, batch=32, rate=5e-4, schedule="cosine", ema=0.98)
        plan = replace(options.plan, method="hybrid", threshold=0.0, protect_first=0)
        options = replace(options, plan=plan, data=DataOptions("shapes", 6000), distill=training)
    if name == "quick":
        assert options.distill is not None
        options = replace(
            options,
            analyze=AnalyzeOptions(count=7, estimator="gates"),
            data=replace(options.data, samples=512),
            distill=replace(options.distill, steps=40, batch=16),
        )
    return options


def as_published(options: CompressOptions) -> CompressOptions:
    """A baseline is distilled by its own rule: its features, every weight trained alike; all else stays as it is."""
    baseline = baselines().get(options.plan.method)
    if baseline is None or options.distill is None:
        return options
    training = replace(options.distill, features=baseline.features, sensitivity="off", freeze_prefix=False)
    return replace(options, distill=training)


def load_encoders(source: Path) -> Any:
    """A folder's pipeline around a transformer of which only the embedder of timestep and prompt is left."""
    config, family = checkpoint.read_config(source)
    return checkpoint.load_pipeline(source, embedder_alone(family, config, Weights(source / HALF).__getitem__))


class Workspace:
    """An artefact folder being made from a model, and what is loaded of that model."""

    def __init__(
        self,
        out: Path,
        model: str | None,
        *,
        model_given: bool = True,
        fresh: bool = False,
        generation: dict[str, Any] | None = None,
    ) -> None:
        """Open or begin a folder. It is this process's as long as the object lives, see lock.py.

        Of several processes the first one opens it first, and alone writes.

        Args:
            model: as the user named it, None for the built-in one.
            model_given: False takes the model that the folder was begun with.
            fresh: allow stages to be made again with other inputs.
            generation: fields of `Generation` that differ from the folder's, or the source's, own.

        Raises:
            InputError: the model is not usable, or the folder holds something else.
            StaleStageError: the folder was begun with another model.
            LockedError: another process is at work in the folder.
        """
        self.out, self.fresh, self.cache = out, fresh, out / "cache"
        self.command = ""
        """What the user typed, for the record."""
        name = "built-in" if model is None else str(Path(model).resolve()) if Path(model).is_dir() else model
        if (out / MANIFEST).is_file():
            self._lock = self._hold()  # before the manifest is read, which another run may be changing
            self.manifest = Manifest.load(out)
            if not model_given:
                name = self.manifest.source
                model = None if name == "built-in" else name
            self.source = checkpoint.resolve(model)
            self.config, self.family = checkpoint.read_config(self.source)
            self._check_whole()
            if self.manifest.source != name or self.manifest.fingerprint != fingerprint(self.config):
                raise StaleStageError(f"{out}: made from {self.manifest.source!r}, found {name!r}; use another -o")
            self._set_generation(self.manifest.generation or asdict(Generation.load(self.source)), generation or {})
            return
        if not is_free(out, MANIFEST):
            raise InputError(f"{out}: exists and is not a folder of edgeprune (no {MANIFEST}); use another -o")
        self.source = checkpoint.resolve(model)
        self.config, self.family = checkpoint.read_config(self.source)
        self._check_whole()
        self.manifest = Manifest(name, fingerprint(self.config), self.family.name, self.config)
        self._set_generation(asdict(Generation.load(self.source)), generation or {})
        self._lock = self._hold()
        if (out / MANIFEST).is_file():
            raise InputError(f"{out}: another run began it at the same moment; run again to go on with it")
        self.manifest.save(self.out)

    def _hold(self) -> Lock | None:
        """The folder's lock is the first process'."""
        return hold(self.out / LOCK, self.out) if processes.is_main() else None

    def _save(self) -> None:
        if processes.is_main():
            self.manifest.save(self.out)

    def beside(self, out: Path) -> Workspace:
        """Another artefact of the same model and settings, which shares what is loaded and cached of the model."""
        model = None if self.builtin else self.manifest.source
        other = Workspace(out, model, fresh=self.fresh, generation=asdict(self.generation))
        other.cache = self.cache
        shared = {"pipe": self.pipe, "teacher": self.teacher, "weights_hash": self.weights_hash}
        vars(other).update(shared)  # what cached_property would make anew
        return other

    @property
    def builtin(self) -> bool:
        """Whether the model is ours."""
        return self.manifest.source == "built-in"

    def _check_whole(self) -> None:
        if str(self.config["_class_name"]).startswith(CHANGED):
            raise InputError(f"{self.source}: parts of its blocks are gone already; compress the original instead")

    def _set_generation(self, known: dict[str, Any], given: dict[str, Any]) -> None:
        self.generation = Generation.checked(known | given, f"{self.out / MANIFEST}: generation")
        self.generation.check_size(self.source)
        changed = [n for n, v in given.items() if known.get(n) != v]
        if changed and self.manifest.stages and not self.fresh:
            said = ", ".join(f"{n} {known.get(n)}" for n in changed)
            raise StaleStageError(f"{self.out}: begun with {said}; use --fresh to do its stages again, or another -o")
        if asdict(self.generation) != self.manifest.generation:
            self.manifest.generation = asdict(self.generation)
            if (self.out / MANIFEST).is_file():
                self._save()

    @cached_property
    def teacher(self) -> Any:
        """The original transformer in float32, loaded once."""
        return checkpoint.load_transformer(self.source, quantized=False)

    @cached_property
    def pipe(self) -> Any:
        """The original pipeline in float32, loaded once."""
        return checkpoint.load_pipeline(self.source, self.teacher)

    @cached_property
    def encoders(self) -> Any:
        """The original pipeline around a transformer of which only the embedder of timestep and prompt is left."""
        return load_encoders(self.source)

    @cached_property
    def weights_hash(self) -> str:
        """Identity of the original pipeline: its weights, configs and tokenizers. Gigabytes are hashed once."""
        paths = sorted(p for kind in ("*.safetensors", "*.json") for p in self.source.rglob(kind))
        with self.hashes() as sha256:
            return digest([(p.relative_to(self.source).as_posix(), sha256(p)) for p in paths])

    @contextlib.contextmanager
    def hashes(self) -> Iterator[Callable[[Path], str]]:
        """SHA-256 of files, each read once as long as it stays what it is."""
        path = self.cache / "hashes.json"
        known = read_json(path) if path.is_file() else {}
        before = dict(known)
        try:
            yield lambda file: sha256_unless_known(file, known)
        finally:
            if known != before:
                write_json(path, known)

    @property
    def report_path(self) -> Path:
        """Where `analyze` writes."""
        return self.out / "analysis.json"

    @property
    def scores_path(self) -> Path:
        """Where `plan` keeps scores that it was given instead of the folder's own."""
        return self.out / "scores.json"

    def report(self) -> ContributionReport | None:
        """The contribution scores, if there are any: those that the plan was made from, else the folder's own."""
        paths = [p for p in (self.scores_path, self.report_path) if p.is_file()]
        return ContributionReport.load(paths[0]) if paths else None

    def fit(self, target: str) -> Fit:
        """What a device leaves for the transformer's weights.

        Raises:
            InputError: no such target.
            BudgetError: nothing is left.
        """
        return fit(self.source, targets.load(target), self.generation)

    def plan(self) -> PrunePlan:
        """The plan.

        Raises:
            InputError: none made yet.
        """
        path = self.out / "plan.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file; run `edgeprune plan -o {self.out}` first")
        plan = PrunePlan.load(path)
        plan.check(self.config, path)
        return plan

    def stage(self, name: str, inputs: dict[str, Any], run: Callable[[str], dict[str, Any]]) -> bool:
        """Run a stage unless it is done with the same inputs; True if it ran. `run` gets the inputs' digest.

        Raises:
            StaleStageError: it is done with other inputs, and `fresh` was not said.
        """
        before = STAGES[: STAGES.index(name)]
        upstream = [self.manifest.stages[s]["inputs"] for s in before if s in self.manifest.stages]
        with processes.main_first():  # the hashes of gigabytes are found once
            key = digest({"weights": self.weights_hash, "upstream": upstream, "inputs": inputs})
        found = self.manifest.stages.get(name)
        if found and found["inputs"] == key:
            self._noted()
            return False
        if found and not self.fresh:
            raise StaleStageError(
                f"{self.out}: {name} was done with other inputs; "
                "use --fresh to do it again, or another -o to keep this one"
            )
        self._forget(STAGES[STAGES.index(name) :])
        start = time.monotonic()
        result = run(key)
        self.manifest.stages[name] = {
            "inputs": key,
            "command": self.command,
            "seconds": round(time.monotonic() - start, 3),
            "options": inputs,
        } | result
        self._save()
        self._noted()
        return True

    def _noted(self) -> None:
        for part in (HALF, INT4) if processes.is_main() else ():
            checkpoint.noted(self.out, part)

    def _forget(self, stages: tuple[str, ...]) -> None:
        """Drop stages and what only they made, before anything new is written: no reader may find old weights."""
        if not any(s in self.manifest.stages for s in stages):
            return
        for stage in stages:
            self.manifest.stages.pop(stage, None)
            part = {"prune": HALF, "quantize": INT4}.get(stage)
            if part:
                self.manifest.files = {k: v for k, v in self.manifest.files.items() if k.split("/")[0] != part}
        self._save()
        for stage, part in (("prune", HALF), ("quantize", INT4)):
            if stage in stages and processes.is_main():
                shutil.rmtree(self.out / part, ignore_errors=True)

    def skip_distillation(self) -> None:
        """Go on without distillation.

        Raises:
            StaleStageError: the folder was distilled, and `fresh` was not said.
        """
        if "distill" not in self.manifest.stages:
            return
        if not self.fresh:
            raise StaleStageError(f"{self.out}: was distilled; use --fresh to prune again without, or another -o")
        self._forget(STAGES[STAGES.index("prune") :])

    def need(self, name: str, after: str) -> None:
        """Refuse to run `after` before `name`."""
        if name not in self.manifest.stages:
            raise InputError(f"{self.out}: {after} needs {name}; run `edgeprune {name} -o {self.out}` first")


def analysis_prompts(ws: Workspace, options: AnalyzeOptions) -> list[str]:
    """The prompts that contributions are measured on; never held-out ones."""
    if options.prompts:
        return read_prompts(Path(options.prompts))[: options.count]
    if own := tasks_of(options.metric) or (tasks_of("shapes") if ws.builtin else None):
        per_task = -(-options.count // len(own.TASKS))
        return [p.text for p in own.evaluation_prompts(per_task, held_out=False)]
    return read_prompts(PROMPTS)[: options.count]


def analysis_groups(family: Family, config: Config, options: AnalyzeOptions) -> list[Group]:
    """What is removed, one group after the other.

    Raises:
        InputError: joint removals of components that are left out.
    """
    if options.joint and not options.components:
        raise InputError("--joint removes components together; leave --only-blocks out")
    return groups(family, config, components=options.components, joint=options.joint, pairs=options.pairs)


@torch.no_grad()
def modulation_mean(ws: Workspace, prompts: list[str]) -> torch.Tensor:
    """Mean modulation input (D) over the sampler's timesteps and these prompts."""
    return _modulation_inputs(ws, prompts, _sampled(ws)).flatten(0, 1).mean(0)


def _sampled(ws: Workspace) -> torch.Tensor:
    """The sampler's noise levels without the last, 0."""
    return sigmas(ws.encoders, ws.generation.num_inference_steps, latent_shape(ws.encoders, ws.generation))[:-1]


def _modulation_inputs(ws: Workspace, prompts: list[str], levels: torch.Tensor) -> torch.Tensor:
    """Modulation inputs (prompts, T, D)."""
    pooled = encode_prompts(ws.encoders, prompts, ws.generation.max_sequence_length).pooled
    return modulation_inputs(ws.family, ws.encoders.transformer, levels * 1000, pooled, ws.generation.guidance_scale)


def run_analyze(ws: Workspace, options: AnalyzeOptions, progress: Progress = silent) -> bool:
    """Contribution scores to `analysis.json`."""
    estimator_class = estimator_named(options.estimator, options.metric)
    wanted = analysis_groups(ws.family, ws.config, options)
    prompts = analysis_prompts(ws, options)
    check_analysis(options.metric, options.weights, prompts)
    inputs = asdict(options) | {"prompts": prompts, "generation": asdict(ws.generation)}
    if not options.weights:
        del inputs["weights"]  # so that what was made before there were any is still current

    def run(key: str) -> dict[str, Any]:
        metric = of_pipeline(options.metric, ws.pipe, ws.generation, prompts, options.weights)
        estimator = estimator_class(ws.family, metric, modulation_mean(ws, prompts))
        analyze(
            ws.family, ws.config, estimator.estimate, groups=wanted, metric=metric.name, estimator=estimator.name,
            prompts=prompts, path=ws.report_path, inputs_digest=key,
            progress=lambda done, total: progress("analyze", done, total, ""),
        )  # fmt: skip
        ws.manifest.hash_files(ws.out, "analysis.json")
        return {}

    ran = ws.stage("analyze", inputs, run)
    for partial in partials_of(ws.report_path) if processes.is_main() else ():
        partial.unlink(missing_ok=True)
    return ran


def calibration_prompts(ws: Workspace, options: PlanOptions) -> list[str]:
    """The prompts that the modulation's directions are found on: the empty one of guidance, and never held-out ones."""
    if options.prompts:
        return ["", *read_prompts(Path(options.prompts))]
    if ws.builtin:
        from edgeprune.shapes import evaluation_prompts

        return ["", *(p.text for p in evaluation_prompts(CAPTIONS, held_out=False))]
    return ["", *read_prompts(PROMPTS)]


def calibration_inputs(ws: Workspace, prompts: list[str]) -> torch.Tensor:
    """Modulation inputs (prompts, T, D) at the sampler's timesteps and an even grid."""
    return _modulation_inputs(ws, prompts, torch.cat([_sampled(ws), torch.linspace(0, 1, GRID)]))


def run_plan(ws: Workspace, options: PlanOptions, scores: Path | None = None) -> bool:
    """A plan to `plan.json`, from this folder's scores or from a given file; beside it what projects the modulation."""
    options.check()
    budget = budget_for(ws.source, ws.generation, options)
    rank = options.modulation_rank
    if rank == NEEDED and not is_projectable(ws.family, ws.config):
        rank = None
    prompts = [] if rank is None else calibration_prompts(ws, options)

    def run(_: str) -> dict[str, Any]:
        (ws.out / MODULATION).unlink(missing_ok=True)
        ws.scores_path.unlink(missing_ok=True)
        if scores:
            ContributionReport.load(scores)  # refused before it is kept
            write_text(ws.scores_path, scores.read_text(encoding="utf-8"))
        measured = measured_for(ws, options)

        def planned(rank: int | None) -> PrunePlan:
            chosen = replace(options, modulation_rank=rank)
            return plan_for(ws.family, ws.config, ws.report(), chosen, budget, measured)

        chosen = rank if isinstance(rank, int) else None
        if rank is not None and not (rank == NEEDED and _is_enough(planned)):
            inputs = calibration_inputs(ws, prompts)
            chosen = choose_rank(inputs, modulation_width(ws.family, ws.config)) if chosen is None else chosen
        plan = planned(chosen)
        if chosen is not None:
            found = subspace(inputs.flatten(0, 1))
            save_tensors(ws.out / MODULATION, {"mean": found.mean, "basis": found.basis(chosen)})
        write_json(ws.out / "plan.json", plan.to_json())
        for name in ("plan.json", MODULATION):
            ws.manifest.hash_files(ws.out, name)
        return {"modulation_rank": chosen}

    return ws.stage(
        "plan",
        asdict(options)
        | {"fit_bytes": budget, "scores": sha256_file(scores) if scores and scores.is_file() else str(scores)}
        | ({"calibration": prompts, "generation": asdict(ws.generation)} if prompts else {}),
        run,
    )


def _is_enough(planned: Callable[[int | None], PrunePlan]) -> bool:
    """Whether a plan without projected modulation meets the budget, and leaves enough."""
    try:
        plan = planned(None)
    except BudgetError:
        return False
    return plan.after.parameters >= MODULATION_BELOW * plan.before.parameters


def block_magnitudes(ws: Workspace) -> list[float]:
    """Root mean square of the weights of each block, read one tensor at a time."""
    weights = _original_weights(ws)
    squares, counts = [0.0] * ws.family.block_count(ws.config), [0] * ws.family.block_count(ws.config)
    for name in weights.shapes:
        place = ws.family.place(ws.config, name)
        if place is not None:
            tensor = weights[name]
            squares[place[0]] += float(tensor.float().square().sum(dtype=torch.float64))
            counts[place[0]] += tensor.numel()
    return [math.sqrt(s / c) for s, c in zip(squares, counts, strict=True)]


def measured_for(ws: Workspace, options: PlanOptions) -> Measured:
    """What the method asks of the model: magnitudes, of a baseline that reads weights."""
    baseline = baselines().get(options.method)
    return Measured(magnitudes=block_magnitudes(ws) if baseline is not None and baseline.magnitudes else ())


def budget_for(source: Path, generation: Generation, options: PlanOptions) -> int | None:
    """The bytes that the device of `options.fit` leaves for the transformer; None where no device is named."""
    if options.fit is None:
        return None
    return fit(source, targets.load(options.fit), generation).transformer_bytes


def rehearse(source: Path, generation: Generation, options: CompressOptions) -> PrunePlan:
    """A plan as if all parts contributed alike: what is left is about as large as what the real plan will leave.

    A rank that is still to be measured counts as the smallest, so that no budget is refused that can be met.

    Args:
        source: the pipeline's folder.

    Raises:
        BudgetError: no plan of these options meets the budget.
        InputError: the metric cannot be asked.
    """
    check_analysis(options.analyze.metric, options.analyze.weights)
    config, family = checkpoint.read_config(source)
    alike = dict.fromkeys(groups(family, config, components=options.analyze.components), 0.0)
    report = ContributionReport(
        fingerprint(config), family.name, family.block_count(config), "none", [], [], {}, summary=alike
    )
    choices = options.plan
    if choices.method in PLANNERS:  # what may go is the same
        choices = replace(choices, method="hybrid", threshold=1.0)
    if choices.modulation_rank == NEEDED and not is_projectable(family, config):
        choices = replace(choices, modulation_rank=None)
    if isinstance(choices.modulation_rank, str):
        choices = replace(choices, modulation_rank=ranks(modulation_width(family, config))[0])
    even = Measured(magnitudes=[1.0] * report.num_blocks)
    return plan_for(family, config, report, choices, budget_for(source, generation, choices), even)


def run_prune(ws: Workspace, progress: Progress = silent) -> bool:
    """The shorter transformer to `transformer/`, the rest of the pipeline beside it. Tensors go by one at a time."""
    plan = ws.plan()

    def run(key: str) -> dict[str, Any]:
        original, (mean, basis) = _original_weights(ws), _calibrated(ws, plan, key)
        sources = tensor_sources(ws.family, ws.config, plan.kept, plan.removed, plan.modulation_rank)
        shapes = remaining_shapes(ws.family, ws.config, plan.blocks, plan.components, plan.modulation_rank)
        parts = _by_block(ws, {name: 2 * math.prod(shape) for name, shape in shapes.items()}, plan)

        def make(index: int) -> Tensors:
            return {n: _half(prune_tensor(original.__getitem__, sources[n], mean, basis)) for n in parts[index]}

        _write_half(ws, plan, parts, make, key, progress)
        checkpoint.copy_surroundings(ws.source, ws.out)
        ws.generation.save(ws.out)
        return {}

    return ws.stage("prune", {"plan": plan.to_json(), "generation": asdict(ws.generation)}, run)


def _original_weights(ws: Workspace) -> Weights:
    weights = Weights(ws.source / HALF)
    weights.check(ws.family.tensor_shapes(ws.config))
    return weights


def _calibrated(ws: Workspace, plan: PrunePlan, key: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mean modulation input (D) and the basis (R, D), where the plan needs them; `key` is the digest of `prune`.

    `distill` finds on disk what `prune` has computed: it may be without text encoders.
    """
    if plan.modulation_rank is not None:
        path = ws.out / MODULATION
        if not path.is_file():
            raise InputError(f"{path}: no such file; run `edgeprune plan -o {ws.out} --fresh` again")
        ws.manifest.verify(ws.out, MODULATION)
        with checkpoint.readable(path):
            tensors = load_file(path)
            return tensors["mean"], tensors["basis"]
    if any(c in ws.family.norms for _, c in plan.components):
        path = ws.cache / f"mean-{key[:12]}.safetensors"
        if not path.is_file():
            save_tensors(path, {"mean": modulation_mean(ws, analysis_prompts(ws, AnalyzeOptions()))})
        with checkpoint.readable(path):
            return load_file(path)["mean"], None
    return None, None


def _by_block(ws: Workspace, sizes: dict[str, int], plan: PrunePlan) -> list[dict[str, int]]:
    """Tensors in the parts that are made at once: block by block, then what is outside blocks."""
    config = ws.family.shorter_config(ws.config, plan.kept)
    parts: list[dict[str, int]] = [{} for _ in range(len(plan.kept) + 1)]
    for name, size in sizes.items():
        place = ws.family.place(config, name)
        parts[-1 if place is None else place[0]][name] = size
    return parts


def _half(tensor: torch.Tensor) -> torch.Tensor:
    """16-bit tensors stay what they are; others become float16."""
    return tensor if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.half()


def _write_half(
    ws: Workspace,
    plan: PrunePlan,
    parts: list[dict[str, int]],
    make: Callable[[int], Tensors],
    key: str,
    progress: Progress,
) -> None:
    config = shorter_config(ws.family, ws.config, plan)
    checkpoint.write_transformer(ws.out, HALF, config, parts, make, inputs=key, progress=progress)
    ws.manifest.plan = plan.to_json()
    ws.manifest.hash_files(ws.out, HALF)


def run_distill(
    ws: Workspace,
    options: DistillOptions,
    data: DataOptions,
    progress: Progress = silent,
    *,
    placement: Placement = HERE,
) -> bool:
    """Train the pruned transformer against the original; `transformer/` is replaced by the averaged weights.

    In one process or several, see processes.py.
    """
    ws.need("prune", "distill")
    options.check()
    plan = ws.plan()
    source = data.source or ("shapes" if ws.builtin else str(PROMPTS))
    if options.sensitivity != "off" and ws.report() is None:
        raise InputError(
            f"--sensitivity {options.sensitivity} needs contribution scores; run `edgeprune analyze`, or use off"
        )
    given = is_cache(source)
    if given:
        with processes.main_first():
            _check_cache(ws, Path(source), progress)
    identity = [source_digest(source), None if given else data.samples, asdict(ws.generation)]
    inputs = {"options": options.to_json(), "data": identity}

    def run(key: str) -> dict[str, Any]:
        encoded = Path(source) if given else ws.cache / f"data-{digest([identity, ws.weights_hash])[:12]}"
        with processes.main_first():
            if not given:
                _encode(ws, encoded, CacheOptions(source, data.samples), progress)
            with ws.hashes() as sha256:
                pairs = open_pairs(
                    encoded, ws.family, ws.config, sha256=sha256,
                    progress=lambda done, total: progress("distill: checking", done, total, ""),
                )  # fmt: skip
            calibrated = _calibrated(ws, plan, ws.manifest.stages["prune"]["inputs"])
        pruned = prune_state(ws.family, ws.config, plan, _original_weights(ws).__getitem__, *calibrated)
        student = build(ws.family, ws.config, plan, {n: t.float() for n, t in pruned.items()})
        state, losses = distill(
            ws.family,
            _teacher(ws, options.teacher_precision),
            student,
            plan,
            ws.report(),
            pairs,
            options,
            ws.out / "cache" / "distill.safetensors",
            inputs_digest=key,
            placement=placement,
            guidance=ws.generation.guidance_scale,
            progress=lambda done, total, loss: progress("distill", done, total, f"loss {loss:.4f}"),
        )
        if processes.is_main():
            halves = {n: _half(t) for n, t in state.items()}
            parts = _by_block(ws, {n: 2 * t.numel() for n, t in halves.items()}, plan)
            _write_half(ws, plan, parts, lambda i: {n: halves[n] for n in parts[i]}, key, progress)
        return {"first_loss": sum(losses[:10]) / len(losses[:10]), "last_loss": sum(losses[-10:]) / len(losses[-10:])}

    return ws.stage("distill", inputs, run)


def _teacher(ws: Workspace, precision: str) -> Any:
    """The original transformer. One that training changes, in precision or into shards, is nobody else's."""
    if precision == "float32" and processes.count() == 1:
        return ws.teacher
    for loaded in ("pipe", "teacher"):  # the encoders have done their work
        vars(ws).pop(loaded, None)
    teacher = checkpoint.load_transformer(ws.source, quantized=False)
    lower(ws.family, teacher, precision)
    return teacher


def _encode(ws: Workspace, folder: Path, options: CacheOptions, progress: Progress) -> None:
    """What is missing of a cache of the folder's own."""
    with ws.hashes() as sha256:
        settings = settings_of(ws.source, ws.generation, options, sha256)
    make_cache(
        lambda: ws.pipe, ws.source, folder, settings, ws.generation, options,
        progress=lambda done, total, note: progress("distill: latents", done, total, note),
    )  # fmt: skip


def _check_cache(ws: Workspace, folder: Path, progress: Progress) -> None:
    """Refuse a cache that this model's encoders did not make; their files are hashed once, and not loaded."""
    index = Index.load(folder)
    with ws.hashes() as sha256:
        drawn = "transformer" in index.settings
        absent = index.check_made_by(made_by(ws.source, ws.generation, drawn=drawn, sha256=sha256), folder)
    if absent:
        progress(
            f"distill: {folder} says what made it; no weights of {', '.join(absent)} here to compare with", 0, 0, ""
        )


def run_quantize(ws: Workspace, options: QuantizeOptions, progress: Progress = silent) -> bool:
    """INT4 weights of `transformer/` to `transformer_int4/`."""
    ws.need("prune", "quantize")
    if options.calibration not in CALIBRATIONS:
        raise InputError(f"--calibration: found {options.calibration!r}, expected one of {', '.join(CALIBRATIONS)}")
    if options.group_size not in (16, 32, 64, 128):
        raise InputError(f"--group-size: found {options.group_size}, expected 16, 32, 64 or 128")
    plan = ws.plan()

    def run(key: str) -> dict[str, Any]:
        stored = checkpoint.open_transformer(ws.out, quantized=False)
        empty = prepare(ws.family, copy.deepcopy(stored.model), group_size=options.group_size).state_dict()
        sizes = {n: t.numel() * (t.element_size() if n.endswith(PACKED) else 2) for n, t in empty.items()}
        parts = _by_block(ws, sizes, plan)
        calibrate = _calibration(ws, stored.load()) if options.calibration != "none" else None

        def make(index: int) -> Tensors:
            block = index if index < len(plan.kept) else None
            if calibrate is None:
                stored.fill(stored.names(block), None)
            quantize_part(ws.family, stored.model, block, **asdict(options), run=calibrate)
            state = stored.model.state_dict()
            tensors = {n: state[n] if n.endswith(PACKED) else state[n].half() for n in parts[index]}
            if calibrate is not None:
                keep(tensors)
            elif block is not None:
                stored.drop(block)
            return tensors

        def found(index: int, weights: Weights) -> None:
            if calibrate is not None and index < len(plan.kept):
                prefix = ws.family.block_prefix(stored.model, index)
                prepare(ws.family, ws.family.blocks(stored.model)[index], prefix=prefix, group_size=options.group_size)
                keep({n: weights[n] for n in parts[index]})

        def keep(tensors: Tensors) -> None:
            """Later blocks are calibrated with a block as it is written, whichever run wrote it."""
            floats = {n: t if n.endswith(PACKED) else t.float() for n, t in tensors.items()}
            stored.model.load_state_dict(floats, strict=False, assign=True)

        ws.manifest.group_size = options.group_size
        config = shorter_config(ws.family, ws.config, plan)
        size = checkpoint.write_transformer(
            ws.out, INT4, config, parts, make, inputs=key, found=found, progress=progress
        )
        ws.manifest.hash_files(ws.out, INT4)
        return {"weights_bytes": size}

    return ws.stage("quantize", asdict(options), run)


def _calibration(ws: Workspace, model: Any) -> Callable[[], None]:
    """Runs `model` on the analysis prompts' trajectories."""
    metric = of_pipeline(VELOCITY, ws.pipe, ws.generation, analysis_prompts(ws, AnalyzeOptions()))
    original = ws.pipe.transformer

    def run() -> None:
        ws.pipe.transformer = model
        try:
            metric.score()
        finally:
            ws.pipe.transformer = original

    return run


def compress(ws: Workspace, options: CompressOptions, progress: Progress = silent) -> list[str]:
    """All stages; returns the names of those that ran.

    Raises:
        BudgetError: the plan's budget cannot be met; said before anything is computed.
        InputError: the data is a cache that other encoders have made; said then too.
    """
    ran = []
    rehearse(ws.source, ws.generation, options)
    if options.distill is not None and options.data.source and is_cache(options.data.source):
        _check_cache(ws, Path(options.data.source), progress)
    needs_scores = options.plan.scored or (options.distill and options.distill.sensitivity != "off")
    if needs_scores and run_analyze(ws, options.analyze, progress):
        ran.append("analyze")
    if run_plan(ws, options.plan):
        ran.append("plan")
    if options.distill is None:
        ws.skip_distillation()
    if run_prune(ws, progress):
        ran.append("prune")
    if options.distill is not None and run_distill(ws, options.distill, options.data, progress):
        ran.append("distill")
    if run_quantize(ws, options.quantize, progress):
        ran.append("quantize")
    return ran
