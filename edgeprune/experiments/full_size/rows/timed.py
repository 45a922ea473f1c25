"""Rows of `compress --time`: once undisturbed, and once killed every few minutes with the same stored choice."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from edgeprune.artefact.manifest import MANIFEST
from edgeprune.common.files import read_json, write_json
from edgeprune.common.hashes import sha256
from edgeprune.experiments.full_size.forecast import Work
from edgeprune.experiments.full_size.recording import Recorder
from edgeprune.experiments.full_size.rows.row import Row

_SOURCE, _WHOLE, _KILLED = "sd3.5-large", "sd3.5-large-40m", "sd3.5-large-40m-killed"
_TIME, _TIME_S = "40m", 2400
_BETWEEN_S = 240
"""Seconds that a killed run gets at a time."""
_COMPARED = ("*/*.safetensors", "analysis.json", "plan.json", "cache/report.npz")
_DISK = 25 * 10**9


def rows() -> Iterator[Row]:
    """Yield both rows."""
    yield Row(
        "time-40m", f"{_SOURCE}: all of compress in 40 minutes at 1024x1024", Work(given=_TIME_S), _DISK,
        _whole, needs=("synth",), model=_WHOLE,
    )  # fmt: skip
    yield Row(
        "time-40m-killed", "the same, killed every 4 minutes: the same bytes", Work(12, given=_TIME_S), _DISK,
        _killed, needs=("time-40m",),
    )  # fmt: skip


def _command(recorder: Recorder, out: Path) -> tuple[str, ...]:
    return "compress", str(recorder.out / _SOURCE), "-o", str(out), "--time", _TIME


def _whole(recorder: Recorder) -> None:
    out = recorder.out / _WHOLE
    recorder.stage("time-40m: compress", *_command(recorder, out), makes=out)


def _killed(recorder: Recorder) -> None:
    whole, out, name = recorder.out / _WHOLE, recorder.out / _KILLED, "time-40m: killed every 4 minutes"
    if not out.is_dir():
        begin(whole, out)
    recorder.stage(name, *_command(recorder, out), kill_after_s=_BETWEEN_S)
    recorder.remark(name, lambda: f"{recorder.stages[name]['kills']} times; {compared(whole, out)}")
    shutil.rmtree(out)


def begin(whole: Path, out: Path) -> None:
    """Make a folder with what another has chosen, and nothing done."""
    out.mkdir()
    write_json(out / MANIFEST, read_json(whole / MANIFEST) | {"stages": {}, "files": {}, "plan": None})


def compared(one: Path, other: Path) -> str:
    """Say which weights, scores, plans and images of two folders differ."""
    names = sorted(str(path.relative_to(one)) for kind in _COMPARED for path in one.glob(kind))
    differ = [name for name in names if not (other / name).is_file() or sha256(one / name) != sha256(other / name)]
    same = f"{len(names) - len(differ)} of {len(names)} files of weights, scores, plan and images are the same"
    return same + (f"; not {', '.join(differ)}" if differ else "")
