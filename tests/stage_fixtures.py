"""A tiny pipeline and the artefact that compress makes of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgeprune.report import make


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline's folder; restore what you change."""
    from tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def artefact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed tiny pipeline with its report; use `copy` to change it."""
    from stage_runs import OPTIONS

    from edgeprune.stages.compress import compress
    from edgeprune.stages.workspace import STAGES, Workspace

    out = tmp_path_factory.mktemp("artefact") / "small"
    ws = Workspace(out, str(source))
    assert compress(ws, OPTIONS) == list(STAGES)
    make.make_report(ws, quick=True)
    return out


@pytest.fixture
def copy(artefact: Path, tmp_path: Path) -> Path:
    """A copy of the artefact for one test."""
    return Path(shutil.copytree(artefact, tmp_path / "copy"))
