"""A limit is kept, as the kernel counts it, or refused before anything is opened."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprune import export, targets
from edgeprune.artefact.resolve import BUILTIN

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's peak"),
    pytest.mark.parametrize("runtime", ["openvino", "ort"]),
]

DRAW = """
import json, re, sys
from pathlib import Path
from edgeprune import runtimes
from edgeprune.common.errors import InputError
from edgeprune.common import pieces
pieces.PIECE_BYTES = 300_000  # so that a small model has many
folder, runtime, limit, side = *sys.argv[1:3], *map(int, sys.argv[3:])
refused = ""
try:
    with runtimes.load(folder, runtime, threads=1, memory=limit) as model:
        model.generate("two red circles", steps=1, height=side, width=side)
except InputError as error:
    refused = str(error)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps([peak, refused]))
"""

MANY = """
import json, sys
from edgeprune import runtimes
from edgeprune.common.memory import resident
from edgeprune.common import pieces
pieces.PIECE_BYTES = 300_000
folder, runtime, limit, count = *sys.argv[1:3], *map(int, sys.argv[3:])
held = []
with runtimes.load(folder, runtime, threads=1, memory=limit) as model:
    for image in range(count):
        side = (64, 96)[image // 10 % 2]
        model.generate(f"{image} red circles", steps=1, height=side, width=side)
        held.append(resident())
print(json.dumps(held))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built-in original for each runtime: 8 M parameters, not quantised."""
    out = {"openvino": tmp_path_factory.mktemp("budgets") / "ir", "ort": tmp_path_factory.mktemp("budgets") / "onnx"}
    for path in out.values():
        target = "openvino" if path.name == "ir" else path.name
        export.export(BUILTIN, path, target, targets.load("cpu-x86"), progress=lambda *_: None)
    return out


def drawn(model: Path, runtime: str, limit: int, side: int) -> tuple[int, str]:
    pytest.importorskip({"ort": "onnxruntime"}.get(runtime, runtime))
    command = [sys.executable, "-c", DRAW, str(model), runtime, str(limit), str(side)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: Any = json.loads(done.stdout)
    return found[0], found[1]


def kept_or_refused(model: Path, runtime: str, limit: int, side: int) -> bool:
    peak, refused = drawn(model, runtime, limit, side)
    if not refused:
        assert peak <= limit
        return True
    least = re.search(r"memory: found .* expected at least (\d+\.\d+) GB", refused)
    assert least is not None and float(least[1]) * 1e9 > limit, refused
    assert peak < limit  # nothing was opened
    return False


def test_the_least_that_is_named_is_enough(runtime: str, tiny_folders: tuple[Path, Path]) -> None:
    model = tiny_folders[1]
    _, refused = drawn(model, runtime, 150_000_000, 64)
    least = re.search(r"at least (\d+\.\d+) GB", refused)
    assert least is not None, refused
    assert kept_or_refused(model, runtime, int(float(least[1]) * 1e9), 64)


@pytest.mark.slow  # a process for each
def test_fifty_limits_are_kept_or_refused(runtime: str, models: dict[str, Path]) -> None:
    draw = random.Random(0)
    sides = (64, 128) * 25
    limits = [draw.randrange(200 * 10**6, 500 * 10**6) for _ in sides]
    found = [kept_or_refused(models[runtime], runtime, *one) for one in zip(limits, sides, strict=True)]
    assert 5 < sum(found) < 45


@pytest.mark.slow  # a thousand images
def test_a_thousand_images_take_no_more_memory_than_a_hundred(runtime: str, models: dict[str, Path]) -> None:
    limit = 300_000_000
    command = [sys.executable, "-c", MANY, str(models[runtime]), runtime, str(limit), "1000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held: list[int] = json.loads(done.stdout)
    assert max(held) <= limit
    assert max(held[900:]) - max(held[80:120]) < 5_000_000
