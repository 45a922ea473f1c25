"""The start of the command, timed: with a clock and commands of the test, so no real time counts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edgeprune.bench import start


class Machine:
    """Pretends to run commands: each run moves the clock by the next number of seconds for that command."""

    def __init__(self, seconds: dict[str, list[float]]) -> None:
        self.seconds = {name: iter(values) for name, values in seconds.items()}
        self.names = {tuple(command): name for name, command in start.COMMANDS.items()}
        self.now = 100.0
        self.ran: list[str] = []

    def run(self, command: Sequence[str]) -> None:
        name = self.names[tuple(command)]
        self.ran.append(name)
        self.now += next(self.seconds[name])

    def clock(self) -> float:
        return self.now


def machine(*, shown: list[float]) -> Machine:
    return Machine({start.BARE: [0.25, 0.125], "import edgeprune": [0.5, 0.25], start.HELP: shown})


@pytest.mark.parametrize("shown", [[0.5, 4.0], [4.0, 0.5]])
def test_the_fastest_run_counts(shown: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    fake = machine(shown=shown)
    assert start.main(["--at-most", "0.5", "--repeats", "2"], run=fake.run, clock=fake.clock) == 0
    assert fake.ran == [name for name in start.COMMANDS for _ in range(2)]
    out, err = capsys.readouterr()
    assert [line.split("  (")[0].split() for line in out.splitlines()] == [
        ["python", "0.125", "s"],
        ["import", "edgeprune", "0.250", "s"],
        ["edgeprune", "--help", "0.500", "s"],
    ]
    assert "(0.375 s more than python alone)" in out.splitlines()[2] and err == ""


def test_a_slow_start_is_one_line_and_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    fake = machine(shown=[0.75, 0.625])
    assert start.main(["--at-most", "0.5", "--repeats", "2"], run=fake.run, clock=fake.clock) == 1
    assert capsys.readouterr().err == "error: edgeprune --help takes 0.625 s, at most 0.5 s allowed\n"


def test_without_a_limit_it_only_prints() -> None:
    fake = machine(shown=[8.0, 8.0])
    assert start.main(["--repeats", "2"], run=fake.run, clock=fake.clock) == 0


def test_the_commands_run() -> None:
    for command in start.COMMANDS.values():
        start.run_silently(command)
