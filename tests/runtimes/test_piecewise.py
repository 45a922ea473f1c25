"""Networks in pieces, in both runtimes that cut them: the numbers of the whole, and as many blocks open as fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import hub
import numpy as np
import pytest

from edgeprune import runtimes
from edgeprune.common import pieces
from edgeprune.common.errors import InputError
from edgeprune.runtimes import networks, piecewise
from edgeprune.runtimes.base import Array

both = pytest.mark.parametrize("runtime", ["openvino", "ort"])
FEED = {
    "hidden_states": np.ones((1, 8, 8, 8), np.float32),
    "encoder_hidden_states": np.ones((1, 16, 64), np.float32),
    "pooled_projections": np.ones((1, 64), np.float32),
    "timestep": np.full(1, 500, np.float32),
}


@pytest.fixture(autouse=True)
def small(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model has many pieces, and every table is large."""
    pytest.importorskip({"ort": "onnxruntime"}.get(runtime, runtime))
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200_000)
    monkeypatch.setattr(piecewise, "TABLE", 0)


def file_of(runtime: str, folder: Path) -> Any:
    path = folder / "transformer" / "model.onnx"
    if runtime == "openvino":
        from openvino_fakes import EXACT

        from edgeprune.runtimes.openvino import OpenVinoFile

        return OpenVinoFile(path, "CPU", EXACT)
    from edgeprune.runtimes.ort import session_options
    from edgeprune.runtimes.ort_pieces import OrtFile
    from edgeprune.runtimes.providers import choose

    return OrtFile(path, lambda: session_options(threads=1, reuse=False), choose(["CPUExecutionProvider"]))


def drawn(folder: Path, runtime: str, free: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Array, Array, Any]:
    """Return latents, pixels and the network that made the latents, with so many bytes free."""
    monkeypatch.setattr(networks, "allowed", lambda: free)
    with runtimes.load(folder, runtime, threads=1) as ours:
        latents = ours.generate_latents("two red circles", seed=3, steps=2)
        network = ours.backend._networks["transformer"]  # type: ignore[attr-defined]
        return latents, ours.backend.decode(latents), network


def apart(found: Array, expected: Array) -> float:
    """Return the largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("runtime", "linked"), [("ort", False), ("ort", True), ("openvino", True)])
def test_little_memory_gives_the_same_image(
    runtime: str, linked: bool, tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block is opened and closed at each step; in a hub's cache, the weights' file is a link."""
    folder = tiny_folders[1]
    looked_up, look_up = list[Any](), piecewise.Lookup.__call__
    monkeypatch.setattr(
        piecewise.Lookup, "__call__", lambda self, feed: looked_up.append(self.table) or look_up(self, feed)
    )
    expected = drawn(folder, runtime, 10**12, monkeypatch)
    assert not isinstance(expected[2], networks.Piecewise) and not looked_up
    if linked:
        folder = hub.cached(Path(shutil.copytree(folder, tmp_path / "export")), tmp_path / "hub", shared=True)
    found = drawn(folder, runtime, 0, monkeypatch)
    assert isinstance(found[2], piecewise.PiecewiseNetwork)
    assert len(looked_up) >= 4  # two encoders, two halves of guidance
    assert apart(found[0], expected[0]) < 1e-5 and apart(found[1], expected[1]) < 1e-4


@both
def test_as_many_blocks_stay_open_as_fit(
    runtime: str, tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is room for both halves of guidance, they go through a piece before the next is opened."""
    file = file_of(runtime, tiny_folders[1])
    needs = file.graph({name: value.shape for name, value in FEED.items()}).measured().needs()
    found, made, opened = [], list[Array](), list[int]()
    real = type(file).opened
    monkeypatch.setattr(type(file), "opened", lambda self, part: opened.append(1) or real(self, part))
    monkeypatch.setattr(piecewise, "resident", lambda: 0)
    for room in (needs.least, needs.least + 200_000, (needs.least + needs.whole) // 2, 2 * needs.whole):
        network = piecewise.PiecewiseNetwork(file, room + pieces.RESERVE)
        list(network.many([FEED, FEED]))
        opened.clear()
        made += [output["out_hidden_states"] for output in network.many([FEED, FEED])]
        found.append((len(opened), len(network._pieces)))
        network.close()
        with pytest.raises(InputError, match="closed"):
            network(**FEED)
    assert all(apart(one, made[0]) < 1e-5 for one in made)
    assert found[0] == (2 * found[0][1], found[0][1]) and found[1][0] <= found[1][1]
    assert found[1][0] > found[2][0] > found[3][0] == 0


@both
@pytest.mark.parametrize("damage", ["no model.onnx.data", "half model.onnx.data", "no model.onnx", "half model.onnx"])
def test_damaged_files_are_named(
    runtime: str, damage: str, tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(tiny_folders[1], tmp_path / "copy"))
    what, name = damage.split()
    path = copy / "transformer" / name
    if what == "no":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    monkeypatch.setattr(networks, "allowed", lambda: 0)
    with pytest.raises(InputError, match=r"transformer/model\.onnx: ") as caught, runtimes.load(copy, runtime) as ours:
        ours.generate("x", steps=1)
    assert "\n" not in str(caught.value)


@both
def test_inputs_that_do_not_fit_are_named(runtime: str, tiny_folders: tuple[Path, Path]) -> None:
    network = piecewise.PiecewiseNetwork(file_of(runtime, tiny_folders[1]), 10**12)
    with pytest.raises(InputError, match=r"model\.onnx: inputs: the model also needs .*timestep"):
        network(**{name: value for name, value in FEED.items() if name != "timestep"})
    with pytest.raises(InputError, match=r"model\.onnx: .*"):
        network(**FEED | {"encoder_hidden_states": np.ones((1, 16, 63), np.float32)})
