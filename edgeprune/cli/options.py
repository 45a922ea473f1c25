"""Options that several commands share, and the functions that turn their text into values.

Options with a fixed list of names are choices (choices.py). Registries that import torch are repeated here as tuples;
tests/cli/test_choices.py compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.choices import analysis_metrics, choice, devices, group_sizes, methods, runtimes, solvers
from edgeprune.common.errors import InputError

if TYPE_CHECKING:
    from edgeprune.planning.options import PlanOptions

ENCODERS = ("int4", "int8", "half")
CALIBRATIONS = ("auto", "none", "feedback")
ESTIMATORS = ("auto", "exhaustive", "reuse", "gates")
FEATURES = ("blocks", "attention")
LEVELS = ("shifted", "steps", "uniform")
MIXED_PRECISIONS = ("no", "bf16", "fp16")
PREFIX_CALIBRATIONS = CALIBRATIONS[1:]
PRESETS = ("default", "quick")
SCHEDULES = ("constant", "cosine")
OPTIMIZERS = ("adamw", "adamw8bit")
SENSITIVITIES = ("graded", "off")
BINARY = "the reference's binary form is the frozen prefix (PWP), with all parts after it trained alike; use off"
TEACHER_PRECISIONS = ("float32", "bf16", "int8")


# Panels of the help.
BUDGET, METHOD, ANALYSIS, TRAINING, INT4, IMAGES = "Budget", "Method", "Analysis", "Training", "INT4", "Images"
ORIGINAL = "Original"
RECIPE = "Recipe"

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Diffusers folder or hub id.",
        show_default="the folder's own model, else the built-in one",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Branch, tag or commit of the hub id.",
        show_default="its default branch",
        rich_help_panel=ORIGINAL,
    ),
]
Variant = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Variant of the original's weights, such as fp16.",
        show_default="the full weights, or the only ones that there are",
        rich_help_panel=ORIGINAL,
    ),
]
Out = Annotated[
    Path, typer.Option("-o", "--out", metavar="DIR", help="Artefact folder to create, or to resume if it exists.")
]
BegunFolder = Annotated[
    Path, typer.Option("-o", "--out", metavar="DIR", help="Artefact folder that `analyze` or `compress` began.")
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Redo stages that were done with other inputs. Without it they are refused.")
]
NoHalf = Annotated[
    bool,
    typer.Option(
        "--no-half",
        help="Do not write the pruned weights in half precision: INT4 is made from the original. Not with training.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the expected cost and stop. Nothing is written.")]


def weights_of_metrics(panel: str | None = None) -> Any:
    """Return the option `--weights`."""
    return typer.Option(
        "--weights",
        metavar="NAME=PATH",
        help="Weights of a metric, such as clip=./clip. Repeat the option for several: geneval needs clip as well.",
        rich_help_panel=panel,
    )


Metric = Annotated[
    str,
    choice(
        names=analysis_metrics, rich_help_panel=ANALYSIS,
        help="How parts are scored. velocity measures the transformer's output error and draws no images; the others "
        "score images. psnr, ssim and lpips compare with the original's images.",
    ),
]  # fmt: skip
MetricWeights = Annotated[list[str] | None, weights_of_metrics(ANALYSIS)]
Prompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Text file with one prompt per line.",
        show_default="the metric's own prompts, else captions of edgeprune that nothing else uses",
        rich_help_panel=ANALYSIS,
    ),
]
Count = Annotated[
    int | None,
    typer.Option(min=1, help="Number of prompts.", show_default="28; 7 with --preset quick", rich_help_panel=ANALYSIS),
]
States = Annotated[
    int | None,
    typer.Option(
        min=1, max=6,
        help="Noise levels at which each prompt is seen; --metric velocity and --calibration only.",
        show_default="6, or the steps of an image where these are fewer; 2 where a large model is calibrated",
        rich_help_panel=ANALYSIS,
    ),
]  # fmt: skip
Estimator = Annotated[
    str | None,
    choice(
        names=lambda: ESTIMATORS, rich_help_panel=ANALYSIS, show_default="auto; gates with --preset quick",
        help="How scores are obtained. exhaustive runs the model without each part. reuse gives the same numbers "
        "for half the work, gates estimates them from gradients in one pass; both need --metric velocity. auto is "
        "exhaustive for a small model, else gates.",
    ),
]  # fmt: skip
Keep = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Share of the transformer's parameters to keep at most, such as 0.79.",
        show_default="0.79 without another budget",
        rich_help_panel=BUDGET,
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Bytes that the transformer's INT4 weights may take, such as 3.2GB.",
        rich_help_panel=BUDGET,
    ),
]
FitTo = Annotated[
    str | None,
    choice(
        "--fit", names=devices, rich_help_panel=BUDGET,
        help="Device whose memory sets the budget; see `edgeprune targets`.",
    ),
]  # fmt: skip
Method = Annotated[
    str | None,
    choice(
        names=methods, rich_help_panel=METHOD,
        show_default="hpp; hybrid for teachers of shapes world; manual with --blocks",
        help="How parts are chosen. hpp removes whole blocks, hybrid also components, milp solves an integer "
        "program for the best set, "
        "manual takes your list. The others are baselines to compare with.",
    ),
]  # fmt: skip
ProtectFirst = Annotated[
    str | None,
    typer.Option(
        metavar="N|KIND=N,...",
        help="Number of leading blocks that are never removed: of all, or of each kind of block, such as "
        "joint=10,single=5. Kinds that you do not name keep their default.",
        show_default="half of all; 0 for teachers of shapes world",
        rich_help_panel=METHOD,
    ),
]
ProtectLast = Annotated[
    int | None,
    typer.Option(
        min=0, help="Number of trailing blocks that are never removed.", show_default="2", rich_help_panel=METHOD
    ),
]
KeepComponents = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="hybrid and milp only: component types that no block loses on its own, such as norm,attn.",
        show_default="none",
        rich_help_panel=METHOD,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="hybrid only: share of the parameters to remove as whole blocks before removing components. What "
        "--modulation-rank saves does not count.",
        show_default="0.15; 0 for teachers of shapes world",
        rich_help_panel=METHOD,
    ),
]
Blocks = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="manual only: blocks to remove, as closed ranges such as 25-28,31.",
        show_default="none",
        rich_help_panel=METHOD,
    ),
]
Components = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="manual only: components to remove, such as 30:mlp,30:context_mlp.",
        show_default="none",
        rich_help_panel=METHOD,
    ),
]
ModulationRank = Annotated[
    str | None,
    typer.Option(
        metavar="auto|R|full",
        help="Directions of the modulation input to keep: a number, auto (measures how many matter) or full (all).",
        show_default="auto if less than 0.75 of the parameters would stay, else full",
        rich_help_panel=METHOD,
    ),
]
StandIn = Annotated[
    str | None,
    typer.Option(
        metavar="none|quarter|R",
        help="Rank of the affine maps that stand in for removed runs of blocks, found without training; quarter is a "
        "quarter of the width. With them, the transformer loads with edgeprune.load and not in stock diffusers.",
        show_default="none",
        rich_help_panel=METHOD,
    ),
]
GroupSize = Annotated[
    int,
    choice(names=group_sizes, convert=int, help="Number of weights that share one INT4 scale.", rich_help_panel=INT4),
]
Encoders = Annotated[
    str | None,
    choice(
        names=lambda: ENCODERS, rich_help_panel=INT4, show_default="int4; int8 with --calibration none",
        help="How a T5 or Qwen3 is exported. int4 has the last layer of a feed-forward part in 8 bits where "
        "the embedding's error asks for it.",
    ),
]  # fmt: skip
Calibration = Annotated[
    str,
    choice(
        names=lambda: CALIBRATIONS, rich_help_panel=INT4,
        help="How INT4 weights are chosen: none (the nearest), or feedback, which runs the model (what rounding one "
        "costs is made up for in the next ones). auto: feedback, or none for weights that training has rounded.",
    ),
]  # fmt: skip


def calibration_count(flag: str) -> Any:
    """Return the option that says how many prompts calibrate INT4 weights."""
    return typer.Option(
        flag,
        min=1,
        help="Number of prompts that calibrate INT4 weights.",
        show_default="28, or all that were given to `analyze`; 2 of a large model",
        rich_help_panel=INT4,
    )


DataSource = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="SOURCE",
        help="Training data: a folder of `edgeprune cache`, an imagefolder, .tar shards, YE-POP, datasets:NAME, a text "
        "file of prompts, 'captions' (the model draws 1,024 images for captions that come with edgeprune) or 'shapes'.",
        show_default="shapes for teachers of shapes world; other models are not distilled without it",
        rich_help_panel=TRAINING,
    ),
]
_OWN = "the model's own"
InferenceSteps = Annotated[
    int | None,
    typer.Option(
        min=1, help="Denoising steps of the images drawn on the way.", show_default=_OWN, rich_help_panel=IMAGES
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Guidance scale of these images; 0 for models distilled without guidance.",
        show_default=_OWN,
        rich_help_panel=IMAGES,
    ),
]
Height = Annotated[
    int | None,
    typer.Option(min=8, help="Height of these images in pixels.", show_default=_OWN, rich_help_panel=IMAGES),
]
Width = Annotated[
    int | None,
    typer.Option(min=8, help="Width of these images in pixels.", show_default=_OWN, rich_help_panel=IMAGES),
]
Solver = Annotated[
    str | None,
    choice(
        "--solver", names=solvers, show_default=_OWN, rich_help_panel=IMAGES,
        help="How a step is taken. ab2 needs about half of Euler's steps (docs/run.md).",
    ),
]  # fmt: skip


def noise_levels(text: str | None) -> tuple[float, float] | None:
    """Return the lowest and highest noise level of `LOW:HIGH` or `LOW`.

    Raises:
        InputError: they are no numbers from 0 to 1 in this order.
    """
    if text is None:
        return None
    low, _, high = text.partition(":")
    try:
        found = float(low), float(high or 1)
    except ValueError:
        found = (1.0, 0.0)
    if not 0 <= found[0] < found[1] <= 1:
        raise InputError(f"--guidance-range: found {text!r}, expected noise levels from 0 to 1, such as 0.5:1")
    return found


GuidanceRange = Annotated[
    str | None,
    typer.Option(
        metavar="LOW[:HIGH]", show_default=_OWN, rich_help_panel=IMAGES,
        help="Noise levels, from 0 to 1, at which guidance takes its second evaluation, such as 0.5.",
    ),
]  # fmt: skip
RuntimeName = Annotated[
    str | None,
    choice("--runtime", names=runtimes, help="Runtime to draw with.", show_default="the first installed one that fits"),
]


def given(**options: Any) -> dict[str, Any]:
    """Return the options that the user set: those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def parse_rank(text: str) -> int | str | None:
    """Return `auto`, a number, or None for `full`.

    Raises:
        InputError: the text has another form.
    """
    if text in ("auto", "full"):
        return None if text == "full" else text
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"--modulation-rank: found {text!r}, expected auto, full or a number")
    return int(text)


def parse_stand_in(text: str) -> int | str | None:
    """Return `quarter`, a number, or None for `none`.

    Raises:
        InputError: the text has another form.
    """
    if text in ("quarter", "none"):
        return None if text == "none" else text
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"--stand-in: found {text!r}, expected none, quarter or a number")
    return int(text)


def parse_protected(text: str) -> int | dict[str, int]:
    """Return a number of blocks, or for `joint=10,single=5` a number for each kind of block.

    Raises:
        InputError: the text has another form.
    """
    pairs = [(kind.strip(), number.strip()) for kind, _, number in (item.partition("=") for item in text.split(","))]
    if text.strip().isdecimal():
        return int(text)
    if not all(kind and number.isdecimal() for kind, number in pairs) or len(dict(pairs)) < len(pairs):
        raise InputError(
            f"--protect-first: found {text!r}, expected a number of blocks, or one for each kind like joint=10,single=5"
        )
    return {kind: int(number) for kind, number in pairs}


def plan_options(
    start: PlanOptions,
    *,
    method: str | None = None,
    keep: float | None = None,
    max_size: str | None = None,
    fit: str | None = None,
    protect_first: str | None = None,
    protect_last: int | None = None,
    threshold: float | None = None,
    blocks: str = "",
    components: str = "",
    group_size: int = 64,
    modulation_rank: str | None = None,
    prompts: str | None = None,
    keep_components: str = "",
    stand_in: str | None = None,
) -> PlanOptions:
    """Return the preset's options with the user's on top. Another method begins with its own defaults.

    Args:
        start: the options of the preset.
        prompts: text file to measure the modulation's directions with.

    Raises:
        InputError: an option has another form, two options set the budget, or `--blocks` or `--components` meets
            another method than manual.
    """
    from dataclasses import replace

    from edgeprune import targets
    from edgeprune.common.memory import parse_bytes
    from edgeprune.planning.budget import check_keep
    from edgeprune.planning.options import PlanOptions

    rank = start.modulation_rank if modulation_rank is None else parse_rank(modulation_rank)
    if stand_in is not None:
        start = replace(start, stand_in=parse_stand_in(stand_in))
    if blocks or components:
        method = method or "manual"
        if method != "manual":
            raise InputError(f"--blocks and --components work with --method manual only, found --method {method}")
    if keep is not None and max_size:
        raise InputError("give --keep or --max-size, not both")
    if keep is not None:
        check_keep(keep)
    if fit and (keep is not None or max_size or method == "manual"):
        raise InputError("--fit sets the budget; omit --keep, --max-size and --method manual")
    if fit:
        targets.load(fit)
    if method not in (None, start.method):
        start = PlanOptions(method=method, keep=None if method == "manual" else start.keep, stand_in=start.stand_in)
    if keep is not None or max_size or fit:
        size = parse_bytes(max_size, "--max-size") if max_size else None
        start = replace(start, keep=keep, max_size_bytes=size, fit=fit)
    return replace(
        start,
        **given(
            protect_first=None if protect_first is None else parse_protected(protect_first),
            protect_last=protect_last,
            threshold=threshold,
        ),
        keep_components=tuple(dict.fromkeys(filter(None, (name.strip() for name in keep_components.split(","))))),
        blocks=blocks,
        components=components,
        group_size=group_size,
        modulation_rank=rank,
        prompts=None if rank is None and start.stand_in is None else prompts,
    )
