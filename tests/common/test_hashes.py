"""Hashes that are computed once, files that are linked instead of copied, and the bytes that both cost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.common import hashes, linking, traffic
from edgeprune.common.errors import InputError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where hashes of originals are kept; every size is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hashes, "KEPT_FROM", 0)
    monkeypatch.setattr(linking, "LINKED_FROM", 0)
    return tmp_path / "home" / "edgeprune" / "hashes.json"


def later_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has read."""
    monkeypatch.setattr(hashes, "_known", {})


def test_whether_a_file_would_be_linked_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tmp_path / "weights", tmp_path / "not" / "yet"
    path.write_bytes(bytes(64))
    assert not linking.is_linked(path, folder)  # small files are copied
    monkeypatch.setattr(linking, "LINKED_FROM", 64)
    before = path.stat()
    monkeypatch.setattr(linking, "_reflink", lambda *_: False)
    assert linking.is_linked(path, folder)
    assert path.stat().st_ctime_ns == before.st_ctime_ns  # else its kept hash would be lost
    assert list(tmp_path.iterdir()) == [path]
    with monkeypatch.context() as patch:
        patch.setattr(linking, "_disk", lambda path: (0, str(path)))
        assert not linking.is_linked(path, folder)
    monkeypatch.setattr(os, "link", refuse)
    assert not linking.is_linked(path, folder)
    monkeypatch.setattr(linking, "_reflink", lambda *_: True)
    assert linking.is_linked(path, folder) and list(tmp_path.iterdir()) == [path]


def refuse(*_: object) -> None:
    raise OSError(1, "Operation not permitted")


def of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def rewrite(path: Path, data: bytes, time_ns: int) -> None:
    """Write a file again, at another time even where the clock of the file system is coarse."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        path.write_bytes(data)
        os.utime(path, ns=(time_ns, time_ns))


@pytest.mark.parametrize("kept", [False, True])
def test_a_file_that_is_written_while_it_is_read_is_read_again(
    store: Path, tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sha256 = tmp_path / "weights", hashes.kept_sha256 if kept else hashes.sha256
    path.write_bytes(b"one")

    def read(path: Path) -> str:
        digest = of(path.read_bytes())
        rewrite(path, b"two", 10**18)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "sha256_file", read)
        assert sha256(path) == of(b"one")
    assert not store.exists()
    assert sha256(path) == of(b"two")


def test_a_file_that_is_written_while_it_is_linked_is_read_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, link = tmp_path / "weights", tmp_path / "linked", os.link
    source.write_bytes(b"one")
    hashes.kept_sha256(source)

    def late(*names: Path) -> None:
        rewrite(source, b"two", 10**18)
        link(*names)

    monkeypatch.setattr(linking, "_reflink", lambda *_: False)
    monkeypatch.setattr(os, "link", late)
    linking.place(source, target)
    assert hashes.sha256(target) == hashes.kept_sha256(source) == of(b"two")


def test_files_of_two_disks_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stat = tmp_path / "weights", Path.stat
    path.write_bytes(b"one")
    hashes.sha256(path)

    def elsewhere(self: Path) -> os.stat_result:
        values = list(stat(self))
        values[2] += 1  # st_dev
        return os.stat_result(values, {n: getattr(stat(self), n) for n in ("st_mtime_ns", "st_ctime_ns")})

    monkeypatch.setattr(Path, "stat", elsewhere)
    assert hashes.known(path) is None


@pytest.mark.parametrize("time_ns", [0, 4 * 10**18])
@pytest.mark.parametrize("kept", [False, True])
def test_a_clock_that_was_set_makes_nothing_current_or_stale(
    store: Path, tmp_path: Path, time_ns: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sha256 = tmp_path / "weights", hashes.kept_sha256 if kept else hashes.sha256
    path.write_text("one")
    assert sha256(path) == of(b"one")
    os.utime(path, ns=(time_ns, time_ns))
    assert sha256(path) == of(b"one")
    rewrite(path, b"two", time_ns)  # same size, and the modification time is set back to the recorded one
    later_process(monkeypatch)
    assert sha256(path) == of(b"two")


def test_only_hashes_of_originals_are_kept_for_later_processes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    before = traffic.total()
    assert [hashes.sha256(path), hashes.sha256(path)] == [of(b"one")] * 2
    assert traffic.total().since(before).read_bytes == 3 and not store.exists()
    hashes.kept_sha256(path)
    assert not store.exists()  # known to this process
    later_process(monkeypatch)
    hashes.kept_sha256(path)
    later_process(monkeypatch)
    monkeypatch.setattr(hashes, "sha256_file", lambda path: pytest.fail(f"read {path} again"))
    (tmp_path / "link").symlink_to(path)
    assert hashes.kept_sha256(tmp_path / "link") == of(b"one")
    later_process(monkeypatch)
    with pytest.raises(pytest.fail.Exception):
        hashes.sha256(path)  # what is checked is read once by each process


@pytest.mark.parametrize("content", ["", "[1]", '{"a', '{"a": 3}', '{"PATH": [1, 2, 3, 4, 5]}', "folder"])
def test_a_damaged_store_is_ignored_and_written_again(
    store: Path, tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    store.parent.mkdir(parents=True)
    if content == "folder":
        store.mkdir()
    else:
        store.write_text(content.replace("PATH", str(path)))
    assert hashes.kept_sha256(path) == of(b"one")
    if content != "folder":
        assert list(json.loads(store.read_text())) == [str(path)]
    assert {p.name for p in store.parent.iterdir()} == {"hashes.json"}
    later_process(monkeypatch)
    assert hashes.kept_sha256(path) == of(b"one")


def test_hashes_of_many_files_push_out_none_but_those_of_files_that_are_gone(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "files").mkdir()
    paths = [tmp_path / "files" / f"{number}" for number in range(6)]
    for path in paths:
        path.write_text(path.name)
    monkeypatch.setattr(hashes, "_MANY", 4)
    hashes.kept_sha256(paths[0])
    hashes.kept_sha256(paths[1])
    paths[1].unlink()
    moved, read, write = list[str](), hashes._read_store, hashes.write_text
    monkeypatch.setattr(hashes, "_read_store", lambda: moved.append("read") or read())  # type: ignore[func-returns-value]
    monkeypatch.setattr(hashes, "write_text", lambda *some: moved.append("write") or write(*some))  # type: ignore[func-returns-value]
    with pytest.raises(FileNotFoundError), hashes.keeping() as sha256_of:
        for path in paths[2:]:
            assert sha256_of(path) == of(path.name.encode())
        sha256_of(paths[1])
    assert moved == ["read", "read", "write"]
    assert json.loads(store.read_text()).keys() == {str(path) for path in paths if path != paths[1]}


KEEP_ALL = """
import sys
from pathlib import Path
from edgeprune.common import hashes
hashes.KEPT_FROM = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    hashes.kept_sha256(path)
"""


def test_several_processes_keep_a_readable_store(store: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number in range(20):
        (tmp_path / "files" / f"{number}").write_text(f"{number}")
    workers = [subprocess.Popen([sys.executable, "-c", KEEP_ALL, str(tmp_path / "files")]) for _ in range(4)]
    assert [worker.wait() for worker in workers] == [0] * 4
    kept = json.loads(store.read_text())  # what two write at the same moment is lost, and read again
    assert kept and kept.keys() <= {str(p) for p in (tmp_path / "files").iterdir()}
    assert {p.name for p in store.parent.iterdir()} == {"hashes.json"}


def test_a_file_is_verified_once_unless_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    hashes.verify(tmp_path, {"weights": of(b"one")}, "edgeprune.json")
    with monkeypatch.context() as patch:
        patch.setattr(hashes, "sha256_file", lambda path: pytest.fail(f"read {path} again"))
        hashes.verify(tmp_path, {"weights": of(b"one")}, "edgeprune.json")
    rewrite(path, b"onf", 10**18)
    with pytest.raises(InputError, match="the file is damaged or was changed"):
        hashes.verify(tmp_path, {"weights": of(b"one")}, "edgeprune.json")


def test_a_linked_file_costs_no_bytes_and_no_second_hash(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "weights", tmp_path / "linked"
    source.write_bytes(b"one")
    (tmp_path / "snapshot").symlink_to(source)
    hashes.kept_sha256(source)
    before = traffic.total()
    linking.place(tmp_path / "snapshot", target)
    assert target.samefile(source) and not target.is_symlink()
    assert hashes.sha256(target) == hashes.kept_sha256(source) == of(b"one")
    later_process(monkeypatch)
    assert hashes.kept_sha256(source) == of(b"one")  # the time of the file's last change is the link's
    assert traffic.total() == before


def test_without_links_a_file_is_copied_and_hashed_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "weights", tmp_path / "copied"
    source.write_bytes(b"one")
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(linking, "LINKED_FROM", 0)
    before = traffic.total()
    linking.place(source, target)
    assert not target.samefile(source) and hashes.sha256(target) == of(b"one")
    assert traffic.total().since(before) == traffic.Traffic(3, 3)


def test_a_reflink_is_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    source, target = tmp_path / "weights", tmp_path / "cloned"
    source.write_bytes(b"one")
    digest = hashes.sha256(source)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(linking, "LINKED_FROM", 0)

    def clone(made: int, request: int, original: int) -> None:
        assert request == 0x40049409
        os.write(made, os.read(original, 100))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    linking.place(source, target)
    assert not target.samefile(source) and target.read_bytes() == b"one" and hashes.known(target) == digest


def test_tensors_are_written_as_safetensors_writes_them_and_hashed_on_the_way(tmp_path: Path) -> None:
    torch, save_file = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch").save_file
    from edgeprune.common.tensors import load_tensors, save_tensors

    kinds = ("int64", "float64", "float32", "int32", "bfloat16", "float16", "int16", "int8", "uint8", "bool")
    tensors = {
        f'{place % 3}.ü"{kind}': torch.arange(place + 1).to(getattr(torch, kind)) for place, kind in enumerate(kinds)
    }
    tensors |= {
        "turned": torch.ones(2, 3).T,
        "empty": torch.zeros(0, 4),
        "number": torch.tensor(1.5),
        "part": torch.ones(4)[::2],
    }
    for number, metadata in enumerate((None, {}, {"format": "pt"}, {"meta": '{"ä": 1}'})):
        theirs, ours = tmp_path / f"theirs{number}", tmp_path / f"ours{number}"
        save_file({n: t.contiguous() for n, t in tensors.items()}, theirs, metadata)
        before = traffic.total()
        save_tensors(ours, tensors, metadata, hashed=True)
        assert traffic.total().since(before) == traffic.Traffic(0, theirs.stat().st_size)
        assert ours.read_bytes() == theirs.read_bytes()
        assert hashes.known(ours) == of(ours.read_bytes())
        save_tensors(ours, tensors, metadata)
        assert hashes.known(ours) is None  # nobody asks for the hashes of scratch files
    assert load_tensors(ours)["number"] == 1.5
