"""--revision: a model of the hub at a branch, a tag or a commit; an artefact keeps the one that it was begun with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import hub
import pytest
from stage_runs import OPTIONS
from typer.testing import CliRunner

from edgeprune import api
from edgeprune.api.folders import source_of
from edgeprune.artefact.resolve import resolve
from edgeprune.cli import app
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.common.hub_cache import commit_of

SECOND, THIRD = "2" * 40, "3" * 40
"""Commits of the tag v2, and of main after a push."""


@pytest.fixture
def snapshots(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The snapshots by branch or tag of me/m, of which v2 draws other sizes."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    out = {}
    for ref, commit in (("main", hub.REVISION), ("v2", SECOND)):
        made = Path(shutil.copytree(source, tmp_path / ref))
        settings = json.loads((made / "generation.json").read_text())
        (made / "generation.json").write_text(json.dumps(settings | {"height": 64 if ref == "main" else 32}))
        out[ref] = hub.cached(made, tmp_path / "hub", shared=False, ref=ref, commit=commit)
    return out


def manifest(out: Path) -> dict[str, Any]:
    """An artefact's edgeprune.json."""
    content: dict[str, Any] = json.loads((out / "edgeprune.json").read_text())
    return content


def test_a_revision_is_a_snapshot_of_its_own(snapshots: dict[str, Path]) -> None:
    assert resolve("me/m") == resolve("me/m", "main") == snapshots["main"]
    assert resolve("me/m", "v2") == resolve("me/m", SECOND) == snapshots["v2"]
    assert [commit_of(snapshots[ref]) for ref in ("main", "v2")] == [hub.REVISION, SECOND]
    assert commit_of(snapshots["main"] / "vae") is None
    with pytest.raises(InputError, match="me/m: .* not available from the hub at revision v3"):
        resolve("me/m", "v3")


def test_an_artefact_keeps_its_revision(snapshots: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "small"
    api.analyze("me/m", out, OPTIONS.analyze, revision="v2")
    found = manifest(out)
    assert (found["source"], found["revision"], found["commit"]) == ("me/m", "v2", SECOND)
    assert found["generation"]["height"] == 32 and source_of(out) == ("me/m", SECOND, None)
    assert not api.analyze("me/m", out, OPTIONS.analyze, revision="v2").ran
    assert not api.analyze(None, out, OPTIONS.analyze).ran
    for revision in (None, "main"):
        with pytest.raises(StaleStageError, match="made from 'me/m' at revision 'v2', not from 'me/m'"):
            api.analyze("me/m", out, OPTIONS.analyze, revision=revision)
    with pytest.raises(StaleStageError, match="not from 'me/m' at revision 'main'"):
        api.analyze(None, out, OPTIONS.analyze, revision="main")


def test_an_artefact_keeps_its_commit(
    snapshots: dict[str, Path],
    source: Path,
    tmp_path: Path,
) -> None:
    """A push to main between two runs changes nothing for a begun folder."""
    out = tmp_path / "small"
    api.analyze("me/m", out, OPTIONS.analyze)
    assert "revision" not in manifest(out) and manifest(out)["commit"] == hub.REVISION
    made = Path(shutil.copytree(source, tmp_path / "pushed"))
    (made / "generation.json").write_text((made / "generation.json").read_text() + " ")  # enters the source's hash
    assert resolve("me/m") == snapshots["main"]
    hub.cached(made, tmp_path / "hub", shared=False, ref="main", commit=THIRD)
    assert resolve("me/m").name == THIRD
    assert not api.analyze("me/m", out, OPTIONS.analyze).ran


REFUSED = [
    ("compress ./local --revision v2 -o x", "--revision v2: ./local, a local folder, has no revisions"),
    ("compress --revision v2 -o x", "--revision v2: the built-in model has no revisions"),
    ("analyze ./local --revision v2 -o x", "--revision v2: ./local, a local folder, has no revisions"),
    ("compare ./local --revision v2 -o x", "--revision v2: ./local, a local folder, has no revisions"),
    ("cache shapes --model ./local --revision v2 -o x", "--revision v2: ./local, a local folder, has no revisions"),
    ("bench ./local --baseline ./local --revision v2", "--revision v2: ./local, a local folder, has no revisions"),
    (
        "score ./local --metric shapes --revision v2",
        "--revision v2: is that of one hub id like owner/name; among the models, found none",
    ),
    (
        "score me/m --against you/m --metric psnr --revision v2",
        "--revision v2: is that of one hub id like owner/name; among the models, found me/m and you/m",
    ),
]


@pytest.mark.parametrize(("line", "words"), REFUSED, ids=[line for line, _ in REFUSED])
def test_what_has_no_revision_is_refused(
    line: str,
    words: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "local").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, line.split())
    assert isinstance(found.exception, InputError) and words in str(found.exception)
    assert not (tmp_path / "x").exists()
