"""A source's license goes into the artefact and through it into every export, whose networks are left out here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from edgeprune.artefact import licensing
from edgeprune.artefact.manifest import Manifest
from edgeprune.common.files import sha256_file
from edgeprune.export import FORMATS, folder
from edgeprune.planning.options import PlanOptions
from edgeprune.stages import plan, prune
from edgeprune.stages.workspace import Workspace

NAMES = {"LICENSE.md", "NOTICE", "licenses/text_encoder/LICENSE"}
CARD = """---
license: other
license_name: tiny-community-license
license_link: LICENSE.md
---
"""


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned pipeline whose source has a license."""
    source = tmp_path_factory.mktemp("licensed") / "source"
    tiny.tiny_pipeline(source)
    (source / "README.md").write_text(CARD)
    for name in ("LICENSE.md", "NOTICE", "text_encoder/LICENSE"):
        (source / name).write_text(f"text of {name}")
    workspace = Workspace(source.with_name("small"), str(source))
    plan.run(workspace, PlanOptions("manual", blocks="1"))
    prune.run(workspace)
    return workspace.out


def test_an_artefact_has_the_license(artefact: Path) -> None:
    manifest = Manifest.load(artefact)
    assert set(licensing.files(artefact)) == NAMES
    for name in NAMES:
        assert manifest.files[name] == sha256_file(artefact / name)
    assert manifest.license == {
        "license": "other", "license_name": "tiny-community-license", "license_link": "LICENSE.md"
    }  # fmt: skip
    (artefact / "NOTICE").write_text("changed")
    with pytest.raises(folder.InputError, match="NOTICE: its SHA-256"):
        manifest.verify(artefact, "NOTICE")
    (artefact / "NOTICE").write_text("text of NOTICE")


@pytest.mark.parametrize("target", FORMATS)
def test_an_export_has_it_too(artefact: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "out"
    record = folder.write(artefact, out, target, {}, lambda work: {})
    assert set(licensing.files(out)) == NAMES
    assert {*NAMES, "README.md"} <= set(record["files"])
    card = (out / "README.md").read_text()
    front = card.split("---\n")[1]
    assert 'license_name: "tiny-community-license"' in front and 'license_link: "LICENSE.md"' in front
    assert "Blocks removed from the transformer: 1 (of 3)." in card and "not trained further" in card
    assert licensing.read(out)["license"] == "other"
    folder.write(artefact, tmp_path / "again", target, {}, lambda work: {})
    assert (tmp_path / "again" / "README.md").read_text() == card  # an export has the same bytes each time


def test_another_license_is_another_export(artefact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder.write(artefact, out, "onnx", {}, lambda work: {})
    (artefact / "NOTICE").write_text("another")
    folder.write(artefact, out, "onnx", {}, lambda work: {})
    assert (out / "NOTICE").read_text() == "another"


def test_an_export_of_a_plain_folder_without_a_license(tmp_path: Path) -> None:
    tiny.tiny_pipeline(tmp_path / "source")
    folder.write(tmp_path / "source", tmp_path / "out", "onnx", {}, lambda work: {})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No license was found in the source" in card and "license:" not in card.split("---\n")[1]
    assert "edgeprune.json" not in json.loads((tmp_path / "out" / folder.FILE).read_text())["files"]
