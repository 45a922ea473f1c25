"""The report's page and the model card of an artefact."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune.artefact.manifest import Manifest, identity
from edgeprune.bench.results import MEASURES
from edgeprune.common.errors import InputError
from edgeprune.export import folder
from edgeprune.report import make
from edgeprune.report import page as report_page
from edgeprune.shapes import PLAIN
from edgeprune.stages import plan
from edgeprune.stages.options import PlanOptions
from edgeprune.stages.workspace import Workspace


def test_page_is_self_contained_and_escaped(copy: Path, source: Path) -> None:
    manifest = Manifest.load(copy)
    evil = "<script>alert(1)</script>"
    path = copy / "report.json"
    data = json.loads(path.read_text())
    data["prompts"][0] = evil
    path.write_text(json.dumps(data))
    ws = Workspace(copy, str(source))
    make.make_report(ws)
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
    assert trained and set(trained) == {1.0}  # a plan of whole blocks is not graded
    ws.manifest.stages["distill"]["options"]["options"]["sensitivity"] = "graded"
    cells = dict(report_page.grid(ws))
    trained = [cells[c][b]["strength"] for c in cells for b in plan.kept if cells[c][b]["state"] == "kept"]
    assert all(0.1 <= s <= 1 for s in trained) and len(set(trained)) > 1

    (_, before), (_, after) = report_page.memory(ws, {"original_bf16_bytes": 10**6})
    sizes = {part["name"]: part["bytes"] for part in after}
    assert sizes["transformer"] == sum(p.stat().st_size for p in (artefact / "transformer_int4").glob("*.safetensors"))
    assert sum(part["share"] for part in before) == pytest.approx(1)


def test_images_of_other_steps_are_drawn_again(copy: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another choice of `compress --time` gives up steps alone. The built-in model's number is its own."""
    ws, drawn = Workspace(copy, str(source)), list[int]()
    known, images = json.loads((copy / "report.json").read_text()), dict(np.load(copy / "cache" / "report.npz"))

    def measured(*_: object, steps: int, **__: object) -> object:
        drawn.append(steps)
        return known | {"generation": known["generation"] | {"num_inference_steps": steps}}, images

    monkeypatch.setattr(make, "measure", measured)
    make.make_report(ws)
    for steps in (1, 1, 2):
        ws.manifest.choice = {"images": known["images"], "image_steps": steps}
        make.make_report(ws)
    assert drawn == [1, 2]
    ws.world = PLAIN
    ws.manifest.choice = {"images": 210, "image_steps": 2}
    make.make_report(ws, quick=True)
    assert drawn == [1, 2]
    with pytest.raises(
        InputError, match="^--images 4: a teacher of shapes world draws the same prompts of each task; omit"
    ):
        make.make_report(ws, images=4)


def test_figures_of_another_model_are_refused(copy: Path, source: Path) -> None:
    ws = Workspace(copy, str(source))
    rows: dict[str, Any] = {"runtime": "ort", "precision": "W4A32", **dict.fromkeys(MEASURES, 9)}
    own, other = {**rows, "identity": identity(copy)}, {**rows, "identity": "another's"}
    bench = {"comparisons": {}, "machine": {"cpu": "x", "cores": 2}}
    assert own["identity"] == Manifest.load(copy).stages["quantize"]["inputs"]
    make.make_report(ws, bench={**bench, "variants": [{**own, "name": "compressed"}]})
    assert "compressed (ort, W4A32)" in (copy / "report.html").read_text()
    for variants in ([{**other, "name": "compressed"}], [{**rows, "name": "compressed"}]):
        with pytest.raises(
            InputError, match="^--bench: found compressed, none of which is .*copy as it is now; measure"
        ):
            make.make_report(ws, bench={**bench, "variants": variants})


def test_an_export_has_the_identity_of_its_artefact(copy: Path, source: Path, tmp_path: Path) -> None:
    folder.write(copy, tmp_path / "onnx", "onnx", {}, lambda work: {})
    assert identity(tmp_path / "onnx") == identity(copy) and identity(source) is None


def test_model_card(copy: Path, source: Path) -> None:
    ws = Workspace(copy, str(source))
    ws.manifest.stages["plan"]["command"] = "edgeprune plan -o copy --keep 0.95"
    make.make_report(ws)
    card = (copy / "README.md").read_text()
    front = card.split("---")[1]
    assert 'library_name: "diffusers"' in front and 'pipeline_tag: "text-to-image"' in front
    assert "base_model" not in front  # the source is a folder of this machine, no hub id
    assert "license:" not in front and "No license was found in the source" in card
    assert "edgeprune plan -o copy --keep 0.95" in card and "transformer weights" in card
    assert "learned guidance" not in card
    ws.manifest.stages["distill"]["options"]["options"]["guidance"] = 3.0
    make.make_report(ws)
    card = (copy / "README.md").read_text()
    assert "\n```\n\nThe model has learned guidance: call it with `guidance_scale=1`. Another" in card
    (copy / "README.md").write_text("mine")
    make.make_report(ws)
    assert (copy / "README.md").read_text() == "mine"


def test_model_card_names_license_and_changes(copy: Path, source: Path) -> None:
    (copy / "LICENSE.md").write_text("You may.")
    ws = Workspace(copy, str(source))
    ws.manifest.license = {"license": "other", "license_name": "you-may", "license_link": "LICENSE.md"}
    ws.manifest.license["base_model"] = "me/model"
    make.make_report(ws)
    _, front, text = (copy / "README.md").read_text().split("---\n", 2)
    for line in ('license: "other"', 'license_name: "you-may"', 'license_link: "LICENSE.md"', 'base_model: "me/model"'):
        assert line in front.splitlines()
    assert 'base_model_relation: "quantized"' in front and "`LICENSE.md`" in text
    assert "Blocks removed from the transformer" in text and "distilled from the original" in text
    assert "in INT4, groups of" in text


def test_each_stage_keeps_the_command_that_made_it(tmp_path: Path, source: Path) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    ws.command = "edgeprune plan --blocks 1"
    plan.run(ws, PlanOptions("manual", blocks="1"))
    assert report_page.commands(Workspace(tmp_path / "out", str(source))) == ["edgeprune plan --blocks 1"]
