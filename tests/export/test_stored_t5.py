"""T5 is exported one layer at a time: the bytes are those of a T5 rounded in memory, and little of it is in memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import save_file

from edgeprune.common.errors import InputError, ParityError
from edgeprune.export import external_data, graph, modules, parity, to_onnx
from edgeprune.export.stored_t5 import StoredT5
from edgeprune.families.encoders import T5
from edgeprune.families.parts import part_shapes
from edgeprune.quantization.text import quantize_text_encoder
from edgeprune.residency import shards

PARTS = ("weight_packed", "weight_scale")
pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations


OTHERS = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.bfloat16, torch.float32)]


@pytest.fixture(scope="module", params=[torch.float16, *OTHERS], ids=str)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 in one of the precisions that files have."""
    path = tmp_path_factory.mktemp("t5") / "text_encoder_3"
    tiny.tiny_t5(300).to(request.param).save_pretrained(path)
    return path


def vendor(folder: Path) -> Any:
    """Return the T5 as transformers loads it, in the precision of its file."""
    return transformers.T5EncoderModel.from_pretrained(folder, dtype="auto", local_files_only=True).eval()


@pytest.mark.parametrize("half", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_bytes_are_those_of_a_t5_rounded_in_memory(
    half: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if half and vendor(folder).dtype != torch.float16:
        pytest.skip("half precision is traced alike for all files")
    monkeypatch.setattr(external_data, "INLINE_BYTES", 1000)
    whole = modules.widen(modules.T5Encoder(quantize_text_encoder(vendor(folder))))
    stored = StoredT5(folder)
    example = whole.example(batch=2, tokens=7)
    source = to_onnx.NetworkSource("t5", stored.running(), example, [example], example, stored)
    in_memory = to_onnx.NetworkSource("t5", whole, example, [example], example)
    for name, network in (("stored", source), ("whole", in_memory)):
        (tmp_path / name).mkdir()
        to_onnx.save("t5", network.to_ir(half=half), tmp_path / name / "model.onnx")
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "stored" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_all_forms_compute_the_same(folder: Path) -> None:
    stored, whole = StoredT5(folder), modules.widen(modules.T5Encoder(quantize_text_encoder(vendor(folder))))
    example = whole.example(batch=2, tokens=9)
    with torch.no_grad():
        (expected,) = whole(**example)
        for module in (stored.running(), stored.checkpoint()):
            for forward in (module, module.reference):
                steps: list[int] = []
                with parity.stepping(module, lambda steps=steps: steps.append(1)):  # type: ignore[misc]
                    torch.testing.assert_close(forward(**example)[0], expected, atol=2e-5, rtol=1e-5)
                assert len(steps) == parity.torch_steps(module) == 2  # its blocks
        assert all(t.is_meta for t in stored.running().model.parameters())
        torch.testing.assert_close(stored.running(torch.float16)(**example), whole.half()(**example), atol=0, rtol=0)


def test_a_wrong_number_fails_the_comparison(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison reads no integers: layers that are written in each other's place show."""
    read = StoredT5.read
    layer = "encoder.block.1.layer.0.SelfAttention"
    other = {f"{layer}.{a}.{kind}": f"{layer}.{b}.{kind}" for a, b in ("qk", "kq") for kind in PARTS}

    def swapped(self: StoredT5, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return read(self, other.get(name, name), dtype)

    monkeypatch.setattr(StoredT5, "read", swapped)
    stored = StoredT5(folder)
    traced = stored.running().example(batch=2, tokens=7)
    model = graph.to_ir(
        stored.traceable(torch.float32), traced, modules.T5Encoder.inputs, modules.T5Encoder.outputs, read=stored.read
    )
    to_onnx.save("t5", model, tmp_path / "model.onnx")
    with pytest.raises(ParityError, match="found a relative error"):
        parity.check(
            "t5", parity.session(tmp_path / "model.onnx"), stored.checkpoint(), [traced], ["last_hidden_state"]
        )


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    tiny.tiny_t5(300).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_ff": 32}))
    with pytest.raises(InputError, match=r"DenseReluDense.wi_0.weight': found \(64, 96\), expected \(32, 96\)"):
        StoredT5(tmp_path)


CHILD = """
import sys
from pathlib import Path
import torch
from edgeprune.common import heap
from edgeprune.export import parity, to_onnx
from edgeprune.export.stored_t5 import StoredT5

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

def grown(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before

torch.set_num_threads(1)
folder, out = map(Path, sys.argv[1:])
stored = StoredT5(folder)
example = stored.running().example(batch=1, tokens=4)
source = to_onnx.NetworkSource("t5", stored.running(), example, [example], example, stored, stored.checkpoint)
model = source.to_ir()
with heap.returned():  # as every export
    written = grown(lambda: to_onnx.save("t5", model, out / "model.onnx"))
    compared = grown(lambda: parity.reference(source.checkpoint(), example, lambda: None))
print(written, compared)
"""


@pytest.mark.slow  # test_coreml_text.py counts what is in memory of a small one
def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Measured by the kernel, for a T5 of 126 M parameters; the largest of its 84 linear layers has 2 M."""
    config = {"d_model": 1024, "d_ff": 2048, "d_kv": 64, "num_heads": 16, "num_layers": 12, "vocab_size": 99}
    config |= {"architectures": [T5], "feed_forward_proj": "gated-gelu", "model_type": "t5"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = part_shapes(T5, config, "config.json")
    assert shapes is not None
    save_file({n: torch.full(s, 0.01).half() for n, s in shapes.items()}, tmp_path / "model.safetensors")
    numbers = sum(map(math.prod, shapes.values()))
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not tell a peak from a time on")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    written, compared = map(int, run.stdout.split())
    assert (tmp_path / "model.onnx.data").stat().st_size >= numbers  # in 8 bits
    assert max(written, compared) < numbers / 2, (written, compared, numbers)


def test_an_interrupted_file_resumes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if vendor(folder).dtype != torch.float16:
        pytest.skip("files resume alike")
    monkeypatch.setattr(external_data, "INLINE_BYTES", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    read: list[str] = []
    original = StoredT5._original
    monkeypatch.setattr(StoredT5, "_original", lambda self, name: read.append(name) or original(self, name))

    def save(to: Path, last: int) -> list[str]:
        """Write the T5, interrupted after a number of shards; return the names of linear weights that were read."""

        def progress(what: str, done: int = 0, total: int = 0, note: str = "") -> None:
            if done == last:
                raise KeyboardInterrupt

        stored = StoredT5(folder)
        example = stored.running().example(batch=2, tokens=7)
        model = to_onnx.NetworkSource("t5", stored.running(), example, [example], example, stored).to_ir()
        read.clear()
        to.mkdir(exist_ok=True)
        to_onnx.save("t5", model, to / "model.onnx", progress)
        return [name for name in read if ".block." in name]

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "resumed", 15)
    begun = {name for name in read if ".block." in name}
    rest = save(tmp_path / "resumed", -1)
    whole = save(tmp_path / "whole", -1)
    assert 0 < len(rest) < len(whole) and len(whole) == len(set(whole))  # each layer is rounded once
    assert begun | set(rest) == set(whole)
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
