"""Times the start of the command: python -m edgeprune.bench.start --at-most 0.5

Each of these runs several times in fresh processes, and the fastest counts: a bare interpreter, `import edgeprune`, and
`edgeprune --help`. Exits with 1 if the help takes longer than the limit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

BARE = "python"
HELP = "edgeprune --help"
COMMANDS = {
    BARE: [sys.executable, "-c", ""],
    "import edgeprune": [sys.executable, "-c", "import edgeprune"],
    HELP: [sys.executable, "-m", "edgeprune.cli", "--help"],
}


def run_silently(command: Sequence[str]) -> None:
    """Run a command without its output.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def fastest(
    command: Sequence[str],
    repeats: int,
    *,
    run: Callable[[Sequence[str]], None] = run_silently,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the seconds of the fastest of `repeats` runs."""
    times = []
    for _ in range(repeats):
        began = clock()
        run(command)
        times.append(clock() - began)
    return min(times)


def main(
    arguments: Sequence[str] | None = None,
    *,
    run: Callable[[Sequence[str]], None] = run_silently,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Time the commands, print a line for each, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.bench.start", description=__doc__)
    parser.add_argument("--at-most", type=float, help=f"seconds that `{HELP}` may take")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command; the fastest counts")
    options = parser.parse_args(arguments)
    seconds = {
        name: fastest(command, max(1, options.repeats), run=run, clock=clock) for name, command in COMMANDS.items()
    }
    for name, value in seconds.items():
        more = "" if name == BARE else f"  ({value - seconds[BARE]:.3f} s more than {BARE} alone)"
        print(f"{name:<18}{value:.3f} s{more}")
    if options.at_most is not None and seconds[HELP] > options.at_most:
        print(f"error: {HELP} takes {seconds[HELP]:.3f} s, at most {options.at_most:g} s allowed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
