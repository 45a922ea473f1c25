"""compress end to end on a tiny model: the artefact, stages that are done, stale inputs, and resuming."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stage_runs import OPTIONS, edit
from tiny import tiny_inputs

import edgeprune
from edgeprune.analysis.contribution import ContributionReport, Group, groups
from edgeprune.analysis.contribution import analyze as score_groups
from edgeprune.analysis.estimators.exhaustive import Exhaustive
from edgeprune.artefact.loading import load_transformer
from edgeprune.artefact.resolve import BUILTIN
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.residency.shards import ShardWriter
from edgeprune.sampling.generation import Generation
from edgeprune.stages import analyze, distill, plan, prune, quantize
from edgeprune.stages.compress import compress, forecast
from edgeprune.stages.memory import PROCESS_BYTES
from edgeprune.stages.options import DataOptions, PlanOptions
from edgeprune.stages.workspace import STAGES, Workspace
from edgeprune.training.recipe import DistillOptions


def test_artefact_loads_here_and_in_stock_diffusers(artefact: Path) -> None:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    plan = Workspace(artefact, None, model_given=False).plan()
    stock = StableDiffusion3Pipeline.from_pretrained(artefact, text_encoder_3=None, tokenizer_3=None)
    assert isinstance(stock.transformer, SD3Transformer2DModel)
    assert stock.transformer.config.num_layers == len(plan.kept) == 2
    half = load_transformer(artefact, quantized=False)
    with torch.no_grad():
        a, b = (m(**tiny_inputs(), return_dict=False)[0] for m in (stock.transformer.float(), half))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    small = edgeprune.load(artefact)
    assert type(small.transformer.transformer_blocks[0].ff.net[2]).__name__ == "PackedLinear"


def test_loading_prints_nothing(source: Path) -> None:
    """In a new process: transformers prints advice on torchvision when diffusers' pipelines are imported."""
    code = "import sys, edgeprune; edgeprune.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, source], capture_output=True, text=True)
    # With optimum installed, diffusers prints on import which of optimum's distributions it found.
    warnings = [line for line in done.stderr.splitlines() if "distributions found for package optimum" not in line]
    assert (done.returncode, done.stdout, warnings) == (0, "", [])


def test_manifest_tells_all(artefact: Path) -> None:
    data = json.loads((artefact / "edgeprune.json").read_text())
    assert list(data["stages"]) == list(STAGES)
    assert data["plan"]["blocks"] and data["tools"]["torch"] == metadata.version("torch")
    assert {"transformer", "transformer_int4", "analysis.json", "plan.json"} <= {n.split("/")[0] for n in data["files"]}


def test_done_stages_are_no_ops(source: Path, artefact: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in artefact.rglob("*") if p.is_file()}
    assert compress(Workspace(artefact, str(source)), OPTIONS) == []
    assert before == {p: p.stat().st_mtime_ns for p in artefact.rglob("*") if p.is_file()}


def test_other_inputs_need_fresh(source: Path, copy: Path) -> None:
    other = replace(OPTIONS, distill=DistillOptions(steps=2, batch=2))
    with pytest.raises(StaleStageError, match="--fresh"):
        compress(Workspace(copy, str(source)), other)
    assert compress(Workspace(copy, str(source), fresh=True), other) == ["distill", "quantize"]


def test_component_plan_loads_strictly(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "parts", str(source))
    options = replace(
        OPTIONS, plan=PlanOptions("manual", components="1:norm,1:mlp,0:attn,2:context_norm"), distill=None
    )
    compress(ws, options)
    state = load_transformer(ws.out, quantized=True).state_dict()
    assert "transformer_blocks.1.norm1.linear.bias" in state
    assert not [n for n in state if n.startswith(("transformer_blocks.1.ff.", "transformer_blocks.0.attn."))]
    with torch.no_grad():
        edgeprune.load(ws.out).transformer(**tiny_inputs())


def test_analysis_resumes_without_redoing(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "a", str(source))
    calls = 0

    def score() -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return [float(calls)]

    def go() -> dict[Group, list[float]]:
        metric = SimpleNamespace(pipe=ws.pipe, score=score)
        estimator = Exhaustive(ws.family, metric, torch.zeros(64))
        made = score_groups(
            ws.family, ws.config, estimator.estimate, groups=groups(ws.family, ws.config, components=False), metric="m",
            estimator="exhaustive", prompts=["p"], path=ws.report_path, inputs_digest="d",
        )  # fmt: skip
        return made.scores

    with pytest.raises(KeyboardInterrupt):
        go()
    partial = ws.report_path.with_name("analysis.json.partial")
    partial.write_text(partial.read_text() + '{"parts": [[2, nu')  # a line that the kill cut off
    calls = 10
    assert go() == {((0, None),): [2.0], ((1, None),): [3.0], ((2, None),): [11.0]}
    calls = 20
    assert go()[(2, None),] == [11.0] and calls == 20  # killed before the manifest was written: nothing is scored again


@pytest.mark.parametrize("stage", ["analyze", "prune", "quantize"])
def test_killed_before_a_finished_stage_was_noted(
    source: Path, artefact: Path, copy: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are in place, but the manifest does not list the stage: it finishes without making anything again."""
    part = {"prune": "transformer", "quantize": "transformer_int4"}.get(stage)
    if stage == "prune":  # distillation has replaced what it wrote
        shutil.rmtree(copy)
        compress(Workspace(copy, str(source)), replace(OPTIONS, distill=None))
    stages = json.loads((copy / "edgeprune.json").read_text())["stages"]
    before_it = STAGES[: STAGES.index(stage)]
    edit(copy / "edgeprune.json", "stages", {name: stages[name] for name in before_it if name in stages})
    if part:
        count = len(list((copy / part).glob("*.safetensors")))
        (copy / part / "unfinished.json").write_text(json.dumps({"inputs": stages[stage]["inputs"], "shards": count}))
        (copy / f"{part}.old").mkdir()
    else:
        rows = json.loads((copy / "analysis.json").read_text())
        key = json.loads((artefact / "edgeprune.json").read_text())["stages"]["analyze"]["inputs"]
        lines = [{"inputs": key}, {"parts": [], "scores": rows["untouched"]}, *rows["scores"]]
        (copy / "analysis.json.partial").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(ShardWriter, "put", None)
    monkeypatch.setattr(Exhaustive, "estimate", None)
    before = {p: p.read_bytes() for p in copy.rglob("*.safetensors")}
    ws = Workspace(copy, str(source))
    run = {"analyze": lambda: analyze.run(ws, OPTIONS.analyze), "prune": lambda: prune.run(ws)}
    assert run.get(stage, lambda: quantize.run(ws, OPTIONS.quantize))()
    assert before == {p: p.read_bytes() for p in copy.rglob("*.safetensors")}
    assert not [p for p in copy.rglob("*") if p.name.endswith((".partial", ".old", ".tmp", "unfinished.json"))]


def test_doing_a_stage_again_leaves_no_old_int4(source: Path, copy: Path) -> None:
    ws = Workspace(copy, str(source), fresh=True)
    assert distill.run(ws, DistillOptions(steps=1, batch=2), OPTIONS.data)
    assert not (copy / "transformer_int4").exists()
    assert not [n for n in ws.manifest.files if n.startswith("transformer_int4/")]


def test_leaving_distillation_out_of_a_distilled_folder_needs_fresh(source: Path, copy: Path) -> None:
    without = replace(OPTIONS, distill=None)
    with pytest.raises(StaleStageError, match="was distilled"):
        compress(Workspace(copy, str(source)), without)
    assert compress(Workspace(copy, str(source), fresh=True), without) == ["prune", "quantize"]


def test_changed_data_is_noticed(source: Path, copy: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    data = DataOptions(str(prompts), 2)
    assert distill.run(Workspace(copy, str(source), fresh=True), DistillOptions(steps=1, batch=2), data)
    prompts.write_text("a blue circle\n")
    with pytest.raises(StaleStageError):
        distill.run(Workspace(copy, str(source)), DistillOptions(steps=1, batch=2), data)


def test_tokenizers_are_for_both_transformers(artefact: Path) -> None:
    """transformers 5 writes only tokenizer.json, transformers 4 vocab.json and merges.txt; both read the latter."""
    for folder in (artefact, BUILTIN):
        for name in ("tokenizer", "tokenizer_2"):
            if folder == artefact and metadata.version("transformers").startswith("4."):
                assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / name).iterdir()}
                continue  # its source was saved by version 4
            model = json.loads((folder / name / "tokenizer.json").read_text())["model"]
            assert json.loads((folder / name / "vocab.json").read_text()) == model["vocab"]
            assert len((folder / name / "merges.txt").read_text().splitlines()) == 1 + len(model["merges"])


def test_given_scores_also_guide_distillation(source: Path, artefact: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    plan.run(ws, OPTIONS.plan, artefact / "analysis.json")
    used, expected = ws.report(), ContributionReport.load(artefact / "analysis.json")
    assert used is not None and used.contributions() == expected.contributions()
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match="bad.json"):
        plan.run(Workspace(tmp_path / "out", str(source), fresh=True), OPTIONS.plan, tmp_path / "bad.json")


def test_no_training_holds_nothing(source: Path) -> None:
    """The forecast counts the teacher's weights only if something is trained."""
    generation = Generation.load(source)
    trained = forecast(source, OPTIONS, generation)
    untrained = forecast(source, replace(OPTIONS, distill=None), generation)
    assert trained["distill_memory_bytes"] - PROCESS_BYTES > 2 * trained["parameters"] * 4
    assert untrained["distill_memory_bytes"] == 0 == untrained["distill_floor_s"]


def test_digests_are_those_of_folders_from_before(source: Path) -> None:
    """Options that were removed still enter the digests with their defaults, so no finished stage is done again."""
    later = {"keep_components", "max_size_bytes", "stand_in"}  # appear where they are used
    known = set(asdict(OPTIONS.plan)) - later
    earlier = {"max_latency": None, "max_memory_bytes": None}
    assert OPTIONS.plan.to_json() == {f: getattr(OPTIONS.plan, f) for f in known} | earlier
    assert replace(OPTIONS.plan, keep_components=("attn",)).to_json()["keep_components"] == ("attn",)
    assert OPTIONS.to_json()["plan"]["max_latency"] is None
    assert replace(OPTIONS, distill=None).to_json()["distill"] is None
