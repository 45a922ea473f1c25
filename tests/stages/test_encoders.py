"""The stage `encoders`: a T5 in INT4 by error feedback, its measured error, the form that is kept, kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stage_runs import begun

from edgeprune import api
from edgeprune.artefact.loading import load_part
from edgeprune.artefact.manifest import Manifest, packed_encoders, recorded_encoders
from edgeprune.artefact.text import packed_text
from edgeprune.bench.disk import disk_bytes
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.families.encoders import T5
from edgeprune.quantization.int4 import PackedLinear
from edgeprune.quantization.text import PackedText, plain, prepare_text_encoder, quantize_text_encoder
from edgeprune.residency import shards
from edgeprune.residency.weights import Weights
from edgeprune.stages import encoders
from edgeprune.stages.encoders import run
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.workspace import Workspace

LAYERS = 2
PACKED = "text_encoder_3_int4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "t5"
    tiny.tiny_pipeline(folder, t5=True, num_layers=1)
    return folder


@pytest.fixture
def ws(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setattr(encoders, "PROMPTS", 6)
    return begun(source, tmp_path / "out")


def kept(monkeypatch: pytest.MonkeyPatch, bound: float) -> None:
    """Keep the forms with at most this error, whatever their cosine."""
    monkeypatch.setattr(encoders, "BOUND", bound)
    monkeypatch.setattr(encoders, "LEAST_COSINE", 0.0)


def floats(out: Path) -> Any:
    """Return transformers' own T5 with the numbers that the artefact's integers stand for."""
    model = load_part(out / "text_encoder_3", T5)
    tensors = packed_text(out / "text_encoder_3")
    assert tensors is not None
    state = {n: plain(tensors, n, tuple(t.shape)).float() for n, t in model.state_dict().items()}
    model.load_state_dict(state)
    return model


@torch.no_grad()
def said(model: Any, ws: Workspace) -> torch.Tensor:
    """Return the embeddings of the prompts that calibrate."""
    prompts = calibrating(ws, count=6)[:6]
    ids = tiny.tiny_t5_tokenizer()(prompts, padding="max_length", max_length=tiny.T5_TOKENS, truncation=True).input_ids
    out: torch.Tensor = model(torch.tensor(ids)).last_hidden_state
    return out


def test_the_error_that_is_written_is_that_of_the_integers(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with transformers' forward pass; feedback leaves less of it than the nearest integers."""
    kept(monkeypatch, 1.0)
    assert run(ws, "int4", 64) and not run(ws, "int4", 64)
    exact = load_part(ws.out / "text_encoder_3", T5)
    wanted = said(exact, ws)
    found = encoders.errors(said(floats(ws.out), ws), wanted)
    written = ws.manifest.stages["encoders"]["errors"]["int4"]
    assert written["relative"] == pytest.approx(found.relative, rel=1e-3)
    assert written["cosine"] == pytest.approx(found.cosine, abs=1e-5)
    nearest = encoders.errors(said(quantize_text_encoder(load_part(ws.out / "text_encoder_3", T5), "int4"), ws), wanted)
    assert 0.01 < found.relative < 0.9 * nearest.relative
    assert ws.manifest.encoders == "int4" == ws.manifest.stages["encoders"]["form"]
    assert Manifest.load(ws.out).files[f"{PACKED}/model.safetensors"]
    kinds = {name.rpartition(".")[2] for name in Weights(ws.out / PACKED).shapes if ".layer.1.Dense" in name}
    assert kinds == {"weight_packed", "weight_scale"}
    assert not list(ws.out.rglob("unfinished.json"))


def test_wo_gets_8_bits_where_the_error_asks_for_it(
    source: Path, ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(monkeypatch, 1.0)
    run(ws, "int4", 64)
    errors = {form: found["relative"] for form, found in ws.manifest.stages["encoders"]["errors"].items()}
    assert errors["int4-wo8"] < errors["int4"]
    kept(monkeypatch, errors["int4-wo8"] * 1.001)
    other = begun(source, tmp_path / "wide")
    lines: list[str] = []
    run(other, "int4", 64, lambda what, *_: lines.append(what))
    assert other.manifest.encoders == "int4-wo8"
    assert any("int4-wo8: error" in line and line.endswith("is kept") for line in lines)
    narrow, wide = Weights(ws.out / PACKED), Weights(other.out / PACKED)
    for name in narrow.shapes:
        if ".wo." not in name:
            assert torch.equal(narrow[name], wide[name]), name
    layer = "encoder.block.1.layer.1.DenseReluDense.wo"
    assert wide.shapes[f"{layer}.weight_packed"] == (tiny.T5_WIDTH, 64)
    assert narrow.shapes[f"{layer}.weight_packed"] == (tiny.T5_WIDTH, 32)
    found = encoders.errors(said(floats(other.out), other), said(load_part(ws.out / "text_encoder_3", T5), other))
    assert found.relative == pytest.approx(errors["int4-wo8"], rel=1e-3)
    model = prepare_text_encoder(load_part(other.out / "text_encoder_3", T5), PackedText(wide).precision)
    bits = {n.rpartition(".")[2]: m.bits for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert bits.pop("wo") == 8 and set(bits.values()) == {4}
    assert not run(other, "int4", 64)


def test_8_bits_where_no_int4_is_close_enough(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(monkeypatch, 0.0)
    lines: list[str] = []
    run(ws, "int4", 64, lambda what, *_: lines.append(what))
    assert ws.manifest.encoders == "int8" and not (ws.out / PACKED).exists()
    assert not [name for name in ws.manifest.files if name.startswith(PACKED)]
    assert any("no INT4 form is within" in line for line in lines)


@pytest.mark.parametrize("bound", [1.0, "wo"])
@pytest.mark.parametrize("shards_made", [1, 2, 4])
def test_a_killed_run_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: Any, shards_made: int
) -> None:
    monkeypatch.setattr(encoders, "PROMPTS", 6)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    kept(monkeypatch, 1.0)
    whole = begun(source, tmp_path / "whole")
    run(whole, "int4", 64)
    if bound == "wo":
        bound = whole.manifest.stages["encoders"]["errors"]["int4-wo8"]["relative"] * 1.001
        kept(monkeypatch, bound)
        whole = begun(source, tmp_path / "wide")
        run(whole, "int4", 64)
    if bound == 1.0 and shards_made == 4:
        pytest.skip("all are written")
    ws, made = begun(source, tmp_path / "killed"), []
    put = shards.ShardWriter.put

    def killed(self: Any, index: int, tensors: Any) -> None:
        if len(made) == shards_made:
            raise KeyboardInterrupt
        made.append(index)
        put(self, index, tensors)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards.ShardWriter, "put", killed)
        run(ws, "int4", 64)
    assert "encoders" not in ws.manifest.stages
    del ws
    ws = Workspace(tmp_path / "killed", str(source))
    rounded: list[int] = []
    make = encoders._Rounder.make
    monkeypatch.setattr(encoders._Rounder, "make", lambda self, i: rounded.append(i) or make(self, i))
    run(ws, "int4", 64)
    assert len(rounded) == max(0, LAYERS + 1 - shards_made)
    files = sorted(path.name for path in (whole.out / PACKED).iterdir())
    assert files == sorted(path.name for path in (ws.out / PACKED).iterdir())
    for name in files:
        assert (whole.out / PACKED / name).read_bytes() == (ws.out / PACKED / name).read_bytes(), name


def test_other_forms_write_nothing(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(monkeypatch, 1.0)
    assert run(ws, "half", 64)
    assert ws.manifest.encoders == "half" and not (ws.out / PACKED).exists()
    with pytest.raises(StaleStageError, match="encoders was done with"):
        run(ws, "int4", 64)
    ws.fresh = True
    assert run(ws, "int4", 64) and (ws.out / PACKED).is_dir()
    assert run(ws, "int8", 64)
    assert ws.manifest.encoders == "int8" and not (ws.out / PACKED).exists()
    assert not [name for name in ws.manifest.files if name.startswith(PACKED)]


def test_what_a_killed_run_left_does_not_count(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(monkeypatch, 1.0)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Manifest, "hash_files", killed)
        run(ws, "int4", 64)
    assert (ws.out / PACKED).is_dir() and packed_text(ws.out / "text_encoder_3") is None
    assert packed_encoders(ws.out) == [PACKED] and recorded_encoders(ws.out) == []
    whole = disk_bytes(ws.out)["total_disk_bytes"]
    (ws.out / PACKED / "model.safetensors").write_bytes(b"")
    assert disk_bytes(ws.out)["total_disk_bytes"] == whole
    assert run(ws, "int8", 64) and not (ws.out / PACKED).exists()


def test_the_default_follows_the_calibration(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks, `quantize` or `compress`; and it is refused for its time before the transformer is rounded."""
    monkeypatch.setattr(encoders, "PROMPTS", 6)
    ws, asked = begun(source, tmp_path / "out"), list[tuple[str, int]]()
    monkeypatch.setattr(encoders, "check_time", lambda _, form, size, __: asked.append((form, size)))
    nearest = api.QuantizeOptions(group_size=32, calibration="none")
    api.quantize(ws.out, nearest)
    assert Manifest.load(ws.out).encoders == "int8" and set(asked) == {("int8", 32)}
    chosen = api.CompressOptions(distill=None, quantize=nearest)
    assert chosen.settled(10).encoders == "int8" and chosen.to_json()["encoders"] == "int8"
    trained = api.CompressOptions().settled(10)
    assert (trained.quantize.calibration, trained.encoders) == ("none", "int4")  # nobody asked for no calibration


def test_a_damaged_form_is_named(ws: Workspace) -> None:
    run(ws, "half", 64)
    path = ws.out / "edgeprune.json"
    path.write_text(path.read_text().replace('"half"', '"int3"'))
    with pytest.raises(InputError, match=r"encoders: found 'int3', expected .*int4-wo8.* or null"):
        Manifest.load(ws.out)


def test_what_is_refused(ws: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--encoders: found 'int2', expected int4, int8 or half"):
        run(ws, "int2", 64)
    kept(monkeypatch, 1.0)
    run(ws, "int4", 64)
    path = ws.out / PACKED / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=PACKED):
        packed_text(ws.out / "text_encoder_3")


def test_a_pipeline_without_a_t5_has_no_such_stage(tmp_path: Path) -> None:
    tiny.tiny_pipeline(tmp_path / "source")
    ws = begun(tmp_path / "source", tmp_path / "out")
    assert not run(ws, "int4", 64) and "encoders" not in ws.manifest.stages
    assert encoders.written_bytes(tmp_path / "source", "int4", 64) == 0


def test_its_work_is_counted(source: Path, ws: Workspace) -> None:
    counted = encoders.work(ws.subject, "int4", 64)
    assert counted.flops > 0 and counted.rounded > 0
    assert encoders.work(ws.subject, "int8", 64) == encoders.work(ws.subject, "half", 64) == type(counted)()
    run(ws, "int4", 64)
    size = sum(path.stat().st_size for path in (ws.out / PACKED).glob("*.safetensors"))
    assert 0.5 < size / encoders.written_bytes(source, "int4", 64) < 1.3  # with its header
    layer = 4 * 4 * tiny.T5_WIDTH**2  # its attention in float32
    assert ws.memory.process + layer < encoders.memory(ws.memory, "int4") and encoders.memory(ws.memory, "int8") == 0
