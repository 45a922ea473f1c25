"""Fixtures that several test files share, because they take long to make."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

LONG = ("integers", "t5", "export", "flux", "resume_export", "bench", "coreml", "cli", "modulation_export", "processes")
"""Files that take longest, to be begun first: with one of them last, the other worker has nothing to do."""

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; the order of a file's tests stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    known = {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
    assert places.keys() <= known
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny diffusers folder and its ONNX export, not quantised; copy before damaging one."""
    pytest.importorskip("diffusers")
    pytest.importorskip("onnxruntime")
    from edgeprune.export.to_onnx import export

    source = tmp_path_factory.mktemp("tiny") / "source"
    out = source.with_name("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vendors' deprecations
        import tiny

        tiny.tiny_pipeline(source)
        export(source, out)
    return source, out
