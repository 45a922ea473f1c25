"""Execution providers: the order, the reason, and messages for one that is absent or does not start."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from edgeprune import runtimes
from edgeprune.cli import doctor
from edgeprune.common.errors import InputError
from edgeprune.runtimes.providers import PROVIDERS, choose

CUDA, TRT, COREML, OPENVINO, CPU = (providers[0] for providers in PROVIDERS.values())
OTHER = "AzureExecutionProvider"


@pytest.mark.parametrize(
    ("available", "wanted", "chain", "why"),
    [
        ([OTHER, CPU], None, [CPU], "the only one here"),
        ([TRT, CUDA, CPU], None, [CUDA, CPU], "the first of cuda, tensorrt, cpu, which are here"),
        ([TRT, CUDA, CPU], "tensorrt", [TRT, CUDA, CPU], "provider=tensorrt"),
        ([CPU, CUDA], None, [CUDA, CPU], "the first of cuda, cpu, which are here"),
        ([COREML, OTHER, CPU], None, [COREML, CPU], "the first of coreml, cpu, which are here"),
        ([OPENVINO, CPU], None, [OPENVINO, CPU], "the first of openvino, cpu, which are here"),
        ([TRT, CUDA, CPU], "cuda", [CUDA, CPU], "provider=cuda"),
        ([TRT, CUDA, CPU], "cpu", [CPU], "provider=cpu"),
        ([TRT, CPU], None, [TRT, CPU], "the first of tensorrt, cpu, which are here"),
    ],
)
def test_choice(available: list[str], wanted: str | None, chain: list[str], why: str) -> None:
    found = choose(available, wanted)
    assert (list(found.providers), found.why) == (chain, why)
    assert found.started(chain[0]) == why


@pytest.mark.parametrize("wanted", ["cuda", "abacus", "CPUExecutionProvider", ""])
def test_one_that_is_not_here(wanted: str) -> None:
    with pytest.raises(InputError, match=rf"provider: found '{wanted}', expected .* has: coreml, cpu$"):
        choose([CPU, COREML], wanted)


def test_one_that_does_not_start() -> None:
    """With a GPU build on a machine without a GPU, ONNX Runtime falls back to the CPU."""
    assert choose([CUDA, CPU]).started(CPU) == f"{CUDA} is installed but does not start here"
    with pytest.raises(InputError, match=f"provider: {CUDA} does not start here"):
        choose([CUDA, CPU], "cuda").started(CPU)


def test_names_are_the_vendors() -> None:
    assert {name for chain in PROVIDERS.values() for name in chain} <= set(onnxruntime.get_all_providers())


class FakeSession:
    """A session without a network; starts the providers in `starts`, else the CPU."""

    starts: tuple[str, ...] = (CUDA,)
    asked: list[list[str]] = []

    def __init__(self, path: str, options: Any, *, providers: list[str]) -> None:
        self.asked.append(providers)
        self.providers = [p for p in providers if p in (*self.starts, CPU)]

    def get_providers(self) -> list[str]:
        return self.providers

    def get_inputs(self) -> list[SimpleNamespace]:
        return []

    get_outputs = get_inputs


@pytest.mark.parametrize(
    ("starts", "options", "provider", "why"),
    [
        ((CUDA,), {}, CUDA, "the first of cuda, cpu, which are here"),
        ((), {}, CPU, f"{CUDA} is installed but does not start here"),
        ((CUDA,), {"provider": "cpu"}, CPU, "provider=cpu"),
    ],
)
def test_the_runtime_says_where_and_why(
    starts: tuple[str, ...], options: dict[str, str], provider: str, why: str,
    tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(FakeSession, "starts", starts)
    monkeypatch.setattr(FakeSession, "asked", [])
    with runtimes.load(tiny_folders[1], "ort", **options) as model:
        assert (model.backend.provider, model.backend.why) == (provider, why)
    assert FakeSession.asked == [[CPU] if options else [CUDA, CPU]] * 4
    with pytest.raises(InputError, match=f"cache_dir: found it for {CUDA}, expected it for provider=cpu only"):
        runtimes.load(tiny_folders[1], "ort", provider="cuda", cache_dir="x")


def test_the_real_one(tiny_folders: tuple[Path, Path]) -> None:
    with runtimes.load(tiny_folders[1], "ort", provider="cpu") as model:
        assert (model.backend.provider, model.backend.why) == (CPU, "provider=cpu")
    with pytest.raises(InputError, match="provider: found 'abacus', expected one that this onnxruntime has: cpu"):
        runtimes.load(tiny_folders[1], "ort", provider="abacus")


def test_doctor_tells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> doctor.Finding:
        return {f.what: f for f in doctor.examine()}["run ort"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    assert said().works and said().why.endswith(f"; {CUDA}: the first of cuda, cpu, which are here")
    monkeypatch.delattr(onnxruntime, "get_available_providers")
    assert not said().works and "cannot be imported" in said().why
