"""Exports in huggingface_hub's cache: every runtime opens them, though every file is a link."""

from __future__ import annotations

import shutil
from pathlib import Path

import hub
import numpy as np
import pytest

from edgeprune import runtimes
from edgeprune.common.errors import InputError


@pytest.mark.parametrize("shared", [False, True], ids=["old", "new"])
@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_a_linked_export_draws_the_same_image(
    runtime: str, shared: bool, tiny_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip({"ort": "onnxruntime"}.get(runtime, runtime))
    copy = Path(shutil.copytree(tiny_folders[1], tmp_path / "export"))
    snapshot = hub.cached(copy, tmp_path / "hub", shared=shared)
    assert (snapshot / "transformer" / "model.onnx.data").is_symlink()
    expected = runtimes.load(tiny_folders[1], runtime).generate("a red square", seed=1, steps=1)
    linked = runtimes.load(snapshot, runtime)
    assert np.array_equal(np.asarray(linked.generate("a red square", seed=1, steps=1)), np.asarray(expected))
    linked.close()
    assert not list((tmp_path / "hub").rglob(".edgeprune-*"))  # hard links that stood in for links


def test_openvino_says_what_to_do_where_it_cannot_follow(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    copy = Path(shutil.copytree(tiny_folders[1], tmp_path / "export"))
    snapshot = hub.cached(copy, tmp_path / "hub", shared=False)

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    with pytest.raises(InputError, match=r"model\.onnx: OpenVINO does not follow links .*not permitted.*cp -rL"):
        runtimes.load(snapshot, "openvino").generate("a red square", seed=1, steps=1)
    assert not list((tmp_path / "hub").rglob(".edgeprune-*"))
