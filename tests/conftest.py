"""Fixtures that several test files share, because they take long to make."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


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
