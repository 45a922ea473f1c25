"""A tiny pipeline, and shards of four entries, for the tests of training data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_pipeline

from edgeprune.data import settings
from edgeprune.stages.original import Original


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline's folder; copy before changing it."""
    tiny_pipeline(folder := tmp_path_factory.mktemp("cache") / "model")
    return folder


@pytest.fixture(scope="module")
def pipe(model: Path) -> Any:
    return Original(model).encoding(drawing=False)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SHARD_BYTES", 1)
    monkeypatch.setattr(settings, "_ROUND", 4)
