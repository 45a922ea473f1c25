"""How often files are read and written: INT4 in the same pass as `prune`, `--no-half`, and parts that are linked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from stage_runs import OPTIONS
from typer.testing import CliRunner

import edgeprune
from edgeprune import api
from edgeprune.api.hub import _check
from edgeprune.artefact.loading import open_transformer
from edgeprune.artefact.lora.reading import Lora
from edgeprune.cli import app
from edgeprune.common import hashes, linking, traffic
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.common.files import UNFINISHED, write_json
from edgeprune.common.progress import silent
from edgeprune.common.tensors import load_tensors, save_tensors
from edgeprune.planning.options import PlanOptions
from edgeprune.planning.plan import PrunePlan
from edgeprune.report import make
from edgeprune.residency import shards
from edgeprune.residency.model_files import model_files
from edgeprune.residency.weights import Weights
from edgeprune.stages import merge, plan, prune, quantize
from edgeprune.stages.compress import compress
from edgeprune.stages.options import CompressOptions, DataOptions, QuantizeOptions
from edgeprune.stages.weights import open_pruned
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions

BLOCK = CompressOptions(
    plan=PlanOptions("manual", blocks="1"), distill=None, quantize=QuantizeOptions(calibration="none")
)
PLANS = {
    "norms": PlanOptions("manual", components="1:norm,1:mlp,0:attn,2:context_norm"),
    "modulation": PlanOptions("manual", blocks="0", modulation_rank=3),
}


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob(pattern)}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def keys(ws: Workspace) -> dict[str, str]:
    return {name: stage["inputs"] for name, stage in ws.manifest.stages.items()}


@pytest.fixture
def first_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been hashed yet, and hashes are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setattr(hashes, "KEPT_FROM", 10_000)
    monkeypatch.setattr(linking, "LINKED_FROM", 10_000)


@pytest.mark.parametrize("no_half", [False, True])
def test_the_original_is_read_once_to_hash_it_and_once_to_prune_it(
    source: Path, tmp_path: Path, first_process: None, no_half: bool
) -> None:
    before, out = traffic.total(), tmp_path / "out"
    compress(Workspace(out, str(source)), BLOCK, no_half=no_half)
    moved = traffic.total().since(before)
    small = sum(p.stat().st_size for p in model_files(source) if p.suffix != ".safetensors")
    kept = PrunePlan.load(out / "plan.json").after.bf16_bytes  # of float16, too
    least, room = size(source) + kept, 2 * small + 30_000
    assert room < min(p.stat().st_size for p in source.rglob("*.safetensors")) + 2 * small  # a second reading shows
    assert least <= moved.read_bytes <= least + room
    written = size(out / "transformer_int4") + size(out / "transformer")
    assert (size(out / "transformer") == 0) is no_half
    assert written <= moved.written_bytes <= written + small + 10_000


@pytest.mark.parametrize("removed", PLANS)
def test_every_road_ends_in_the_same_integers(
    source: Path, tmp_path: Path, removed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage by stage, in one pass, and without a copy in half precision; several shards of one and of two blocks."""
    options = replace(BLOCK, plan=PLANS[removed])
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    apart = Workspace(tmp_path / "apart", str(source))
    plan.run(apart, options.plan)
    assert prune.run(apart) and quantize.run(apart, options.quantize)
    expected = files(apart.out / "transformer_int4")
    assert len([name for name in expected if name.endswith(".safetensors")]) > 1
    read = list[str]()
    get = Weights.__getitem__
    monkeypatch.setattr(Weights, "__getitem__", lambda self, name: read.append(str(self.folder)) or get(self, name))  # type: ignore[func-returns-value]
    for no_half in (False, True):
        ws = Workspace(tmp_path / f"{no_half}", str(source))
        compress(ws, options, no_half=no_half)
        assert files(ws.out / "transformer_int4") == expected
        assert keys(ws) == keys(apart)
        half = files(ws.out / "transformer", "*.safetensors")
        assert half == ({} if no_half else files(apart.out / "transformer", "*.safetensors"))
        assert not any(Path(folder).is_relative_to(ws.out / "transformer") for folder in read)
        assert ws.manifest.half_in_source is no_half


@pytest.mark.parametrize("puts", [2, 3])
def test_an_interrupted_pass_ends_in_the_same_bytes(
    source: Path, tmp_path: Path, puts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 40_000)
    whole, ws = Workspace(tmp_path / "whole", str(source)), Workspace(tmp_path / "out", str(source))
    compress(whole, BLOCK)
    put, calls = shards.ShardWriter.put, list[int]()

    def killed(self: shards.ShardWriter, index: int, tensors: object) -> None:
        calls.append(index)
        if len(calls) == puts:
            raise KeyboardInterrupt
        put(self, index, tensors)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards.ShardWriter, "put", killed)
        compress(ws, BLOCK)
    compress(ws, BLOCK)
    for part in ("transformer", "transformer_int4"):
        assert files(ws.out / part) == files(whole.out / part)
    assert {p.name for p in ws.out.iterdir()} == {p.name for p in whole.out.iterdir()}


def test_a_killed_stage_finds_its_weights_after_earlier_stages_were_skipped(source: Path, tmp_path: Path) -> None:
    """`compress` asks each stage again: those that are done must leave the mark of one that was killed at its end."""
    ws = Workspace(tmp_path / "out", str(source))
    compress(ws, BLOCK)
    mark = ws.out / "transformer" / UNFINISHED
    for inputs, stays in (("a later stage", True), (ws.manifest.stages["prune"]["inputs"], False)):
        write_json(mark, {"inputs": inputs, "shards": 1})
        assert not prune.run(ws)
        assert mark.is_file() is stays
    mark.write_text("{")  # damaged: it tells nothing
    assert not prune.run(ws) and not mark.exists()


def test_weights_of_other_parts_are_linked_and_what_people_edit_is_copied(
    source: Path, tmp_path: Path, first_process: None
) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    compress(ws, BLOCK)
    for path in model_files(source):
        name = path.relative_to(source)
        if name.parts[0] not in ("transformer", "generation.json"):
            assert (ws.out / name).read_bytes() == path.read_bytes()
            assert (ws.out / name).samefile(path) is (path.suffix == ".safetensors")
            assert name.parts[0] == "model_index.json" or ws.manifest.files.get(name.as_posix(), "none")


@pytest.fixture
def light(source: Path, tmp_path: Path) -> Workspace:
    """A compressed folder without weights in half precision."""
    ws = Workspace(tmp_path / "light", str(source))
    compress(ws, BLOCK, no_half=True)
    return ws


def test_without_a_half_copy_int4_works(light: Workspace) -> None:
    edgeprune.load(light.out)
    open_transformer(light.out, quantized=True)
    assert json.loads((light.out / "edgeprune.json").read_text())["half_in_source"] is True
    assert compress(light, BLOCK, no_half=True) == []


def test_what_needs_the_half_copy_says_which_command_writes_it(light: Workspace, source: Path, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in light.out.rglob("[!.]*") if p.is_file()}
    lora = Lora(tmp_path / "style.safetensors", (), 0)
    needs = {
        "load": lambda: edgeprune.load(light.out, quantized=False),
        "distill": lambda: api.distill(light.out, DistillOptions(steps=1, batch=2), data=DataOptions("shapes", 4)),
        "merge": lambda: merge.begin(light.out, tmp_path / "merged", lora, 1.0),
        "push": lambda: _check(light.out, silent),
    }
    light._lock = None
    for need in needs.values():
        with pytest.raises(InputError, match=rf"write them: edgeprune prune -o {light.out}"):
            need()
    assert before == {p: p.stat().st_mtime_ns for p in light.out.rglob("[!.]*") if p.is_file()}
    assert not (tmp_path / "merged").exists()


def test_a_later_run_without_the_option_writes_the_half_copy_and_nothing_else(
    light: Workspace, source: Path, tmp_path: Path
) -> None:
    whole = Workspace(tmp_path / "whole", str(source))
    compress(whole, BLOCK)
    others = {p: p.stat().st_mtime_ns for part in ("transformer_int4", "vae") for p in (light.out / part).rglob("*")}
    assert compress(light, BLOCK) == ["prune"]
    assert others == {p: p.stat().st_mtime_ns for p in others}
    assert files(light.out / "transformer") == files(whole.out / "transformer")
    assert (
        light.manifest.files == whole.manifest.files
        and "half_in_source" not in (light.out / "edgeprune.json").read_text()
    )
    assert compress(light, BLOCK, no_half=True) == [] and files(light.out / "transformer", "*.safetensors")


@pytest.mark.parametrize("quantized", [False, True])
def test_int4_is_not_made_of_other_weights_than_were_pruned(
    source: Path, tmp_path: Path, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "out", shutil.copytree(source, tmp_path / "source")
    ws = Workspace(out, str(source))
    plan.run(ws, BLOCK.plan)
    prune.run(ws, no_half=True)
    if quantized:
        quantize.run(ws, BLOCK.quantize)
    before, ws._lock = files(out / "transformer_int4"), None
    weights = next((source / "transformer").glob("*.safetensors"))
    save_tensors(weights, {name: 3 * tensor for name, tensor in load_tensors(weights).items()})
    changed = Workspace(out, str(source), fresh=quantized)
    with pytest.raises(StaleStageError, match="has changed since it was pruned; .*edgeprune prune -o .* --fresh"):
        quantize.run(changed, BLOCK.quantize)
    assert files(out / "transformer_int4") == before
    with pytest.raises(StaleStageError):
        open_pruned(changed)
    if quantized:  # before images are drawn
        monkeypatch.setattr(make, "measure", lambda *_, **__: pytest.fail("drawn"))
        with pytest.raises(StaleStageError):
            make.make_report(changed)
    changed.fresh = True
    assert prune.run(changed, no_half=True) and quantize.run(changed, BLOCK.quantize)


def test_training_is_refused_with_no_half_before_anything_is_made(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--no-half: training ends in .* give --steps 0"):
        api.compress(source, tmp_path / "out", OPTIONS, no_half=True)
    done = CliRunner().invoke(
        app, ["compress", str(source), "-o", str(tmp_path / "out"), "--no-half", "--keep", "1", "--dry-run"]
    )
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out").exists()
