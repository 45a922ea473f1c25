"""Which files are the model: one variant of each part, and nothing of what else lies in a repository."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from repositories import DOUBLES, as_variant, with_doubles
from tiny import tiny_pipeline

from edgeprune.artefact.loading import load
from edgeprune.artefact.resolve import BUILTIN
from edgeprune.artefact.writing import copy_part, copy_surroundings
from edgeprune.bench.disk import disk_bytes
from edgeprune.common.errors import DiskError, InputError
from edgeprune.data.cache import made_by
from edgeprune.planning.fit import stored_shapes
from edgeprune.planning.options import PlanOptions
from edgeprune.residency.model_files import files_among, model_files, weights_among, weights_of, without_variant
from edgeprune.residency.weights import Weights
from edgeprune.sampling.generation import Generation
from edgeprune.stages.compress import compress
from edgeprune.stages.options import CompressOptions
from edgeprune.stages.workspace import Workspace

STEM, OPTIONS = "diffusion_pytorch_model", CompressOptions(plan=PlanOptions("manual", blocks="1"), distill=None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    tiny_pipeline(folder := tmp_path_factory.mktemp("files") / "plain")
    return folder


@pytest.fixture(scope="module")
def variants(plain: Path) -> dict[str, Path]:
    """The same model as fp16 alone, the same in shards, and as full and fp16 weights, of which the latter differ."""
    made = {name: plain.with_name(name) for name in ("fp16", "sharded", "both")}
    as_variant(plain, made["fp16"], "fp16")
    as_variant(plain, made["sharded"], "fp16", shard="100KB")
    shutil.copytree(plain, made["both"])
    as_variant(plain, made["both"], "fp16")
    return made


def names(folder: Path) -> set[str]:
    """Paths of all files below a folder."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


FP16_INDEX = "model.safetensors.index.fp16.json"
FOUND: list[tuple[list[str], str | None, tuple[str | None, int] | None]] = [
    ([f"{STEM}.safetensors"], None, (None, 1)),
    ([f"{STEM}.fp16.safetensors"], None, ("fp16", 1)),
    ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"], None, (None, 1)),
    ([f"{STEM}.fp16.safetensors", f"{STEM}.safetensors"], "fp16", ("fp16", 1)),
    ([f"{STEM}.safetensors"], "fp16", (None, 1)),  # another part has it
    ([f"{STEM}.non_ema.safetensors", f"{STEM}.safetensors"], None, (None, 1)),
    ([FP16_INDEX, *(f"model.fp16-0000{i}-of-00002.safetensors" for i in "12")], None, ("fp16", 2)),
    ([FP16_INDEX, *(f"model-0000{i}-of-00002.fp16.safetensors" for i in "12")], None, ("fp16", 2)),
    (["model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in "123")], None, (None, 3)),
    (["tokenizer.json", "vocab.json", "spiece.model"], None, None),
    (["pytorch_model.bin", "model.onnx", "consolidated.safetensors", "model_fp16.safetensors"], None, None),
]  # fmt: skip


@pytest.mark.parametrize(("files", "wish", "expected"), FOUND, ids=range(len(FOUND)))
def test_one_variant_is_found(files: list[str], wish: str | None, expected: Any) -> None:
    found = weights_among(["config.json", *files], wish, "x")
    assert (found and (found.variant, len(found.files))) == expected
    assert found is None or (len(found.files) > 1) == (found.index is not None)


def test_several_variants_without_full_weights_are_a_question() -> None:
    files = [f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"]
    with pytest.raises(InputError, match="x: found no full weights, but the variants bf16, fp16; choose .* --variant"):
        weights_among(files, None, "x")
    assert weights_among(files, "bf16", "x").variant == "bf16"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="choose one with --variant"):
        weights_among(files, "fp8", "x")


def test_a_loaders_own_choice_is_taken_of_a_single_file_and_shards() -> None:
    """transformers looks for a single file first, diffusers for an index."""
    for stem, count in (("model", 1), (STEM, 2)):
        shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in "12"]
        found = weights_among([f"{stem}.safetensors", f"{stem}.safetensors.index.json", *shards], None, "x")
        assert found and len(found.files) == count


def test_names_of_copies_are_those_of_full_weights() -> None:
    for name, plain in (
        ("model.fp16.safetensors", "model.safetensors"),
        (f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}-00001-of-00002.safetensors"),
        ("model-00001-of-00002.fp16.safetensors", "model-00001-of-00002.safetensors"),
        ("model.safetensors.index.fp16.json", "model.safetensors.index.json"),
        ("model.safetensors.index.json", "model.safetensors.index.json"),
        ("tokenizer.json", "tokenizer.json"),
    ):
        assert without_variant(name) == plain


def test_doubles_are_neither_hashed_nor_counted_nor_copied(plain: Path, tmp_path: Path) -> None:
    full = with_doubles(tmp_path / "full")
    before, after = Workspace(tmp_path / "a", str(plain)), Workspace(tmp_path / "b", str(full))
    assert after.weights_hash == before.weights_hash
    assert not {p.relative_to(full).as_posix() for p in model_files(full)} & set(DOUBLES)
    generation = Generation.load(plain)
    assert made_by(full, generation, drawn=True) == made_by(plain, generation, drawn=True)
    assert disk_bytes(full)["transformer_disk_bytes"] == disk_bytes(plain)["transformer_disk_bytes"]
    assert stored_shapes(full / "vae") == stored_shapes(plain / "vae")
    copy_surroundings(full, tmp_path / "copy")
    assert not names(tmp_path / "copy") & set(DOUBLES)
    assert {"LICENSE.md", "TERMS-OF-USE", "licenses/vae/LICENSE"} <= names(tmp_path / "copy")


def test_a_copy_on_a_full_disk_is_one_line(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edgeprune.artefact.writing.copy", full)
    with pytest.raises(DiskError, match=r"config\.json: disk full; free some space"):
        copy_part(plain / "vae", tmp_path / "vae")


def test_the_digest_of_the_built_in_model_is_the_same() -> None:
    """Which world it draws is no part of it: folders of all versions are of the same model."""
    everything = sorted(
        p for kind in ("*.safetensors", "*.json") for p in BUILTIN.rglob(kind) if p.name != "world.json"
    )
    assert [p for p in model_files(BUILTIN) if p.suffix in (".safetensors", ".json")] == everything


@pytest.mark.parametrize("name", ["fp16", "sharded"])
def test_a_variant_alone_works_for_every_part(
    name: str, plain: Path, variants: dict[str, Path], tmp_path: Path
) -> None:
    source = variants[name]
    found, expected = load(source), load(plain)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(found, part).state_dict(), getattr(expected, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours), part
    out = tmp_path / "out"
    compress(Workspace(out, str(source)), OPTIONS)
    assert not [path for path in names(out) if "fp16" in path]
    for part in ("vae", "text_encoder"):  # the index of shards names the copies
        assert weights_of(out / part) is not None
    assert torch.equal(
        load(out).vae.state_dict()["decoder.conv_in.bias"], expected.vae.state_dict()["decoder.conv_in.bias"]
    )


def test_full_weights_are_the_default_and_a_variant_a_wish(variants: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(variants["both"], tmp_path / "both")
    name = "decoder.conv_in.bias"
    from safetensors.torch import load_file, save_file

    path = folder / "vae" / f"{STEM}.fp16.safetensors"
    save_file({**load_file(path), name: torch.full((16,), 7.0)}, path)
    assert float(load(folder).vae.state_dict()[name][0]) != 7.0
    assert float(load(folder, variant="fp16").vae.state_dict()[name][0]) == 7.0
    default, wish = Workspace(tmp_path / "a", str(folder)), Workspace(tmp_path / "b", str(folder), variant="fp16")
    assert default.weights_hash != wish.weights_hash
    assert float(wish.pipe.vae.state_dict()[name][0]) == 7.0
    manifests = [json.loads((tmp_path / n / "edgeprune.json").read_text()) for n in "ab"]
    assert "variant" not in manifests[0] and manifests[1]["variant"] == "fp16"


def test_a_variant_that_is_not_there_names_those_that_are(variants: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--variant bf16: .*both has no such weights; found fp16, full"):
        Workspace(tmp_path / "out", str(variants["both"]), variant="bf16")
    with pytest.raises(InputError, match="--variant fp16: .* has no such weights; found full"):
        Workspace(tmp_path / "out", None, variant="fp16")
    assert not (tmp_path / "out").exists()


def test_shards_of_another_count_do_not_count(variants: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(variants["sharded"] / "vae", tmp_path / "vae"))
    (folder / f"{STEM}.fp16-00001-of-00009.safetensors").write_bytes(b"stale")
    found = weights_of(folder)
    assert found and len(found.files) == 2 and Weights(folder).shapes
    (folder / found.files[1]).unlink()
    with pytest.raises(InputError, match="no such file, but .*index.fp16.json lists it; download the model again"):
        weights_of(folder)


INDEX = {"_class_name": "P", "vae": ["diffusers", "A"], "text_encoder": ["transformers", "B"], "gone": [None, None]}


@pytest.mark.parametrize(
    ("files", "wish", "words"),
    [
        (["vae/model.safetensors"], None, "me/m: model_index.json lists text_encoder, but there is no such folder"),
        (
            ["vae/model.safetensors", "text_encoder/pytorch_model.bin"],
            None,
            "text_encoder: found pytorch_model.bin",
        ),
        (["vae/config.json", "text_encoder/model.safetensors"], None, "me/m: vae: found no weights"),
        (["vae/model.safetensors", "text_encoder/model.safetensors"], "fp16", "--variant fp16: me/m has .* found full"),
    ],
)
def test_what_a_repository_lacks_is_said_before_a_download(files: list[str], wish: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        files_among(INDEX, ["model_index.json", *files], wish, "me/m")
