"""Options of a compress that takes seconds on a tiny pipeline, a pruned folder, and damage to what it writes."""

from __future__ import annotations

import json
from pathlib import Path

from edgeprune.planning.options import PlanOptions
from edgeprune.stages import plan, prune
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions

OPTIONS = CompressOptions(
    analyze=AnalyzeOptions(count=3),
    plan=PlanOptions(keep=0.95, protect_first=1, protect_last=0),
    data=DataOptions("shapes", 16),
    distill=DistillOptions(steps=3, batch=2),
)


def begun(source: Path, out: Path) -> Workspace:
    """Return the workspace of an artefact with nothing removed."""
    ws = Workspace(out, str(source))
    plan.run(ws, PlanOptions("manual", blocks=""))
    prune.run(ws)
    return ws


def truncate(path: Path) -> None:
    """Keep the first 1000 bytes."""
    path.write_bytes(path.read_bytes()[:1000])


def edit(path: Path, field: str, value: object) -> None:
    """Set one field of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
