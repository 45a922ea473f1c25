"""One run at a time in a folder: errors name the owner of a lock, and a dead process's lock is free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeprune.common.errors import DiskError, InputError, LockedError
from edgeprune.common.lock import LOCK, hold, is_free

Start = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture
def other() -> Iterator[Start]:
    """Return a function that starts a process which holds a lock until it is killed."""
    code = """
        import sys
        from pathlib import Path
        from edgeprune.common.lock import hold
        path = Path(sys.argv[1])
        held = hold(path, path.parent)
        print("held", flush=True)
        sys.stdin.read()  # until it is killed
    """
    started: list[subprocess.Popen[str]] = []

    def start(path: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout and started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_another_process_is_refused_and_told_of_the_first(other: Start, tmp_path: Path) -> None:
    process = other(tmp_path / LOCK)
    words = rf"in use by process {process.pid} on \S+ since 20\S+ \(-c \S+\); .*`kill {process.pid}`.*another -o"
    with pytest.raises(LockedError, match=words) as refusal:
        hold(tmp_path / LOCK, tmp_path)
    assert refusal.value.exit_code == 2 and str(refusal.value).startswith(f"{tmp_path}: ")


def test_what_a_killed_process_held_is_free(other: Start, tmp_path: Path) -> None:
    process = other(tmp_path / LOCK)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == process.pid  # the dead process's
    held = hold(tmp_path / LOCK, tmp_path)
    assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    del held
    assert not any(tmp_path.iterdir())


def test_a_process_shares_its_lock_with_itself(other: Start, tmp_path: Path) -> None:
    with hold(tmp_path / LOCK, tmp_path) as first:
        assert hold(tmp_path / LOCK, tmp_path) is first
        code = (
            "import sys\nfrom pathlib import Path\nfrom edgeprune.common.lock import hold\n"
            "hold(Path(sys.argv[1]), Path('x'))"
        )
        done = subprocess.run([sys.executable, "-c", code, tmp_path / LOCK], capture_output=True, text=True)
        assert done.returncode == 1 and f"in use by process {os.getpid()} on" in done.stderr
        if not (child := os.fork()):
            first._end()  # as if it were garbage-collected
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / ".lock.json").exists()  # a child's exit does not release the lock
        del first
    other(tmp_path / LOCK)


def test_a_note_that_says_nothing_true_is_not_repeated(other: Start, tmp_path: Path) -> None:
    other(tmp_path / LOCK)
    for note in ("{", '{"pid": "x"}', json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename})):
        (tmp_path / ".lock.json").write_text(note)
        with pytest.raises(LockedError, match="in use by another run, which has just begun; wait"):
            hold(tmp_path / LOCK, tmp_path)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be written"):
        hold(tmp_path / "file" / LOCK, tmp_path)


def test_what_a_run_leaves_that_had_hardly_begun_is_free(tmp_path: Path) -> None:
    assert is_free(tmp_path / "none", "mark.json") and is_free(tmp_path, "mark.json")
    for name in (LOCK, ".lock.json", ".lock.json.tmp", "mark.json.tmp"):
        (tmp_path / name).touch()
    assert is_free(tmp_path, "mark.json")
    (tmp_path / "holiday.jpg").touch()
    assert not is_free(tmp_path, "mark.json") and not is_free(tmp_path / "holiday.jpg", "mark.json")


def test_every_kind_of_folder_is_locked(other: Start, tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    from edgeprune.artefact.synth import write_pipeline
    from edgeprune.export.to_onnx import export
    from edgeprune.stages.workspace import Workspace

    source, _ = tiny_folders
    config = json.loads((source / "transformer" / "config.json").read_text())
    begun = Workspace(tmp_path / "begun", str(source))
    del begun
    for path, act in (
        (tmp_path / "new" / LOCK, lambda: Workspace(tmp_path / "new", str(source))),
        (tmp_path / "begun" / LOCK, lambda: Workspace(tmp_path / "begun", None, model_given=False)),
        (tmp_path / "synth" / LOCK, lambda: write_pipeline(config, tmp_path / "synth", label="tiny")),
        (tmp_path / ".onnx.lock", lambda: export(source, tmp_path / "onnx")),
    ):
        path.parent.mkdir(exist_ok=True)
        process = other(path)
        with pytest.raises(InputError, match=f"in use by process {process.pid} "):
            act()
    assert not (tmp_path / "onnx.partial").exists()
