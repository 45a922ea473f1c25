"""Strips of rows: which rows a strip needs, statistics that are merged, and files that are removed."""

from __future__ import annotations

import errno
import math
import re
import tempfile
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.common.errors import DiskError, InputError
from edgeprune.runtimes import strip_runner
from edgeprune.runtimes.base import Array
from edgeprune.runtimes.strip_norms import Moments, Norm
from edgeprune.runtimes.strip_store import Store
from edgeprune.runtimes.strips import Described, Layer, Rows, fewest, plan, windows

NORM = Norm(2, 1e-6, np.float32([1, 2, 3, 4]), np.float32([0, 1, 0, -1]))
IMAGE = (1, 4, 6, 5)


def normalised(values: np.ndarray, norm: Norm) -> np.ndarray:
    """Return the group norm of values (C, h, w)."""
    grouped = values.astype(np.float64).reshape(norm.groups, -1)
    mean, variance = grouped.mean(axis=1, keepdims=True), grouped.var(axis=1, keepdims=True)
    flat = ((grouped - mean) / np.sqrt(variance + norm.epsilon)).reshape(len(values), -1)
    return (flat * norm.gamma[:, None] + norm.beta[:, None]).reshape(values.shape)


def described(*layers: Layer, shapes: dict[int, tuple[int, ...]] | None = None) -> Described:
    """A network that reads value 0 and returns what its last layer makes; all values are images unless given."""
    all_shapes = dict.fromkeys(range(len(layers) + 1), IMAGE) | (shapes or {})
    return Described(layers, all_shapes, 0, layers[-1].makes)


@pytest.mark.parametrize("halo", [0, 1, 3])
def test_every_row_is_kept_once_and_is_right(halo: int) -> None:
    for rows in range(1, 40):
        for most in range(2 * halo + 1, 45):
            strips = windows(rows, halo, most)
            assert [row for one in strips for row in range(one.first, one.last)] == list(range(rows))
            assert len({one.stop - one.start for one in strips}) == 1, "one model computes all strips"
            for one in strips:
                assert 0 <= one.start < one.stop <= rows and one.stop - one.start <= most
                assert one.first == 0 if one.start == 0 else one.first >= one.start + halo
                assert one.last == rows if one.stop == rows else one.last <= one.stop - halo


@pytest.mark.parametrize(("mean", "tolerance"), [(0, 2e-6), (1000, 5e-4), (-30000, 1e-2)])
def test_statistics_of_strips_are_those_of_the_whole(mean: float, tolerance: float) -> None:
    """Squares would be lost: 30000 squared has 9 digits, and float32 has 7."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((4, 90, 70)) + mean + np.arange(4)[:, None, None]).astype(np.float32)
    values += np.linspace(-3, 3, 90, dtype=np.float32)[:, None]  # strips have different means
    moments = Moments(4)
    for start, stop in ((0, 1), (1, 40), (40, 90)):
        moments.add(values[:, start:stop])
    scale, shift = moments.affine(NORM)
    expected = normalised(values, NORM)
    exact = values * scale[:, None, None].astype(np.float64) + shift[:, None, None]
    assert np.abs(exact - expected).max() < tolerance * np.abs(expected).max()
    grouped = values.astype(np.float64).reshape(2, -1)
    assert np.allclose(scale, NORM.gamma / np.sqrt(grouped.var(axis=1) + 1e-6).repeat(2), rtol=2e-6)


def test_moments_of_large_strips_are_taken_in_parts() -> None:
    values = np.random.default_rng(0).standard_normal((4, 1000, 400)).astype(np.float32)  # 1.6 MB a channel
    moments = Moments(4)
    moments.add(values)
    scale, _ = moments.affine(NORM)
    assert np.allclose(scale, NORM.gamma / values.reshape(2, -1).std(axis=1).repeat(2), rtol=1e-5)


def test_a_norm_begins_a_segment_and_a_short_cut_is_computed_where_it_is_added() -> None:
    found = plan(
        described(
            Layer("conv", (0,), 1, halo=1),
            Layer("norm", (1,), 2, norm=NORM),
            Layer("conv", (2,), 3, halo=2),
            Layer("norm", (3,), 4, norm=NORM),
            Layer("conv", (4,), 5, halo=1),
            Layer("pointwise", (1, None), 6),  # a short cut
            Layer("pointwise", (6, 5), 7),
        )
    )
    first, second, third = found.segments
    assert (first.layers, first.strips, first.makes, first.halo) == ((0,), (0,), (1,), 1)
    assert (second.layers, second.strips, second.makes, second.halo) == ((1, 2), (1,), (3,), 2)
    assert (third.layers, set(third.strips), third.makes, third.halo) == ((3, 4, 5, 6), {1, 3}, (7,), 1)
    assert [found.norm_source(i) for one in found.segments for i in one.norms] == [1, 3]
    size = 4 * math.prod(IMAGE)
    assert found.most_stored() == 2 * size and found.rows[3] == Rows(2, 4, 6, 5)
    assert fewest(first) == 6 and fewest(replace(first, rows=100)) == 10


def test_attention_reads_keys_and_values_whole() -> None:
    tokens, keys, scores = (1, 30, 4), (1, 4, 30), (1, 30, 30)
    found = plan(
        described(
            Layer("reshape", (0,), 1),
            Layer("norm", (1,), 2, norm=NORM),
            Layer("matmul", (2, None), 3, transposed=(True, False)),
            Layer("matmul", (2, None), 4, transposed=(True, False)),
            Layer("transpose", (4,), 5, order=(0, 2, 1)),
            Layer("matmul", (3, 5), 6),
            Layer("softmax", (6,), 7, axis=2),
            Layer("matmul", (7, 4), 8),
            Layer("transpose", (8,), 9, order=(0, 2, 1)),
            Layer("reshape", (9,), 10),
            Layer("pointwise", (10, 0), 11),
            shapes={1: keys, 2: keys, 3: tokens, 4: tokens, 5: keys, 6: scores, 7: scores, 8: tokens, 9: keys},
        )
    )
    first, second = found.segments
    assert first.whole == () and first.strips == (0,) and set(first.makes) == {2, 4, 5}
    assert set(second.whole) == {4, 5} and set(second.strips) == {0, 2} and second.halo == 0
    assert [found.norm_source(i) for i in first.norms] == [0]
    assert found.rows[5] == Rows(2, 4, 6, 5) and found.rows[4] == Rows(1, 1, 6, 20)
    assert found.strip_shape(2, second, 2) == (1, 4, 10) and found.strip_shape(5, second, 2) == keys
    # a strip of the scores, and all of the keys and the values
    assert found.bytes_of(second, 1) >= 4 * (2 * 5 * 30 + 2 * 4 * 30)
    assert fewest(second) == 1


def test_upsampling_begins_a_segment_and_doubles_the_rows() -> None:
    large = (1, 4, 12, 10)
    found = plan(
        described(
            Layer("conv", (0,), 1, halo=1), Layer("upsample", (1,), 2), Layer("conv", (2,), 3, halo=1),
            shapes={2: large, 3: large},
        )
    )  # fmt: skip
    assert [one.layers for one in found.segments] == [(0,), (1, 2)]
    assert found.segments[1].halo == 1 and found.rows[3].count == 12
    assert found.strip_shape(3, found.segments[1], 5) == (1, 4, 10, 10)


@pytest.mark.parametrize(
    ("layers", "shapes", "says"),
    [
        ([Layer("softmax", (0,), 1, axis=-2)], {}, "softmax: .* another axis than that of the rows"),
        ([Layer("matmul", (None, 0), 1)], {1: IMAGE}, "matmul: .* a sum over another axis than that of the rows"),
        ([Layer("reshape", (0,), 1)], {1: (1, 30, 4)}, "reshape: .* one that keeps 4 times the rows"),
        (
            [Layer("transpose", (0,), 1, order=(0, 1, 3, 2)), Layer("conv", (1,), 2)],
            {1: (1, 4, 5, 6)},
            "conv: .* rows in axis 2",
        ),
        ([Layer("pointwise", (0,), 1)], {1: (1, 4, 6, 1)}, "pointwise: .* values of one shape"),
        ([Layer("reduce", (0,), 1)], {1: (1, 4, 1, 5)}, "reduce: .* another axis than that of the rows"),
        (
            [Layer("reduce", (0,), 1), Layer("pointwise", (0, 1), 2)],
            {1: (1, 1, 6, 5), 2: (1, 1, 6, 5)},
            "pointwise: .* of one number in other axes",
        ),
        ([Layer("unheard-of", (0,), 1)], {}, "unheard-of: an operation that cannot be computed in strips"),
        ([Layer("norm", (0,), 1, norm=NORM)], {0: (1, 8, 6, 5), 1: (1, 8, 6, 5)}, "norm: .* channels in axis 1"),
    ],
)
def test_what_mixes_rows_is_refused(layers: list[Layer], shapes: dict[int, tuple[int, ...]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan(described(*layers, shapes=shapes))


def test_a_store_reads_what_was_written_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = Rows(2, 3, 7, 5)
    values = np.arange(105, dtype=np.float32).reshape(3, 7, 5)
    held = np.zeros((1, 3, 7, 5), np.float32)
    with Store() as store:
        store.hold(1, held)
        for value in (0, 1):
            store.create(value)
            store.write(value, rows, 2, values[:, 2:7])
            store.write(value, rows, 0, values[:, :2])
            for start, stop in ((0, 7), (1, 4)):
                into = np.empty((3, stop - start, 5), np.float32)
                store.read(value, rows, start, into)
                assert np.array_equal(into, values[:, start:stop])
        (file,) = store._files.values()
        store.drop(0)
        assert file.closed and not store._files
    assert np.array_equal(held[0], values) and not list(tmp_path.iterdir())


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: Full(tmp_path / "x", "w+b"))
    with pytest.raises(DiskError, match="disk full; free some space"), Store() as store:
        store.create(0)
        store.write(0, Rows(2, 1, 2, 2), 0, np.zeros((1, 2, 2), np.float32))
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DiskError, match="gone"), Store() as store:
        store.create(0)


class Engine:
    """Runs segments of a chain of convolutions (sums of three rows) and norms in numpy."""

    def __init__(self, network: Described, fail: int = -1) -> None:
        self.plan, self.fail, self.opened, self.closed = plan(network), fail, list[tuple[int, int]](), 0

    def __call__(self, index: int, rows: int) -> Engine:
        self.index = index
        self.opened.append((index, rows))
        return self

    def run(self, values: Any, affine: Any) -> dict[int, Array]:
        if self.index == self.fail:
            raise InputError("it fails")
        segment = self.plan.segments[self.index]
        (value,) = segment.strips
        now = values[value]
        for i in segment.layers:
            layer = self.plan.network.layers[i]
            if layer.kind == "norm":
                scale, shift = (one[:, None, None] for one in affine[i])
                now = now * scale + shift
            elif layer.kind == "conv":
                edged = np.pad(now, ((0, 0), (0, 0), (1, 1), (0, 0)))
                now = edged[:, :, :-2] + edged[:, :, 1:-1] * 2 - edged[:, :, 2:]
        return {segment.makes[0]: now}

    def close(self) -> None:
        self.closed += 1


class Opening:
    """What a segment is opened with: the runner's protocol."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, values: Any, affine: Any) -> dict[int, Array]:
        return self.engine.run(values, affine)

    def close(self) -> None:
        self.engine.close()


def chain() -> Described:
    shape = (1, 4, 40, 5)
    layers = (
        Layer("norm", (0,), 1, norm=NORM), Layer("conv", (1,), 2, halo=1), Layer("conv", (2,), 3, halo=1),
        Layer("norm", (3,), 4, norm=NORM), Layer("conv", (4,), 5, halo=1),
    )  # fmt: skip
    return Described(layers, dict.fromkeys(range(6), shape), 0, 5)


def run(engine: Engine, budget: int) -> Array:
    latents = np.random.default_rng(0).standard_normal((1, 4, 40, 5)).astype(np.float32) + 3
    result = np.empty_like(latents)
    strip_runner.run(engine.plan, latents, result, budget, lambda i, rows: (engine(i, rows), Opening(engine))[1])
    return result


def test_strips_compute_what_the_whole_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole = Engine(chain())
    expected = run(whole, 10**9)
    assert whole.opened == [(0, 40), (1, 40)], "memory suffices for one strip"
    least = strip_runner.least_bytes(whole.plan)
    for budget in (0, least, least + 3000, least + 6000):
        engine = Engine(chain())
        assert np.abs(run(engine, budget) - expected).max() < 1e-5
        assert engine.closed == len(engine.plan.segments)
        assert budget or engine.opened == [(0, 12), (1, 10)], "the least"
        for rows, segment in zip(strip_runner.heights(engine.plan, budget), engine.plan.segments, strict=True):
            outside = 2 * 4 * 4 * 40 * 5  # what it reads and returns
            assert budget < least or engine.plan.bytes_of(segment, rows) <= budget - outside
    assert not list(tmp_path.iterdir())


def test_after_an_error_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    engine = Engine(chain(), fail=1)
    with pytest.raises(InputError, match="it fails"):
        run(engine, 0)
    assert engine.closed == 2 and not list(tmp_path.iterdir())


def test_the_disk_is_looked_at_before_anything_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(chain())

    def full(folder: Path, size: int) -> None:
        raise DiskError(f"needs {size}")

    monkeypatch.setattr(strip_runner, "need_space", full)
    with pytest.raises(DiskError, match=re.escape(f"needs {engine.plan.most_stored()}")):
        run(engine, 0)
    assert engine.plan.most_stored() == 4 * 4 * 40 * 5 and not engine.opened
