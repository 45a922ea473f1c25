"""Which prompts a stage uses where the user gives none: each purpose has its split, see common/splits.py."""

from __future__ import annotations

from itertools import chain, zip_longest
from pathlib import Path

from edgeprune.artefact.manifest import MANIFEST
from edgeprune.common.fields import texts
from edgeprune.common.splits import Split
from edgeprune.metrics import Tasks, tasks_of
from edgeprune.sampling.prompts import first, prompts, read_prompts
from edgeprune.shapes import World
from edgeprune.stages.options import AnalyzeOptions
from edgeprune.stages.workspace import Workspace

GIVEN = "prompts_given"
"""Field of the stage `analyze` in the manifest: whether its prompts were the user's."""
CALIBRATION_PROMPTS = 112
"""Prompts that find the modulation's mean and directions."""


def analysis_prompts(options: AnalyzeOptions, *, world: World | None) -> list[str]:
    """Return the prompts that contributions are measured on: those of a file, or `count` of the analysis split.

    Args:
        options: of the analysis.
        world: that the model draws: it understands only the captions of this world. None for other models.

    Raises:
        InputError: the file cannot be used, or the split has fewer prompts.
    """
    if options.prompts:
        return read_prompts(Path(options.prompts))[: options.count]
    tasks = tasks_of(options.metric, world) or (world.grammar if world else None)
    return prompts_of(Split.ANALYSIS, options.count, tasks)


def calibration_prompts(file: str | None, *, world: World | None, count: int = CALIBRATION_PROMPTS) -> list[str]:
    """Return the prompts that constants of the compressed model are found on: those of a file, or `count` others.

    Args:
        file: a text file with one prompt per line, all of which are used; None for the calibration split.
        world: that the model draws.
        count: how many prompts of the split.

    Raises:
        InputError: the file cannot be used, or the split has fewer prompts.
    """
    return read_prompts(Path(file)) if file else prompts_of(Split.CALIBRATION, count, world.grammar if world else None)


def calibrating(ws: Workspace, *, count: int = CALIBRATION_PROMPTS) -> list[str]:
    """Return the calibration prompts of a planned folder: as given to `plan`, else to `analyze`, else of the split.

    Args:
        ws: the folder's workspace.
        count: how many prompts of the split.

    Raises:
        InputError: the manifest cannot be used, or the split has fewer prompts.
    """
    planned = ws.manifest.stages.get("plan", {}).get("options")
    if isinstance(planned, dict) and planned.get("prompts"):
        return [text for text in texts(planned, "calibration", f"{ws.out / MANIFEST}: plan") if text]
    return analyzed_or_split(ws, count)


def analyzed_or_split(ws: Workspace, count: int = CALIBRATION_PROMPTS) -> list[str]:
    """Return the calibration prompts of a folder that is being planned: as given to `analyze`, else of the split.

    Args:
        ws: the folder's workspace.
        count: how many prompts of the split.

    Raises:
        InputError: the manifest cannot be used, or the split has fewer prompts.
    """
    analysis = ws.manifest.stages.get("analyze", {})
    if analysis.get(GIVEN):
        options = analysis.get("options")
        return texts(options if isinstance(options, dict) else {}, "prompts", f"{ws.out / MANIFEST}: analyze")
    return calibration_prompts(None, world=ws.world, count=count)


def prompts_of(split: Split, count: int, tasks: Tasks | None) -> list[str]:
    """Return `count` prompts of a split: edgeprune's captions, or those of tasks, taken in turn.

    Args:
        split: what they may be used for.
        count: how many.
        tasks: a world's grammar, or a metric's prompts.

    Raises:
        InputError: the split has fewer prompts.
    """
    if tasks is None:
        return prompts(split, count)
    found = tasks.evaluation_prompts(count, split=split)
    names = dict.fromkeys(p.meaning.task for p in found)
    by_task = [[p.text for p in found if p.meaning.task == task] for task in names]
    texts = [text for text in chain.from_iterable(zip_longest(*by_task)) if text is not None]
    return first(texts, count)
