"""OpenVINO's precisions of an export: what is measured, and what runs then. On the ONNX of a tiny model in INT4."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import traced
from fakes import fake_runtime
from torch import nn

pytest.importorskip("openvino")

from edgeprune import runtimes
from edgeprune.export import folder, parity, precisions, to_onnx
from edgeprune.quantization.precision import Precision
from edgeprune.quantization.quantize import packed_from, round_to_nearest
from edgeprune.runtimes import base, networks, openvino, precision

INT4 = Precision(4, 64)


def every_instruction(patch: pytest.MonkeyPatch) -> None:
    """Measure and load as if the processor had them all."""
    patch.setattr(precisions, "lacking", lambda _: [])
    patch.setattr(precision, "instructions", lambda: frozenset({"avx512_vnni", "avx512_bf16"}))


@pytest.fixture(scope="module")
def exported(tiny_folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The export, measured as if the processor had every instruction."""
    source = tmp_path_factory.mktemp("source") / "tiny"
    tiny.tiny_pipeline(source)
    (source / "transformer_int4").mkdir()
    shutil.copyfile(source / "transformer" / "config.json", source / "transformer_int4" / "config.json")
    model = tiny.tiny_transformer(num_layers=2)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name.startswith("transformer_blocks"):
            parent, _, leaf = name.rpartition(".")
            packed = packed_from(layer, *round_to_nearest(layer.weight.detach(), INT4), INT4)
            setattr(model.get_submodule(parent), leaf, packed)
    out = tmp_path_factory.mktemp("out") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "open_transformer", lambda *_, **__: tiny.stored(model))
        every_instruction(patch)
        traced.reuse(patch, tiny_folders[1], "text_encoder", "text_encoder_2", "vae_decoder")
        return out, to_onnx.export(source, out)


def test_the_errors_are_in_the_record(exported: tuple[Path, dict[str, Any]]) -> None:
    found = json.loads((exported[0] / folder.FILE).read_text())["precisions"]
    assert found == exported[1]["precisions"]
    sizes = {"prompts": 10, "height": 64, "width": 64, "text_tokens": tiny.TOKENS}
    assert {key: found[key] for key in sizes} == sizes
    assert found["openvino"].keys() == {"int8"}  # bf16 would spoil the angles of an ONNX file
    least = 0.0 if precision.lacking("int8") else 1e-3  # without the instructions OpenVINO rounds nothing
    assert least <= found["openvino"]["int8"] < 0.2


def test_nothing_is_measured_without_the_instructions(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO would compute float32 in place of int8, and no error be found."""
    monkeypatch.setattr(precision, "instructions", lambda: frozenset({"avx2"}))
    assert precisions.measured(exported[0], lambda *_: None) == {}


def test_a_long_text_and_a_large_image_are_cut() -> None:
    """Rounding is per token: at full size it would take minutes and find the same."""
    hidden, pooled = (
        np.random.default_rng(0).standard_normal((2, 300, 4)).astype(np.float32),
        np.zeros((2, 3), np.float32),
    )
    hidden[1, [7, 299]] *= 100
    found, same = precisions._largest(hidden, pooled)
    assert found.shape == (2, 128, 4) and same is pooled
    rows = [row.tobytes() for row in hidden[1]]
    places = [rows.index(row.tobytes()) for row in found[1]]
    assert {7, 299} <= set(places) and places == sorted(places)
    assert np.array_equal(precisions._largest(hidden[:, :77], pooled)[0], hidden[:, :77])
    generation = SimpleNamespace(height=1024, width=64)
    settings = SimpleNamespace(generation=generation, factor=8, patch=2)
    assert precisions._size(SimpleNamespace(settings=settings)) == (128, 64)  # type: ignore[arg-type]


def test_an_error_is_that_of_ten_velocities(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transformer that is off by 1 % in int8 is found to be."""
    every_instruction(monkeypatch)
    seen, computed, real, settings_of = [], list[Any](), networks.NetworkBackend.step, openvino.settings_of

    def step(self: Any, latents: Any, text: Any, pooled: Any, sigma: Any, guidance: float) -> Any:
        seen.append((sigma.tolist(), text, latents, guidance))
        computed.append(real(self, latents, text, pooled, sigma, guidance))
        return computed[-1] * (1.01 if self.precision == "W4A8" else 1.0)

    def exact(device: str, *, precision: str = "exact", **options: Any) -> dict[str, Any]:
        return settings_of(device, **options)

    monkeypatch.setattr(networks.NetworkBackend, "step", step)
    monkeypatch.setattr(openvino, "settings_of", exact)
    told: list[tuple[Any, ...]] = []
    found = precisions.measured(exported[0], lambda what, *steps: told.append(steps[:2]))
    assert found["precisions"]["openvino"]["int8"] == 0.01
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    (first, _, noise, _), (levels, text, latents, guidance), again = seen
    assert first == [1.0] * 10 and np.array_equal(noise[0], latents[0])
    np.testing.assert_allclose(latents[9], noise[9] + (levels[9] - 1) * computed[0][9], atol=1e-5)
    assert len(set(levels)) == len(latents) == 10 and levels[0] == 1.0 and min(levels) > 0 and guidance == 3.0
    assert len({row.tobytes() for row in text}) > 5  # of other prompts
    assert levels == again[0] and np.array_equal(text, again[1]) and np.array_equal(latents, again[2])


def test_the_fastest_that_is_exact_enough_is_the_default(
    exported: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(exported[0], tmp_path / "out"))
    old = {key: value for key, value in exported[1].items() if key != "precisions"}

    def velocity(error: float | None, here: str = "avx512_vnni", **options: Any) -> tuple[str, list[Any]]:
        measured = {} if error is None else {"precisions": {"openvino": {"int8": error}}}
        (out / folder.FILE).write_text(json.dumps(old | measured))
        monkeypatch.setattr(precision, "instructions", lambda: frozenset({here}))
        with runtimes.load(out, "openvino", threads=1, **options) as model:
            texts = model.backend.encode(["two red circles"])
            latents = base.initial_latents(model.settings, [1], 64, 64)
            return model.backend.precision, [*texts, model.step(latents, *texts, np.full(1, 0.5, np.float32))]

    before = velocity(None)
    for same in (velocity(0.01, precision="exact"), velocity(0.021), velocity(0.01, here="avx2")):
        assert before[0] == same[0] == "W4A32"
        assert all(np.array_equal(a, b) for a, b in zip(same[1], before[1], strict=True))
    fast = velocity(0.01)
    assert fast[0] == "W4A8" == velocity(None, precision="int8")[0]
    assert all(np.array_equal(a, b) for a, b in zip(fast[1][:2], before[1][:2], strict=True))  # the text encoders'
    monkeypatch.undo()
    if not precision.lacking("int8"):
        assert parity.relative_error(fast[1][2], before[1][2])[1] > 1e-3


def test_a_precision_that_overflows_is_left_out(
    exported: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is no number, which JSON cannot hold."""
    every_instruction(monkeypatch)
    real = networks.NetworkBackend.step

    def step(self: Any, *inputs: Any) -> Any:
        return real(self, *inputs) * (np.nan if self.precision == "W4A8" else 1.0)

    monkeypatch.setattr(networks.NetworkBackend, "step", step)
    assert precisions.measured(exported[0], lambda *_: None)["precisions"]["openvino"] == {}


def test_levels_do_not_depend_on_the_solver() -> None:
    """Heun's visits each level but the last twice."""
    model = fake_runtime()
    expected = precisions._levels(model)
    heun = dataclasses.replace(model.settings.generation, solver="heun")
    model.settings = dataclasses.replace(model.settings, generation=heun)
    np.testing.assert_array_equal(precisions._levels(model), expected)
    assert len(expected) == 10
