"""The options of each stage. They enter the stages' digests through `asdict`: keep the names and order of the fields.

`plan` and `distill` take PlanOptions (planning/options.py) and DistillOptions (training/recipe.py).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgeprune.analysis.estimators import AUTO, estimator_named
from edgeprune.common.errors import InputError
from edgeprune.data.settings import CAPTIONS, SHAPES
from edgeprune.families import Config, Family
from edgeprune.metrics import VELOCITY
from edgeprune.planning.options import PlanOptions
from edgeprune.quantization.precision import TEXT_INT4, TEXT_INT8
from edgeprune.quantization.quantize import CALIBRATIONS
from edgeprune.residency.compute import is_small
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import World
from edgeprune.training.recipe import ADAMW, HERE, DistillOptions, Placement

GIVE_DATA = (
    "give --data FOLDER (images with captions), or --data captions: the model first draws 1,024 images for captions "
    "that come with edgeprune; --dry-run shows the cost"
)
"""What to do if a model that draws no shapes world has no data to be distilled on."""
COUNTED_BY, COUNTED_BY_COMPRESS = "--count", "--calibration-count"
"""What sets the number of prompts that calibrate INT4 in `quantize`, and in `compress`."""
GROUP_SIZES = (16, 32, 64, 128)
LARGE_PROMPTS, LARGE_STATES = 2, 2
"""That calibrate a large model by default: SD3.5 Large at 1024x1024 then takes about an hour on two cores with bf16."""


def seen(generation: Generation, states: int | None) -> Generation:
    """Return the settings of trajectories with at most so many states; None leaves that to the velocity metric."""
    if states is None:
        return generation
    return replace(generation, num_inference_steps=min(states, generation.num_inference_steps))


def encoders_of(given: str | None, int4: QuantizeOptions) -> str:
    """Return how a T5 or Qwen3 is exported: INT4 is calibrated, so without calibration it has 8 bits by default.

    Args:
        given: one of precision.ENCODERS; None for the default.
        int4: as the user gave them.
    """
    if given is not None:
        return given
    return TEXT_INT8 if int4.calibration == "none" else TEXT_INT4


def halvings(count: int) -> list[int]:
    """Return smaller numbers to offer where `count` takes too long: 28 gives 14, 7, 3, 1."""
    return [count // 2**n for n in range(1, count.bit_length())]


@dataclass(frozen=True)
class AnalyzeOptions:
    """Options of `analyze`."""

    metric: str = "velocity"
    prompts: str | None = None
    """A text file. By default the analysis split of the metric's own prompts; else, for a teacher of shapes world, of
    its world; else of edgeprune's captions."""
    count: int = 28
    """How many prompts to use."""
    components: bool = True
    """Score components as well as whole blocks."""
    weights: dict[str, str] = field(default_factory=dict)
    """Paths of the metric's weights by name, see metrics.KNOWN."""
    joint: bool = False
    """Also score groups of components of one block, see contribution.TOGETHER."""
    pairs: bool = False
    """Also score every pair of parts."""
    estimator: str = AUTO
    """How scores are obtained, see analysis/estimators/. AUTO is `exhaustive` where that is cheap: for a small model,
    and for metrics that others cannot estimate; else `gates`."""
    states: int | None = None
    """Most states of each prompt's trajectory, for the velocity; None takes velocity.STATES."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as stages digest them; folders that were analyzed before `states` stay current."""
        data = asdict(self)
        if self.states is None:
            del data["states"]
        return data

    def chosen(self, family: Family, config: Config) -> AnalyzeOptions:
        """Return the options for a model: AUTO is replaced by a name.

        Raises:
            InputError: the metric has no states.
        """
        if self.states is not None and self.metric != VELOCITY:
            raise InputError(f"--states works with --metric {VELOCITY} only, found {self.metric}")
        if self.estimator != AUTO:
            return self
        large = not is_small(sum(map(math.prod, family.tensor_shapes(config).values())))
        fits = large and self.metric in (estimator_named("gates", "velocity").metrics or ())
        return replace(self, estimator="gates" if fits else "exhaustive")


@dataclass(frozen=True)
class DataOptions:
    """What `distill` learns from, see data/."""

    source: str | None = None
    """`shapes`, `captions`, a cache, a folder of images, or a text file of prompts. None is `shapes` for a teacher of
    shapes world; other models are not distilled then."""
    samples: int = 1024
    """How many samples to make, or to take from a stream; a cache or a folder of images is used whole."""

    def of_model(self, *, world: World | None) -> str:
        """Return the source for a model that draws a world, or none.

        Raises:
            InputError: a model that draws none has no source, or one that does has captions that it cannot understand.
        """
        if world and self.source == CAPTIONS:
            raise InputError(
                f"--data {CAPTIONS}: a teacher of shapes world understands only its own; give --data {SHAPES}"
            )
        if self.source or world:
            return self.source or SHAPES
        raise InputError(f"no data to distill on; {GIVE_DATA}")


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of `quantize`."""

    group_size: int = 64
    """Weights that share a scale."""
    calibration: str = AUTO
    """One of quantize.CALIBRATIONS; `feedback` runs the model on prompts that were given to `analyze`, else on those of
    the calibration split. AUTO is `none` for weights that were trained as they are rounded, else `feedback`."""
    count: int | None = None
    """Most prompts that calibrate; None takes all that were given, else quantize.PROMPTS of the split. Of a large model
    it takes LARGE_PROMPTS."""
    states: int | None = None
    """Most states of each prompt's trajectory; None takes velocity.STATES, of a large model LARGE_STATES."""

    def calibrates(self, *, rounded: bool) -> bool:
        """Return whether the model runs to choose integers; see `chosen`."""
        return self.calibration == "feedback" or (self.calibration == AUTO and not rounded)

    def chosen(self, *, rounded: bool, large: bool, counted_by: str = COUNTED_BY) -> QuantizeOptions:
        """Return the options for a model, without AUTO.

        Args:
            rounded: its weights were trained as they are rounded.
            large: it is a large one.
            counted_by: the option that sets `count`, for messages.

        Raises:
            InputError: an option is not usable.
        """
        if self.calibration not in (AUTO, *CALIBRATIONS):
            known = ", ".join((AUTO, *CALIBRATIONS))
            raise InputError(f"--calibration: found {self.calibration!r}, expected one of {known}")
        if self.group_size not in GROUP_SIZES:
            raise InputError(f"--group-size: found {self.group_size}, expected 16, 32, 64 or 128")
        if self.calibrates(rounded=rounded):
            count, states = (LARGE_PROMPTS, LARGE_STATES) if large else (None, None)
            return replace(self, calibration="feedback", count=self.count or count, states=self.states or states)
        if (self.count, self.states) != (None, None):
            given = "--states" if self.count is None else counted_by
            why = "training saw these weights rounded to the nearest, so they are not calibrated; omit it"
            raise InputError(f"{given}: {why if self.calibration == AUTO else 'excludes --calibration none; omit one'}")
        return replace(self, calibration="none")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as stages digest them; folders that were quantized before `count` stay current."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class CompressOptions:
    """The options of all stages that `compress` runs."""

    analyze: AnalyzeOptions = field(default_factory=AnalyzeOptions)
    plan: PlanOptions = field(default_factory=PlanOptions)
    data: DataOptions = field(default_factory=DataOptions)
    distill: DistillOptions | None = field(default_factory=DistillOptions)
    """None skips distillation."""
    placement: Placement = HERE
    """In how many micro-batches it trains; no result depends on that."""
    quantize: QuantizeOptions = field(default_factory=QuantizeOptions)
    encoders: str | None = None
    """How a T5 or Qwen3 is exported, one of precision.ENCODERS; None for the default, see `encoders_of`."""

    @property
    def text_form(self) -> str:
        """How a T5 or Qwen3 is exported."""
        return encoders_of(self.encoders, self.quantize)

    @property
    def reads_scores(self) -> bool:
        """Whether the plan or the training needs contribution scores.

        Training does if it is graded, which by default it is for plans that remove components.
        """
        if self.plan.scored or self.distill is None or self.distill.sensitivity == "off":
            return self.plan.scored
        return self.distill.sensitivity == "graded" or bool(self.plan.components)

    @property
    def rounded(self) -> bool:
        """Whether weights are trained as they are rounded."""
        return self.distill is not None and self.distill.int4_group_size == self.quantize.group_size

    def settled(self, numbers: int) -> CompressOptions:
        """Return the options with `quantize` and the form of a text encoder resolved for a model of so many weights.

        Raises:
            InputError: an option of `quantize` is not usable.
        """
        int4 = self.quantize
        if int4.calibration == AUTO and self.rounded:  # --states is the analysis's, too
            int4 = replace(int4, states=None)
        large = not is_small(numbers)
        chosen = int4.chosen(rounded=self.rounded, large=large, counted_by=COUNTED_BY_COMPRESS)
        return replace(self, quantize=chosen, encoders=self.text_form)

    def check_data(self, *, world: World | None) -> None:
        """Check that there is something to distill on, unless nothing is distilled.

        Raises:
            InputError: see `DataOptions.of_model`.
        """
        if self.distill is not None:
            self.data.of_model(world=world)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a grid's runs digest them."""
        own = {"analyze": self.analyze.to_json(), "plan": self.plan.to_json(), "quantize": self.quantize.to_json()}
        data = asdict(self) | own
        del data["placement"]
        if self.distill is not None and self.distill.optimizer == ADAMW:  # older grids and folders stay current
            del data["distill"]["optimizer"]
        data["encoders"] = self.text_form
        if self.text_form == TEXT_INT4:
            del data["encoders"]
        return data
