"""Core ML within a limit: chunks in turn, counted from their descriptions; a fake opens and computes them."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.common.errors import InputError
from edgeprune.common.pieces import RESERVE
from edgeprune.runtimes import coreml
from edgeprune.runtimes.coreml_chain import Chain, Package

Shape = tuple[int, ...]


def package(name: str, size: int, inputs: dict[str, Shape], outputs: list[str]) -> Package:
    """Describe a package that takes one and two rows of inputs with these shapes."""
    both = {key: ([(1, *shape), (2, *shape)], key == "ids") for key, shape in inputs.items()}
    return Package(Path(name), size, both, outputs)


def chain() -> Chain:
    """Three chunks of 400, 300 and 300 bytes: 4 ids become a stream of 5 numbers; a condition of 2 goes to all."""
    return Chain(
        [
            package("chunk_1.mlpackage", 400, {"ids": (4,)}, ["stream_1", "condition"]),
            package("chunk_2.mlpackage", 300, {"stream_1": (5,), "condition": (2,)}, ["stream_2"]),
            package("chunk_3.mlpackage", 300, {"stream_2": (5,), "condition": (2,)}, ["out"]),
        ]
    )


PASSED = 4 * (4 + 5 + 5 + 2)  # in the second chunk: what was given, both streams, the condition


def test_what_is_counted() -> None:
    one = chain()
    assert one.passed == PASSED
    assert (one.needs().whole, one.needs().least) == (1000 + PASSED, 400 + PASSED)
    alone = Chain([package("model.mlpackage", 70, {"ids": (4,)}, ["out"])]).needs()
    assert alone.whole == alone.least == 70 + 16


def test_as_many_chunks_stay_as_fit() -> None:
    one = chain()
    room = {rows: [one.kept(size + rows * PASSED, rows) for size in range(300, 1101, 50)] for rows in (1, 3)}
    assert room[1] == room[3] == [0] * 8 + [1] * 6 + [3] * 3  # with the second, the third is the last
    assert one.at_once(400 + 4 * PASSED, 4) == 4
    assert one.at_once(400 + 4 * PASSED - 1, 4) == 2
    assert one.at_once(0, 4) == 1


def test_a_chunk_that_is_missing() -> None:
    first, _, last = chain().packages
    with pytest.raises(InputError, match=r"chunk_3\.mlpackage: inputs: found \['stream_2'\], expected outputs of the"):
        Chain([first, last])


class Opened:
    """A chunk that adds its number to what it is given; it notes when it is opened, run and freed."""

    alive: weakref.WeakSet[Opened]
    compile_s, specialise_s = 0.0, 0.25

    def __init__(self, one: Package, events: list[str]) -> None:
        self.one, self.events, self.number = one, events, int(re.findall(r"\d", one.path.name)[0])
        Opened.alive.add(self)
        events.append(f"open {self.number} at {len(Opened.alive)}")

    def predict(self, arrays: dict[str, Any]) -> dict[str, Any]:
        assert set(arrays) == set(self.one.inputs)
        (row,) = next(iter(arrays.values()))[:, :1]
        self.events.append(f"run {self.number} at {len(Opened.alive)}")
        return {name: np.full((1, 5 if "stream" in name else 2), row + self.number, "f2") for name in self.one.outputs}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    Opened.alive = weakref.WeakSet()
    monkeypatch.setattr(coreml, "chain_of", lambda folder: chain())
    monkeypatch.setattr(coreml, "resident", lambda: 7)
    noted = list[str]()
    yield noted
    assert not Opened.alive


def network(events: list[str], room: int | None) -> coreml.CoremlNetwork:
    by_name = {one.path: one for one in chain().packages}
    limit = None if room is None else 7 + RESERVE + room
    return coreml.CoremlNetwork(Path("net"), "all", lambda path: Opened(by_name[path], events), limit)


def rows(*values: int) -> list[dict[str, Any]]:
    return [{"ids": np.full((1, 4), value, np.int64)} for value in values]


@pytest.mark.parametrize("kept", [0, 1])
def test_chunks_in_turn(kept: int, events: list[str]) -> None:
    """Both halves of guidance go through a chunk before the next is opened, at most one besides those that stay."""
    one = network(events, 2 * PASSED + (400, 700)[kept])
    assert not events
    found = [out["out"][0, 0] for out in one.many(rows(10, 20))]
    assert found == [16, 26]
    again = [out["out"].dtype for out in one.many(rows(30, 40))]
    assert again == [np.float32] * 2
    first = ["open 1 at 1", *["run 1 at 1"] * 2]
    others = [f"{what} {i} at {1 + kept}" for i in (2, 3) for what in ("open", "run", "run")]
    assert events == [*first, *others, *first[kept:], *others]
    assert one.times == {"compile_s": 0, "specialise_s": 0.25 * (6 - kept)}
    one.close()
    with pytest.raises(InputError, match="closed"):
        list(one.many(rows(1)))


def test_sets_of_inputs_that_do_not_fit_together_go_in_groups(events: list[str]) -> None:
    found = network(events, 400 + PASSED).many(rows(10, 20))
    assert [out["out"][0, 0] for out in found] == [16, 26]
    once = [f"{what} {i} at 1" for i in (1, 2, 3) for what in ("open", "run")]
    assert events == once * 2


def test_without_a_limit_all_are_open_from_the_start(events: list[str]) -> None:
    one = network(events, None)
    assert events == [f"open {i} at {i}" for i in (1, 2, 3)]
    list(one.many(rows(10, 20)))
    assert events[3:] == [f"run {i} at 3" for i in (1, 1, 2, 2, 3, 3)]
    one.close()
