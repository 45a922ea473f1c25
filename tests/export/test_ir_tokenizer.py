"""Tokenizers as IR: the ids of our runtimes, the same bytes twice, and a line where it cannot be done."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from edgeprune.common.errors import DiskError
from edgeprune.common.files import sha256_file
from edgeprune.export import folder as export_folder
from edgeprune.export import genai, ir_tokenizer
from edgeprune.runtimes.text import PromptTokenizer
from edgeprune.sampling.scheduler import FlowMatch

pytest.importorskip("openvino_tokenizers")

TEXTS = [
    *ir_tokenizer.PLAIN,
    "two red circles",  # again: ids of the text before would show
    "A CAT!! It's 5 o'clock; they'll, we've, I'd... #1 (a_b)",
    "e\u0301clair, Ångström, İstanbul, façade",
    "混合 text, кириллица и 日本語 🐱🐱",
    "a" * 400,
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen",
]
LENGTHS = {"clip": 16, "clip-g": 16, "t5": 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By kind: a CLIP's tokenizer, one that pads with `!` as CLIP-G's does, and a T5's."""
    root = tmp_path_factory.mktemp("tokenizers")
    for kind, tokenizer in (("clip", tiny.tiny_tokenizer()), ("t5", tiny.tiny_t5_tokenizer())):
        tokenizer.save_pretrained(root / "saved" / kind)
        export_folder._tokenizer(root / "saved" / kind, root / kind, chat=False)
    shutil.copytree(root / "clip", root / "clip-g")
    path = root / "clip-g" / "tokenizer.json"
    rules = json.loads(path.read_text("utf-8"))
    pad = {"id": rules["model"]["vocab"]["!"], "content": "!", "special": True, "normalized": False}
    rules["added_tokens"].insert(0, dict.fromkeys(("single_word", "lstrip", "rstrip"), False) | pad)
    path.write_text(json.dumps(rules), "utf-8")
    path = root / "clip-g" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"pad_token": "!"}), "utf-8")
    return root


@pytest.fixture
def folder(folders: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders / "clip", tmp_path / "tokenizer"))


def ids_of(folder: Path, texts: list[str], length: int) -> np.ndarray[Any, Any]:
    """The ids (B, length) that the saved file gives, padded as GenAI pads them."""
    from edgeprune.runtimes.openvino import core

    compiled = core().compile_model(folder / ir_tokenizer.MODEL, "CPU", {"INFERENCE_NUM_THREADS": 1})
    ids = np.full((len(texts), length), PromptTokenizer(folder, chat=False, max_length=length).pad_id)
    for row, text in zip(ids, texts, strict=True):
        found = compiled([text])["input_ids"][0]
        row[: len(found)] = found  # longer ones raise
    return ids


@pytest.mark.parametrize("kind", LENGTHS)
def test_ids_are_those_of_our_runtimes(kind: str, folders: Path, tmp_path: Path) -> None:
    folder, length = Path(shutil.copytree(folders / kind, tmp_path / kind)), LENGTHS[kind]
    record = ir_tokenizer.write(folder, length)
    assert record.keys() == {"different"} and set(record["different"]) < set(ir_tokenizer.ODD)
    expected = PromptTokenizer(folder, chat=False, max_length=length)(TEXTS)
    for text, found, ours in zip(TEXTS, ids_of(folder, TEXTS, length), expected, strict=True):
        assert found.tolist() == ours.tolist(), text
    runtime = PromptTokenizer(folder, chat=False, max_length=length)
    odd = {text for text in ir_tokenizer.ODD if (ids_of(folder, [text], length) != runtime([text])).any()}
    assert odd == set(record["different"])
    if kind == "clip-g":  # the `!` in the text; it fills all 16, so there is no padding
        assert expected[TEXTS.index(ir_tokenizer.PLAIN[2])].tolist().count(0) == 1


def test_the_same_bytes_twice(folders: Path, tmp_path: Path) -> None:
    written = []
    for name in ("first", "second"):
        for kind, length in LENGTHS.items():
            folder = Path(shutil.copytree(folders / kind, tmp_path / name / kind))
            ir_tokenizer.write(folder, length)
            written.append([sha256_file(folder / f"openvino_tokenizer.{end}") for end in ("xml", "bin")])
    assert written[:3] == written[3:]


def refused(folder: Path, why: str) -> None:
    """One line says why there is no file, and nothing else changes."""
    before = sorted(folder.iterdir())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        record = ir_tokenizer.write(folder, 16)
    (line,) = [str(w.message) for w in said]
    assert line.startswith("tokenizer: no openvino_tokenizer.xml, so OpenVINO GenAI cannot open this export: ")
    assert why in line and "\n" not in line and line.endswith(record["missing"])
    assert sorted(folder.iterdir()) == before


def test_rules_that_cannot_be_converted(folder: Path) -> None:
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text("utf-8"))
    rules["normalizer"] = {"type": "Nmt"}
    path.write_text(json.dumps(rules), "utf-8")
    refused(folder, "'Nmt'")


def test_other_ids_are_no_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir_tokenizer, "_cut", lambda *_: None)  # as openvino_tokenizers converts it
    refused(folder, "openvino_tokenizers gives other token ids for ")


def test_a_broken_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    refused(folder, "ModuleNotFoundError: ")


def test_a_full_disk_is_no_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", full)
    with pytest.raises(DiskError, match=r"openvino_tokenizer\.xml: cannot be written"):
        ir_tokenizer.write(folder, 16)


def test_scheduler_with_a_constant_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the folder's own size it has the noise levels of the scheduler that shifts by size."""
    monkeypatch.setattr(ir_tokenizer, "write", lambda folder, length: {"length": length})
    for name, guidance in (("dev", True), ("schnell", False)):
        tiny.tiny_flux_pipeline(tmp_path / name, guidance_embeds=guidance)
        folder = tmp_path / name
        record = genai.write(folder)
        assert record == {"tokenizers": {"tokenizer": {"length": 16}, "tokenizer_2": {"length": 24}}}
        path = folder / "scheduler" / genai.SCHEDULER
        assert path.exists() == guidance
        if guidance:
            own, constant = (
                FlowMatch.from_config(json.loads((folder / "scheduler" / file).read_text("utf-8")))
                for file in ("scheduler_config.json", genai.SCHEDULER)
            )
            levels = np.linspace(1, 1 / 4, 4)
            assert own.use_dynamic_shifting and not constant.use_dynamic_shifting
            np.testing.assert_allclose(
                own.sigmas(4, tokens=16, levels=levels), constant.sigmas(4, levels=levels), rtol=1e-6
            )
