"""What a row has measured so far, on disk: finished stages, and the time of stages that were interrupted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeprune.common.files import read_json, write_json
from edgeprune.experiments.full_size.measuring import Stage, run

Values = dict[str, Any]
"""Figures of one stage by name, or of one bench by runtime and name."""


class Recorder:
    """Measures the stages of one row; a new one of the same row continues.

    Args:
        out: the folder in which rows work. The row's own file is `OUT/ROW.row.json`.
        row: the row's name.
    """

    def __init__(self, out: Path, row: str) -> None:
        self.out, self._path = out, out / f"{row}.row.json"
        out.mkdir(parents=True, exist_ok=True)
        found = read_json(self._path) if self._path.is_file() else {}
        self.stages: dict[str, Values] = found.get("stages", {})
        self._attempts: dict[str, list[Values]] = found.get("attempts", {})

    def stage(
        self,
        name: str,
        *arguments: str,
        makes: Path | None = None,
        file: Path | None = None,
        caches: Path | None = None,
        kill_after_s: float | None = None,
    ) -> None:
        """Measure a command unless that is done.

        The time of interrupted attempts, which the command continues, counts too, except for their last second.

        Args:
            name: the stage's.
            arguments: of `edgeprune`.
            makes: what the command writes. An earlier measurement's is deleted before the first attempt.
            file: note the bytes of this file or folder, which the command wrote.
            caches: an empty folder in place of the user's caches, deleted before the first attempt.
            kill_after_s: kill the command after so many seconds, and begin it again until it ends by itself.
        """
        if name in self.stages:
            return
        attempts = self._attempts.setdefault(name, [])
        for folder in (makes, caches) if not attempts else ():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

        def so_far(stage: Stage) -> None:
            attempts[-1] = asdict(stage)
            self._save()

        stage = None
        while stage is None or stage.killed:
            attempts.append({})
            stage = run(*arguments, so_far=so_far, caches=caches, kill_after_s=kill_after_s)
        values: Values = {
            "seconds": round(sum(a.get("seconds", 0) for a in attempts), 1),
            "peak_bytes": max(a.get("peak_bytes", 0) for a in attempts),
        }
        if kill_after_s is not None:
            values["kills"] = sum(attempt.get("killed", False) for attempt in attempts)
        if len(attempts) == 1 and stage.read_bytes is not None and stage.written_bytes is not None:
            values["said"] = f"{stage.read_bytes / 1e9:.1f} GB read, {stage.written_bytes / 1e9:.1f} GB written"
        if file is not None:
            values["file_bytes"] = sum(p.stat().st_size for p in _files(file))
        self.note(name, values)

    def remark(self, name: str, text: Callable[[], str]) -> None:
        """Add a remark to a stage unless it has one."""
        if "said" not in self.stages[name]:
            self.note(name, self.stages[name] | {"said": text()})

    def note(self, name: str, values: Values) -> None:
        """Keep the figures of a stage on disk and print them."""
        self.stages[name] = values
        self._attempts.pop(name, None)
        self._save()
        print(json.dumps({name: values}), flush=True)

    def forget(self) -> None:
        """Delete what the row has measured, so that the next run measures everything again."""
        self._path.unlink(missing_ok=True)

    def remove(self, *labels: str) -> None:
        """Free disk space: delete the folders of exactly these names their exports and caches."""
        for label in labels:
            for suffix in ("", "-onnx", "-openvino", "-prepared", "-trt", "-coreml", "-caches"):
                shutil.rmtree(self.out / f"{label}{suffix}", ignore_errors=True)

    def _save(self) -> None:
        write_json(self._path, {"stages": self.stages, "attempts": self._attempts})


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
