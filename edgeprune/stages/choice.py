"""What `compress --time` chooses: how much of each stage fits in a time, from speeds that are measured here.

What the options ask for is the most. MOVES lists what is given up, the cheapest to miss first, until the stages fit.
Then each of these moves is taken back, the last one first, if the stages still fit without it. The choice is made once:
`edgeprune.json` keeps it, and a run that resumes follows it, however fast the machine is by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.artefact.manifest import MANIFEST
from edgeprune.artefact.resolve import read_original
from edgeprune.common.errors import BudgetError, InputError, StaleStageError
from edgeprune.common.fields import real_number, text, whole_number
from edgeprune.common.files import digest
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import Progress
from edgeprune.common.tables import duration
from edgeprune.data.settings import SHAPES, is_drawn
from edgeprune.metrics import VELOCITY
from edgeprune.metrics.velocity import STATES
from edgeprune.planning.options import PlanOptions
from edgeprune.quantization.precision import TEXT_INT4, TEXT_INT8
from edgeprune.residency.compute import Compute, is_small
from edgeprune.residency.model_files import model_files
from edgeprune.sampling.generation import Generation
from edgeprune.stages import quantize
from edgeprune.stages.compress import expected_plan, images_of_report, works
from edgeprune.stages.options import CompressOptions
from edgeprune.stages.original import Original
from edgeprune.stages.prompts import analysis_prompts
from edgeprune.stages.work import Speeds, Subject, Work, measured
from edgeprune.stages.workspace import Workspace

SHARE = 0.75
"""Share of the time that the counted work may take: the rest is for what is not counted, and for a slower moment."""
_ENOUGH = 0.9
"""Share of the memory that a run began in, with which it goes on as if all of it were there: a part is left free."""
WITHOUT_SCORES = "uniform"
"""The method that plans by position alone, where no analysis fits."""
Move = tuple[str, Any]
NO_SCORES: Move = ("prompts", 0)
"""The last move. It is not made where a plan by position cannot meet the budget."""
WIDE_TEXT: Move = ("int4_text", 0)
"""Not made where a text encoder in 8 bits does not fit the device."""
MOVES: tuple[Move, ...] = (
    ("estimator", "gates"),
    ("images", 4), ("images", 2), ("prompts", 14), ("prompts", 7), ("calibration", 14), ("calibration", 7),
    ("training", 0.5), ("training", 0.25), ("training", 0.125),
    WIDE_TEXT, ("image_steps", 14), ("image_steps", 8), ("calibration", 2), ("prompts", 2),
    ("calibration", 1), ("prompts", 1), ("images", 1), ("image_steps", 4),
    ("training", 0.0), ("states", 3), ("calibration", 0), ("image_steps", 1), ("states", 1),
    ("images", 0), ("stand_ins", 0), NO_SCORES,
)  # fmt: skip
"""Fields of `Choice`, and what each is lowered to. `training` is a share of the steps and of the images drawn for them.
Less than an eighth of the training is none."""


@dataclass(frozen=True)
class Choice:
    """How much of each stage runs."""

    time_s: float
    """What was given."""
    of: str
    """Digest of the options that it was chosen for."""
    forecast_s: float
    """What the stages were expected to take."""
    estimator: str
    prompts: int
    """That the analysis scores on; 0 without an analysis."""
    states: int
    """Most states of each prompt's trajectory."""
    calibration: int
    """Prompts that calibrate INT4; 0 without calibration."""
    steps: int
    """Of the training; 0 without one."""
    samples: int
    """That are drawn, or taken, to train on."""
    images: int
    """Of each model, in the report; 0 without a report."""
    image_steps: int
    calibration_states: int = STATES
    """Most states of each prompt that calibrates."""
    stand_ins: int = 0
    """1 if removed runs of blocks are stood in for."""
    int4_text: int = 1
    """0 if a T5 or Qwen3 has 8 bits instead of INT4."""
    memory: int = 0
    """Bytes that a large model's run on a processor may take: those that were free at its start, where none were given.
    Row counts follow from it, so a run that resumes goes on to the same bytes. 0 in all other runs."""

    @classmethod
    def of_manifest(cls, ws: Workspace) -> Choice | None:
        """Return the choice that a folder keeps; None without one.

        Raises:
            InputError: it is damaged.
        """
        found, where = ws.manifest.choice, f"{ws.out / MANIFEST}: choice"
        if found is None:
            return None
        for name in ("of", "estimator"):
            text(found, name, where)
        for name in ("time_s", "forecast_s"):
            real_number(found, name, where, least=0, most=1e10)
        for name in ("prompts", "states", "calibration", "steps", "samples", "images", "image_steps"):
            whole_number(found, name, where, least=0, most=10**9)
        # Versions before lack them.
        added = {"stand_ins": 0, "int4_text": 1, "calibration_states": STATES, "memory": 0} | found
        for name in ("stand_ins", "int4_text"):
            whole_number(added, name, where, least=0, most=1)
        whole_number(added, "calibration_states", where, least=0, most=STATES)
        whole_number(added, "memory", where, least=0, most=10**15)
        try:
            return cls(**added)
        except TypeError as error:
            raise InputError(f"{where}: not a choice of this version ({error}); use another -o") from error

    def lowered(self, moves: Sequence[Move], *, drawn: bool) -> Choice:
        """Return the choice with each field that is above what a move says at that.

        Args:
            moves: of MOVES.
            drawn: whether images are drawn to train on; then fewer steps take fewer of them.
        """
        found = self
        for name, value in moves:
            if name == "training":
                samples = max(1, int(self.samples * value)) if drawn else self.samples
                found = replace(found, steps=int(self.steps * value), samples=samples)
            elif name == "estimator" or getattr(found, name) > value:
                found = replace(found, **{name: value})
            if name == "states":
                found = replace(found, calibration_states=min(found.calibration_states, value))
        return found

    def over(self, options: CompressOptions, kinds: Mapping[str, range]) -> CompressOptions:
        """Return the options with this choice on top.

        Args:
            options: of all stages.
            kinds: the original's blocks of each kind.
        """
        analysis, plan, training, int4 = options.analyze, options.plan, options.distill, options.quantize
        if self.prompts:
            states = self.states if analysis.metric == VELOCITY and self.states < STATES else None
            analysis = replace(analysis, estimator=self.estimator, count=self.prompts, states=states)
        elif options.reads_scores:
            plan = _without_scores(plan, kinds)
        if not self.stand_ins:
            plan = replace(plan, stand_in=None)
        if training is not None:
            unscored = not self.prompts and training.sensitivity == "graded"
            training = replace(training, steps=self.steps, sensitivity=None if unscored else training.sensitivity)
        data, training = replace(options.data, samples=self.samples), training if self.steps else None
        form = TEXT_INT8 if options.text_form == TEXT_INT4 and not self.int4_text else options.text_form
        found = replace(options, analyze=analysis, plan=plan, data=data, distill=training, encoders=form)
        if self.calibration and int4.calibrates(rounded=found.rounded):
            most = self.calibration_states if self.calibration_states < STATES else int4.states
            return replace(found, quantize=replace(int4, calibration="feedback", count=self.calibration, states=most))
        return replace(found, quantize=replace(int4, calibration="none", count=None, states=None))

    def described(self) -> str:
        """Return the choice in a line."""
        scored = f"prompts scored by {self.estimator}: {self.prompts}, at up to {self.states} noise levels"
        parts = [
            scored if self.prompts else "no scores: the plan goes by position, or by your list",
            f"training steps: {self.steps}" if self.steps else "no training",
            *([f"prompts that calibrate: {self.calibration}"] if self.calibration else []),
            *(["stand-ins for removed blocks"] if self.stand_ins else []),
            *([] if self.int4_text else ["text encoder in 8 bits"]),
            f"images in the report: {self.images}, of {self.image_steps} steps" if self.images else "no report",
        ]
        return f"--time {duration(self.time_s)}: about {duration(self.forecast_s)}; {'; '.join(parts)}"


def _without_scores(plan: PlanOptions, kinds: Mapping[str, range]) -> PlanOptions:
    """Return the options of a plan by position: the same budget and protected blocks, without what needs scores."""
    half, first = sum(map(len, kinds.values())) // 2, plan.protect_first
    if first is None:
        first = half
    elif isinstance(first, dict):  # kinds that are not named keep the default of a plan by scores
        first = {kind: sum(block < half for block in blocks) for kind, blocks in kinds.items()} | first
    return replace(
        plan, method=WITHOUT_SCORES, threshold=PlanOptions.threshold, keep_components=(), protect_first=first
    )


def choose(subject: Subject, options: CompressOptions, time_s: float, speeds: Speeds, *, quick: bool = False) -> Choice:
    """Choose how much of each stage runs.

    Args:
        subject: the original.
        options: of all stages; what they ask for is the most.
        time_s: seconds that all stages and the report may take.
        speeds: of this machine.
        quick: the report draws few images.

    Raises:
        BudgetError: no plan meets the budget.
        InputError: an option is not usable.
    """
    options.settled(subject.numbers)
    expected = expected_plan(subject.source, subject.generation, options)
    kinds = subject.family.kinds(subject.config)
    drawn = is_drawn(options.data.source or SHAPES)
    files = Work(moved=sum(path.stat().st_size for path in model_files(subject.source)))

    def seconds(choice: Choice) -> float:
        stages = works(subject, choice.over(options, kinds), expected, choice.images, choice.image_steps)
        return speeds.seconds(sum(stages.values(), files))

    most = _most(subject, options, time_s, quick=quick)
    fixed = {"images"} if subject.world else set()  # its checker scores the same number of each task
    fixed |= set() if options.analyze.metric == VELOCITY else {"estimator", "states"}
    able, moves = [move for move in MOVES if move[0] not in fixed], list[Move]()
    for move, needless in ((NO_SCORES, not most.prompts), (WIDE_TEXT, options.text_form != TEXT_INT4)):
        if not needless and not _suffices(subject, replace(most, **dict([move])).over(options, kinds)):
            able.remove(move)
    while seconds(most.lowered(moves, drawn=drawn)) > SHARE * time_s and len(moves) < len(able):
        moves = able[: len(moves) + 1]
    for move in moves[::-1]:
        others = [other for other in moves if other != move]
        if seconds(most.lowered(others, drawn=drawn)) <= SHARE * time_s:
            moves = others
    chosen = most.lowered(moves, drawn=drawn)
    if chosen.over(options, kinds).quantize.calibration == "none":
        chosen = replace(chosen, calibration=0)
    return replace(chosen, forecast_s=round(seconds(chosen), 1))


def _suffices(subject: Subject, options: CompressOptions) -> bool:
    """Return whether a plan with these options meets the budget."""
    try:
        expected_plan(subject.source, subject.generation, options)
    except BudgetError:
        return False
    return True


def _most(subject: Subject, options: CompressOptions, time_s: float, *, quick: bool) -> Choice:
    """Return the choice that is what the options ask for."""
    analysis, int4 = options.analyze.chosen(subject.family, subject.config), options.quantize
    steps = subject.generation.num_inference_steps
    # Training may be given up; then integers are calibrated.
    calibrated = int4.calibrates(rounded=False)
    most = int4.chosen(rounded=False, large=not is_small(subject.numbers)) if calibrated else int4
    return Choice(
        time_s=time_s,
        of=_digest(subject, options, quick=quick),
        forecast_s=0.0,
        estimator=analysis.estimator,
        prompts=len(analysis_prompts(analysis, world=subject.world)) if options.reads_scores else 0,
        states=min(analysis.states or int4.states or STATES, STATES),
        calibration=most.count or quantize.PROMPTS if calibrated else 0,
        calibration_states=most.states or STATES,
        steps=options.distill.steps if options.distill else 0,
        samples=options.data.samples,
        images=images_of_report(subject.world, quick),
        image_steps=steps,
        stand_ins=int(options.plan.stand_in is not None),
    )


def _digest(subject: Subject, options: CompressOptions, *, quick: bool) -> str:
    return digest([options.to_json(), subject.generation.to_json(), quick])


def rehearse_choice(
    source: Path,
    options: CompressOptions,
    generation: Generation,
    time_s: float,
    variant: str | None,
    compute: ComputeOptions | None,
    scratch: Path,
    *,
    quick: bool,
) -> tuple[Choice, CompressOptions]:
    """Return what `settle` would choose now for a new folder, and the options with that on top.

    Args:
        source: the pipeline's folder.
        options: of all stages.
        generation: how images are made.
        time_s: seconds that all stages and the report may take.
        variant: of the weights, see residency/model_files.py.
        compute: where networks run; None takes what this machine has.
        scratch: a folder on the disk that would be written to.
        quick: the report draws few images.

    Raises:
        InputError: see `choose`.
    """
    config, family = read_original(source)
    subject, place = Subject(source, family, config, generation), Compute.of(compute or ComputeOptions())
    speeds = measured(subject, Original(source, variant, place).stored, place, scratch)
    choice = choose(subject, options, time_s, speeds, quick=quick)
    return choice, choice.over(options, family.kinds(config))


def settle(
    ws: Workspace, options: CompressOptions, time_s: float | None, progress: Progress, *, quick: bool = False
) -> Choice | None:
    """Return the choice that a folder keeps, or make it; None without `time_s` in a folder that keeps none.

    Args:
        ws: the folder's workspace.
        options: of all stages.
        time_s: seconds that all stages and the report may take; None is what the folder was begun with.
        progress: gets a line that says what was chosen.
        quick: the report draws few images.

    Raises:
        StaleStageError: the folder was begun with another time or with other options, and `fresh` is not set.
        InputError: see `choose`.
    """
    known, of = Choice.of_manifest(ws), _digest(ws.subject, options, quick=quick)
    if known is None and time_s is None:
        return None
    if known and known.of == of and time_s in (None, known.time_s):
        progress(known.described())
        _go_on_in(ws, known.memory, progress)
        return known
    if not ws.fresh and (known or ws.manifest.stages):
        begun = f"with --time {duration(known.time_s)}" if known else "without --time"
        differs = " and other options" if known and known.of != of else ""
        raise StaleStageError(f"{ws.out}: begun {begun}{differs}; use --fresh to choose again, or another -o")
    wanted = time_s or (known.time_s if known else 0.0)
    speeds = measured(ws.subject, ws.original.stored, ws.original.compute, ws.cache)
    choice = choose(ws.subject, options, wanted, speeds, quick=quick)
    place = ws.original.compute
    if place.memory is None and place.device.type == "cpu" and not is_small(ws.subject.numbers):
        choice = replace(choice, memory=place.left() + place.taken())
    ws.keep_choice(asdict(choice))
    ws.limit_memory(choice.memory)
    progress(choice.described())
    return choice


def _go_on_in(ws: Workspace, memory: int, progress: Progress) -> None:
    """Take as much memory as the run began in, unless clearly less is there now, or it is about another device."""
    place = ws.original.compute
    if not memory or place.memory is not None or place.device.type != "cpu":
        return
    if (here := place.left() + place.taken()) < _ENOUGH * memory:
        progress(
            f"memory: {here / 1e9:.1f} GB are free, {memory / 1e9:.1f} GB were when this began; fewer rows run "
            "together, so last bits may differ"
        )
    else:
        ws.limit_memory(memory)
