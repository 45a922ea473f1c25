"""Every target file can be read, and the error of a wrong one names the fault."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune import targets
from edgeprune.common.errors import InputError

GOOD = """
description = "a board"
formats = ["onnx"]
runtimes = ["ort"]
requires = "nothing"
memory_bytes = 8_000_000_000
memory_source = "guessed"
own_memory = false
dtypes = ["int4", "float32"]
int4_group_sizes = [64, 32]
int4_symmetric_only = false
opset = 21
activations = "float32"
batch = [1, 2]
side = [64, 128]
chunks = 1
"""


def test_names() -> None:
    assert {"cpu-x86", "cpu-arm"} <= set(targets.names())
    assert targets.names() == sorted(targets.names())


@pytest.mark.parametrize("name", targets.names())
def test_every_target_reads(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    assert target.description and target.memory_source
    assert 10**9 <= target.memory_bytes < 10**12
    assert set(target.dtypes) <= {"int4", "int8", "float16", "bfloat16", "float32"}
    assert ("int4" in target.dtypes) == bool(target.int4_group_sizes)
    assert set(target.runtimes) <= {"ort", "trt", "coreml", "openvino"} and target.runtimes
    assert set(target.formats) <= set(targets.DEFAULTS) and target.formats
    assert target.activations in {"float32", "float16"}


def test_a_target_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        targets.load("cpu-x86").opset = 17  # type: ignore[misc]


@pytest.mark.parametrize("name", ["gameboy", "", "../targets/cpu-x86", "cpu-x86.toml"])
def test_unknown_target_lists_the_names(name: str) -> None:
    with pytest.raises(InputError, match="cpu-arm, cpu-x86") as caught:
        targets.load(name)
    assert repr(name) in str(caught.value)


def test_good_text() -> None:
    target = targets.parse("board", GOOD)
    assert target.dtypes == ("int4", "float32")
    assert target.int4_group_sizes == (64, 32)
    assert target.memory_bytes == 8 * 10**9


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("opset = 21", "", "opset"),
        ("opset = 21", "opset = 21\ncolour = 1", "colour"),
        ("opset = 21", "opset = true", "opset: found True, expected int"),
        ("opset = 21", "opset = -1", "opset: found -1"),
        ("8_000_000_000", '"8 GB"', "memory_bytes: found '8 GB', expected int"),
        ("8_000_000_000", "8e9", "memory_bytes: found 8000000000.0, expected int"),
        ('["int4", "float32"]', '"int4"', "dtypes: found 'int4', expected a list"),
        ("[64, 32]", '[64, "32"]', "int4_group_sizes: found '32', expected int"),
        ('runtimes = ["ort"]', "runtimes = [", "not TOML"),
        ("[1, 2]", "[2, 1]", "batch: found [2, 1], expected the smallest and the largest"),
    ],
)
def test_bad_text_says_where(old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        targets.parse("board", GOOD.replace(old, new))
    assert says in str(caught.value) and "board.toml" in str(caught.value)


@pytest.mark.parametrize("package", ["targets", "runtimes", "export"])
def test_a_mapped_folder_refuses_another_name(package: str) -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", f"import {package}"], cwd=root, capture_output=True, text=True)
    assert run.returncode == 1
    assert "ImportError" in run.stderr and f"edgeprune.{package}, not" in run.stderr
