"""Files on a full disk: one line that says what to do, no incomplete file, and the old file untouched."""

import ast
import errno
from pathlib import Path
from typing import Any

import pytest

from edgeprune.common.errors import DiskError, EdgepruneError, InputError
from edgeprune.common.files import (
    check_schema,
    read_json,
    replace_folder,
    whole_lines,
    write_json,
)


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_json_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"blocks": [1]})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(EdgepruneError, match=r"plan\.json: disk full; free some space"):
        write_json(path, {"blocks": [2]})
    assert "1" in path.read_text() and list(tmp_path.iterdir()) == [path]


def test_a_folder_comes_back_if_its_successor_cannot_take_its_place(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "kept").touch()
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", old)
    assert (old / "kept").exists()


def test_a_torn_last_line_is_cut_off_and_the_others_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for text, lines, kept in (("", [], ""), ("a", [], ""), ("a\nb\n", ["a", "b"], "a\nb\n"), ("ä\nb", ["ä"], "ä\n")):
        path.write_text(text, encoding="utf-8")
        inode = path.stat().st_ino
        assert whole_lines(path) == lines
        assert path.read_text(encoding="utf-8") == kept and path.stat().st_ino == inode


def test_nothing_reads_the_clock_but_to_tell_people() -> None:
    """Speeds, periods and time limits use the monotonic clock; digests decide what is up to date."""
    root, found = Path(__file__).parents[2], set()
    for path in (p for folder in ("edgeprune", "export", "runtimes", "targets") for p in (root / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        if any(call.endswith((".now", ".utcnow", ".today", "time.time", "time_ns")) for call in calls):
            found.add(path.relative_to(root).as_posix())
    assert found == {"edgeprune/common/lock.py", "edgeprune/user_study/store.py"}


@pytest.mark.parametrize(
    ("found", "words"), [(1, "expected 2; analyze again"), (None, "analyze again"), (3, "expected 2; .*newer.*upgrade")]
)
def test_a_file_of_another_schema_says_what_to_do(found: object, words: str) -> None:
    check_schema("a.json", 2, 2, "analyze again")
    with pytest.raises(
        InputError, match=rf"a\.json: schema_version: found {found}, {'' if found == 3 else '.*'}{words}"
    ):
        check_schema("a.json", found, 2, "analyze again")


def test_weights_are_as_readable_as_any_other_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from edgeprune.common.tensors import save_tensors

    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.json").stat().st_mode


def test_what_a_killed_write_leaves_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from edgeprune.common import tensors

    def half(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskError, match=r"a\.safetensors: disk full"):
        patch.setattr(tensors, "write_safetensors", half)
        tensors.save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert not list(tmp_path.iterdir())
    (tmp_path / "a.safetensors.tmp").write_bytes(b"half")  # a killed process cannot clean up
    tensors.save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_with_a_byte_order_mark_is_refused_at_once(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}", encoding=encoding)
    with pytest.raises(
        InputError, match=r"model_index\.json: begins with a byte order mark, expected UTF-8 without one"
    ):
        read_json(tmp_path / "model_index.json")
