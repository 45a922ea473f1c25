"""Making caches: the same bytes however the run goes, resumed shard by shard, other settings refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caching import MIXED, cached, contents, images, opened
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from edgeprune import cli
from edgeprune.artefact.loading import load
from edgeprune.common.errors import DiskError, InputError, StaleStageError
from edgeprune.common.memory import ComputeOptions
from edgeprune.data import encode, settings
from edgeprune.data.cache import Index, made_by
from edgeprune.data.encode import summary
from edgeprune.data.settings import CacheOptions
from edgeprune.data.sources import Entry
from edgeprune.residency.running import running
from edgeprune.residency.streaming import is_streamed
from edgeprune.sampling.denoising import encode_images
from edgeprune.sampling.generation import Generation
from edgeprune.stages import original
from edgeprune.stages.caching import Caching
from edgeprune.stages.original import Original
from edgeprune.stages.work import Speeds


@pytest.mark.parametrize("half", [False, True])
def test_a_cache_holds_what_was_encoded_and_lists_the_rest(pipe: Any, model: Path, tmp_path: Path, half: bool) -> None:
    source, out = images(tmp_path / "images", [(64, 64)] * 10, bad=(1, 6)), tmp_path / "out"
    made = cached(pipe, model, source, out, half=half)
    assert [s.sizes for s in made.index.shards] == [{"64x64": 3}, {"64x64": 3}, {"64x64": 2}]
    listed = json.loads((out / "skipped.json").read_text())
    assert listed["used"] == 8 and [name for name, _ in listed["skipped"]] == ["1.png", "6.png"]
    tensors = load_file(out / "shard-00001.safetensors")
    pixels = np.stack([np.asarray(Image.open(source / f"{i}.png")) for i in (4, 5, 7)])
    expected = encode_images(pipe, torch.from_numpy(pixels).permute(0, 3, 1, 2))
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if half else {}
    torch.testing.assert_close(tensors["latents.64x64"].float(), expected, **tolerance)
    assert tensors["latents.64x64"].dtype == (torch.float16 if half else torch.float32)
    assert tensors["rows.64x64"].tolist() == [3, 1, 2]  # the empty prompt, then the shard's texts in order
    said = summary(made)
    assert said["samples"] == said["made_samples"] == 8 and said["skipped"] == 2 and said["samples_per_s"] > 0
    assert said["written_bytes"] == sum(p.stat().st_size for p in out.glob("shard-*"))
    batch = opened(out, model).batch(5, 0.0, torch.Generator().manual_seed(0))
    assert batch.latents.dtype == batch.hidden.dtype == torch.float32 and batch.latents.shape == (5, 8, 8, 8)


@pytest.mark.parametrize("buckets", [False, True])
def test_threads_change_no_byte(
    pipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buckets: bool
) -> None:
    monkeypatch.setattr(settings, "_ROUND", 16)  # more entries than one thread prepares ahead
    source = images(tmp_path / "images", MIXED, bad=(2,))
    for workers in (1, 7):
        cached(pipe, model, source, tmp_path / str(workers), workers=workers, buckets=buckets)
    assert contents(tmp_path / "1") == contents(tmp_path / "7")


@pytest.mark.parametrize("moment", ["within a shard", "before the index"])
@pytest.mark.parametrize("shard", [0, 2])
def test_a_killed_run_goes_on_after_the_last_whole_shard(
    pipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, shard: int
) -> None:
    source, out = images(tmp_path / "images", MIXED, bad=(1,)), tmp_path / "out"
    cached(pipe, model, source, tmp_path / "whole", buckets=True)
    save, calls = encode.save_tensors, itertools.count()

    class Killed(BaseException):
        pass

    def killed(*arguments: Any, **options: Any) -> None:
        if next(calls) == shard:
            if moment == "before the index":
                save(*arguments, **options)
            raise Killed
        save(*arguments, **options)

    monkeypatch.setattr(encode, "save_tensors", killed)
    with pytest.raises(Killed):
        cached(pipe, model, source, out, buckets=True)
    with pytest.raises(InputError, match="the cache is not finished"):
        opened(out, model)
    before = {p: p.stat().st_mtime_ns for p in out.glob("shard-*")}
    assert len(before) == shard + (moment == "before the index")
    monkeypatch.setattr(encode, "save_tensors", save)
    cached(pipe, model, source, out, buckets=True)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert contents(out) == contents(tmp_path / "whole")


def test_a_cache_of_another_dtype_is_not_continued(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a folder goes from a machine that multiplies bf16 to one that does not, or back."""
    options, found = CacheOptions("captions", 4), []
    monkeypatch.setattr("edgeprune.residency.compute.is_small", lambda numbers: False)
    for able in (True, False):
        monkeypatch.setattr("edgeprune.residency.compute.multiplies_bf16", lambda able=able: able)
        found.append(Caching(model, Generation.load(model), options, tmp_path / "out", ComputeOptions("cpu")).settings)
    two = "text_encoder bf16, text_encoder_2 bf16"
    assert (found[0].pop("computed_in"), found[0]) == (f"{two}, transformer bf16", found[1])
    images = Original(model)
    monkeypatch.setattr("edgeprune.residency.compute.multiplies_bf16", lambda: True)
    assert images.computed_in(drawing=False) == two
    encode.remaining(tmp_path / "new", found[1], 4)
    index = Index(found[1] | {"computed_in": two})
    (tmp_path / "begun").mkdir()
    index.save(tmp_path / "begun")
    with pytest.raises(StaleStageError, match=f"begun with 'computed_in' '{two}', found 'none'; use another -o"):
        encode.remaining(tmp_path / "begun", found[1], 4)
    # What is trained does not encode: it takes either.
    assert index.check_made_by(made_by(model, Generation.load(model), drawn=True), tmp_path) == []


def test_a_complete_cache_loads_nothing_and_a_lost_shard_is_made_again(pipe: Any, model: Path, tmp_path: Path) -> None:
    source, out = images(tmp_path / "images", MIXED), tmp_path / "out"
    cached(pipe, model, source, out)
    before = contents(out)
    assert cached(None, model, source, out).samples == 0
    (out / "shard-00001.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard-00001.safetensors: no such file, but cache.json lists it"):
        opened(out, model)
    assert cached(pipe, model, f"{source}/.", out).samples == 4  # the same folder
    assert contents(out) == before


def test_a_full_disk_keeps_the_shards_before(
    pipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.common import tensors

    source, out = images(tmp_path / "images", MIXED), tmp_path / "out"
    write, calls = tensors.write_safetensors, itertools.count()

    def full(*args: Any) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        write(*args)

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="shard-00001.safetensors: disk full"):
        patch.setattr(tensors, "write_safetensors", full)
        cached(pipe, model, source, out)
    assert sorted(p.name for p in out.iterdir()) == ["cache.json", "shard-00000.safetensors"]
    assert cached(pipe, model, source, out).samples == len(MIXED) - 4


def test_other_settings_are_refused(pipe: Any, model: Path, tmp_path: Path) -> None:
    source, out = images(tmp_path / "images", MIXED), tmp_path / "out"
    cached(pipe, model, source, out)
    with pytest.raises(StaleStageError, match="begun with 'buckets' False, found True"):
        cached(pipe, model, source, out, buckets=True)
    (source / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n')
    with pytest.raises(StaleStageError, match="begun with 'content' "):
        cached(pipe, model, source, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="exists and is not a cache"):
        cached(pipe, model, source, tmp_path / "mine")
    with pytest.raises(InputError, match="is a cache already"):
        cached(pipe, model, out, tmp_path / "other")
    with pytest.raises(InputError, match="--data nowhere|--data: nowhere"):
        cached(pipe, model, "nowhere", tmp_path / "other")
    bad = images(tmp_path / "bad", [(64, 64)], bad=(0,))
    with pytest.raises(InputError, match="no image with a caption that can be used: 0.png: not a readable image"):
        cached(pipe, model, bad, tmp_path / "other")


def test_a_stream_gives_so_many_samples(
    pipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = images(tmp_path / "images", [(64, 64)] * 9, bad=(0, 5))

    class Stream:
        STREAMED = True

        def identity(self, given: str) -> str:
            return given

        def count(self, given: str) -> None:
            return None

        def read(self, given: str) -> Iterator[Entry]:
            for i in itertools.count():
                yield Entry(f"{i}", source / f"{i % 9}.png", f"text {i}")

    monkeypatch.setattr(settings, "layout_of", lambda given: Stream())
    made = cached(pipe, model, "stream", tmp_path / "out", samples=5)
    assert [s.samples for s in made.index.shards] == [3, 2] and made.index.shards[1].skipped == 1
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    before = made.index.shards
    assert cached(pipe, model, "stream", tmp_path / "out", samples=5).index.shards == before


def test_prompts_are_drawn_by_the_model(model: Path, tmp_path: Path) -> None:
    whole = load(model)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo stars\n")
    made = cached(whole, model, tmp_path / "prompts.txt", tmp_path / "out", samples=6)
    assert [s.samples for s in made.index.shards] == [4, 2]
    assert {"transformer", "scheduler", "guidance_scale"} < made.index.settings.keys()
    first, second = (load_file(tmp_path / "out" / s.file)["latents.64x64"] for s in made.index.shards)
    assert len({t.numpy().tobytes() for t in (*first, *second)}) == 6  # each image has its own seed
    with pytest.raises(InputError, match="--buckets: images that the model makes are of one size"):
        cached(whole, model, tmp_path / "prompts.txt", tmp_path / "out", buckets=True)


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["cache", *words, "--json"])


def test_the_command(model: Path, tmp_path: Path) -> None:
    source, out = images(tmp_path / "images", MIXED), tmp_path / "out"
    words = (str(source), "--model", str(model), "-o", str(out), "--buckets")
    forecast = run(*words, "--dry-run")
    said = json.loads(forecast.stdout.splitlines()[-1])
    assert said["samples"] == 11 and said["cache_bytes"] == 11 * said["sample_bytes"] and said["free_bytes"] > 0
    assert not out.exists()
    made = json.loads(run(*words).stdout.splitlines()[-1])
    assert made["samples"] == 10 and made["skipped"] == 1 and made["sizes"]["64x64"] == 5
    assert not (out / ".lock").exists()
    again = run(*words)
    assert json.loads(again.stdout.splitlines()[-1])["made_samples"] == 0
    assert "nothing to do" in again.stderr and "next: edgeprune distill" in again.stderr
    refused = run(*words, "--height", "65")
    assert isinstance(refused.exception, InputError) and "height: found 65" in str(refused.exception)


def test_the_command_reads_the_model_as_distill_does(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within `--memory`, blocks are read when they run; the files are those of the model in memory."""
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo stars\n")
    made = list[Any]()
    monkeypatch.setattr(original, "running", lambda *given: made.append(running(*given)) or made[-1])
    words = (str(tmp_path / "prompts.txt"), "--model", str(model), "--samples", "6", "--device", "cpu")
    for name, memory in (("whole", ()), ("read", ("--memory", "100GB"))):
        done = run(*words, "-o", str(tmp_path / name), *memory)
        assert done.exit_code == 0, done.exception
    assert [is_streamed(transformer.transformer_blocks[0]) for transformer in made] == [False, True]
    assert contents(tmp_path / "whole") == contents(tmp_path / "read")
    refused = run(*words, "-o", str(tmp_path / "little"), "--memory", "1MB")
    assert isinstance(refused.exception, InputError) and "--memory: found 0.00 GB" in str(refused.exception)
    refused = run(*words, "-o", str(tmp_path / "nowhere"), "--device", "gpu")
    assert isinstance(refused.exception, InputError) and "--device: found 'gpu'" in str(refused.exception)
    assert not (tmp_path / "little").exists() and not (tmp_path / "nowhere").exists()


def test_the_command_says_how_long_it_takes_and_refuses_hours(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.stages.caching.least", lambda *_: Speeds(200.0))
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = (str(tmp_path / "prompts.txt"), "--model", str(model), "-o", str(tmp_path / "out"), "--samples", "8")
    said = r"^cache: at least .* here, on \w+; --samples 2 takes .*; --yes runs it anyway$"
    refused = run(*words)
    assert isinstance(refused.exception, InputError) and re.search(said, str(refused.exception))
    assert not (tmp_path / "out").exists()
    done = run(*words, "--yes")
    assert done.exit_code == 0 and re.search(
        "cache: at least .*, writes .* evaluations of the transformer", done.stderr
    )
    assert "at least" not in run(*words).stderr  # complete: nothing is left
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    refused = run(*words)  # half of it, and another number of samples would be another cache
    assert re.search(r"^cache: at least [\w. ]+ here, on \w+; --yes runs it anyway$", str(refused.exception))
    other = run(*words, "--height", "32")
    assert isinstance(other.exception, StaleStageError)
