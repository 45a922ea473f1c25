"""Where networks compute, in which dtype, and in how much memory."""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch

from edgeprune.artefact import staged
from edgeprune.artefact.loading import open_transformer
from edgeprune.common import memory, processor
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions, allowed, parse_bytes, resident
from edgeprune.families import family_of, published
from edgeprune.residency import compute
from edgeprune.residency.compute import Compute, is_small, multiplies_bf16
from edgeprune.residency.running import check_room, dtype_of

LARGE = 10**9
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"), [("3.2GB", 3_200_000_000), ("850 mb", 850_000_000), ("12", 12), ("2GiB", 2 * 2**30)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "3.2 gigabytes", "nan", "1e9", "9" * 400])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match=r"--memory: found .*, expected a size such as 3.2GB"):
        parse_bytes(text, "--memory")


def test_memory_is_what_is_free_here_and_in_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**10))
    assert allowed() == pytest.approx(resident() + 0.9 * 10**10, rel=0.01)
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert allowed() == pytest.approx(resident() + 0.9 * 2 * 10**9, rel=0.01)
    (tmp_path / "memory.stat").write_text("anon 5\nactive_file 300000000\ninactive_file 700000000\n")  # freed on demand
    assert allowed() == pytest.approx(resident() + 0.9 * 3 * 10**9, rel=0.01)
    (tmp_path / "memory.max").write_text("max\n")
    assert allowed() == pytest.approx(resident() + 0.9 * 10**10, rel=0.01)


def test_a_processor_is_asked_whether_it_multiplies_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, line, has in (
        ("zen4", "flags\t\t: fpu avx2 avx512_bf16 amx_tile", True),
        ("arm", "Features\t: fp asimd bf16", True),
        ("haswell", "flags\t\t: fpu avx2\nmodel name\t: a bf16 lover", False),
    ):
        (tmp_path / name).write_text(line)
        monkeypatch.setattr(compute, "instructions", functools.partial(processor.instructions, tmp_path / name))
        assert multiplies_bf16() is has
    # Where the system does not say, the clock does, and a tie is float32's.
    assert processor.instructions(tmp_path / "none") == frozenset()
    monkeypatch.setattr(compute, "instructions", frozenset)
    for taken, faster in ((0.5, True), (0.9, False), (2.0, False)):
        seconds = {torch.bfloat16: taken, torch.float32: 1.0}
        monkeypatch.setattr(compute, "_product_s", lambda dtype, seconds=seconds: seconds[dtype])
        compute._is_faster_in_bf16.cache_clear()
        assert multiplies_bf16() is faster
    monkeypatch.undo()
    compute._is_faster_in_bf16.cache_clear()
    assert compute._product_s(torch.float32) > 0


def test_the_computed_dtype_is_that_of_the_file_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    cuda = Compute(torch.device("cuda"))
    for able, on_cpu in ((True, brain), (False, full)):
        monkeypatch.setattr(compute, "multiplies_bf16", lambda able=able: able)
        assert Compute().dtype(half, LARGE) == Compute().dtype(brain, LARGE) == on_cpu
    assert (cuda.dtype(half, LARGE), cuda.dtype(brain, LARGE), cuda.dtype(full, LARGE)) == (half, brain, full)
    assert is_small(8_000_000) and Compute().dtype(half, 8_000_000) == full


@pytest.mark.parametrize("able", [True, False])
def test_a_gpu_without_bf16_computes_in_float16_or_wider(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Turing card, on which torch emulates bf16."""
    seen = list[Any]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or able)
    half, brain, full, card = torch.float16, torch.bfloat16, torch.float32, torch.device("cuda", 1)
    cuda = Compute(card)
    assert cuda.dtype(brain, LARGE) == (brain if able else half) and seen == [card]
    assert cuda.dtype(brain, LARGE, fits_half=False) == (brain if able else full)
    assert cuda.dtype(half, LARGE, fits_half=False) == half
    assert Compute(card, wish=brain).dtype(half, LARGE) == brain
    weights = SimpleNamespace(shapes={"x.weight": (LARGE,)}, dtype=lambda name: brain, kind=lambda: (brain, LARGE))
    for name, expected in (("sd3.5-large", half), ("z-image-turbo", full)):
        stored: Any = SimpleNamespace(
            family=family_of(published.transformers()[name], name), weights=weights, numbers=LARGE
        )
        assert dtype_of(stored, cuda) == (brain if able else expected)
    monkeypatch.setattr(staged, "part_weights", lambda *_: weights)
    monkeypatch.setattr(staged, "text_encoders", lambda _: {"clip": "CLIPTextModel", "t5": "T5EncoderModel"})
    for name, expected in (("clip", half), ("t5", full)):
        assert staged.encoder_dtype(Path(), name, cuda) == (brain if able else expected)
    asked = Compute(card, wish=half)  # a T5 does not fit it
    assert staged.encoder_dtype(Path(), "t5", asked) == (brain if able else full)


def test_devices_are_those_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "_here", lambda: {"cuda": 2, "cpu": 1})
    assert Compute.of(ComputeOptions()).device == torch.device("cuda:0")
    for rank in (1, 2):  # each process has its own, and shares where there are more processes
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert Compute.of(ComputeOptions()).device == torch.device("cuda", rank % 2)
    assert Compute.of(ComputeOptions("cuda:1", 5)) == Compute(torch.device("cuda:1"), 5)
    for wrong in ("cuda:2", "mps", "gpu", "cuda:x", ""):
        with pytest.raises(InputError, match=r"--device: found .*, expected one of auto, cuda:0 to cuda:1, cpu"):
            Compute.of(ComputeOptions(wrong))


def test_what_is_left_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Any = SimpleNamespace(
        mem_get_info=lambda device: (6, 24), memory_reserved=lambda device: 10, memory_allocated=lambda device: 7
    )
    monkeypatch.setattr(torch, "cuda", seen)
    assert Compute(torch.device("cuda")).left() == int(0.9 * (6 + 3))  # free, and what torch holds without using it
    assert Compute(torch.device("cuda"), 15).left() == 5
    assert Compute(torch.device("cuda"), 4).left() == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's heap")
def test_freed_memory_is_released_before_a_model_is_refused(tmp_path: Path) -> None:
    """Of the heap's pages only those at its end return by themselves."""
    tiny.tiny_pipeline(tmp_path / "tiny")
    stored = open_transformer(tmp_path / "tiny", quantized=False)
    made = [bytearray(100_000) for _ in range(3000)]
    end = made[-1]
    del made
    held = resident()
    left, least = check_room(stored, Compute(CPU, held + 10**8))
    assert left > least > 10**8 and len(end) == 100_000
    assert held - resident() > 2 * 10**8
