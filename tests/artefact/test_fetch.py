"""Models of the hub: what is downloaded, what is said before, and the same without a connection."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub
import huggingface_hub
import pytest
from hub_server import Hub, commit, serving
from repositories import DOUBLES, with_doubles
from typer.testing import CliRunner

from edgeprune.artefact.resolve import resolve
from edgeprune.cli import app
from edgeprune.common.errors import DiskError, InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders by branch or tag: v2 draws other sizes, and `bare` is no pipeline."""
    root = tmp_path_factory.mktemp("repository")
    main = with_doubles(root / "main")
    second = Path(shutil.copytree(main, root / "v2"))
    settings = json.loads((main / "generation.json").read_text())
    (second / "generation.json").write_text(json.dumps(settings | {"height": 32}))
    (root / "bare").mkdir()
    (root / "bare" / "flux1-dev.safetensors").write_bytes(b"x")
    return {"main": main, "v2": second, "bare": root / "bare"}


@pytest.fixture
def online(repository: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The repository on a hub, and an empty cache."""
    with serving(repository) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Versions before 1 import it by name.
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        new_sessions()
        yield server


def new_sessions() -> None:
    """Let huggingface_hub ask again whether it is offline: versions before 1 ask once, for a session."""
    getattr(huggingface_hub.utils, "reset_sessions", lambda: None)()


def test_the_model_is_fetched_and_nothing_else(online: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    folder = resolve("me/m")
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(online.downloaded) <= found and not found & set(DOUBLES)  # equal files are downloaded once
    assert {"model_index.json", "generation.json", "README.md", "LICENSE.md", "TERMS-OF-USE", "vae/LICENSE"} <= found
    # transformers before 5 wrote the tiny tokenizer without a tokenizer.json.
    assert {"transformer/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json"} <= found
    said = capfd.readouterr().err
    # The card and the index were fetched to know the rest.
    assert f"fetching me/m: {len(found) - 2} files, 0.00 GB, to " in said and " GB free)" in said
    online.downloaded.clear()
    assert resolve("me/m") == folder and online.downloaded == []
    assert "fetching" not in capfd.readouterr().err


def test_a_variant_is_fetched_alone(online: Hub) -> None:
    folder = resolve("me/m", variant="fp16")
    weights = {p.relative_to(folder).as_posix() for p in folder.rglob("*.safetensors")}
    fp16 = {f"{part}.fp16.safetensors" for part in ("text_encoder/model", "vae/diffusion_pytorch_model")}
    # text_encoder_2 has no such variant
    assert weights == fp16 | {
        "transformer/diffusion_pytorch_model.fp16.safetensors", "text_encoder_2/model.safetensors"
    }  # fmt: skip


def test_a_revision_is_fetched_by_name_and_by_commit(online: Hub) -> None:
    second = resolve("me/m", "v2")
    assert second.name == commit("v2") and json.loads((second / "generation.json").read_text())["height"] == 32
    assert resolve("me/m", commit("v2")) == second and resolve("me/m").name == commit("main")
    with pytest.raises(InputError, match="me/m: .* not available from the hub at revision v3"):
        resolve("me/m", "v3")
    with pytest.raises(InputError, match="me/x: no such folder, and not available from the hub"):
        resolve("me/x")


def test_refusals_come_before_the_download(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match="me/m: found single files like flux1-dev.safetensors, expected the repository"
    ):
        resolve("me/m", "bare")
    with pytest.raises(InputError, match="--variant fp8: me/m has no such weights; found bf16, fp16, full, non_ema"):
        resolve("me/m", variant="fp8")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore[attr-defined]
    with pytest.raises(DiskError, match=r"hub: needs 0\.0 GB, the disk has 0\.0 GB left"):
        resolve("me/m")
    assert not [path for path in online.downloaded if path.endswith(".safetensors")]


def test_without_a_connection_the_cache_serves(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve("me/m", variant="fp16")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    new_sessions()
    assert resolve("me/m", variant="fp16") == resolve("me/m", commit("main"), "fp16") == folder
    with pytest.raises(InputError, match="not available from the hub at revision v2"):
        resolve("me/m", "v2")
    if not hasattr(huggingface_hub, "get_cached_repo_tree"):  # before version 2 a cache knows only what it has
        assert resolve("me/m") == folder
        return
    # The cache knows that the hub has full weights: the variant does not take their place in silence.
    with pytest.raises(InputError, match=r"me/m: .*incomplete.*safetensors"):
        resolve("me/m")


@pytest.mark.parametrize("shared", [False, True], ids=["old", "new"])
def test_a_cache_without_a_listing_serves_what_it_has(
    shared: bool, repository: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    copy = Path(shutil.copytree(repository["main"], tmp_path / "copy"))
    snapshot = hub.cached(copy, tmp_path / "hub", shared=shared)
    assert resolve("me/m") == resolve("me/m", variant="fp16") == snapshot
    shutil.rmtree(snapshot / "vae")
    with pytest.raises(InputError, match="me/m, of which the cache has .* lists vae, but there is no such folder"):
        resolve("me/m")


def test_a_hub_id_is_compressed_online_and_offline(
    online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Offline in a process of its own: huggingface_hub reads its environment when it is imported."""
    monkeypatch.chdir(tmp_path)
    words = ["compress", "me/m", "--revision", "v2", "--method", "manual", "--blocks", "1", "--steps", "0"]
    words += ["--calibration", "none", "--preset", "quick"]  # in little time
    found = CliRunner().invoke(app, [*words, "-o", "small"])
    assert found.exit_code == 0, found.exception
    assert "fetching me/m: " in found.output + capfd.readouterr().err and not set(online.downloaded) & set(DOUBLES)
    nowhere = "http://127.0.0.1:9"
    given = {"HF_ENDPOINT": nowhere, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune.cli", *words, "-o", "again"],
        env={**os.environ, **given, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / name / "edgeprune.json").read_text()) for name in ("small", "again")]
    for manifest in found:
        assert manifest["source"] == "me/m" and manifest["commit"] == commit("v2") and manifest["revision"] == "v2"
        assert manifest["generation"]["height"] == 32 and "quantize" in manifest["stages"]
    assert found[0]["files"] == found[1]["files"]
    copies = {p.relative_to(tmp_path / "small").as_posix() for p in (tmp_path / "small").rglob("*")}
    assert not copies & set(DOUBLES) and {"LICENSE.md", "licenses/vae/LICENSE"} <= copies
    assert not [path for path in (tmp_path / "small").rglob("*") if path.is_symlink()]
