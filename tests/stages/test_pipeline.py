"""compress end to end on a tiny model: artefact, no-ops, stale inputs, resuming, and damaged files."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny_inputs, tiny_pipeline

import edgeprune
from edgeprune.analysis.contribution import Group, analyze, groups
from edgeprune.analysis.estimators.exhaustive import Exhaustive
from edgeprune.artefact import checkpoint
from edgeprune.common.errors import EdgepruneError, InputError, StaleStageError
from edgeprune.report import figures as report
from edgeprune.report import page as report_page
from edgeprune.residency import weights
from edgeprune.stages import pipeline
from edgeprune.stages.pipeline import AnalyzeOptions, CompressOptions, DataOptions, PlanOptions, Workspace
from edgeprune.training import resume
from edgeprune.training.recipe import DistillOptions

OPTIONS = CompressOptions(
    analyze=AnalyzeOptions(count=3),
    plan=PlanOptions(keep=0.95, protect_first=1, protect_last=0),
    data=DataOptions("shapes", 16),
    distill=DistillOptions(steps=3, batch=2),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def artefact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefact") / "small"
    ws = Workspace(out, str(source))
    assert pipeline.compress(ws, OPTIONS) == list(pipeline.STAGES)
    report.make(ws, quick=True)
    return out


@pytest.fixture
def copy(artefact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artefact, tmp_path / "copy"))


def test_artefact_loads_here_and_in_stock_diffusers(artefact: Path) -> None:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    plan = Workspace(artefact, None, model_given=False).plan()
    stock = StableDiffusion3Pipeline.from_pretrained(artefact, text_encoder_3=None, tokenizer_3=None)
    assert isinstance(stock.transformer, SD3Transformer2DModel)
    assert stock.transformer.config.num_layers == len(plan.kept) == 2
    half = checkpoint.load_transformer(artefact, quantized=False)
    with torch.no_grad():
        a, b = (m(**tiny_inputs(), return_dict=False)[0] for m in (stock.transformer.float(), half))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    small = edgeprune.load(artefact)
    assert type(small.transformer.transformer_blocks[0].ff.net[2]).__name__ == "PackedLinear"


def test_loading_prints_nothing(source: Path) -> None:
    """transformers gives advice on torchvision when diffusers' pipelines are imported, hence a process of its own."""
    code = "import sys, edgeprune; edgeprune.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, source], capture_output=True, text=True)
    # With optimum installed diffusers says, as it is imported, which of optimum's distributions it found.
    said = [line for line in done.stderr.splitlines() if "distributions found for package optimum" not in line]
    assert (done.returncode, done.stdout, said) == (0, "", [])


def test_manifest_tells_all(artefact: Path) -> None:
    data = json.loads((artefact / "edgeprune.json").read_text())
    assert list(data["stages"]) == list(pipeline.STAGES)
    assert data["plan"]["blocks"] and data["tools"]["torch"] == torch.__version__
    assert {"transformer", "transformer_int4", "analysis.json", "plan.json"} <= {n.split("/")[0] for n in data["files"]}


def test_done_stages_are_no_ops(source: Path, artefact: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in artefact.rglob("*") if p.is_file()}
    assert pipeline.compress(Workspace(artefact, str(source)), OPTIONS) == []
    assert before == {p: p.stat().st_mtime_ns for p in artefact.rglob("*") if p.is_file()}


def test_other_inputs_need_fresh(source: Path, copy: Path) -> None:
    other = replace(OPTIONS, distill=DistillOptions(steps=2, batch=2))
    with pytest.raises(StaleStageError, match="--fresh"):
        pipeline.compress(Workspace(copy, str(source)), other)
    assert pipeline.compress(Workspace(copy, str(source), fresh=True), other) == ["distill", "quantize"]


def test_component_plan_loads_strictly(source: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "parts", str(source))
    options = replace(
        OPTIONS, plan=PlanOptions("manual", components="1:norm,1:mlp,0:attn,2:context_norm"), distill=None
    )
    pipeline.compress(ws, options)
    state = checkpoint.load_transformer(ws.out, quantized=True).state_dict()
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
        estimator = Exhaustive(ws.family, SimpleNamespace(pipe=ws.pipe, score=score), torch.zeros(64))
        made = analyze(
            ws.family, ws.config, estimator.estimate, groups=groups(ws.family, ws.config, components=False), metric="m",
            estimator="exhaustive", prompts=["p"], path=ws.report_path, inputs_digest="d",
        )  # fmt: skip
        return made.scores

    with pytest.raises(KeyboardInterrupt):
        go()
    partial = ws.report_path.with_name("analysis.json.partial")
    partial.write_text(partial.read_text() + '{"parts": [[2, nu')  # torn by the kill
    calls = 10
    assert go() == {((0, None),): [2.0], ((1, None),): [3.0], ((2, None),): [11.0]}
    calls = 20
    assert go()[(2, None),] == [11.0] and calls == 20  # killed before the stage was noted: nothing is scored again


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: _truncate(d / "transformer_int4" / "diffusion_pytorch_model.safetensors"), "SHA-256"),
        (lambda d: (d / "transformer_int4" / "diffusion_pytorch_model.safetensors").unlink(), "no such file"),
        (lambda d: (d / "edgeprune.json").write_text("{"), "not readable as JSON"),
        (lambda d: _edit(d / "edgeprune.json", "schema_version", 99), "schema_version: found 99.*upgrade"),
        (lambda d: _edit(d / "edgeprune.json", "schema_version", 0), "found 0, expected 1; make the artefact again"),
        (lambda d: _edit(d / "edgeprune.json", "files", {"transformer_int4/../../x": "0"}), "out of the folder"),
        (
            lambda d: _edit(d / "transformer" / "config.json", "_class_name", "UNet2DConditionModel"),
            "expected an MMDiT",
        ),
        (lambda d: (d / "model_index.json").unlink(), "model_index.json"),
    ],
)
def test_damage_is_one_clear_error(copy: Path, damage: object, words: str) -> None:
    damage(copy)  # type: ignore[operator]
    with pytest.raises(InputError, match=words):
        edgeprune.load(copy)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def _edit(path: Path, field: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))


def test_a_clock_that_was_set_makes_nothing_stale(source: Path, copy: Path) -> None:
    for time_ns in (0, 4 * 10**18):
        for path in (p for folder in (source, copy) for p in folder.rglob("*") if p.is_file()):
            os.utime(path, ns=(time_ns, time_ns))
        assert pipeline.compress(Workspace(copy, str(source)), OPTIONS) == []


@pytest.mark.parametrize("stage", ["analyze", "prune", "quantize"])
def test_killed_before_a_finished_stage_was_noted(
    source: Path, artefact: Path, copy: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files are in their place and the manifest knows nothing of it: no part is made again."""
    part = {"prune": "transformer", "quantize": "transformer_int4"}.get(stage)
    if stage == "prune":  # what it wrote, distillation has replaced
        shutil.rmtree(copy)
        pipeline.compress(Workspace(copy, str(source)), replace(OPTIONS, distill=None))
    stages = json.loads((copy / "edgeprune.json").read_text())["stages"]
    before_it = pipeline.STAGES[: pipeline.STAGES.index(stage)]
    _edit(copy / "edgeprune.json", "stages", {name: stages[name] for name in before_it if name in stages})
    if part:
        count = len(list((copy / part).glob("*.safetensors")))
        (copy / part / "unfinished.json").write_text(json.dumps({"inputs": stages[stage]["inputs"], "shards": count}))
        (copy / f"{part}.old").mkdir()
    else:
        rows = json.loads((copy / "analysis.json").read_text())
        key = json.loads((artefact / "edgeprune.json").read_text())["stages"]["analyze"]["inputs"]
        lines = [{"inputs": key}, {"parts": [], "scores": rows["untouched"]}, *rows["scores"]]
        (copy / "analysis.json.partial").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(weights.ShardWriter, "put", None)
    monkeypatch.setattr(Exhaustive, "estimate", None)
    before = {p: p.read_bytes() for p in copy.rglob("*.safetensors")}
    ws = Workspace(copy, str(source))
    run = {"analyze": lambda: pipeline.run_analyze(ws, OPTIONS.analyze), "prune": lambda: pipeline.run_prune(ws)}
    assert run.get(stage, lambda: pipeline.run_quantize(ws, OPTIONS.quantize))()
    assert before == {p: p.read_bytes() for p in copy.rglob("*.safetensors")}
    assert not [p for p in copy.rglob("*") if p.name.endswith((".partial", ".old", ".tmp", "unfinished.json"))]


def test_truncated_source_weights(source: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    _truncate(broken / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match="not whole safetensors"):
        Workspace(tmp_path / "o", str(broken)).pipe  # noqa: B018


def test_workspace_refuses_strange_folders(source: Path, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="not a folder of edgeprune"):
        Workspace(tmp_path, str(source))
    with pytest.raises(StaleStageError, match="made from"):
        Workspace(artefact, str(Path(shutil.copytree(source, tmp_path / "other"))))
    with pytest.raises(InputError, match="no such folder"):
        Workspace(tmp_path / "new", "./nothing-here")
    with pytest.raises(InputError, match="edgeprune prune"):
        pipeline.run_distill(Workspace(tmp_path / "new", str(source)), DistillOptions(), DataOptions())


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
)
def test_disk_full_leaves_what_was_there(copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    before = (copy / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(EdgepruneError, match="disk full"):
        checkpoint.save_transformer(copy, "transformer", {}, {"x": torch.zeros(3)})
    assert (copy / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert not (copy / "transformer.tmp").exists()


def test_doing_a_stage_again_leaves_no_old_int4(source: Path, copy: Path) -> None:
    ws = Workspace(copy, str(source), fresh=True)
    assert pipeline.run_distill(ws, DistillOptions(steps=1, batch=2), OPTIONS.data)
    assert not (copy / "transformer_int4").exists()
    assert not [n for n in ws.manifest.files if n.startswith("transformer_int4/")]


def test_leaving_distillation_out_of_a_distilled_folder_needs_fresh(source: Path, copy: Path) -> None:
    without = replace(OPTIONS, distill=None)
    with pytest.raises(StaleStageError, match="was distilled"):
        pipeline.compress(Workspace(copy, str(source)), without)
    assert pipeline.compress(Workspace(copy, str(source), fresh=True), without) == ["prune", "quantize"]


def test_changed_data_is_noticed(source: Path, copy: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    data = DataOptions(str(prompts), 2)
    assert pipeline.run_distill(Workspace(copy, str(source), fresh=True), DistillOptions(steps=1, batch=2), data)
    prompts.write_text("a blue circle\n")
    with pytest.raises(StaleStageError):
        pipeline.run_distill(Workspace(copy, str(source)), DistillOptions(steps=1, batch=2), data)


@pytest.mark.parametrize("index", [{"vae": ["evil", "Vae"]}, {"_class_name": ["pipeline", "Evil"]}])
def test_a_folder_cannot_bring_code(source: Path, tmp_path: Path, index: dict[str, object]) -> None:
    evil = Path(shutil.copytree(source, tmp_path / "evil"))
    for name in ("evil.py", "pipeline.py"):
        (evil / name).write_text("raise SystemExit(9)")
    path = evil / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | index))
    with pytest.raises(InputError, match="model_index.json"):
        edgeprune.load(evil)


def test_page_is_self_contained_and_escaped(copy: Path, source: Path) -> None:
    manifest = checkpoint.Manifest.load(copy)
    evil = "<script>alert(1)</script>"
    path = copy / "report.json"
    data = json.loads(path.read_text())
    data["prompts"][0] = evil
    path.write_text(json.dumps(data))
    ws = Workspace(copy, str(source))
    report.make(ws)
    page = (copy / "report.html").read_text()
    assert evil not in page and "&lt;script&gt;" in page
    assert "http:" not in page and "https:" not in page
    assert page.count("data:image/png") >= 4 and page.count("data:image/svg") == 1
    assert manifest.plan is not None


def test_page_shows_the_plan_and_the_memory(artefact: Path) -> None:
    ws = Workspace(artefact, None, model_given=False)
    plan, cells = ws.plan(), dict(report_page.grid(ws))
    assert list(cells) == [c for c in ws.family.components if c != "attn2"]  # this architecture has none
    assert all(len(row) == 3 for row in cells.values())
    (gone,) = plan.blocks
    assert {row[gone]["state"] for row in cells.values()} == {"pruned"}
    frozen = {block for block in plan.kept if cells["mlp"][block]["state"] == "frozen"}
    assert frozen == set(range(plan.first_pruned))
    trained = [cells[c][b]["strength"] for c in cells for b in plan.kept if cells[c][b]["state"] == "kept"]
    assert trained and all(0.1 <= s <= 1 for s in trained) and len(set(trained)) > 1

    (_, before), (_, after) = report_page.memory(ws, {"original_bf16_bytes": 10**6})
    sizes = {part["name"]: part["bytes"] for part in after}
    assert sizes["transformer"] == sum(p.stat().st_size for p in (artefact / "transformer_int4").glob("*.safetensors"))
    assert sum(part["share"] for part in before) == pytest.approx(1)


def test_model_card(copy: Path, source: Path) -> None:
    ws = Workspace(copy, str(source))
    ws.manifest.stages["plan"]["command"] = "edgeprune plan -o copy --keep 0.95"
    report.make(ws)
    card = (copy / "README.md").read_text()
    front = card.split("---")[1]
    assert 'library_name: "diffusers"' in front and 'pipeline_tag: "text-to-image"' in front
    assert "base_model" not in front  # the source is a folder of this machine, no hub id
    assert "edgeprune plan -o copy --keep 0.95" in card and "transformer weights" in card
    (copy / "README.md").write_text("mine")
    report.make(ws)
    assert (copy / "README.md").read_text() == "mine"


def test_each_stage_keeps_the_command_that_made_it(tmp_path: Path, source: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    ws.command = "edgeprune plan --blocks 1"
    pipeline.run_plan(ws, PlanOptions("manual", blocks="1"))
    assert report_page.commands(Workspace(tmp_path / "out", str(source))) == ["edgeprune plan --blocks 1"]


def test_tokenizers_are_for_both_transformers(artefact: Path) -> None:
    """Version 5 writes only tokenizer.json, version 4 only vocab.json and merges.txt, which both read."""
    for folder in (artefact, checkpoint.BUILTIN):
        for name in ("tokenizer", "tokenizer_2"):
            if folder == artefact and metadata.version("transformers").startswith("4."):
                assert {"vocab.json", "merges.txt"} <= {path.name for path in (folder / name).iterdir()}
                continue  # its source was saved by version 4
            model = json.loads((folder / name / "tokenizer.json").read_text())["model"]
            assert json.loads((folder / name / "vocab.json").read_text()) == model["vocab"]
            assert len((folder / name / "merges.txt").read_text().splitlines()) == 1 + len(model["merges"])


def test_given_scores_also_guide_distillation(source: Path, artefact: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    pipeline.run_plan(ws, OPTIONS.plan, artefact / "analysis.json")
    found, own = ws.report(), pipeline.ContributionReport.load(artefact / "analysis.json")
    assert found is not None and found.contributions() == own.contributions()
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match="bad.json"):
        pipeline.run_plan(Workspace(tmp_path / "out", str(source), fresh=True), OPTIONS.plan, tmp_path / "bad.json")


def test_how_images_are_made_is_kept(source: Path, copy: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source), generation={"num_inference_steps": 3, "height": 16})
    assert (ws.generation.num_inference_steps, ws.generation.height) == (3, 16)
    assert Workspace(tmp_path / "out", str(source)).generation == ws.generation
    with pytest.raises(InputError, match="num_inference_steps: found 0"):
        Workspace(tmp_path / "other", str(source), generation={"num_inference_steps": 0})
    with pytest.raises(InputError, match="height: found 60, expected a multiple of 8"):
        Workspace(tmp_path / "odd", str(source), generation={"height": 60})
    assert not (tmp_path / "odd").exists()
    with pytest.raises(StaleStageError, match="begun with num_inference_steps"):
        Workspace(copy, str(source), generation={"num_inference_steps": 5})
    Workspace(copy, str(source), generation={"num_inference_steps": 5}, fresh=True)
    assert Workspace(copy, str(source)).generation.num_inference_steps == 5


def test_source_is_hashed_once_unless_it_changes(source: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Workspace(artefact, str(source)).weights_hash
    monkeypatch.setattr("edgeprune.common.files.sha256_file", lambda path: pytest.fail(f"read {path} again"))
    assert Workspace(artefact, str(source)).weights_hash == first
    monkeypatch.undo()
    config = source / "scheduler" / "scheduler_config.json"
    before = config.read_text()
    config.write_text(before + " ")
    try:
        assert Workspace(artefact, str(source)).weights_hash != first
    finally:
        config.write_text(before)
