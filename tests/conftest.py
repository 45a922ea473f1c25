"""Fixtures that several test files share, because they take long to make."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

LONG = (
    *("resume_export", "processes", "flux", "trt", "modulation_apart", "openvino", "coreml", "integers", "precisions"),
    *("t5", "t5_int4", "export", "verify", "seam", "what_people_bring", "hardware", "bench", "cli", "packaging"),
    "examples",
)
"""Files that take longest, to be begun first: with one of them last, the other worker has nothing to do.

The first makes `tiny_folders`, the second does not wait for them.
"""

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each; before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first; the order of a file's tests stays."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    known = {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
    assert places.keys() <= known
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


_begun: set[Path] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Spare the garbage collector what is there when a file's first test begins: most are objects that imports made.

    A collection of them all takes half a second, and the code that is tested asks for many.
    """
    if item.path not in _begun:
        _begun.add(item.path)
        gc.collect()
        gc.freeze()


FEW = 6
"""Prompts that calibrate in tests."""


@pytest.fixture(scope="session", autouse=True)
def little_work() -> Iterator[Any]:
    """Calibrate random weights on few prompts, and measure this machine in little time.

    All prompts, times that are known to 2 % on a busy machine, and products in bf16 on a processor that has none take
    most of the time of many tests. Yields the function that gives all prompts.
    """
    if find_spec("torch") is None:
        yield
        return
    from edgeprune.common.splits import Split
    from edgeprune.report import steps
    from edgeprune.stages import costs, prompts, work

    real, speed = prompts.prompts_of, costs.matmul_flops_per_s

    def few(split: Split, count: int, tasks: Any | None) -> list[str]:
        return real(split, min(count, FEW) if split is Split.CALIBRATION else count, tasks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "prompts_of", few)
        patch.setattr(steps, "MOST", steps.LEAST)
        patch.setattr(costs, "matmul_flops_per_s", lambda *, dtype, device: speed(device=device))
        patch.setattr(work, "_SAMPLE_BYTES", 10**6)
        yield real


@contextlib.contextmanager
def made_once(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """Give a folder that the workers share, to the one that asks first and then to the others."""
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    with FileLock(root / f"{name}.lock"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vendors' deprecations
        yield root / name


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny diffusers folder and its ONNX export, not quantised; copy before damaging one."""
    pytest.importorskip("diffusers")
    pytest.importorskip("onnxruntime")
    from edgeprune.export.to_onnx import export

    with made_once(tmp_path_factory, "tiny-folders") as root:
        source, out = root / "source", root / "onnx"
        if not out.is_dir():  # an export is in its place only when it is whole
            import tiny

            tiny.tiny_pipeline(source)
            export(source, out)
    return source, out


@pytest.fixture(scope="session")
def quantised_onnx(tiny_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer of `quantised.two_blocks()` in ONNX, in a folder for `traced.reuse`."""
    import quantised
    import tiny

    from edgeprune.export import external_data, to_onnx

    with made_once(tmp_path_factory, "quantised-onnx") as root, pytest.MonkeyPatch.context() as patch:
        if not root.is_dir():
            patch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(quantised.two_blocks()))
            unfinished = root.with_name("quantised-unfinished")
            (unfinished / "transformer").mkdir(parents=True)
            model = next(to_onnx.sources(tiny_folders[0])).to_ir()
            external_data.save(model, unfinished / "transformer" / "model.onnx")
            unfinished.rename(root)
    return root
