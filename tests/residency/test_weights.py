"""Weights on disk: what the operating system is asked to read before it is needed."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgeprune.common import read_ahead
from edgeprune.common.errors import InputError
from edgeprune.residency.table import StoredTable
from edgeprune.residency.weights import Weights


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no such advice")
def test_all_bytes_are_asked_for_in_requests_that_linux_does_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.full((100_000,), float(i)) for i, name in enumerate("abcd")}
    save_file(tensors, path)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: asked.append((start, size)))
    Weights(tmp_path).ahead(["b", "c"])
    assert max(size for _, size in asked) <= 128 * 1024
    content = path.read_bytes()
    found = b"".join(content[start : start + size] for start, size in asked)
    assert found == b"".join(tensors[name].numpy().tobytes() for name in "bc")


def test_a_system_without_such_advice_reads_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, finished = tmp_path / "model.safetensors", list[tuple[Path, list[tuple[int, int]]]]()
    save_file({name: torch.full((100_000,), 1.0) for name in "abc"}, path)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    real = read_ahead._read

    def read(path: Path, spans: list[tuple[int, int]]) -> None:
        assert threading.current_thread() is not threading.main_thread()
        real(path, spans)
        finished.append((path, spans))

    monkeypatch.setattr(read_ahead, "_read", read)
    Weights(tmp_path).ahead(["b", "c"])
    read_ahead._wishes[0].result(timeout=60)
    read_ahead.read_ahead(tmp_path / "none", [(0, 10)])  # the reader says what is missing
    read_ahead._reading().submit(int).result(timeout=60)
    (one, spans), missing = finished
    assert one == path and sum(end - begin for begin, end in spans) == 800_000 and missing[0].name == "none"


def test_rows_of_a_table_are_read_alone(tmp_path: Path) -> None:
    table = torch.arange(40.0).reshape(10, 4).to(torch.bfloat16)
    save_file({"words": table, "bad": torch.full((2, 2), float("nan"))}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    looked_up = StoredTable(functools.partial(weights.rows, "words"), torch.float32)
    ids = torch.tensor([[3, 3, 9], [0, 9, 3]])
    assert torch.equal(looked_up(ids), table[ids].float())
    with pytest.raises(InputError, match="bad: found NaN or infinity"):
        weights.rows("bad", [1])
