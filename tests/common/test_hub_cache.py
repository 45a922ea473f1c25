"""Models in huggingface_hub's cache: links into its stores are followed, all others still lead out."""

from __future__ import annotations

import warnings
from pathlib import Path

import hub
import pytest
from tiny import tiny_flux_pipeline

from edgeprune.artefact.loading import load_transformer
from edgeprune.artefact.resolve import read_config, resolve
from edgeprune.common import hub_cache
from edgeprune.common.errors import InputError
from edgeprune.common.files import check_links, inside
from edgeprune.planning.options import PlanOptions
from edgeprune.runtimes.base import read_settings
from edgeprune.stages.compress import compress
from edgeprune.stages.options import CompressOptions
from edgeprune.stages.workspace import Workspace


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """Make a snapshot of two files, one of them in the store that repositories share."""
    repository = tmp_path / "models--me--m"
    for folder in (repository / "snapshots" / "1" / "vae", repository / "blobs", tmp_path / "blobs"):
        folder.mkdir(parents=True)
    (repository / "blobs" / "abc").write_text("x")
    (tmp_path / "blobs" / "def").write_text("x")
    (tmp_path / "blobs" / hub_cache.SHARED_MARKER).write_text("1")
    (repository / "blobs" / "def").symlink_to("../../blobs/def")
    (repository / "snapshots" / "1" / "config.json").symlink_to("../../blobs/abc")
    (repository / "snapshots" / "1" / "vae" / "weights").symlink_to("../../../blobs/def")
    return repository / "snapshots" / "1"


def test_links_into_the_stores_stay_inside(snapshot: Path, tmp_path: Path) -> None:
    check_links(snapshot)
    assert inside(snapshot, "config.json", "x") == tmp_path / "models--me--m" / "blobs" / "abc"
    # also from a subfolder, since an index names shards in its own folder
    assert inside(snapshot / "vae", "weights", "x") == tmp_path / "blobs" / "def"


@pytest.mark.parametrize("name", ["../../blobs/abc", "vae/../../../blobs/abc", "../../../blobs/def"])
def test_a_store_is_reached_through_links_alone(snapshot: Path, name: str) -> None:
    with pytest.raises(InputError, match="leads out"):
        inside(snapshot, name, "x")


@pytest.mark.parametrize("target", ["/etc/hostname", "../../..", "../../refs", "../../../models--other/blobs/abc"])
def test_other_links_lead_out(snapshot: Path, target: str) -> None:
    (snapshot / "other").symlink_to(target)
    with pytest.raises(InputError, match="leads out"):
        check_links(snapshot)


def test_a_shared_store_has_its_marker(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs" / hub_cache.SHARED_MARKER).unlink()
    with pytest.raises(InputError, match="leads out"):
        check_links(snapshot)


@pytest.mark.parametrize("place", ["snapshots/1", "model/snapshots/1", "models--me--m/revisions/1"])
def test_no_cache_has_no_stores(tmp_path: Path, place: str) -> None:
    assert hub_cache.stores(tmp_path / place) == []
    assert hub_cache.stores(tmp_path / "models--me--m/snapshots/1") != []


def test_the_marker_is_the_librarys() -> None:
    library = pytest.importorskip("huggingface_hub.utils._shared_blobs")  # since huggingface_hub 2
    assert hub_cache.SHARED_MARKER == library.SHARED_BLOBS_MARKER_NAME


@pytest.mark.parametrize("shared", [False, True], ids=["old", "new"])
def test_a_hub_id_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """A sharded model, located by huggingface_hub itself, is compressed to files that are not symlinks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in dependencies
        pipe = tiny_flux_pipeline(tmp_path / "made")
    (tmp_path / "made" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    pipe.transformer.half().save_pretrained(tmp_path / "made" / "transformer", max_shard_size="100KB")
    snapshot = hub.cached(tmp_path / "made", tmp_path / "cache", shared=shared)
    assert len(list((snapshot / "transformer").glob("*.safetensors"))) > 1

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve("me/m") == snapshot
    read_settings(snapshot)  # runtimes open original folders too
    options = CompressOptions(plan=PlanOptions("manual"), distill=None)
    compress(Workspace(tmp_path / "out", "me/m"), options)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert len(load_transformer(tmp_path / "out", quantized=True).transformer_blocks) == 2

    (snapshot / "vae" / "notes.txt").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="leads out"):
        read_config(snapshot)


def test_a_snapshot_is_found_by_the_path_that_was_given(snapshot: Path, tmp_path: Path) -> None:
    """A repository's folder may be a link to another disk, and a link may lead to the snapshot."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "models--me--m").rename(tmp_path / "disk" / "m")
    (tmp_path / "disk" / "blobs").symlink_to(tmp_path / "blobs")  # its links go up from where they are
    (tmp_path / "models--me--m").symlink_to(tmp_path / "disk" / "m")
    (tmp_path / "mine").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "mine"):
        assert folder.is_dir() and folder.resolve().parents[1].name == "m"
    check_links(snapshot)
    assert inside(snapshot, "config.json", "x") == tmp_path / "disk" / "m" / "blobs" / "abc"
    assert inside(snapshot / "vae", "weights", "x") == tmp_path / "blobs" / "def"


def test_a_store_that_is_a_link_is_no_store(snapshot: Path, tmp_path: Path) -> None:
    """Otherwise an archive with such a link would make every file of the user part of the model."""
    private = tmp_path / "private"
    private.mkdir()
    (private / "abc").write_text("a key")
    (tmp_path / "models--me--m" / "blobs" / "abc").unlink()
    (tmp_path / "models--me--m" / "blobs").rename(tmp_path / "other")
    (tmp_path / "models--me--m" / "blobs").symlink_to(private)
    with pytest.raises(InputError, match="'config.json', which leads out of the folder .*; put the file itself there"):
        check_links(snapshot)


@pytest.mark.parametrize("name", ["", ".", "\0", "a/../b", "..\\b", "C:b", "/b", "x" * 5000])
def test_a_name_is_refused_as_text(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which is not a file name|which leads out"):
        inside(tmp_path, name, "x")
