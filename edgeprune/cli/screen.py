"""What the commands show: lines, tables and progress bars on stderr, JSON on stdout.

Of several processes only the first one shows anything but errors. Control characters in names are escaped.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from edgeprune.common import processes, stop
from edgeprune.common.terminal import printable

FLOORS = "floors assume the speed of a plain matrix product on this machine; expect more"


def fail(text: str, code: int) -> NoReturn:
    """Print an error as one line and exit with `code`."""
    prefix = "error" if processes.is_main() else f"error in process {processes.index()}"
    print(f"{prefix}: {printable(' '.join(text.split()))}", file=sys.stderr)
    raise SystemExit(code)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a Python warning as one line, without its place in the source; stands in for `warnings.showwarning`."""
    if processes.is_main():
        print(f"warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def say(text: str) -> None:
    """Print lines of text."""
    from rich.console import Console

    if processes.is_main():
        Console(stderr=True, soft_wrap=True, highlight=False).print(printable(text), markup=False)


def quoted(path: object, suffix: str = "") -> str:
    """Return a path, with something after it, as a shell takes it."""
    return shlex.quote(f"{path}{suffix}")


def print_json(data: Any) -> None:
    """Print one JSON object as a line of stdout."""
    if processes.is_main():
        print(json.dumps(data, allow_nan=False))


def table(rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows in columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(show_header=False, box=None)
    for _ in rows[0] if rows else ():
        grid.add_column(overflow="fold")  # a cell that is cut could not be searched for
    for row in rows:
        # As Text: rich would take the [onnx] of 'edgeprune[onnx]' for markup and drop it.
        grid.add_row(*(Text(printable(cell)) for cell in row))
    if processes.is_main():
        Console(stderr=True).print(grid)


def show_forecast(numbers: Mapping[str, Any], remark: str, as_json: bool) -> None:
    """Show the numbers of a dry run with their units and a remark, and print them as JSON if wanted.

    What it chose, a dictionary, is not in the table.
    """
    table([in_units(key, value) for key, value in numbers.items() if not isinstance(value, dict)])
    say(remark)
    if as_json:
        print_json(numbers)


def in_units(key: str, value: float) -> tuple[str, str]:
    """Return a readable row for a key that ends in its unit. JSON keeps the plain number."""
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


@contextmanager
def bars() -> Iterator[Callable[..., None]]:
    """Yield a progress function that draws a bar per stage: done, elapsed, left, and a note.

    A stage without a number of steps is one line. In a log file a bar is a line per tenth. SIGTERM ends the block at
    the next step (common/stop.py), where everything done so far is on disk.
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

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )
    tasks: dict[str, Any] = {}
    tenths: dict[str, int] = {}

    def update(stage: str, done: int = 0, total: int = 0, note: str = "") -> None:
        stop.check()
        if not processes.is_main():
            return
        stage, note = printable(stage), printable(note)
        if not progress.console.is_terminal:
            if tenths.get(stage) != (tenth := 10 * done // max(total, 1)):
                tenths[stage] = tenth
                say(f"{stage}: {done} of {total} {note}".rstrip() if total else stage)
            return
        progress.start()  # only now, so that an error before the first step stays one line
        if not total:
            progress.console.print(stage, markup=False, highlight=False)
            return
        if stage not in tasks:
            tasks[stage] = progress.add_task(stage, total=total, note=note)
        progress.update(tasks[stage], completed=done, total=total, note=note)

    try:
        with stop.on_sigterm():
            yield update
    finally:
        if progress.live.is_started:
            progress.stop()
