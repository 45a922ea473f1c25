"""The stage `distill`: train the pruned transformer against the original; the result replaces `transformer/`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.surgery import build, prune_state, structure
from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.files import digest
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors
from edgeprune.data.cache import Index, is_cache, made_by, open_pairs
from edgeprune.data.encode import make_cache, skip_report
from edgeprune.data.pairs import Pairs
from edgeprune.data.settings import SHAPES, CacheOptions, is_drawn, settings_of, source_digest
from edgeprune.families import Architecture, Config, Family
from edgeprune.planning.methods import baselines
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import remaining_shapes
from edgeprune.residency.compute import Compute, is_small
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.schedule import NoiseSchedule
from edgeprune.shapes import World
from edgeprune.stages import tail
from edgeprune.stages.costs import sample
from edgeprune.stages.memory import SAVED_WIDTHS, Memory
from edgeprune.stages.options import DataOptions, halvings
from edgeprune.stages.states import Maker, lot_of, state_bytes
from edgeprune.stages.weights import (
    PrunedWeights,
    by_block,
    half,
    mean_and_basis,
    original_weights,
    stand_ins_of,
    write_half,
)
from edgeprune.stages.work import Subject, Work, drawing
from edgeprune.stages.workspace import Workspace
from edgeprune.training.levels import FEW_STEPS, SHARE_ON_STEPS, default_levels
from edgeprune.training.parallel import Parallel, sharded
from edgeprune.training.rank_memory import ProcessLayout, forecast_rank
from edgeprune.training.recipe import EIGHT_BIT, HERE, DistillOptions, Placement, Recipe, in_prefix
from edgeprune.training.resume import precision_of
from edgeprune.training.teaching import frozen_weights, load_teacher, narrowed
from edgeprune.training.trained import rank_of
from edgeprune.training.whole import distill

PUBLISHED_STEPS, PUBLISHED_BATCH = 64_000, 64
"""The published training of SD3.5 Large Turbo (HierarchicalPrune, `run_distil_sd3L.sh`: 8 GPUs with a batch of 8)."""
CAPTIONS_DROPPED = 0.1
"""The fraction of samples trained without a caption, for models whose guidance evaluates the empty prompt too."""


def recipe_of(
    options: DistillOptions, plan: PrunePlan, family: Architecture, config: Config, generation: Generation
) -> Recipe:
    """Return how a plan is distilled: by its method and its model, with the options that are set on top.

    A baseline is distilled as its authors do. HierarchicalPrune grades updates by contribution together with
    fine-grained removal, so plans that remove whole blocks alone are not graded.
    """
    guided = family.guided(config, generation.guidance_scale)
    recipe = Recipe(
        levels=default_levels(generation.num_inference_steps),
        drop_captions=CAPTIONS_DROPPED if guided and options.guidance is None else 0.0,
    )
    if baseline := baselines().get(plan.method):
        recipe = replace(
            recipe, features=baseline.features, freeze_prefix=False, lambda_task=baseline.lambda_task,
            lambda_output=baseline.lambda_output, lambda_feature=baseline.lambda_feature,
        )  # fmt: skip
    elif plan.components:
        recipe = replace(recipe, sensitivity="graded")
    if options.guidance is not None:
        recipe = replace(recipe, lambda_task=0.0)  # the data's velocity is not guided
    recipe = replace(recipe, **tail.defaults(options, plan, frozen=options.over(recipe).freeze_prefix))
    return options.over(recipe)


def defaults_of(method: str) -> dict[str, Any]:
    """Return the constants that `recipe_of` takes for a method; results that were made with others are not current."""
    baseline = baselines().get(method)
    names = ("features", "lambda_task", "lambda_output", "lambda_feature")
    own = {name: getattr(baseline, name) for name in names} if baseline else {}
    return own | {"drop_captions": CAPTIONS_DROPPED, "few_steps": FEW_STEPS, "share_on_steps": SHARE_ON_STEPS}


def check_guidance(subject: Subject, options: DistillOptions) -> None:
    """Refuse to learn guidance that there is not.

    Raises:
        InputError: no second evaluation guides the model, or it does so at some noise levels alone.
    """
    scale = subject.generation.guidance_scale
    if options.guidance is not None and not (subject.generation.guides(0.0) and subject.generation.guides(1.0)):
        low, high = subject.generation.guidance_range
        raise InputError(
            f"--distill-guidance: the model is guided at noise levels from {low:g} to {high:g} (--guidance-range), "
            "expected at all; omit one of them"
        )
    if options.guidance is not None and not subject.family.guided(subject.config, scale):
        raise InputError(
            f"--distill-guidance: at guidance scale {scale:g} a step of this model is one evaluation already; omit it"
        )


def in_precision(
    options: DistillOptions, plan: PrunePlan, compute: Compute, begun: str | None = None
) -> DistillOptions:
    """Return the options with a number format: bf16 for a large model where that is multiplied, else float32.

    The weights that are trained stay in float32.

    Args:
        options: of the training.
        plan: what is pruned.
        compute: where it runs.
        begun: the format of a training that has begun, perhaps on another machine, which goes on with that.
    """
    if options.mixed_precision is not None:
        return options
    multiplied = compute.dtype(torch.bfloat16, plan.before.parameters) == torch.bfloat16
    return replace(options, mixed_precision=begun or ("bf16" if multiplied else "no"))


def _begun_precision(ws: Workspace, path: Path) -> str | None:
    """Return the number format of the training that a folder keeps, finished or not; None without one or with fresh."""
    if ws.fresh:
        return None
    stage = ws.manifest.stages.get("distill")
    return precision_of(path) if stage is None else str(stage["options"]["options"]["mixed_precision"])


def seen_by_quantize(ws: Workspace, options: DistillOptions, calibration: str, plan: PrunePlan) -> DistillOptions:
    """Return the options with the prefix rounded as `quantize` is asked to, unless they say otherwise.

    Args:
        ws: the workspace.
        options: of the training.
        calibration: of `quantize`.
        plan: what is pruned.
    """
    states = recipe_of(options, plan, ws.family, ws.config, ws.generation).states
    if not states or options.prefix_calibration is not None or options.int4_group_size is None:
        return options
    return replace(options, prefix_calibration=calibration)


def described(recipe: Recipe, options: DistillOptions, plan: PrunePlan, *, world: World | None) -> str:
    """Return a recipe in a line, and how its length compares with the published training."""
    parts = [
        f"lambda task {recipe.lambda_task:g}, output {recipe.lambda_output:g}, feature {recipe.lambda_feature:g} "
        f"({recipe.features})",
        "prefix frozen" if recipe.freeze_prefix else "all weights trained",
        "updates graded by contribution" if recipe.sensitivity == "graded" else "updates not graded",
        f"noise levels {recipe.levels}",
        f"{recipe.drop_captions:.0%} of captions dropped",
    ]
    if options.guidance is not None:
        parts.append(f"guidance of {options.guidance:g} learned")
    if recipe.states:
        parts.append(f"from {recipe.states} states a round, {recipe.rounds} rounds")
    if world is None:
        share = options.steps * options.batch / (PUBLISHED_STEPS * PUBLISHED_BATCH)
        parts.append(
            f"{options.steps} steps of {options.batch}, {share:.2g} of the published training's samples "
            f"({PUBLISHED_STEPS} steps of {PUBLISHED_BATCH})"
        )
    return f"distill: recipe of {plan.method}: {'; '.join(parts)}"


@dataclass(frozen=True)
class _Task:
    """A training whose options and data are checked."""

    ws: Workspace
    plan: PrunePlan
    options: DistillOptions
    recipe: Recipe
    """What those options became that follow from the plan and the model."""
    data: DataOptions
    source: str
    identity: list[Any]
    """Of the data."""

    @classmethod
    def checked(
        cls, ws: Workspace, options: DistillOptions, data: DataOptions, placement: Placement, progress: Progress
    ) -> _Task:
        """Check what the user asks for.

        Raises:
            InputError: nothing is pruned yet, scores are missing, or an option or the data is not usable.
        """
        ws.need("prune", "distill")
        ws.manifest.need_half(ws.out)
        options.check()
        plan = ws.plan()
        options = in_precision(options, plan, ws.original.compute, _begun_precision(ws, _state_path(ws)))
        recipe = recipe_of(options, plan, ws.family, ws.config, ws.generation)
        check_guidance(ws.subject, options)
        tail.check(plan, options, recipe, placement)
        device = ws.original.compute.device
        Parallel.check(options.mixed_precision or "no", options.batch, placement, device, options.optimizer)
        source = data.of_model(world=ws.world)
        if recipe.sensitivity == "graded" and ws.report() is None:
            found = "graded" if options.sensitivity else "graded, the default for plans that remove components"
            raise InputError(
                f"--sensitivity: found {found}: it needs contribution scores; run `edgeprune analyze`, or use off"
            )
        encoded = is_cache(source)
        if encoded:
            with processes.main_first():
                check_cache(ws, Path(source), progress)
        identity = [source_digest(source, ws.world), None if encoded else data.samples, ws.generation.to_json()]
        return cls(ws, plan, options, recipe, data, source, identity)

    def pairs(self, progress: Progress) -> Pairs:
        """Return what is trained on, encoded first unless it is a cache."""
        ws, encoded = self.ws, is_cache(self.source)
        progress(described(self.recipe, self.options, self.plan, world=ws.world))
        with processes.main_first():
            folder = Path(self.source) if encoded else self._encode(progress)
            return _open(ws, folder, progress)

    def _encode(self, progress: Progress) -> Path:
        """Make the folder's own cache, or what is missing of it; return where it is."""
        ws, options, drawing = self.ws, CacheOptions(self.source, self.data.samples), is_drawn(self.source)
        computed_in = ws.original.computed_in(drawing=drawing)
        made_of = [self.identity, ws.weights_hash, *([computed_in] if computed_in else [])]
        folder = ws.cache / f"data-{digest(made_of)[:12]}"
        settings = settings_of(ws.source, ws.generation, options, ws.variant, computed_in=computed_in)
        make_cache(
            lambda: ws.original.encoding(drawing=drawing), ws.source, folder, settings, ws.generation, options,
            progress=lambda done, total, note: progress("distill: latents", done, total, note),
        )  # fmt: skip
        progress(f"distill: data: {skip_report(folder)}")
        return folder

    @property
    def schedule(self) -> NoiseSchedule:
        """The original's noise levels."""
        ws = self.ws
        return NoiseSchedule.load(ws.source, ws.family, ws.config, ws.generation.num_inference_steps)

    def maker(self, progress: Progress) -> Maker:
        """Return what makes the states."""
        pairs = self.pairs(progress)
        return Maker(self.ws, self.plan, pairs, self.schedule, self.options, self.recipe, self.identity, progress)

    def states_bytes(self) -> int:
        """Return the bytes of a round of states."""
        return self.recipe.states * state_bytes(self.ws, self.recipe)


def run(
    ws: Workspace,
    options: DistillOptions,
    data: DataOptions,
    progress: Progress = silent,
    *,
    placement: Placement = HERE,
) -> bool:
    """Train the pruned transformer and write the averaged weights to `transformer/`; return whether the stage ran.

    Runs in one process or in several, see processes.py.

    Raises:
        InputError: nothing is pruned yet, scores are missing, or an option or the data is not usable.
        StaleStageError: see `Workspace.stage`.
        EdgepruneError: the loss is not finite; the last good state stays on disk.
    """
    task = _Task.checked(ws, options, data, placement, progress)
    options, recipe, plan, path = task.options, task.recipe, task.plan, _state_path(ws)

    def train(key: str) -> dict[str, Any]:
        result = dict[str, Any]()
        if not recipe.states:
            state, losses = _train_whole(task, path, key, placement, progress)
        else:
            maker = task.maker(progress)
            state, losses = tail.train_tail(ws, plan, maker, options, recipe, path, key, placement, progress)
            if options.int4_group_size is not None:
                result["prefix"] = {
                    "inputs": maker.prefix_key, "group_size": options.int4_group_size,
                    "calibration": recipe.prefix_calibration,
                }  # fmt: skip
        if processes.is_main():
            _write(ws, plan, state, key, options.guidance, progress)
        few = max(1, min(10, len(losses) // 2))
        first, last = losses[:few], losses[-few:]
        return result | {"first_loss": sum(first) / len(first), "last_loss": sum(last) / len(last)}

    inputs: dict[str, Any] = {"options": options.to_json(recipe), "data": task.identity}
    if recipe.levels == "steps":
        inputs["share_on_steps"] = SHARE_ON_STEPS

    def check() -> None:
        def total(steps: int) -> Work:
            return work(ws.subject, replace(options, steps=steps), data, plan)

        ways = [(f"--steps {fewer}", total(fewer)) for fewer in halvings(options.steps)]
        alone = processes.count() == 1 and not sharded()
        needed = memory(ws.memory, options, data, plan, placement) if alone else 0
        written = plan.after.bf16_bytes + task.states_bytes()
        ws.check_time("distill", total(options.steps), ways, progress, memory=needed, written=written)

    return ws.stage("distill", inputs, train, check)


def make_states(ws: Workspace, options: DistillOptions, data: DataOptions, progress: Progress = silent) -> list[Path]:
    """Make the states of the first round, and train nothing; `run` with the same options finds them.

    Returns:
        Their files.

    Raises:
        InputError: see `run`; or nothing would be trained from states; or several processes run.
        DiskError: the disk is full.
    """
    task = _Task.checked(ws, options, data, HERE, progress)
    if not task.recipe.states:
        raise InputError("--only-states: this training runs both models in every step; give --states N")
    if processes.count() > 1:
        raise InputError("--only-states: states are made in one process; omit --config, and do not launch several")
    one = replace(options, steps=1, states=task.recipe.states, rounds=1)
    total = drawn(ws.subject, data) + made(ws.subject, one, task.plan)
    ways = [(f"--states {n}", drawn(ws.subject, data) + made(ws.subject, replace(one, states=n), task.plan))
            for n in halvings(task.recipe.states)]  # fmt: skip
    needed = max(_data_bytes(ws.memory, data), _state_maker_bytes(ws.memory))
    ws.check_time("states", total, ways, progress, memory=needed, written=task.states_bytes())
    maker = task.maker(progress)
    ws.original.release()
    return maker.make(0)


def _state_path(ws: Workspace) -> Path:
    return ws.out / "cache" / "distill.safetensors"


def _train_whole(
    task: _Task, path: Path, key: str, placement: Placement, progress: Progress
) -> tuple[Tensors, list[float]]:
    """Train with teacher and student in memory; see `training.whole.distill`."""
    ws, plan, pairs = task.ws, task.plan, task.pairs(progress)
    with processes.main_first():
        mean, basis = mean_and_basis(ws, plan, ws.manifest.stages["prune"]["inputs"])
    pruned = prune_state(
        ws.family, ws.config, plan, original_weights(ws).__getitem__, mean, basis, stand_ins_of(ws, plan)
    )
    narrow, empty = narrowed(task.options, plan, sharded=sharded()), structure(ws.family, ws.config, plan)
    frozen = frozen_weights(ws.family, empty, plan, task.options, task.recipe) if narrow else set()
    for name in pruned.keys() - frozen:
        pruned[name] = pruned[name].float()  # this frees the narrow one
    student = build(ws.family, ws.config, plan, pruned)
    pruned.clear()  # what training replaces is free, too
    return distill(
        ws.family,
        _teacher(ws, task.options.teacher_precision, narrow=narrow),
        student,
        plan,
        ws.report(),
        pairs,
        task.options,
        task.recipe,
        task.schedule,
        path,
        inputs_digest=key,
        placement=placement,
        device=ws.original.compute.device,
        guidance=ws.generation.guidance_scale,
        progress=lambda done, total, loss: progress("distill", done, total, f"loss {loss:.4f}"),
    )


def work(subject: Subject, options: DistillOptions, data: DataOptions, plan: PrunePlan) -> Work:
    """Return the work of `run`: drawing images if the data is prompts, and training."""
    return drawn(subject, data) + trained(subject, options, plan)


def drawn(subject: Subject, data: DataOptions) -> Work:
    """Return the work of drawing the images that are trained on; none where there are images or a cache."""
    return drawing(subject, data.samples) if is_drawn(data.source or SHAPES) else Work()


def trained(subject: Subject, options: DistillOptions, plan: PrunePlan) -> Work:
    """Return the work of the training steps, and of making the states that they start from.

    A sample takes one evaluation of the teacher (two of a guided one) and three of the student: forward, and twice that
    backward. A frozen prefix runs forward only; a student whose weights are not rounded takes the prefix's result from
    the teacher. From states only what follows the prefix is run.
    """
    recipe = recipe_of(options, plan, subject.family, subject.config, subject.generation)
    prefix = plan.first_pruned / plan.num_blocks if recipe.freeze_prefix else 0.0
    learned = 3 * max(0.0, plan.after.parameters / plan.before.parameters - prefix)
    samples = options.steps * options.batch
    if not recipe.states:
        return Work(evaluations=samples * (_before(options, plan, prefix) + learned))
    taught = 1 - prefix if recipe.lambda_feature else 0.0
    return made(subject, options, plan) + Work(evaluations=samples * (learned + taught))


def made(subject: Subject, options: DistillOptions, plan: PrunePlan) -> Work:
    """Return the work of making the states of all rounds.

    A prefix that error feedback rounds is run twice by the first lot: for its inputs, and to send them on.
    """
    recipe = recipe_of(options, plan, subject.family, subject.config, subject.generation)
    prefix, states = plan.first_pruned / plan.num_blocks, recipe.states * recipe.rounds
    calibrating = 2 * prefix * lot_of(subject.numbers, recipe.states) if recipe.prefix_calibration != "none" else 0.0
    return Work(evaluations=states * _before(options, plan, prefix) + calibrating)


def _before(options: DistillOptions, plan: PrunePlan, prefix: float) -> float:
    """Return the evaluations of the teacher and of the frozen share `prefix` of the student that a sample takes."""
    shared = options.int4_group_size is None and plan.modulation_rank is None
    return (1 if options.guidance is None else 2) + (0.0 if shared else prefix)


def memory(of: Memory, options: DistillOptions, data: DataOptions, plan: PrunePlan, placement: Placement = HERE) -> int:
    """Return the bytes that `run` takes at least in one process: of its data, of states, and of the training.

    Args:
        of: the original.
        options: of the training.
        data: what it learns from.
        plan: what is pruned.
        placement: in how many micro-batches it trains, and what a GPU leaves on the CPU.
    """
    subject, options = of.subject, in_precision(options, plan, of.compute)
    recipe = recipe_of(options, plan, subject.family, subject.config, subject.generation)
    apart = (
        replace(placement, teacher_offload=False, ema_offload=False) if of.compute.device.type == "cpu" else placement
    )
    micro = replace(options, batch=options.batch // placement.accumulate)
    held = training_bytes(subject.family, subject.config, options, recipe, plan, apart)
    trained = of.process + held + _graph_bytes(of, micro, recipe, plan)
    return max(_data_bytes(of, data), trained, _state_maker_bytes(of) if recipe.states else 0)


def _data_bytes(of: Memory, data: DataOptions) -> int:
    """Return the bytes of memory that encoding, or drawing, the training data takes at least."""
    source = data.source or SHAPES
    return 0 if is_cache(source) else of.drawing(1) if is_drawn(source) else of.reading(1)


def _state_maker_bytes(of: Memory) -> int:
    """Return the bytes of memory that making states takes at least: a block of either model at a time."""
    return of.process + of.transformer(1)


def _graph_bytes(of: Memory, options: DistillOptions, recipe: Recipe, plan: PrunePlan) -> int:
    """Return the bytes that autograd keeps of a batch at least: of all trained blocks, or of one and all streams."""
    frozen = plan.first_pruned if recipe.freeze_prefix else 0
    blocks = sum(block >= frozen for block in plan.kept)
    widths = SAVED_WIDTHS * blocks if not options.gradient_checkpointing else SAVED_WIDTHS + blocks
    itemsize = 4 if options.mixed_precision in (None, "no") else 2
    return widths * of.subject.family.width(of.subject.config) * of.tokens * options.batch * itemsize


def training_bytes(
    family: Family,
    config: Config,
    options: DistillOptions,
    recipe: Recipe,
    plan: PrunePlan,
    placement: Placement = HERE,
) -> int:
    """Return the bytes of the tensors that training holds, without those that `placement` keeps elsewhere.

    They are the teacher's weights (four bits each, at least, if it is lowered) and the student's; where weights are
    trained, their gradients, two moments, the average and, of a small model that is trained rounded, the rounded
    weights (those of a large one are made again where they are needed). From states, all of them only of what follows
    the frozen prefix. Weights that are not trained are in 16 bits where `narrowed` says so. Of low-rank additions only
    the weights count, and their rounded sums.

    Args:
        family: the original's.
        config: of the original.
        options: of the training.
        recipe: what those options became that follow from the plan and the model.
        plan: what is pruned.
        placement: what a GPU leaves on the CPU.
    """
    prefix, rounded = 2 * _prefix_numbers(family, config, plan), options.int4_group_size is not None
    learned, wide = plan.after.bf16_bytes - prefix, 1 if narrowed(options, plan, sharded=False) else 2
    student = learned if recipe.states else plan.after.bf16_bytes
    trained = learned if recipe.freeze_prefix else student
    whole = wide * plan.before.bf16_bytes if options.teacher_precision == "float32" else plan.before.int4_bytes
    teacher = 0 if recipe.states or placement.teacher_offload else whole
    narrow = options.mixed_precision not in (None, "no")  # autograd keeps rounded weights as they are multiplied
    if rank_of(options.train) is not None:  # what is added is small
        return teacher + (1 + rounded) * (1 if recipe.states and narrow else wide) * student
    kept = rounded and is_small(plan.before.parameters)
    copies = 3 + (options.ema > 0 and not placement.ema_offload) - (1.5 if options.optimizer == EIGHT_BIT else 0)
    weights = 2 * trained + wide * (student - trained)
    return int(teacher + weights + (2 * copies + kept * (1 if narrow else 2)) * trained)


def _prefix_numbers(family: Family, config: Config, plan: PrunePlan) -> int:
    """Return how many numbers of the pruned model come before the first pruned block."""
    shapes = remaining_shapes(family, config, plan.blocks, plan.components, plan.modulation_rank, plan.stand_in_rank)
    left = family.shorter_config(config, plan.kept)
    return sum(math.prod(shape) for name, shape in shapes.items() if in_prefix(family, left, plan, name))


def amount(ws: Workspace) -> str:
    """Return how much the artefact was trained, in words, beside the published training where that compares."""
    stage = ws.manifest.stages.get("distill")
    options = stage["options"]["options"] if stage else {}
    done = f"{options['steps']:,} steps of {options['batch']}" if options else "not distilled"
    if options.get("guidance"):
        done += f", guidance of {options['guidance']:g} learned"
    return done if ws.world else f"{done}; published: {PUBLISHED_STEPS:,} steps of {PUBLISHED_BATCH}"


def check_cache(ws: Workspace, folder: Path, progress: Progress = silent) -> None:
    """Refuse a cache that other encoders than this model's made. Their files are hashed once, and not loaded.

    Raises:
        InputError: the cache was made by other encoders, or with other settings.
    """
    index = Index.load(folder)
    drawn = "transformer" in index.settings
    absent = index.check_made_by(made_by(ws.source, ws.generation, drawn=drawn, variant=ws.variant), folder)
    if absent:
        progress(
            f"distill: {folder} records its encoders; the weights of {', '.join(absent)} are missing here, so they "
            "were not compared"
        )


def _open(ws: Workspace, folder: Path, progress: Progress) -> Pairs:
    """Open a cache, and verify its files."""
    return open_pairs(
        folder, ws.family, ws.config,
        progress=lambda done, total: progress("distill: checking", done, total, ""),
    )  # fmt: skip


def _teacher(ws: Workspace, precision: str, *, narrow: bool) -> Any:
    """Return the original transformer: a copy of its own where training changes its precision or shards it.

    Args:
        ws: the workspace.
        precision: of its weights.
        narrow: those of blocks stay in the dtype of their file, see `narrowed`.
    """
    ws.original.release_surroundings()  # everything is encoded
    small = is_small(ws.plan().before.parameters) and ws.original.compute == Compute()
    if small and precision == "float32" and processes.count() == 1:
        return ws.teacher
    ws.original.release()
    return load_teacher(open_transformer(ws.source, quantized=False, variant=ws.variant), precision, narrow=narrow)


def _write(
    ws: Workspace, plan: PrunePlan, state: Tensors, key: str, guidance: float | None, progress: Progress
) -> None:
    """Write the trained tensors, the frozen ones that training did not have as `prune` makes them, and how to draw."""
    pruned = PrunedWeights(ws, plan, ws.manifest.stages["prune"]["inputs"])
    blocks = by_block(ws, {name: 2 * math.prod(shape) for name, shape in pruned.shapes.items()}, plan)

    def tensor(name: str, block: int) -> torch.Tensor:
        frozen = plan.kept[block] < plan.first_pruned if block < len(plan.kept) else not name.startswith(ws.family.tail)
        return pruned[name] if frozen and name not in state else half(state[name])

    def make(index: int) -> Tensors:
        return {name: tensor(name, index) for name in blocks[index]}

    write_half(ws, plan, blocks, make, key, progress)
    (ws.generation if guidance is None else ws.generation.without_guidance()).save(ws.out)


def forecast(ws: Workspace, options: DistillOptions, placement: Placement, config: Path | None) -> dict[str, int]:
    """Forecast the memory of `distill`: bytes that one process holds, see rank_memory.py.

    Args:
        ws: the workspace.
        options: of the training.
        placement: where it runs.
        config: a file of accelerate's settings; None for one process.

    Raises:
        InputError: there is no plan yet, or an option or the settings are not usable.
    """
    options.check()
    check_guidance(ws.subject, options)
    layout = ProcessLayout.of_launch_file(config) if config else ProcessLayout()
    one, plan = sample(ws.family, ws.config, ws.source, ws.generation), ws.plan()
    options = in_precision(options, plan, ws.original.compute)
    recipe = recipe_of(options, plan, ws.family, ws.config, ws.generation)
    return forecast_rank(ws.family, ws.config, plan, ws.report(), options, recipe, placement, layout, one)
