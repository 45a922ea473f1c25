"""A tiny pipeline and the artefact that compress makes of it.

Three folders of tests import these fixtures. pytest takes them for different ones, so what they make is kept here.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest

from edgeprune.report import make


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline's folder; restore what you change."""
    return _source(tmp_path_factory.getbasetemp())


@functools.cache
def _source(place: Path) -> Path:
    from tiny import tiny_pipeline

    folder = place / "stage-source" / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def artefact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed tiny pipeline with its report; use `copy` to change it."""
    return _artefact(source, tmp_path_factory.getbasetemp())


@functools.cache
def _artefact(source: Path, place: Path) -> Path:
    from stage_runs import OPTIONS

    from edgeprune.stages.compress import compress
    from edgeprune.stages.workspace import STAGES, Workspace

    out = place / "stage-artefact" / "small"
    ws = Workspace(out, str(source))
    assert compress(ws, OPTIONS) == list(STAGES)
    make.make_report(ws, quick=True)
    return out


@pytest.fixture
def copy(artefact: Path, tmp_path: Path) -> Path:
    """A copy of the artefact for one test."""
    return Path(shutil.copytree(artefact, tmp_path / "copy"))
