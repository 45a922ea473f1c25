"""Shared options that say where to compute, in how much memory, and in how much time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.common.errors import InputError

if TYPE_CHECKING:
    from edgeprune.common.memory import ComputeOptions

MEMORY = "Memory and speed"
"""The panel of the help."""
LONGEST_S = 3600.0
"""Seconds that a stage may take without `--yes`."""

LaunchConfig = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="YAML file of `accelerate config`: run in the processes that it describes (docs/scale.md).",
        rich_help_panel=MEMORY,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps|xpu",
        help="Where to compute. auto takes a GPU that torch finds, else the processor.",
        rich_help_panel=MEMORY,
    ),
]
TorchDevice = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps|xpu",
        help="Where models and metrics that run in torch compute; other runtimes choose by themselves. auto takes a "
        "GPU that torch finds, else the processor.",
        rich_help_panel=MEMORY,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="BYTES",
        help="Most memory to take, such as 6GB; with torch on a GPU, of the GPU. What does not fit is read to run.",
        show_default="most of what is free",
        rich_help_panel=MEMORY,
    ),
]
Yes = Annotated[
    bool,
    typer.Option("--yes", help="Run what takes over an hour, too; without it that is refused.", rich_help_panel=MEMORY),
]
LongestTime = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="DURATION",
        help="Refuse what takes longer than this here, such as 90s, 40m or 2h.",
        show_default="1h without --yes",
        rich_help_panel=MEMORY,
    ),
]
TorchYes = Annotated[
    bool,
    typer.Option(
        "--yes", help="Run what takes torch over an hour, too; without it that is refused.", rich_help_panel=MEMORY
    ),
]
TorchTime = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="DURATION",
        help="Refuse what takes torch longer than this here, such as 90s, 40m or 2h. Other runtimes are not forecast.",
        show_default="1h without --yes",
        rich_help_panel=MEMORY,
    ),
]
Time = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="DURATION",
        help="Finish within this time, such as 40m or 8h: chooses once how much is scored, trained and drawn, of what "
        "the other options ask for.",
        show_default="none; a folder keeps its own",
        rich_help_panel=MEMORY,
    ),
]


RuntimeOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="NAME=VALUE",
        help="An option of the runtime itself, such as threads=4 (docs/run.md). Repeat it for several.",
        rich_help_panel=MEMORY,
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="Compute an export in float32, not in the fastest precision that is exact enough.",
        rich_help_panel=MEMORY,
    ),
]


def runtime_options(given: list[str] | None) -> dict[str, str]:
    """Return the values of `--option` by name.

    Raises:
        InputError: one has another form, or a name is repeated.
    """
    out: dict[str, str] = {}
    for text in given or []:
        name, _, value = text.partition("=")
        if not name or not value or name in out:
            raise InputError(f"--option: found {text!r}, expected NAME=VALUE, once for each name")
        out[name] = value
    return out


def compute_options(device: str, memory: str | None, *, yes: bool = True, longest: str | None = None) -> ComputeOptions:
    """Return where to compute, in how much memory, and in how much time: `longest`, else unless `yes` an hour.

    Raises:
        InputError: an option has another form, or both `--yes` and `--time` are given.
    """
    from edgeprune.common.memory import ComputeOptions, parse_bytes
    from edgeprune.common.tables import parse_duration

    if yes and longest is not None:
        raise InputError("--yes runs what takes any time; omit --time")
    size = parse_bytes(memory, "--memory") if memory else None
    seconds = LONGEST_S if longest is None else parse_duration(longest, "--time")
    return ComputeOptions(device, size, None if yes else seconds)
