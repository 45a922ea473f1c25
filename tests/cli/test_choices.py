"""Help and choices of every command: panels, examples, names from the registries, and what refuses a wrong name."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from shell import run
from typer.testing import CliRunner

from edgeprune.cli import PANELS, app, options, study, targets
from edgeprune.cli.choices import Names, Verb
from edgeprune.common.errors import InputError
from edgeprune.shapes import PLAIN

COMMAND = typer.main.get_command(app)


def leaves(command: Any = COMMAND, words: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that does something, as typed."""
    subcommands = getattr(command, "commands", None)
    if not subcommands:
        yield " ".join(words), command
        return
    for name, sub in subcommands.items():
        yield from leaves(sub, (*words, name))


VERBS = dict(leaves())


def choices() -> Iterator[tuple[str, str, list[str]]]:
    """Verb, option as typed, and the names that it takes."""
    for verb, command in leaves(typer.main.get_command(app)):
        for param in command.params:
            if isinstance(param.metavar, Names):
                yield verb, param.opts[0], list(param.metavar.names())


CHOICES = list(choices())
FIXED = {
    ("compress", "--method"), ("plan", "--method"), ("compress", "--metric"), ("analyze", "--metric"),
    ("compare", "--metric"), ("compare", "--teacher"), ("score", "--metric"), ("generate", "--runtime"),
    ("bench", "--runtime"), ("tune", "--metric"), ("tune", "--runtime"),
    ("score", "--runtime"), ("export", "--target"), ("export", "--device"), ("compress", "--fit"), ("plan", "--fit"),
    ("export", "--modulation"), ("compress", "--encoders"), ("quantize", "--encoders"),
    ("analyze", "--estimator"), ("compress", "--estimator"), ("distill", "--schedule"), ("distill", "--sensitivity"),
    ("distill", "--features"),
    ("distill", "--levels"),
    ("distill", "--teacher-precision"), ("distill", "--mixed-precision"),
    ("distill", "--optimizer"), ("compress", "--optimizer"), ("generate", "--solver"), ("compress", "--solver"),
    ("compress", "--mixed-precision"), ("distill", "--prefix-calibration"), ("compress", "--calibration"),
    ("quantize", "--calibration"), ("compress", "--preset"), ("compare", "--preset"), ("compress", "--group-size"),
    ("plan", "--group-size"), ("distill", "--group-size"), ("quantize", "--group-size"), ("study new", "--mode"),
    ("synth", "name"), ("targets show", "name"), ("verify", "--dtype"),
}  # fmt: skip
"""Options and arguments with a fixed list of names."""


@functools.cache
def shown(*words: str) -> str:
    """The help of a command, on a wide screen and without its frames."""
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.output)


def test_every_fixed_choice_is_one() -> None:
    assert {(verb, option) for verb, option, *_ in CHOICES} == FIXED


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_a_text_and_an_example(verb: str) -> None:
    text = shown(*verb.split())
    assert "Example: edgeprune" in text
    for param in VERBS[verb].params:
        if param.name != "help":
            assert param.help, f"{verb}: {param.name} has no help"


@pytest.mark.parametrize(("verb", "option", "names"), CHOICES, ids=[f"{v} {o}" for v, o, *_ in CHOICES])
def test_help_lists_the_choices(verb: str, option: str, names: list[str]) -> None:
    text = shown(*verb.split())
    if option.startswith("--"):
        assert f"{option} [{' | '.join(names)}]" in text.replace("* ", "")
    else:
        assert f"One of {', '.join(names)}." in text


def test_every_command_is_in_a_panel() -> None:
    for info in [*app.registered_commands, *app.registered_groups]:
        assert isinstance(info.rich_help_panel, str), info
    assert {module.__name__.rpartition(".")[2] for panel in PANELS.values() for module in panel} == {
        info.name for info in app.registered_commands
    }
    root = shown()
    assert all(f"─ {panel} ─" in root for panel in PANELS)
    for group in (study.app, targets.app):
        assert (group.info.epilog or "").startswith("Example: ")


@pytest.mark.parametrize("verb", ["compress", "distill"])
def test_many_options_are_in_panels(verb: str) -> None:
    own = [param for param in VERBS[verb].params if getattr(param, "rich_help_panel", None) is None]
    assert len(own) < 8 < len(VERBS[verb].params)


WRONG = [
    (["compress", "--preset", "fast", "-o", "x"], "--preset", "default, quick"),
    (["export", "x", "--target", "abacus", "-o", "y"], "--target", "coreml, onnx, openvino, trt"),
    (["export", "x", "--device", "toaster", "-o", "y"], "--device", "cpu-arm, cpu-x86"),
    (["score", ".", "--metric", "beauty"], "--metric", "shapes, clip, hpsv2, geneval, psnr, ssim, lpips"),
    (["score", ".", "--metric", "psnr", "--metric", "velocity"], "--metric", "shapes, clip"),
    (["compress", "-o", "x", "--metric", "beauty"], "--metric", "velocity, shapes, clip"),
    (["compress", "x", "-o", "out", "--dry-run", "--method", "hppp"], "--method", "hpp, hybrid"),
    (["plan", "--method", "nonsense"], "--method", "hpp, hybrid, manual, milp, bk-sdm, koala"),
    (["quantize", "--group-size", "48"], "--group-size", "16, 32, 64, 128"),
    (["analyze", "--estimator", "guess"], "--estimator", "auto, exhaustive, reuse, gates"),
    (["distill", "--sensitivity", "binary"], "--sensitivity", "graded, off: the reference's binary form is"),
    (["synth", "sd4"], "NAME", "sd3.5-large, sd3.5-large-turbo"),
    (["targets", "show", "toaster"], "NAME", "cpu-arm, cpu-x86"),
    (["study", "new", "x", "--mode", "duel"], "--mode", "mos, pairs"),
]


@pytest.mark.parametrize(("words", "option", "names"), WRONG, ids=[" ".join(words) for words, *_ in WRONG])
def test_a_wrong_choice_is_refused_with_the_list(words: list[str], option: str, names: str) -> None:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "400", "TERMINAL_WIDTH": "400"})
    text = re.sub(r"\s+", " ", result.output)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in text and f"is not one of {names}" in text


def test_a_wrong_choice_is_no_traceback_and_makes_no_folder(tmp_path: Path) -> None:
    found = run("compress", "-o", "out", "--method", "hppp", cwd=tmp_path)
    assert found.returncode == 2 and "'hppp' is not one of hpp, hybrid" in found.stderr
    assert "Traceback" not in found.stderr and not list(tmp_path.iterdir())


def test_values_are_plain() -> None:
    """Choices reach the command as text and whole numbers, as they are written to files."""
    taken = {}
    other = typer.Typer()

    @other.command(cls=Verb)
    def verb(method: options.Method = None, size: options.GroupSize = 64, metric: options.Metric = "velocity") -> None:
        taken.update(method=method, size=size, metric=metric)

    assert CliRunner().invoke(other, []).exit_code == 0
    assert taken == {"method": None, "size": 64, "metric": "velocity"}
    assert CliRunner().invoke(other, ["--method", "hpp", "--size", "128"]).exit_code == 0
    assert taken == {"method": "hpp", "size": 128, "metric": "velocity"}
    assert [type(value) for value in taken.values()] == [str, int, str]


def test_the_shell_completes_choices() -> None:
    environment = os.environ | {"_EDGEPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": "edgeprune plan --method h"}
    code = "import sys; sys.argv[0] = 'edgeprune'; from edgeprune.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment | {"COMP_CWORD": "3"}
    )
    assert done.stdout.split() == ["hpp", "hybrid"], done
    assert "--install-completion" in shown()


def test_repeated_names_are_those_of_the_code() -> None:
    """What options.py repeats because its home imports torch."""
    from edgeprune.analysis import estimators
    from edgeprune.cli import compare, verify
    from edgeprune.compare.grid import GRIDS
    from edgeprune.quantization.quantize import CALIBRATIONS
    from edgeprune.residency import compute
    from edgeprune.stages import work
    from edgeprune.training import recipe

    assert (estimators.AUTO, *estimators._MODULES) == options.ESTIMATORS
    assert CALIBRATIONS == options.PREFIX_CALIBRATIONS == tuple(work.CALIBRATED)
    assert recipe.FEATURES == options.FEATURES
    assert recipe.LEVELS == options.LEVELS
    assert recipe.SCHEDULES == options.SCHEDULES
    assert recipe.OPTIMIZERS == options.OPTIMIZERS
    assert (recipe.SENSITIVITIES, recipe.BINARY) == (options.SENSITIVITIES, options.BINARY)
    assert tuple(compute.DTYPES) == verify.DTYPES
    assert recipe.TEACHERS == options.TEACHER_PRECISIONS
    assert ("auto", *CALIBRATIONS) == options.CALIBRATIONS
    assert compare.grids() == sorted(path.stem for path in GRIDS.glob("*.toml"))
    for name in options.MIXED_PRECISIONS:
        recipe.DistillOptions(mixed_precision=name).check()


def test_the_code_below_refuses_as_well() -> None:
    """Callers from Python pass by Typer."""
    from edgeprune.metrics import check_analysis, scoring
    from edgeprune.planning.options import PlanOptions
    from edgeprune.stages.compress import preset
    from edgeprune.targets import for_format

    for name in options.PRESETS:
        preset(name, world=PLAIN)
    with pytest.raises(InputError, match="--preset"):
        preset("fast", world=PLAIN)
    with pytest.raises(InputError, match="--target"):
        for_format("abacus")
    with pytest.raises(InputError, match="expected one of shapes, clip, hpsv2, geneval, psnr, ssim, lpips"):
        scoring.check(["beauty"], {}, False)
    with pytest.raises(InputError, match="expected one of velocity, shapes, clip"):
        check_analysis("beauty", {})
    with pytest.raises(InputError, match="--method: found 'hppp', expected one of hpp, hybrid"):
        PlanOptions(method="hppp").check()


def test_a_t5_has_8_bits_where_nothing_calibrates() -> None:
    from edgeprune.stages.options import CompressOptions, QuantizeOptions

    given = [
        (form, QuantizeOptions(calibration=how)) for form in (None, "half") for how in ("auto", "feedback", "none")
    ]
    found = [CompressOptions(quantize=int4, encoders=form).text_form for form, int4 in given]
    assert found == ["int4", "int4", "int8", "half", "half", "half"]
