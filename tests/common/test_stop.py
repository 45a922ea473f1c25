"""How a run ends: SIGTERM stops it after the current step, and every ending is one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from edgeprune import cli
from edgeprune.common import stop


class OutOfMemoryError(RuntimeError):
    """An error with the name of torch's."""


def test_stops_where_it_is_asked() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop.on_sigterm():
        stop.check()
        assert not stop.asked()
    done = []
    with pytest.raises(stop.Stopped), stop.on_sigterm():
        for part in range(5):
            stop.check()
            done.append(part)
            if part == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # a second signal changes nothing
                assert stop.asked()
    assert done == [0, 1, 2] and not stop.asked() and signal.getsignal(signal.SIGTERM) is before


def test_stops_at_the_end_if_nobody_checks() -> None:
    with pytest.raises(stop.Stopped), stop.on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)


def script(code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_has_no_end_is_broken_off() -> None:
    assert stop.GRACE_S < 30
    run = script("""
        import os, signal, time
        from edgeprune.common import stop
        stop.GRACE_S = 0.1
        with stop.on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
            print("slept to its end")
    """)
    slept, said = run.communicate()
    assert run.returncode == 143 and said.count("\n") == 1 and "run the same command again" in said
    assert not slept


def test_a_command_with_bars_stops_at_its_next_step() -> None:
    run = script("""
        import sys, time
        from edgeprune import cli
        from edgeprune.cli import screen
        def app():
            with screen.bars() as progress:
                for step in range(10**6):
                    print(step, flush=True)
                    progress("distill", step, 10**6, "")
                    time.sleep(0.01)
        cli.app = app
        sys.argv = ["edgeprune", "distill"]
        cli.main()
    """)
    assert run.stdout and run.stdout.readline() == "0\n"
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode == 143
    assert said.splitlines()[-1] == "error: stopped by SIGTERM; run the same command again to resume"


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (stop.Stopped(), 143, "stopped by SIGTERM; run the same command again to resume\n"),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to resume\n"),
        (MemoryError(), 1, "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "--batch"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "out of memory; what is finished is kept"),
        (OSError(errno.EROFS, "Read-only file system", "small/plan.json"), 1, "small/plan.json: Read-only file system"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "x: No space left on device; free some space"),
    ],
)
def test_every_end_is_one_line(
    raised: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise raised

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["edgeprune", "compress", "-o", "small"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == code and said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "resumes"),
    [
        ("export small --target onnx", True),
        ("score small", False),
        ("score small -o images", True),
        ("bench small", False),
        ("convert model.safetensors", False),
        ("", False),
    ],
)
def test_only_what_resumes_says_so(
    typed: str, resumes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["edgeprune", *typed.split()])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == f"error: stopped; run the same command again{' to resume' * resumes}\n"


def test_other_failures_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def app() -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main()
