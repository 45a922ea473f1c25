"""Licenses: found in the source, copied, and named in cards; the source's card is untrusted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hub import cached

from edgeprune.artefact import card, licensing
from edgeprune.artefact.resolve import BUILTIN
from edgeprune.common.errors import InputError

FRONT = """---
license: other
license_name: stability-community
license_link: LICENSE.md
base_model: [me/first, me/second]
tags: [x]
---
# A model
"""


def model(folder: Path, front: str = FRONT, *names: str) -> Path:
    """A folder with a card and these files."""
    folder.mkdir(parents=True)
    if front:
        (folder / "README.md").write_text(front)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    return folder


def test_license_files_are_found_whatever_their_case(tmp_path: Path) -> None:
    wanted = [
        "LICENSE.md", "licence", "NOTICE.txt", "COPYING", "USE_POLICY.md", "Acceptable_Use_Policy.pdf", "AUP.txt",
        "LICENSE-2.0", "terms-of-use.html",
    ]  # fmt: skip
    others = ["model_index.json", "license.py", "notice.safetensors", "notes.md", "cache/LICENSE", ".git/LICENSE"]
    source = model(tmp_path / "m", FRONT, *wanted, *others, "text_encoder/LICENSE", "vae/config.json")
    assert set(licensing.files(source)) == {*wanted, "licenses/text_encoder/LICENSE"}
    licensing.copy(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "licenses/text_encoder/LICENSE").read_text() == "text of text_encoder/LICENSE"
    assert set(licensing.files(tmp_path / "copy")) == {*wanted, "licenses/text_encoder/LICENSE"}  # as from the source


def test_what_the_card_says(tmp_path: Path) -> None:
    source = model(tmp_path / "m", FRONT, "LICENSE.md")
    fields = licensing.read(source)
    assert fields == {
        "license": "other", "license_name": "stability-community", "license_link": "LICENSE.md",
        "base_model": ["me/first", "me/second"],
    }  # fmt: skip
    assert licensing.read(source, "me/model")["base_model"] == "me/model"
    text = card.license_text(fields, licensing.files(source))
    assert "license_name: stability-community" in text and "Copied from the original: `LICENSE.md`" in text
    assert card.license_fields(fields)["base_model_relation"] == "quantized"


def test_a_file_that_only_the_card_names(tmp_path: Path) -> None:
    source = model(tmp_path / "m", FRONT.replace("LICENSE.md", "legal.md"), "legal.md")
    assert set(licensing.files(source)) == {"legal.md"} and licensing.read(source)["license_link"] == "legal.md"
    (source / "legal.md").unlink()
    assert licensing.files(source) == {} and "license_link" not in licensing.read(source)


def test_a_file_without_a_card_and_nothing_at_all(tmp_path: Path) -> None:
    source = model(tmp_path / "m", "", "LICENSE", "NOTICE")
    assert licensing.read(source) == {"license": "other", "license_link": "LICENSE"}
    nothing = model(tmp_path / "n", "")
    assert licensing.read(nothing) == {}
    assert "No license was found in the source" in card.license_text({}, [])


@pytest.mark.parametrize(
    "front",
    [
        "---\nlicense: !!python/object/apply:os.system ['touch hacked']\n---\n",
        "---\nlicense: [1, {a: b}]\nlicense_name: {x: y}\nbase_model: 3\n---\n",
        "---\n- license\n---\n",
        "---\nlicense: 'open\n---\n",
        "---\n" + "[" * 20_000 + "\n---\n",
        "no front matter\n",
        "---\nlicense: ''\n---\n",
    ],
)
def test_an_untrusted_card(tmp_path: Path, front: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert licensing.read(model(tmp_path / "m", front)) == {}
    assert not (tmp_path / "hacked").exists()


def test_text_of_a_card_cannot_leave_its_place(tmp_path: Path) -> None:
    evil = "---\nlicense: \"mit\\n---\\n# Owned <script>\\e[31m\"\nlicense_name: 'a|b](http://x)'\n---\n"
    fields = licensing.read(model(tmp_path / "m", evil))
    assert fields["license"] == "mit --- # Owned <script> [31m"
    front = card.front_matter(card.license_fields(fields))
    assert front.count("\n") == len(fields) + 2 and json.loads(front.splitlines()[1].partition(": ")[2])
    text = card.license_text(fields, [])
    assert "<script>" not in text.replace("\\<script\\>", "") and "](http" not in text.replace("\\]\\(", "")


def test_links_stay_in_the_folder_or_its_hub_cache(tmp_path: Path) -> None:
    source = model(tmp_path / "m", FRONT, "LICENSE.md")
    for shared in (False, True):
        copy = model(tmp_path / f"copy{shared}", FRONT, "LICENSE.md")
        snapshot = cached(copy, tmp_path / f"cache{shared}", shared=shared)
        assert (snapshot / "LICENSE.md").is_symlink()
        licensing.copy(snapshot, tmp_path / f"out{shared}")
        copied = tmp_path / f"out{shared}" / "LICENSE.md"
        assert copied.read_text() == "text of LICENSE.md" and not copied.is_symlink()
        assert licensing.read(snapshot)["license"] == "other"
    secret = tmp_path / "secret"
    secret.write_text("key")
    os.symlink(secret, source / "NOTICE")
    with pytest.raises(InputError, match="leads out of the folder"):
        licensing.files(source)


def test_the_built_in_model_says_its_own(tmp_path: Path) -> None:
    assert licensing.read(BUILTIN) == {"license": "apache-2.0"}
    assert set(licensing.files(BUILTIN)) == {"LICENSE"}
    assert (BUILTIN / "LICENSE").read_text() == (Path(__file__).parents[2] / "LICENSE").read_text()
