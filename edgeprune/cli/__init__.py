"""The command line: one short function per verb. Heavy packages are imported inside, so that `--help` is instant.

Errors of ours become one line on stderr and an exit code (see errors.py). What it leaves out: logic.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune.cli.study import study
from edgeprune.common import heap, processes, stop
from edgeprune.common.errors import CannotRunError, EdgepruneError, InputError, MissingExtraError
from edgeprune.common.extras import COMPRESS, absent, conflicts
from edgeprune.common.files import is_out_of_memory
from edgeprune.common.terminal import printable

if TYPE_CHECKING:
    from edgeprune.planning.plan import PlanOptions
    from edgeprune.sampling.generation import Generation
    from edgeprune.stages.pipeline import CompressOptions, Workspace

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Make MMDiT diffusion models small enough for edge devices. Begin with: edgeprune compress -o small",
)  # fmt: skip

Model = Annotated[
    str | None, typer.Argument(help="Diffusers folder or hub id; without it, the built-in model (or the folder's own).")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Artefact folder to make or go on with.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Do a stage again although it was done with other inputs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line of stdout.")]
Metric = Annotated[
    str,
    typer.Option(
        help="velocity (error of the velocity, no images), or a metric of images: see `edgeprune score --help`."
    ),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(help="NAME=PATH of a metric's weights, like clip=./clip: clip, hpsv2, geneval (and clip), lpips."),
]
Prompts = Annotated[str | None, typer.Option(help="Text file of prompts, one a line.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="hpp, hybrid, milp or manual; by default hpp, for the built-in model hybrid. Baselines: bk-sdm, "
        "koala, uniform, magnitude, random."
    ),
]
Keep = Annotated[float | None, typer.Option(help="Share of the transformer's parameters that may be left, like 0.79.")]
MaxMemory = Annotated[str | None, typer.Option(help="Bytes its weights may take after INT4, like 3.2GB.")]
FitTo = Annotated[
    str | None, typer.Option("--fit", help="A device of `edgeprune targets` whose memory sets the budget.")
]
ProtectFirst = Annotated[int | None, typer.Option(help="Leading blocks never removed; half of all by default.")]
ProtectLast = Annotated[int | None, typer.Option(help="Trailing blocks never removed; 2 by default.")]
Threshold = Annotated[
    float | None, typer.Option(help="hybrid: share removed as whole blocks before components join; 0.15 by default.")
]
Blocks = Annotated[str, typer.Option(help="manual: closed ranges of blocks, like 25-28,31.")]
Components = Annotated[str, typer.Option(help="manual: components, like 30:mlp,30:context_mlp.")]
ModulationRank = Annotated[
    str | None,
    typer.Option(
        help="Directions of the modulation input that stay: a number, auto (as many as matter) or full (off). "
        "By default auto where less than 0.75 of the parameters would stay, else full.",
        metavar="auto|R|full",
    ),
]
Steps = Annotated[int | None, typer.Option(help="Training steps; 0 leaves distillation out.")]
GroupSize = Annotated[int, typer.Option(help="Weights that share one INT4 scale.")]
Calibration = Annotated[
    str, typer.Option(help="none; scale (NNCF's scale estimation) or awq, both on the model's inputs.")
]
DataSource = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="A folder of `edgeprune cache`, imagefolder, .tar shards, YE-POP, datasets:NAME, a file of prompts, or "
        "'shapes'.",
    ),
]


Config = Annotated[
    str | None,
    typer.Option(help="Run in the processes of this YAML file of accelerate's, see docs/scale.md."),
]
InferenceSteps = Annotated[int | None, typer.Option(min=1, help="Denoising steps of the images made on the way.")]
Guidance = Annotated[float | None, typer.Option(help="Their guidance scale; 0 for models distilled without.")]
RuntimeName = Annotated[str | None, typer.Option(help="openvino, ort, trt, coreml or eager; by default what fits.")]
Height = Annotated[int | None, typer.Option(min=8, help="Their height in pixels.")]
Width = Annotated[int | None, typer.Option(min=8, help="Their width in pixels.")]

SHARED = ("analyze", "distill")
"""Verbs that several processes can share."""
_CTRL_C = 130
"""What Typer, but for old versions, makes of KeyboardInterrupt, without a word."""
OUT_OF_MEMORY = (
    "out of memory; what is finished is kept. Train with a smaller --batch, --gradient-checkpointing or "
    "--mixed-precision bf16, make smaller images (--height, --width), end other programs, or use a larger machine; "
    "`--dry-run` of compress and analyze says what is needed"
)


def main() -> None:
    """Entry point: runs the app and turns errors into lines."""
    # Vendors' advice is for developers; their errors still come through.
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    try:
        app()
    except EdgepruneError as error:
        _fail(str(error), error.exit_code)
    except stop.Stopped:
        _fail("stopped by SIGTERM; run the same command again to go on", stop.EXIT_CODE)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != _CTRL_C:
            raise
        _fail("stopped; run the same command again to go on", _CTRL_C)
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            _fail(OUT_OF_MEMORY, 1)
        if not isinstance(error, OSError):
            raise
        hint = "; free some space and run again" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.filename or 'file'}: {error.strerror or error}{hint}", 1)
    except ModuleNotFoundError as error:
        if error.name not in COMPRESS or not absent(error.name):
            raise
        _fail(str(MissingExtraError(error.name, "compress")), MissingExtraError.exit_code)


def _fail(text: str, code: int) -> None:
    who = "error" if processes.is_main() else f"error in process {processes.index()}"
    print(f"{who}: {printable(' '.join(text.split()))}", file=sys.stderr)
    raise SystemExit(code)


def _say(text: str) -> None:
    from rich.console import Console

    if processes.is_main():
        Console(stderr=True, soft_wrap=True, highlight=False).print(printable(text), markup=False)


def _warn(runtime: str) -> None:
    """Tell of packages that spoil this runtime."""
    for conflict in conflicts() if runtime == "ort" else []:
        _say(f"conflict: {conflict}")


def _print_json(data: Any) -> None:
    if processes.is_main():
        print(json.dumps(data, allow_nan=False))


@contextmanager
def _bars() -> Iterator[Callable[..., None]]:
    """A progress bar per stage on stderr: done, speed by eye, time left; a line for what has no steps.

    SIGTERM ends it at the next step, see stop.py.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        *(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
        ),
        *(TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False)),
    )
    progress, tasks = Progress(*columns, console=Console(stderr=True)), dict[str, Any]()
    tenths: dict[str, int] = {}

    def update(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        stop.check()  # what is done so far is written
        if not processes.is_main():
            return
        what, note = printable(what), printable(note)
        if not progress.console.is_terminal:  # a log file: a line a tenth
            if tenths.get(what) != (tenth := 10 * done // max(total, 1)):
                tenths[what] = tenth
                _say(f"{what}: {done} of {total} {note}".rstrip() if total else what)
            return
        progress.start()  # not before: an error alone is one line
        if not total:
            progress.console.print(what, markup=False, highlight=False)
            return
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total, note=note)
        progress.update(tasks[what], completed=done, total=total, note=note)

    try:
        with stop.on_sigterm():
            yield update
    finally:
        if progress.live.is_started:
            progress.stop()


def parse_bytes(text: str) -> int:
    """`3.2GB`, `850MB` or a plain number of bytes; units are powers of ten.

    Raises:
        InputError: not of this form.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1}
    upper = text.strip().upper()
    for unit, factor in units.items():
        if upper.endswith(unit):
            upper, scale = upper.removesuffix(unit), factor
            break
    else:
        scale = 1
    try:
        value = float(upper)
    except ValueError:
        value = -1
    if not 0 < value < 1e6 * 10**9:
        raise InputError(f"--max-memory: found {text!r}, expected bytes like 3.2GB or 850MB")
    return int(value * scale)


def parse_rank(text: str) -> int | str | None:
    """`auto`, a number, or None for `full`.

    Raises:
        InputError: not of this form.
    """
    if text in ("auto", "full"):
        return None if text == "full" else text
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"--modulation-rank: found {text!r}, expected auto, full or a number")
    return int(text)


def _workspace(
    out: Path, model: str | None, fresh: bool, *, begin: bool = False, generation: dict[str, Any] | None = None
) -> Workspace:
    begun = (out / "edgeprune.json").is_file()
    if not begun and not begin:
        raise InputError(f"{out / 'edgeprune.json'}: no such file; begin with: edgeprune analyze MODEL -o {out}")
    from edgeprune.stages.pipeline import Workspace  # with torch, which takes seconds

    given = {name: value for name, value in (generation or {}).items() if value is not None}
    with processes.main_first():
        ws = Workspace(out, model, model_given=model is not None or not begun, fresh=fresh, generation=given)
    ws.command = shlex.join(["edgeprune", *sys.argv[1:]])
    return ws


def _generation(steps: int | None, guidance: float | None, height: int | None, width: int | None) -> dict[str, Any]:
    return {"num_inference_steps": steps, "guidance_scale": guidance, "height": height, "width": width}


def _source_of(folder: Path) -> str | None:
    """The model that an export or artefact was made from; None for the built-in one."""
    from edgeprune.common.files import read_json

    for name in ("edgeprune_export.json", "edgeprune.json"):
        if (folder / name).is_file():
            source = read_json(folder / name).get("source")
            if isinstance(source, str):
                return None if source == "built-in" else source
    raise InputError(f"{folder}: does not say what it was made from; give --baseline")


def _plan_options(
    start: PlanOptions,
    method: str | None,
    keep: float | None,
    max_memory: str | None,
    fit: str | None,
    protect_first: int | None,
    protect_last: int | None,
    threshold: float | None,
    blocks: str,
    components: str,
    group_size: int,
    modulation_rank: str | None,
    prompts: str | None,
) -> PlanOptions:
    """`start`, the preset's, with what the user says; another method begins from its own defaults."""
    from dataclasses import replace

    from edgeprune import targets
    from edgeprune.planning.plan import NEEDED, PlanOptions

    rank = start.modulation_rank if modulation_rank is None else parse_rank(modulation_rank)
    if (blocks or components) and method in (None, "hpp"):
        method = "manual"
    if fit and (keep is not None or max_memory or method == "manual"):
        raise InputError("--fit sets the budget by itself; leave --keep, --max-memory and --method manual out")
    if fit:
        targets.load(fit)
    if method not in (None, start.method):
        start = PlanOptions(method, keep=None if method == "manual" else start.keep)
    if keep is not None or max_memory or fit:
        size = parse_bytes(max_memory) if max_memory else None
        start = replace(start, keep=keep, max_memory_bytes=size, fit=fit)
    given: dict[str, Any] = {"protect_first": protect_first, "protect_last": protect_last, "threshold": threshold}
    said = {name: value for name, value in given.items() if value is not None}
    listed: dict[str, Any] = {"blocks": blocks, "components": components, "group_size": group_size}
    if rank == NEEDED and not start.scored:
        rank = None
    return replace(start, **said, **listed, modulation_rank=rank, prompts=None if rank is None else prompts)


def _fit_rows(fit: Any) -> list[tuple[str, str]]:
    rows = [
        (f"memory of {fit.target}", fit.memory_bytes),
        ("- text encoders", fit.text_encoders_bytes),
        ("- VAE decoder", fit.vae_decoder_bytes),
        ("- activations, estimated", fit.activations_bytes),
        ("= for the transformer", fit.transformer_bytes),
    ]
    return [(name, f"{value / 1e9:,.3f} GB") for name, value in rows]


def _plan_rows(plan: Any, wanted: int | str | None) -> list[tuple[str, str]]:
    """What a plan leaves; `wanted` is the modulation's rank as it was asked for, None where nobody could measure it."""
    from edgeprune.planning.plan import MODULATION_BELOW, NEEDED

    rank = None if plan.modulation_rank is None else str(plan.modulation_rank)
    if rank is not None and wanted == NEEDED:
        rank += f": less than {MODULATION_BELOW} of the parameters would stay; --modulation-rank full keeps all of it"
    removed = ", ".join(map(str, plan.blocks)) or "none"
    parts = ", ".join(f"{b}:{c}" for b, c in plan.components)
    share = plan.after.parameters / plan.before.parameters
    if rank is None and (wanted == "auto" or (wanted == NEEDED and share < MODULATION_BELOW)):
        rank = "full: auto finds no smaller one that does for prompts it has not seen; give more --prompts"
    elif wanted is None and plan.method != "manual" and share < MODULATION_BELOW:
        rank = "full; --modulation-rank auto kept more at so few bytes (docs/modulation.md)"
    return [
        ("blocks removed", f"{removed} (of {plan.num_blocks})"),
        *([("components removed", parts)] if parts else []),
        *([("modulation rank", rank)] if rank else []),
        ("parameters", f"{plan.before.parameters / 1e6:,.1f} M -> {plan.after.parameters / 1e6:,.1f} M ({share:.1%})"),
        ("bf16", f"{plan.before.bf16_bytes / 1e6:,.1f} MB -> {plan.after.bf16_bytes / 1e6:,.1f} MB"),
        (
            "INT4",
            f"{plan.after.int4_bytes / 1e6:,.1f} MB ({plan.after.int4_bytes / plan.before.bf16_bytes:.1%} of bf16)",
        ),
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for row in rows:
        table.add_row(
            *(Text(printable(cell)) for cell in row)
        )  # as text, or rich takes 'edgeprune[onnx]' for markup and drops the extra
    if processes.is_main():
        Console(stderr=True).print(table)


@app.command(epilog="Example: edgeprune compress -o small  ·  edgeprune compress ./sd35 -o small --max-memory 3.2GB")
def compress(
    model: Model = None,
    out: Out = Path("compressed"),
    preset: Annotated[str, typer.Option(help="default, or quick for a first look.")] = "default",
    metric: Metric = "velocity",
    weights: Weights = None,
    prompts: Prompts = None,
    method: Method = None,
    keep: Keep = None,
    max_memory: MaxMemory = None,
    fit: FitTo = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    threshold: Threshold = None,
    blocks: Blocks = "",
    components: Components = "",
    modulation_rank: ModulationRank = None,
    steps: Steps = None,
    data: DataSource = None,
    group_size: GroupSize = 64,
    calibration: Calibration = "none",
    inference_steps: InferenceSteps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """All stages: analyze, plan, prune, distill, quantize, and a report. Run it again after a kill to go on."""
    from dataclasses import asdict, replace

    heap.large_pages()
    from edgeprune.artefact.checkpoint import resolve
    from edgeprune.metrics import parse_weights
    from edgeprune.report import figures as report
    from edgeprune.sampling.generation import Generation
    from edgeprune.stages import pipeline

    begun = model is None and (out / "edgeprune.json").is_file()
    generation = _generation(inference_steps, guidance_scale, height, width)
    ws = _workspace(out, model, fresh, generation=None if dry_run else generation) if begun else None
    options = pipeline.preset(preset, builtin=ws.builtin if ws else model is None)
    plan_options = _plan_options(
        options.plan,
        method,
        keep,
        max_memory,
        fit,
        protect_first,
        protect_last,
        threshold,
        blocks,
        components,
        group_size,
        modulation_rank,
        prompts,
    )
    distill_options = options.distill
    if steps is not None and distill_options is not None:
        distill_options = replace(distill_options, steps=steps) if steps else None
    if distill_options is not None:
        distill_options = replace(distill_options, int4_group_size=group_size)
    options = replace(
        options,
        analyze=replace(options.analyze, metric=metric, prompts=prompts, weights=parse_weights(weights or [])),
        plan=plan_options,
        data=replace(options.data, source=data or options.data.source),
        distill=distill_options,
        quantize=replace(options.quantize, group_size=group_size, calibration=calibration),
    )
    options = pipeline.as_published(options)
    source = ws.source if ws else resolve(model)
    said = {name: value for name, value in generation.items() if value is not None}
    images = Generation.checked(asdict(ws.generation if ws else Generation.load(source)) | said, "options")
    images.check_size(source)
    if dry_run:
        _forecast(source, options, images, as_json)
        return
    if ws is None:
        pipeline.rehearse(source, images, options)  # before there is a folder
    ws = ws or _workspace(out, model, fresh, begin=True, generation=generation)
    if fit:
        _table(_fit_rows(ws.fit(fit)))
    with _bars() as progress:
        ran = pipeline.compress(ws, options, progress)
        short = report.memory_short(ws)
        summary = {} if short else report.make(ws, quick=preset == "quick", redo=bool(ran), progress=progress)
    rows = _plan_rows(ws.plan(), options.plan.modulation_rank)
    _table([*rows, *(report.rows(summary) if summary else [])])
    done = f"done: {', '.join(ran)}" if ran else "nothing to do, all stages are done"
    _say(f"{done}; {short or 'report: ' + str(out / 'report.html')}")
    _say(f"next: edgeprune export {out} --target onnx -o {out}-onnx")
    if as_json:
        _print_json({"out": str(out), "ran": ran, **summary})


def _in_units(key: str, value: float) -> tuple[str, str]:
    """A row for people from a key that ends in its unit; JSON keeps the plain number."""
    units = {
        "_flops_per_s": (1e12, "TFLOP/s"),
        "_flops": (1e12, "TFLOP"),
        "_bytes": (1e9, "GB"),
        "_floor_s": (60, "minutes"),
        "_s": (1, "s"),
    }
    for ending, (size, unit) in units.items():
        if key.endswith(ending):
            name, amount = key.removesuffix(ending) + ("_floor" if ending == "_floor_s" else ""), value / size
            return name.replace("_", " "), f"{amount:,.0f} {unit}" if amount >= 100 else f"{amount:.3g} {unit}"
    return key.replace("_", " "), f"{value:,}"


def _forecast_analysis(model: str | None, out: Path, options: Any, given: dict[str, Any], as_json: bool) -> None:
    from dataclasses import asdict

    from edgeprune.artefact.checkpoint import resolve
    from edgeprune.sampling.generation import Generation
    from edgeprune.stages.forecast import forecast_analysis

    begun = _workspace(out, None, False) if model is None and (out / "edgeprune.json").is_file() else None
    source = begun.source if begun else resolve(model)
    said = {name: value for name, value in given.items() if value is not None}
    images = Generation.checked(asdict(begun.generation if begun else Generation.load(source)) | said, "options")
    images.check_size(source)
    found = forecast_analysis(source, options, images)
    _table([_in_units(key, value) for key, value in found.items()])
    _say("from one evaluation of one sample here, with weights in float32; batches take less time")
    if as_json:
        _print_json(found)


def _forecast(source: Path, options: CompressOptions, generation: Generation, as_json: bool) -> None:
    from edgeprune.stages.forecast import forecast

    found = forecast(source, options, generation)
    _table([_in_units(key, value) for key, value in found.items()])
    _say("floors are the work at the speed of a matrix product here: expect more")
    if as_json:
        _print_json(found)


@app.command(epilog="Example: edgeprune analyze -o small --joint  ·  edgeprune analyze ./sd35 --dry-run --pairs")
def analyze(
    model: Model = None,
    out: Out = Path("compressed"),
    metric: Metric = "velocity",
    weights: Weights = None,
    prompts: Prompts = None,
    count: Annotated[int, typer.Option(min=1, help="Prompts to use.")] = 28,
    only_blocks: Annotated[bool, typer.Option("--only-blocks", help="Leave the components out.")] = False,
    joint: Annotated[bool, typer.Option("--joint", help="Groups of a block's components too (figure 4).")] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Any two parts too, for `plan --method milp`.")] = False,
    estimator: Annotated[
        str,
        typer.Option(
            help="exhaustive (run without each group), reuse (the same numbers, half the work; velocity only) or gates "
            "(estimated by gradients in one pass; velocity only)."
        ),
    ] = "exhaustive",
    inference_steps: InferenceSteps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Time one evaluation, say what it would cost.")] = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Score the model without each block and component: analysis.json."""
    if config and not processes.launched() and not dry_run:
        from edgeprune.training.launch import launch

        return launch(config, sys.argv[1:])
    from edgeprune.metrics import check_analysis, parse_weights
    from edgeprune.stages import pipeline

    options = pipeline.AnalyzeOptions(
        *(metric, prompts, count, not only_blocks, parse_weights(weights or []), joint, pairs, estimator)
    )
    check_analysis(options.metric, options.weights)  # before there is a folder
    generation = _generation(inference_steps, guidance_scale, height, width)
    if dry_run:
        _forecast_analysis(model, out, options, generation, as_json)
        return
    ws = _workspace(out, model, fresh, begin=True, generation=generation)
    with _bars() as progress:
        ran = pipeline.run_analyze(ws, options, progress)
    found = ws.report()
    assert found is not None
    order = sorted(found.contributions().values(), key=lambda c: c.drop)
    _table([(str(c), f"{c.drop:.4f} ± {c.half_width or 0:.4f}") for c in order[:8]])
    _say(
        f"least contributing first, loss of the {found.metric} score with 95 % interval"
        + ("" if ran else " (already done)")
    )
    if as_json:
        _print_json(found.to_json())
    _say(f"next: edgeprune plot {ws.report_path} -o {out / 'plots'}, or: edgeprune plan -o {out} --keep 0.79")


@app.command(epilog="Example: edgeprune plot small/analysis.json -o plots")
def plot(
    report: Annotated[Path, typer.Argument(help="Report of `edgeprune analyze`, or published scores.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("plots"),
) -> None:
    """Draw contributions with 95 % intervals: SVG and PNG of blocks and components, and of joint removals."""
    from edgeprune.analysis.contribution import ContributionReport
    from edgeprune.analysis.plots import save

    for path in save(ContributionReport.load(report), out):
        _say(f"wrote {path}")


@app.command(epilog="Example: edgeprune plan --config transformer/config.json --scores scores.json --keep 0.79")
def plan(
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Artefact folder that was analyzed.")] = None,
    config: Annotated[Path | None, typer.Option(help="A transformer's config.json: plan without weights.")] = None,
    scores: Annotated[Path | None, typer.Option(help="Contribution scores, instead of the folder's own.")] = None,
    method: Method = None,
    keep: Keep = None,
    max_memory: MaxMemory = None,
    fit: FitTo = None,
    protect_first: ProtectFirst = None,
    protect_last: ProtectLast = None,
    threshold: Threshold = None,
    blocks: Blocks = "",
    components: Components = "",
    modulation_rank: ModulationRank = None,
    prompts: Annotated[
        str | None, typer.Option(help="Text file of prompts, one a line, that --modulation-rank calibrates on.")
    ] = None,
    group_size: GroupSize = 64,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Choose what goes: plan.json, and what is left."""
    if (out is None) == (config is None):
        raise InputError("plan: give exactly one of -o (a folder) and --config (a transformer's config.json)")
    if fit and config is not None:
        raise InputError("--fit counts a pipeline's files: give -o (a folder), not --config")
    from edgeprune.analysis.contribution import ContributionReport
    from edgeprune.planning.plan import DEFAULT, plan_for

    loaded = ContributionReport.load(scores) if scores is not None else None
    chosen = (
        *(method, keep, max_memory, fit, protect_first, protect_last, threshold, blocks, components, group_size),
        *(modulation_rank, prompts),
    )
    if out is not None:
        ws = _workspace(out, None, fresh)
        from edgeprune.stages import pipeline

        options = _plan_options(pipeline.preset("default", builtin=ws.builtin).plan, *chosen)
        if fit:
            _table(_fit_rows(ws.fit(fit)))
        pipeline.run_plan(ws, options, scores)
        made = ws.plan()
    else:
        from edgeprune.common.files import read_json
        from edgeprune.families import family_of

        assert config is not None
        content = read_json(config)
        options = _plan_options(DEFAULT, *chosen)
        made = plan_for(family_of(content, str(config)), content, loaded, options)
    _table(_plan_rows(made, made.modulation_rank if out is None else options.modulation_rank))
    if as_json or out is None:
        _print_json(made.to_json())
    if out is not None:
        _say(f"next: edgeprune prune -o {out}")


@app.command(epilog="Example: edgeprune prune -o small")
def prune(out: Out = Path("compressed"), fresh: Fresh = False) -> None:
    """Make the shorter transformer: transformer/, loadable by stock diffusers for whole-block plans."""
    heap.large_pages()
    from edgeprune.stages import pipeline

    ws = _workspace(out, None, fresh)
    with _bars() as progress:
        ran = pipeline.run_prune(ws, progress)
    _say(f"{out / 'transformer'}: {'written' if ran else 'already done'}\nnext: edgeprune distill -o {out}")


@app.command(epilog="Example: edgeprune distill -o small --data images/ --steps 2000 --rate 1e-4")
def distill(
    out: Out = Path("compressed"),
    data: DataSource = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Images to make, if the data is prompts or shapes.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default as compress has it, as of all these.")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate of AdamW.")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant or cosine.")] = None,
    sensitivity: Annotated[str, typer.Option(help="SGDistill: graded, binary or off.")] = "graded",
    freeze_prefix: Annotated[bool, typer.Option("--freeze-prefix/--no-freeze-prefix", help="PWP.")] = True,
    features: Annotated[
        str, typer.Option(help="What --lambda-feature compares: outputs of blocks or of their attention.")
    ] = "blocks",
    lambda_task: Annotated[float, typer.Option(min=0)] = 0.0,
    lambda_output: Annotated[float, typer.Option(min=0)] = 1.0,
    lambda_feature: Annotated[float, typer.Option(min=0)] = 1e-4,
    ema: Annotated[float | None, typer.Option(min=0, max=1, help="Decay of the averaged weights.")] = None,
    mixed_precision: Annotated[
        str | None, typer.Option(help="no, bf16 or fp16; by default what accelerate's config says, else no.")
    ] = None,
    teacher_precision: Annotated[str, typer.Option(help="float32, bf16 or int8: the teacher's weights.")] = "float32",
    teacher_offload: Annotated[
        bool, typer.Option("--teacher-offload", help="Its weights stay on the CPU until a layer is run.")
    ] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    quantize_aware: Annotated[
        bool, typer.Option("--quantize-aware/--no-quantize-aware", help="Train with weights rounded to INT4.")
    ] = True,
    group_size: GroupSize = 64,
    seed: int = 0,
    accumulate: Annotated[int, typer.Option(min=1, help="Portions of a process' batch, one after the other.")] = 1,
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what each process would hold, and stop.")] = False,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Teach the shorter transformer what the original knows. Killed, it goes on from its last state."""
    from dataclasses import replace

    if config and not processes.launched() and not dry_run:
        from edgeprune.training.launch import launch

        return launch(config, sys.argv[1:])
    from edgeprune.stages import pipeline
    from edgeprune.training.losses import Weights
    from edgeprune.training.recipe import Placement

    ws = _workspace(out, None, fresh)
    base = pipeline.preset("default", builtin=ws.builtin)
    assert base.distill is not None
    given: dict[str, Any] = {"steps": steps, "batch": batch, "rate": rate, "schedule": schedule, "ema": ema}
    options = replace(
        base.distill,
        **{k: v for k, v in given.items() if v is not None},
        sensitivity=sensitivity,
        freeze_prefix=freeze_prefix,
        features=features,
        weights=Weights(lambda_task, lambda_output, lambda_feature),
        mixed_precision=mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        teacher_precision=teacher_precision,
        gradient_checkpointing=gradient_checkpointing,
        int4_group_size=group_size if quantize_aware else None,
        seed=seed,
    )
    placement = Placement(accumulate, teacher_offload)
    if dry_run:
        from edgeprune.stages.forecast import forecast_training
        from edgeprune.training.launch import config_named

        found = forecast_training(ws, options, placement, config_named(config) if config else None)
        _table([_in_units(key, value) for key, value in found.items()])
        _say("of one process, on its device; kernels, communication and the allocator take more")
        if as_json:
            _print_json(found)
        return
    source = pipeline.DataOptions(data or base.data.source, samples or base.data.samples)
    with _bars() as progress:
        ran = pipeline.run_distill(ws, options, source, progress, placement=placement)
    stage = ws.manifest.stages["distill"]
    _say(f"loss {stage['first_loss']:.4f} -> {stage['last_loss']:.4f}" + ("" if ran else " (already done)"))
    _say(f"next: edgeprune quantize -o {out}")


@app.command(
    epilog="Example: edgeprune cache images/ --model ./sd35 -o encoded --buckets  ·  "
    "edgeprune cache datasets:me/pictures --model ./sd35 --samples 100000 --dry-run"
)
def cache(
    source: Annotated[
        str,
        typer.Argument(help="imagefolder, .tar shards, YE-POP, datasets:NAME, a file of prompts, or 'shapes'."),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Diffusers folder or hub id; without it, the built-in model.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make or go on with.")] = Path("cache"),
    samples: Annotated[
        int, typer.Option(min=1, help="Images to make of prompts and shapes, or to take of datasets:NAME.")
    ] = 1024,
    buckets: Annotated[
        bool, typer.Option("--buckets", help="Sizes by aspect ratio; else all are cropped to --height x --width.")
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="Keep numbers in 16 bits: half of the disk.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads that decode and resize; one a core, up to 8.")
    ] = None,
    inference_steps: InferenceSteps = None,
    guidance_scale: Guidance = None,
    height: Height = None,
    width: Width = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Encode images and captions once, for `distill --data` to read. Killed, it goes on after the last whole shard."""
    from dataclasses import asdict

    from edgeprune.artefact.checkpoint import load_pipeline, load_transformer, read_config, resolve
    from edgeprune.common.lock import LOCK, hold
    from edgeprune.data import encode
    from edgeprune.sampling.generation import Generation
    from edgeprune.stages import pipeline

    folder = resolve(model)
    read_config(folder)  # refuses what is no MMDiT
    given = {n: v for n, v in _generation(inference_steps, guidance_scale, height, width).items() if v is not None}
    images = Generation.checked(asdict(Generation.load(folder)) | given, "options")
    images.check_size(folder)
    options = encode.CacheOptions(source, samples, buckets, half)
    encode.check_folder(out, source)
    if dry_run:
        expected = encode.forecast(folder, images, options, out)
        _table(_megabytes(expected))
        _say("at most: what cannot be used takes nothing, and equal captions are kept once a shard")
        if as_json:
            _print_json(expected)
        return

    def load() -> Any:
        import torch

        if encode.is_drawn(source):
            pipe = load_pipeline(folder, load_transformer(folder, quantized=False))
        else:
            pipe = pipeline.load_encoders(folder)
        return pipe.to("cuda") if torch.cuda.is_available() else pipe

    settings = encode.settings_of(folder, images, options)
    with hold(out / LOCK, out), _bars() as progress:
        made = encode.make_cache(
            load,
            folder, out, settings, images, options, workers=workers or encode.WORKERS,
            progress=lambda done, total, note: progress("cache", done, total, note),
        )  # fmt: skip
    summary = encode.summary(made)
    sizes = ", ".join(f"{size}: {count:,}" for size, count in summary["sizes"].items())
    _table([*_megabytes({k: v for k, v in summary.items() if k != "sizes"}), ("samples by size", sizes)])
    if not made.samples:
        _say("nothing to do, the cache is complete")
    if summary["skipped"]:
        _say(f"what was skipped, and why: {out / 'skipped.json'}")
    _say(f"next: edgeprune distill -o small --data {out}")
    if as_json:
        _print_json({"out": str(out), **summary})


def _megabytes(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of what is smaller than models; what is not known is left out."""
    rows = []
    for key, value in found.items():
        if key.endswith("_bytes_per_s"):
            rows.append((key.removesuffix("_bytes_per_s").replace("_", " "), f"{value / 1e6:,.2f} MB/s"))
        elif key.endswith("_bytes") and value is not None:
            rows.append((key.removesuffix("_bytes").replace("_", " "), f"{value / 1e6:,.3f} MB"))
        elif value is not None:
            rows.append((key.replace("_per_s", "/s").replace("_", " "), f"{value:,}"))
    return rows


@app.command(epilog="Example: edgeprune quantize -o small --group-size 64")
def quantize(
    out: Out = Path("compressed"), group_size: GroupSize = 64, calibration: Calibration = "none", fresh: Fresh = False
) -> None:
    """INT4 weights by NNCF, block by block: transformer_int4/."""
    heap.large_pages()
    from edgeprune.stages import pipeline

    ws = _workspace(out, None, fresh)
    with _bars() as progress:
        ran = pipeline.run_quantize(ws, pipeline.QuantizeOptions(group_size, calibration), progress)
    size = ws.manifest.stages["quantize"]["weights_bytes"]
    _say(f"{out / 'transformer_int4'}: {size / 1e6:,.1f} MB" + ("" if ran else " (already done)"))
    _say(f"next: edgeprune export {out} --target onnx -o {out}-onnx")


@app.command(epilog="Example: edgeprune export small --target onnx -o small-onnx")
def export(
    artefact: Annotated[Path, typer.Argument(help="Artefact or diffusers folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    target: Annotated[str, typer.Option(help="Format: onnx, openvino, trt or coreml.")] = "onnx",
    device: Annotated[
        str | None, typer.Option(help="A name from `edgeprune targets`: sizes, precision, limits.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write what a device runs, with the checkpoint's own integers; fails if it does not compute the same.

    Killed, or out of disk, it leaves OUT.partial, and the same command goes on from there.
    """
    from edgeprune.targets import for_format

    chosen = for_format(target, device)
    heap.large_pages()
    from edgeprune import export as exporting

    with _bars() as progress:
        record = exporting.export(artefact, out, target, chosen, progress=progress)
    _say("parity holds")
    _say(f'next: edgeprune generate "two red circles" --model {out} -o out.png, or: edgeprune bench {out}')
    if as_json:
        _print_json(record)


@app.command(epilog='Example: edgeprune generate "two red circles" --model small-onnx -o out.png')
def generate(
    prompt: str,
    model: Annotated[Path, typer.Option("--model", help="Exported, artefact or diffusers folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Image to write.")] = Path("out.png"),
    steps: Annotated[int | None, typer.Option(min=1)] = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    negative_prompt: str = "",
    seed: int = 0,
    runtime: RuntimeName = None,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Hold one stage's networks at a time.")] = False,
    provider: Annotated[
        str | None, typer.Option(help="ort: cuda, tensorrt, coreml, openvino or cpu; by default the first one here.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="ort, openvino: keep prepared weights here for the next start.")
    ] = None,
) -> None:
    """Draw one image with the runtime that fits the folder."""
    from edgeprune import runtimes
    from edgeprune.runtimes.base import check_size, read_settings

    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"-o {out}: expected a name ending in .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise InputError(f"-o {out}: no such folder {out.parent}")
    given = {"low_memory": low_memory, "provider": provider, "cache_dir": cache_dir}
    options = {name: value for name, value in given.items() if value}
    runtime = runtime or ("ort" if provider else None)  # only ONNX Runtime has providers
    chosen = runtimes.choose(model, runtime)
    _warn(chosen)
    runtimes.RUNTIMES[chosen].require()
    settings = read_settings(model)  # a bad size is told before gigabytes are loaded
    check_size(
        settings,
        settings.generation.height if height is None else height,
        settings.generation.width if width is None else width,
    )
    with runtimes.load(model, runtime, **options) as opened, _bars() as progress:
        image = opened.generate(
            prompt, negative_prompt=negative_prompt, steps=steps, guidance_scale=guidance_scale,
            height=height, width=width, seed=seed, progress=lambda done, total: progress("generate", done, total, ""),
        )[0]  # fmt: skip
    image.save(out)
    where = f"{opened.name} on {opened.backend.provider} ({opened.backend.why})"
    _say(f"{out}: {image.width}x{image.height}, seed {seed}; {where}")


@app.command(
    epilog='Example: edgeprune bench small-onnx --assert "peak_ratio<=0.9"  ·  edgeprune bench small-* --runtime all'
)
def bench(
    folders: Annotated[list[Path], typer.Argument(help="Exported or artefact folders.")],
    runtime: Annotated[
        str | None, typer.Option(help="A runtime by name, or all: every one that opens a folder and can run here.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Original: folder or hub id; by default the model it was made from.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Warm steps timed.")] = 20,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of an image.")] = None,
    quality: Annotated[int, typer.Option(min=0, help="Shapes-world prompts per task to score on; 0 for none.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here as JSON.")] = None,
    check: Annotated[
        list[str] | None, typer.Option("--assert", help="Like 'peak_ratio<=0.25'; exit 1 if missed.")
    ] = None,
) -> None:
    """Memory, latency and quality beside the original in bf16, each in a fresh process of this run."""
    from rich.console import Console

    from edgeprune import runtimes
    from edgeprune.artefact.checkpoint import resolve
    from edgeprune.bench import measure as benchmark
    from edgeprune.common.files import write_json

    for expression in check or []:
        benchmark.parse_expression(expression)
    pairs: list[tuple[Path, str]] = []
    refusals: list[CannotRunError] = []
    for folder in folders:
        try:
            fitting = runtimes.runnable(folder) if runtime == "all" else [runtimes.choose(folder, runtime)]
        except CannotRunError as refusal:  # one device's folder among others'
            refusals.append(refusal)
            continue
        pairs += [(folder, name) for name in fitting]
    if not pairs:
        raise refusals[0]
    for left_out in refusals:
        _say(f"left out: {left_out}")
    for name in {name for _, name in pairs}:
        _warn(name)
    names = ["compressed"] if len(pairs) == 1 else [f"{folder}:{name}" for folder, name in pairs]
    variants = [benchmark.Variant("original", resolve(baseline or _source_of(folders[0])), "eager", "bf16")]
    variants += [benchmark.Variant(n, folder, name) for n, (folder, name) in zip(names, pairs, strict=True)]
    result = benchmark.run(variants, repeats=repeats, steps=steps, quality=quality, progress=_say)
    Console().print(benchmark.table(result))
    if json_file:
        write_json(json_file, benchmark.to_json(result))
        _say(f"wrote {json_file}")
    benchmark.assert_expressions(result, check or [])


@app.command(epilog="Example: edgeprune compare -o build/compare  ·  edgeprune compare ./sd35 -o grid --grid mine.toml")
def compare(
    model: Model = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to make or go on with.")] = Path("compare"),
    preset: Annotated[str, typer.Option(help="A grid that comes with edgeprune: demo or demo-untrained.")] = "demo",
    grid: Annotated[Path | None, typer.Option(help="A grid of your own (TOML), instead of the preset.")] = None,
    metric: Annotated[str | None, typer.Option(help="By default shapes for the built-in model, else velocity.")] = None,
    weights: Weights = None,
    prompts: Annotated[
        str | None, typer.Option(help="Text file of prompts to score on, one a line; none that is trained on.")
    ] = None,
    per_task: Annotated[int, typer.Option(min=1, help="Built-in model: held-out captions of each of 7 tasks.")] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compress by many methods at one budget and score all on the same prompts: compare.md, compare.svg."""
    from edgeprune.artefact.checkpoint import resolve
    from edgeprune.compare import grid as comparing
    from edgeprune.compare import page as compare_page
    from edgeprune.metrics import check_analysis, parse_weights
    from edgeprune.stages import pipeline

    begun = (out / "original" / "edgeprune.json").is_file()
    ws = _workspace(out / "original", model, False) if begun else None
    builtin = ws.builtin if ws else model is None
    name, given = metric or ("shapes" if builtin else "velocity"), parse_weights(weights or [])
    check_analysis(name, given)
    path = grid or comparing.grid_named(preset)
    rows = comparing.Grid.load(path, pipeline.preset("default", builtin=builtin))
    texts = comparing.held_out_prompts(builtin, prompts, per_task)
    if dry_run:
        found = comparing.forecast_grid(ws.source if ws else resolve(model), rows, len(texts), name)
        _table([_in_units(key, value) for key, value in found.items()])
        _say("floors are the work at the speed of a matrix product here: expect more")
        if as_json:
            _print_json(found)
        return
    ws = ws or _workspace(out / "original", model, False, begin=True)
    with _bars() as progress:
        summary = comparing.compare(ws, rows, name, texts, out, progress, weights=given)
    paths = compare_page.write(summary, out)
    _table([compare_page.HEADINGS, *compare_page.cells(summary)])
    _say("wrote " + ", ".join(map(str, paths)))
    _say(f"next: edgeprune export {out / rows.reference / 'seed-0'} --target onnx -o {out / rows.reference}-onnx")
    if as_json:
        _print_json(summary)


@app.command(
    epilog="Example: edgeprune score small --against built-in --metric shapes  ·  "
    "edgeprune score images --against ./sd35 --metric psnr --metric clip --weights clip=./clip  ·  "
    "edgeprune score small-onnx --metric geneval --weights geneval=./mask2former --weights clip=./clip -o scored"
)
def score(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A model to draw with, or images with metadata.jsonl.")],
    metric: Annotated[
        list[str],
        typer.Option(help="shapes, clip, hpsv2, geneval; with --against also psnr, ssim, lpips. Again for more."),
    ],
    against: Annotated[
        str | None, typer.Option(help="The original: a model, a hub id, built-in, or images of the same prompts.")
    ] = None,
    weights: Weights = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file of prompts, one a line; by default the metric's own, or a list of ours."),
    ] = None,
    per_task: Annotated[
        int | None, typer.Option(min=1, help="geneval, shapes: prompts of each task; else all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 1,
    runtime: RuntimeName = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of an image.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Keep the images here; a killed run goes on with them.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Images by any metric, with 95 % intervals; with --against also what was lost, in pairs of prompts."""
    import tempfile
    from contextlib import ExitStack

    from edgeprune.common.files import sha256_file
    from edgeprune.data.imagefolder import read_samples
    from edgeprune.metrics import parse_weights, scoring

    given = parse_weights(weights or [])
    scoring.check(metric, given, against is not None)
    places = {"images": _images_or_model(folder)} | ({"original": _images_or_model(against)} if against else {})
    made = [path for path in places.values() if scoring.is_images(path)]
    if made and (prompts or per_task or seeds > 1):
        raise InputError(f"{made[0]} says its prompts by itself; leave --prompts, --per-task and --seeds out")
    if made:
        wanted = [scoring.Wish(s.text, i if s.seed is None else s.seed) for i, s in enumerate(read_samples(made[0]))]
        scoring.check_prompts(metric, [w.text for w in wanted])
    else:
        wanted = scoring.wishes(metric, prompts=prompts, per_task=per_task, seeds=seeds)
    with ExitStack() as stack, _bars() as progress:
        kept = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeprune-score-")))
        for name, place in places.items():
            if place not in made:
                # The original of an export is a diffusers folder, which --runtime is not about.
                scoring.draw(
                    place, kept / name, wanted, runtime=runtime if name == "images" else None, steps=steps,
                    progress=progress,
                )  # fmt: skip
                places[name] = kept / name
        read = {name: read_samples(place) for name, place in places.items()}
        found = scoring.score(read["images"], metric, against=read.get("original"), weights=given, progress=progress)
    _table(scoring.rows(found))
    _say(f"{found[0].images} images of {len(found[0].prompts)} prompts; 95 % bootstrap intervals over prompts")
    if out:
        _say(f"images are in {out}")
    if not against:
        _say(f"next: edgeprune score {folder} --against ORIGINAL --metric {metric[0]} for what was lost")
    elif not out and len(made) < len(places):
        _say("next: the same with -o DIR keeps the images, to be scored again")
    if as_json:
        settings = {"folder": folder, "against": against, "weights": given, "steps": steps}
        settings["prompts_sha256"] = sha256_file(prompts) if prompts else None
        _print_json(scoring.to_json(found) | {"settings": settings})


def _images_or_model(text: str) -> Path:
    if Path(text).is_dir():
        from edgeprune.data.imagefolder import METADATA

        folder = Path(text)
        if not any((folder / name).is_file() for name in (METADATA, "edgeprune_export.json", "model_index.json")):
            raise InputError(
                f"{folder}: found none of {METADATA} (images with their prompts), edgeprune_export.json (an export), "
                "model_index.json (a diffusers pipeline), expected one"
            )
        return folder
    from edgeprune.artefact.checkpoint import resolve  # with torch

    return resolve(None if text == "built-in" else text)


@app.command(epilog="Example: edgeprune lora style.safetensors --model small -o style-small.safetensors")
def lora(
    file: Annotated[Path, typer.Argument(help="A LoRA made for the original, safetensors.")],
    model: Annotated[Path, typer.Option("--model", help="The artefact it shall be for.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    as_json: AsJson = False,
) -> None:
    """Carry a LoRA of the original over to the pruned model, and say what no longer applies."""
    from collections import Counter

    from edgeprune.artefact.checkpoint import Manifest
    from edgeprune.artefact.lora import read, remap
    from edgeprune.common.tensors import save_tensors
    from edgeprune.families import family_of

    if out.suffix != ".safetensors":
        raise InputError(f"-o {out}: expected a name ending in .safetensors")
    manifest = Manifest.load(model)
    family, made = family_of(manifest.config), manifest.prune_plan(model)
    if made is None:
        raise InputError(f"{model}: is not pruned yet; run `edgeprune prune -o {model}` first")
    given = read(file, family)
    found = remap(given, family, manifest.config, made)
    if not found.kept:
        raise InputError(f"{file}: nothing of it applies: all of its {len(found.gone)} layers are gone from {model}")
    save_tensors(out, found.tensors, {"format": "pt", **given.metadata})
    why = Counter(found.gone.values())
    _table([("layers that apply", str(len(found.kept))), *((f"gone: {w}", str(n)) for w, n in sorted(why.items()))])
    _say(f"wrote {out}")
    _say(f'next: pipe = edgeprune.load("{model}", quantized=False); pipe.load_lora_weights("{out}")')
    if as_json:
        _print_json({"out": str(out), "kept": found.kept, "gone": found.gone})


@app.command(epilog="Example: edgeprune synth sd3.5-large -o large")
def synth(
    name: Annotated[str, typer.Argument(help="sd3.5-large, sd3.5-medium, flux.1-schnell or flux.1-dev.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Pipeline folder to write.")] = Path("synth"),
) -> None:
    """A full-size pipeline with random weights, to try memory and time on. Run it again after a kill to go on."""
    from edgeprune.artefact.synth import synth as make

    with _bars() as progress:
        size = make(name, out, progress=progress)
    _say(f"{out}: {name} with random weights, {size / 1e9:,.1f} GB")
    _say(f"next: edgeprune compress {out} -o small --method manual --steps 0")


@app.command(epilog="Example: edgeprune report -o small --bench bench.json")
def report(
    out: Out = Path("compressed"),
    bench_file: Annotated[
        Path | None, typer.Option("--bench", help="JSON of `edgeprune bench`, shown in the page.")
    ] = None,
) -> None:
    """Write report.html again, with a bench's figures."""
    from edgeprune.bench import measure as benchmark
    from edgeprune.report import figures as page

    measured = benchmark.load(bench_file) if bench_file else None
    ws = _workspace(out, None, False)
    with _bars() as progress:
        page.make(ws, redo=False, bench=measured, progress=progress)
    _say(f"wrote {out / 'report.html'}")


@app.command(epilog="Example: edgeprune doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """What is installed, what can be compressed, exported and run here, and what adds the rest."""
    from dataclasses import asdict

    from edgeprune.cli import examine as examination

    findings, clashes = examination.examine(), conflicts()
    _table([("yes" if f.works else "no", f.what, f"{f.fix} ({f.why})" if f.fix else f.why) for f in findings])
    for conflict in clashes:
        _say(f"conflict: {conflict}")
    if as_json:
        _print_json({"findings": [asdict(f) for f in findings], "conflicts": clashes})


app.add_typer(study, name="study")

devices = typer.Typer(help="The devices that are known.", invoke_without_command=True)
app.add_typer(devices, name="targets")


@devices.callback()
def targets(context: typer.Context) -> None:
    """List the devices that are known; `show NAME` explains one."""
    from edgeprune import targets as known

    if context.invoked_subcommand is None:
        _table([(name, known.load(name).description) for name in known.names()])
        _say("next: edgeprune targets show NAME")


@devices.command(epilog="Example: edgeprune targets show rtx")
def show(name: str, as_json: AsJson = False) -> None:
    """Everything known of one device."""
    from dataclasses import asdict

    from edgeprune import targets as known

    values = asdict(known.load(name))
    _table(
        [(k.replace("_", " "), ", ".join(map(str, v)) if isinstance(v, tuple) else str(v)) for k, v in values.items()]
    )
    if as_json:
        _print_json(values)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from edgeprune import __version__

        print(f"edgeprune {__version__}")
        raise typer.Exit
    if processes.count() > 1 and context.invoked_subcommand not in SHARED:
        raise InputError(f"several processes can share {' and '.join(SHARED)}; run anything else in one")
