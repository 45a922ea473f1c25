"""Encoded prompts on disk: found by the encoders and the tokens, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgeprune import runtimes
from edgeprune.common.errors import InputError

PROMPTS = ["two red circles", "a star", "two red circles"]


def test_a_prompt_is_encoded_once(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    exported = tiny_folders[1]
    kept = tmp_path / "a" / "kept"
    with runtimes.load(exported, "ort", threads=1) as model:
        hidden, pooled = model.backend.encode(PROMPTS)
    for _ in range(2):
        with runtimes.load(exported, "ort", threads=1, keep_embeddings=kept) as model:
            ran = list[str]()
            run = model.backend._run  # type: ignore[attr-defined]
            model.backend._run = lambda name, feeds, ran=ran, run=run: ran.append(name) or run(name, feeds)  # type: ignore[attr-defined, func-returns-value]
            found = model.backend.encode(PROMPTS)
        np.testing.assert_allclose(found[0], hidden, atol=1e-6)
        np.testing.assert_allclose(found[1], pooled, atol=1e-6)
        assert len(list(kept.iterdir())) == 2
    assert ran == []


def test_another_encoder_or_prompt_is_not_confused(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    exported = tiny_folders[1]
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    manifest = other / "edgeprune_export.json"
    manifest.write_text(manifest.read_text().replace('"text_encoder/model.onnx": "', '"text_encoder/model.onnx": "0'))
    for count, (folder, prompt) in enumerate(((exported, "a"), (exported, "b"), (other, "a"), (exported, "a")), 1):
        with runtimes.load(folder, "ort", threads=1, keep_embeddings=tmp_path / "kept") as model:
            model.backend.encode([prompt])
        assert len(list((tmp_path / "kept").iterdir())) == min(count, 3)


def test_what_the_embeddings_depend_on_besides(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Without T5, an SD3 pipeline has as many zero tokens as its generation.json says."""
    copy = Path(shutil.copytree(tiny_folders[1], tmp_path / "copy"))
    shapes = []
    for tokens in (0, 3):
        settings = json.loads((copy / "generation.json").read_text())
        (copy / "generation.json").write_text(json.dumps(settings | {"max_sequence_length": tokens}))
        with runtimes.load(copy, "ort", threads=1, keep_embeddings=tmp_path / "kept") as model:
            shapes.append(model.backend.encode(["a"])[0].shape[1])
    assert shapes[1] - shapes[0] == 3


def test_a_damaged_entry_is_made_again(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    exported = tiny_folders[1]
    with runtimes.load(exported, "ort", threads=1, keep_embeddings=tmp_path / "kept") as model:
        expected = model.backend.encode(["a"])
        (entry,) = (tmp_path / "kept").iterdir()
        whole = entry.read_bytes()
        entry.write_bytes(whole[:-9])
        np.testing.assert_array_equal(model.backend.encode(["a"])[0], expected[0])
        assert entry.read_bytes() == whole
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="keep_embeddings: .*file: .*expected a writable folder"):
        runtimes.load(exported, "ort", threads=1, keep_embeddings=tmp_path / "file")


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_they_do_not_depend_on_the_precision_of_the_transformer(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    """Text encoders are exact in any."""
    pytest.importorskip(runtime if runtime == "openvino" else "onnxruntime")
    monkeypatch.setattr("edgeprune.runtimes.precision.instructions", lambda: frozenset({"avx_vnni"}))
    for name in ("exact", "int8"):
        with runtimes.load(tiny_folders[1], runtime, threads=1, precision=name, keep_embeddings=tmp_path) as model:
            model.backend.encode(["a"])
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_kept_for_a_run_does_not_grow(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt that was not encoded ahead nothing is written, since the next run drops it all."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with runtimes.load(tiny_folders[1], "ort", threads=1) as model:
        model.backend._in_turn = True  # type: ignore[attr-defined]
        model.backend.encode_ahead(["a", "b"])
        written = sorted(tmp_path.rglob("*.safetensors"))
        expected, found = (model.backend.encode(["a", "c"]) for _ in range(2))
        np.testing.assert_array_equal(found[0], expected[0])
        assert sorted(tmp_path.rglob("*.safetensors")) == written and len(written) == 2
