"""An interrupted export resumes: nothing finished is redone, and the bytes equal those of an uninterrupted run.

Tests reuse the ONNX of `tiny_folders`, because tracing takes long. TensorRT's builder and Core ML's conversion are
replaced; other files test what they write. Chunks of Core ML: test_coreml.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgeprune import export, targets
from edgeprune.common.errors import DiskError
from edgeprune.common.files import sha256_file
from edgeprune.export import external_data, folder, to_onnx, unfinished
from edgeprune.residency import shards

NETWORKS = ["transformer", "text_encoder", "text_encoder_2", "vae_decoder"]
Export = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _quick(tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip tracing; each tensor of the transformer is a shard of its own, other networks keep their weights inline."""
    monkeypatch.setattr(
        to_onnx.NetworkSource, "to_ir", lambda self, half=False: ir.load(tiny_folders[1] / self.name / "model.onnx")
    )
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(external_data, "INLINE_BYTES", 500_000)


def hashes(out: Path) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    return {p.relative_to(out).as_posix(): sha256_file(p) for p in sorted(out.rglob("*")) if p.is_file()}


class Told:
    """Records progress, and raises KeyboardInterrupt at an event."""

    def __init__(self, *last: Any) -> None:
        self.last, self.events = last, list[tuple[Any, ...]]()

    def __call__(self, what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        self.events.append((what, done))
        if self.last == (what, done):
            raise KeyboardInterrupt

    @property
    def begun(self) -> list[str]:
        """The networks that this run began."""
        return [what for what, done in self.events if not done and ":" not in what]


def killed(export: Export, source: Path, out: Path, *last: Any) -> Told:
    """Run an export until an event interrupts it."""
    told = Told(*last)
    with pytest.raises(KeyboardInterrupt):
        export(source, out, progress=told)
    return told


def test_goes_on_where_it_was(tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, stretches = tiny_folders[0], tmp_path / "onnx", list[int]()
    real = external_data._write_shard
    monkeypatch.setattr(external_data, "_write_shard", lambda *given: stretches.append(1) or real(*given))
    told = Told()
    to_onnx.export(source, tmp_path / "whole", progress=told)
    whole, count = hashes(tmp_path / "whole"), len(stretches)
    assert count > 40 and ("transformer: written", count) in told.events
    stretches.clear()
    steps = max(done for what, done in told.events if what == "transformer: compared")

    assert killed(to_onnx.export, source, out, "transformer: written", 1).begun == ["transformer"]
    assert killed(to_onnx.export, source, out, "transformer: written", 30).begun == ["transformer"]
    assert killed(to_onnx.export, source, out, "transformer: compared", steps - 1).begun == ["transformer"]
    assert len(stretches) == count  # no shard is written twice
    assert killed(to_onnx.export, source, out, "text_encoder: compared", 1).begun == NETWORKS[:2]
    assert killed(to_onnx.export, source, out, "vae_decoder", 0).begun == NETWORKS[1:]
    assert not out.exists()
    told = Told()
    record = to_onnx.export(source, out, progress=told)
    assert told.begun == ["vae_decoder"] and len(stretches) == count
    assert hashes(out) == whole and record == json.loads((out / folder.FILE).read_text())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["onnx", "whole"]


@pytest.mark.slow  # a process of its own; above, other interruptions at as many places
def test_sigkill_in_the_middle_of_a_tensor(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, traced = tiny_folders
    code = f"""
import os, signal, onnx_ir as ir
from pathlib import Path
from edgeprune.residency import shards
from edgeprune.export import external_data, to_onnx

to_onnx.NetworkSource.to_ir = lambda self, half=False: ir.load(Path({str(traced)!r}) / self.name / "model.onnx")
shards.SHARD_BYTES, external_data.INLINE_BYTES = 1, 500_000
real, written = external_data._write_shard, []

def torn(file, tensors):
    written.append(1)
    if len(written) == 12:
        file.write(tensors[0].tobytes()[:-1])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(file, tensors)

external_data._write_shard = torn
to_onnx.export(Path({str(source)!r}), Path({str(tmp_path / "onnx")!r}))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    noted = json.loads((tmp_path / "onnx.partial" / "transformer" / unfinished.MARK).read_text())
    assert len(noted["stretches"]) == 11
    to_onnx.export(source, tmp_path / "onnx")
    to_onnx.export(source, tmp_path / "whole")
    assert hashes(tmp_path / "onnx") == hashes(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["onnx", "whole"]


def test_killed_when_all_was_in_its_place(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tiny_folders[0], tmp_path / "onnx"

    def replace(new: Path, target: Path) -> None:
        new.rename(target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "replace_folder", replace)
        with pytest.raises(KeyboardInterrupt):
            to_onnx.export(source, out)
    assert (out / unfinished.MARK).is_file()
    told = Told()
    record = to_onnx.export(source, out, progress=told)
    assert told.begun == [] and record == json.loads((out / folder.FILE).read_text())
    assert record["files"] == {name: sha256 for name, sha256 in hashes(out).items() if name != folder.FILE}
    assert [p.name for p in tmp_path.iterdir()] == ["onnx"]


def test_what_is_not_of_these_inputs_is_dropped(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Path(shutil.copytree(tiny_folders[0], tmp_path / "source")), tmp_path / "onnx"
    partial = tmp_path / "onnx.partial"

    def left() -> list[str]:
        """Start a run, interrupt it at once, and return what it kept."""
        with pytest.raises(KeyboardInterrupt):
            folder.write(source, out, target, options, stop)
        return sorted(p.name for p in partial.iterdir())

    def stop(work: unfinished.Unfinished) -> dict[str, Any]:
        raise KeyboardInterrupt

    target, options = "onnx", dict[str, Any]()
    (partial / "transformer").mkdir(parents=True)  # from a version that could not resume
    assert left() == [unfinished.MARK]

    def changed() -> bool:
        """Return whether the finished network was dropped; with the same inputs it stays."""
        return left() == [unfinished.MARK]

    def finish() -> None:
        work = unfinished.Unfinished(partial, json.loads((partial / unfinished.MARK).read_text())["inputs"])
        (work.begin("transformer") / "model.onnx").write_text("x")
        work.finish("transformer", {})
        assert left() == ["transformer", unfinished.MARK]

    finish()
    target = "coreml"
    assert changed()
    finish()
    options = {"device": "rtx"}
    assert changed()
    finish()
    (source / "generation.json").write_text((source / "generation.json").read_text().replace("64", "32"))
    assert changed()
    finish()
    path = source / "vae" / "diffusion_pytorch_model.safetensors"
    os.utime(path, ns=(1, 1))
    assert changed()
    finish()
    monkeypatch.setattr(folder, "VERSION", "another")
    assert changed()
    finish()
    (partial / unfinished.MARK).write_text('{"inputs": ')
    assert changed()


def test_damage_is_made_again(tmp_path: Path) -> None:
    work = unfinished.Unfinished(tmp_path / "p", "1")
    for name in ("a", "b"):
        (work.begin(name) / "model.onnx").write_text(name)
        (tmp_path / "p" / name / "unfinished-1.onnx").touch()  # of an interrupted chunk
        work.finish(name, {"parity": name})
    assert sorted(work.hashes) == ["a/model.onnx", "b/model.onnx"] and work.has("a") and not work.has("c")
    (tmp_path / "p" / "a" / "model.onnx").write_text("A")
    again = unfinished.Unfinished(tmp_path / "p", "1")
    assert not again.has("a") and again.has("b")
    again.finish("a", {"parity": "A"})
    assert list(again.recorded("parity").items()) == [("a", "A"), ("b", "b")]  # in the order of an uninterrupted run


def test_a_stretch_that_is_not_as_noted_is_written_again(tmp_path: Path) -> None:
    tensors = [ir.tensor(np.full(40, i, np.float32), name=f"t{i}") for i in range(5)]
    path, journal, told = tmp_path / "w.data", tmp_path / "journal.json", list[int]()

    def write(given: list[Any]) -> None:
        external_data.write(path, given, journal, "w", lambda what, done, total, note: told.append(done))

    write(tensors)
    whole = path.read_bytes()
    assert whole == b"".join(t.tobytes() for t in tensors) and told == [1, 2, 3, 4, 5]
    for spoiled in (whole[:170] + b"?" + whole[171:], whole[:-1], whole + b"more", b""):
        path.write_bytes(spoiled)
        write(tensors)
        assert path.read_bytes() == whole
    journal.write_text("{")
    write(tensors)
    assert path.read_bytes() == whole
    write(tensors[::-1])  # another layout
    assert path.read_bytes() == b"".join(t.tobytes() for t in tensors[::-1])


# ------------------------------------------------------------------------------------- other formats


@pytest.mark.slow
def test_openvino(tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    from edgeprune.export import to_openvino

    device = targets.load("intel-igpu")
    source, out, converted = tiny_folders[0], tmp_path / "ir", list[str]()
    real = to_openvino.converted
    monkeypatch.setattr(to_openvino, "converted", lambda p: converted.append(p.parent.name) or real(p))

    def export(artefact: Path, to: Path, progress: Any = lambda *_: None) -> dict[str, Any]:
        return to_openvino.export(artefact, to, device=device, progress=progress)

    export(source, tmp_path / "whole")
    converted.clear()
    killed(export, source, out, "transformer: compared", 2)
    killed(export, source, out, "text_encoder_2", 0)
    export(source, out)
    assert converted == ["transformer", *NETWORKS]
    assert hashes(out) == hashes(tmp_path / "whole")


def test_tensorrt_builds_no_engine_twice(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgeprune.export import to_trt

    device = dataclasses.replace(targets.load("rtx"), activations="float32")  # like the ONNX files
    out, built = tmp_path / "engines", list[str]()

    def build(self: Any, name: str, path: Path, profile: Any, engine: Path) -> dict[str, Any]:
        assert path.is_file()
        built.append(name)
        engine.write_bytes(f"{name} {len(built)}".encode())  # every build differs
        return {"int4_layers": 0, "int8_layers": 0}

    monkeypatch.setattr(to_trt.Builder, "build", build)

    def export(artefact: Path, to: Path, progress: Any = lambda *_: None) -> dict[str, Any]:
        return to_trt.export(artefact, to, device=device, progress=progress)

    killed(export, tiny_folders[0], out, "text_encoder: compared", 1)
    assert (out.with_name("engines.partial") / "text_encoder" / "model.onnx").is_file()
    killed(export, tiny_folders[0], out, "vae_decoder", 0)
    record = export(tiny_folders[0], out)
    assert built == NETWORKS == list(record["networks"])
    assert [(out / name / "model.engine").read_text() for name in NETWORKS] == [
        f"{n} {i}" for i, n in enumerate(NETWORKS, 1)
    ]
    assert not list(out.rglob("*.onnx*")) and not list(out.rglob("unfinished*"))


def test_core_ml_converts_no_network_twice(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("coremltools")
    from edgeprune.export import to_coreml

    made, device = list[str](), targets.load("iphone-15-pro")

    def network(name: str, parts: Any, reference: Any, examples: Any, path: Path, **_: Any) -> dict[str, Any]:
        made.append(name)
        (path / "model.mlpackage").write_text(name)
        return {"max_relative": 0.5}

    monkeypatch.setattr(to_coreml, "convert_network", network)

    def export(artefact: Path, to: Path, progress: Any = lambda *_: None) -> dict[str, Any]:
        return to_coreml.export(artefact, to, device=device, progress=progress)

    whole = export(tiny_folders[0], tmp_path / "whole")
    for name in ("text_encoder", "text_encoder_2", "vae_decoder"):
        killed(export, tiny_folders[0], tmp_path / "out", name, 0)
    assert export(tiny_folders[0], tmp_path / "out") == whole
    assert made == NETWORKS * 2 and whole["chunks"] == {"transformer": 3} and list(whole["parity"]) == NETWORKS
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


# ------------------------------------------------------------------------------------- a full disk


@pytest.fixture()
def disk() -> Iterator[Callable[[str], Path]]:
    """Mount a separate file system; the function resizes it and returns its path."""
    if not shutil.which("mount"):
        pytest.skip("file systems cannot be mounted here")
    # Outside pytest's folders: pytest could not remove it if the tests were killed.
    path = Path(tempfile.mkdtemp(prefix="edgeprune-disk-"))

    def mount(*options: str) -> None:
        run = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(path)], capture_output=True, check=False)
        if run.returncode:
            path.rmdir()
            pytest.skip("file systems cannot be mounted here")

    def resized(size: str) -> Path:
        mount("-o", f"remount,size={size}")
        return path

    mount("-o", "size=1m")
    try:
        yield resized
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)  # a vendor may still map a file
        path.rmdir()


@pytest.mark.parametrize("fmt", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    fmt: str,
    tiny_folders: tuple[Path, Path],
    disk: Callable[[str], Path],
) -> None:
    source, device, seen = tiny_folders[0], targets.for_format(fmt, None), set[str]()
    told = Told()
    for size in ("100k", "400k", "700k", "1m", "1500k", "2m", "3m", "4m", "6m", "16m"):
        out = disk(size) / "out"
        told = Told()
        try:
            export.export(source, out, fmt, device, modulation=export.INSIDE, progress=told)
            break
        except DiskError as error:
            assert "\n" not in str(error) and str(out) in str(error)
            seen |= {text for text in ("disk full", "needs") if text in str(error)}
        assert (out.with_name("out.partial") / unfinished.MARK).is_file()
    assert "needs" in seen
    if fmt == "onnx":  # OpenVINO's copy of the largest network needs more room than all that follows
        assert "disk full" in seen and told.begun != NETWORKS
    assert json.loads((out / folder.FILE).read_text())["files"].keys() == hashes(out).keys() - {folder.FILE}
