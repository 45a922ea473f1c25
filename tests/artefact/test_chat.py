"""The chat of FLUX.2 klein: two constants, and templates of folders that mean them, or are refused in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from edgeprune.artefact.chat import check_chat
from edgeprune.artefact.synth import tokenizers
from edgeprune.common.errors import InputError
from edgeprune.families.encoders import THOUGHTFUL, THOUGHTLESS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizers.write_qwen(tmp_path, words=900)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as error:
        check_chat(folder, THOUGHTLESS)
    said = str(error.value)
    assert "\n" not in said and str(folder) in said and said.endswith("give the tokenizer of the published model")
    return said


def test_a_template_that_writes_the_chat_is_taken(folder: Path) -> None:
    check_chat(folder, THOUGHTLESS)
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    change(folder, chat_template=named)
    check_chat(folder, THOUGHTLESS)
    change(folder, chat_template="x")
    (folder / "chat_template.jinja").write_text(template)  # counts first
    check_chat(folder, THOUGHTLESS)
    (folder / "chat_template.jinja").write_text(THOUGHTLESS.template)  # what vendors' pipelines get
    check_chat(folder, THOUGHTLESS)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "chat_template: found None, expected Qwen3's"),
        (3, "chat_template: found 3, expected Qwen3's"),
        ([{"name": "other", "template": "x"}], "chat_template: found None"),
        ("hello", "chat template makes 'hello' of a prompt"),
        ("{{ messages[0]['content'] | upper }}", "THE PROMPT"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages.x.y }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("x" * 70_000, "found a chat template above 65,536 bytes"),
        ("{{ 'a' * 10**10 }}", "chat template cannot be used ("),
        ("{% for a in range(99999) %}{% for b in range(99999) %}a{% endfor %}{% endfor %}", "chat template makes 'aaa"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "chat template "),
    ],
)
def test_other_templates_are_refused_in_little_time(folder: Path, template: Any, says: str) -> None:
    change(folder, chat_template=template)
    began = time.monotonic()
    assert says in refused(folder)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_a_side_that_is_not_the_right_one_is_refused(folder: Path, side: str) -> None:
    change(folder, **{side: "left"})
    assert f"{side}: found 'left', expected 'right'" in refused(folder)


def test_a_side_of_the_rules_counts_where_the_config_has_none(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"truncation": {"direction": "Left"}, "padding": null}')
    assert "truncation_side: found 'left', expected 'right'" in refused(folder)
    change(folder, truncation_side="right")
    check_chat(folder, THOUGHTLESS)


def test_a_file_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "chat_template.jinja: cannot be read as text" in refused(folder)


def test_families_differ_in_what_follows_a_prompt(folder: Path) -> None:
    """The published template writes both chats; one that knows no thoughts is only one of them."""
    check_chat(folder, THOUGHTFUL)
    change(folder, chat_template=THOUGHTLESS.template)
    with pytest.raises(InputError, match="chat template makes .*assistant"):
        check_chat(folder, THOUGHTFUL)
