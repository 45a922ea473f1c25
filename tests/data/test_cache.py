"""Caches of encoded data: the same bytes whatever happens on the way, refused where they do not fit, read by sample."""

import functools
import hashlib
import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import KINDS, TOKENS, config_of, tiny_inputs, tiny_pipeline
from typer.testing import CliRunner

from edgeprune import cli
from edgeprune.artefact import checkpoint
from edgeprune.artefact.surgery import prune
from edgeprune.common.errors import DiskError, InputError, StaleStageError
from edgeprune.data import encode
from edgeprune.data.buckets import RATIO, bucket_sizes, enlarged, nearest
from edgeprune.data.cache import is_cache, open_pairs
from edgeprune.data.encode import CacheOptions, make_cache, settings_of, source_digest, summary
from edgeprune.data.pairs import Pairs, Part
from edgeprune.data.sources import Entry
from edgeprune.families import family_of
from edgeprune.planning.plan import make_plan
from edgeprune.sampling.denoising import encode_images
from edgeprune.sampling.generation import Generation
from edgeprune.stages.pipeline import (
    DataOptions,
    PlanOptions,
    Workspace,
    load_encoders,
    run_distill,
    run_plan,
    run_prune,
)
from edgeprune.training.distill import distill
from edgeprune.training.recipe import DistillOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline's folder; copy before changing it."""
    tiny_pipeline(folder := tmp_path_factory.mktemp("cache") / "model")
    return folder


@pytest.fixture(scope="module")
def pipe(model: Path) -> Any:
    return load_encoders(model)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "SHARD_BYTES", 1)
    monkeypatch.setattr(encode, "_ROUND", 4)


def images(root: Path, sizes: list[tuple[int, int]], *, bad: tuple[int, ...] = ()) -> Path:
    """An imagefolder of these (height, width), each with a colour of its own; `bad` ones are no images."""
    root.mkdir()
    rng = np.random.default_rng(0)
    with (root / "metadata.jsonl").open("w") as lines:
        for i, (height, width) in enumerate(sizes):
            path = root / f"{i}.png"
            Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path)
            if i in bad:
                path.write_bytes(b"no image")
            lines.write(json.dumps({"file_name": path.name, "text": f"a {i % 5} circle"}) + "\n")
    return root


def cached(pipe: Any, model: Path, source: Path | str, out: Path, *, workers: int = 2, **chosen: Any) -> encode.Made:
    options, generation = CacheOptions(str(source), **chosen), Generation.load(model)
    settings = settings_of(model, generation, options)
    return make_cache(lambda: pipe, model, out, settings, generation, options, workers=workers)


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def opened(folder: Path, model: Path) -> Pairs:
    config, family = checkpoint.read_config(model)
    return open_pairs(folder, family, config)


MIXED = [(64, 64), (80, 60), (48, 90), (64, 70), (100, 50), (64, 64), (30, 90), (20, 20), (64, 64), (50, 80), (64, 64)]


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
    monkeypatch.setattr(encode, "_ROUND", 16)  # more than one thread has ahead
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

    def killed(path: Path, *rest: Any) -> None:
        if next(calls) == shard:
            if moment == "before the index":
                save(path, *rest)
            raise Killed
        save(path, *rest)

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
    from edgeprune.training import resume

    source, out = images(tmp_path / "images", MIXED), tmp_path / "out"
    write, calls = resume.save_file, itertools.count()

    def full(*args: Any, **kwargs: Any) -> None:
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        write(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(DiskError, match="shard-00001.safetensors: disk full"):
        patch.setattr(resume, "save_file", full)
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

    monkeypatch.setattr(encode, "layout_of", lambda given: Stream())
    made = cached(pipe, model, "stream", tmp_path / "out", samples=5)
    assert [s.samples for s in made.index.shards] == [3, 2] and made.index.shards[1].skipped == 1
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    before = made.index.shards
    assert cached(pipe, model, "stream", tmp_path / "out", samples=5).index.shards == before


def test_prompts_are_drawn_by_the_model(model: Path, tmp_path: Path) -> None:
    whole = checkpoint.load(model)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo stars\n")
    made = cached(whole, model, tmp_path / "prompts.txt", tmp_path / "out", samples=6)
    assert [s.samples for s in made.index.shards] == [4, 2]
    assert {"transformer", "scheduler", "guidance_scale"} < made.index.settings.keys()
    first, second = (load_file(tmp_path / "out" / s.file)["latents.64x64"] for s in made.index.shards)
    assert len({t.numpy().tobytes() for t in (*first, *second)}) == 6  # a seed of its own each
    with pytest.raises(InputError, match="--buckets: images that the model makes are of one size"):
        cached(whole, model, tmp_path / "prompts.txt", tmp_path / "out", buckets=True)


# ------------------------------------------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    ("base", "unit", "largest"),
    [((64, 64), 8, 128), ((1024, 1024), 16, None), ((768, 1344), 16, 1536), ((40, 40), 8, 40)],
)
def test_bucket_sizes(base: tuple[int, int], unit: int, largest: int | None) -> None:
    sizes = bucket_sizes(base, unit, largest)
    assert base in sizes and sizes == sorted(set(sizes))
    for height, width in sizes:
        assert height % unit == width % unit == 0 and height * width <= math.prod(base)
        assert (height, width) == base or max(height, width) <= RATIO * min(height, width)
        assert largest is None or max(height, width) <= largest
    if base[0] == base[1]:
        assert {(w, h) for h, w in sizes} == set(sizes)
    assert min(map(math.prod, sizes)) > 0.7 * math.prod(base)
    assert len(sizes) > 3 or largest == 40


def test_an_image_goes_to_the_nearest_ratio() -> None:
    sizes = bucket_sizes((64, 64), 8)
    assert sizes == [(48, 80), (56, 72), (64, 64), (72, 56), (80, 48)]
    assert [nearest(s, sizes) for s in ((100, 100), (300, 100), (60, 80), (5, 9))] == [
        (64, 64), (80, 48), (56, 72), (48, 80),
    ]  # fmt: skip
    assert enlarged((32, 40), (64, 64)) == 2.0


def test_buckets_are_counted_and_small_images_skipped(pipe: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = cached(pipe, model, images(tmp_path / "images", MIXED), out, buckets=True)
    assert made.index.sizes == {"48x80": 3, "64x64": 5, "72x56": 1, "80x48": 1}
    (skipped,) = json.loads((out / "skipped.json").read_text())["skipped"]
    assert skipped[0] == "7.png" and "found 20 x 20, which would grow 3.2 times to 64 x 64" in skipped[1]
    tensors = load_file(out / "shard-00000.safetensors")
    assert tensors["latents.48x80"].shape == (1, 8, 6, 10) and tensors["latents.64x64"].shape == (2, 8, 8, 8)
    pairs = opened(out, model)
    assert len(pairs) == 10
    drawn = Counter(tuple(pairs.batch(2, 0.1, torch.Generator().manual_seed(i)).latents.shape) for i in range(1000))
    assert {k[2:]: round(v / 100) for k, v in drawn.items()} == {(6, 10): 3, (8, 8): 5, (9, 7): 1, (10, 6): 1}


def parts(*sizes: tuple[int, int], count: int = 6) -> list[Part]:
    g = torch.Generator().manual_seed(3)
    width = tiny_inputs()["pooled_projections"].shape[-1]
    return [
        Part(
            torch.randn(count, 8, *size, generator=g), torch.arange(count) % 3,
            torch.randn(3, TOKENS, width, generator=g), torch.randn(3, width, generator=g),
        )
        for size in sizes
    ]  # fmt: skip


def test_batches_of_one_size_are_drawn_as_they_always_were() -> None:
    """In three shards or in one: evidence of trained models depends on the order."""
    cut = parts((8, 8), (8, 8), (8, 8))
    pairs, generator = Pairs(cut), torch.Generator().manual_seed(5)
    batch = pairs.batch(32, 0.3, generator)
    again = torch.Generator().manual_seed(5)
    picked = torch.randint(18, (32,), generator=again)
    dropped = torch.rand(32, generator=again) < 0.3
    assert torch.equal(generator.get_state(), again.get_state())
    assert torch.equal(batch.latents, torch.cat([p.latents for p in cut])[picked])
    hidden = torch.cat([p.hidden[p.rows] for p in cut])[picked]
    empty = torch.cat([p.hidden[p.rows * 0] for p in cut])[picked]
    assert torch.equal(batch.hidden, torch.where(dropped[:, None, None], empty, hidden))


@pytest.mark.parametrize("kind", ["sd3", "flux", "flux2"])
def test_training_takes_latents_of_several_sizes(kind: str, tmp_path: Path) -> None:
    teacher = KINDS[kind]()
    config = config_of(teacher)
    family = family_of(config)
    plan = make_plan(family, config, None, method="manual", blocks="2")

    def run(path: Path, sizes: tuple[tuple[int, int], ...], steps: int) -> list[float]:
        student = prune(family, teacher, config, plan, None)
        options = DistillOptions(steps=steps, batch=2, rate=1e-3, sensitivity="off", int4_group_size=None)
        return distill(
            family, teacher, student, plan, None, Pairs(parts(*sizes)), options, path, inputs_digest="x", save_every=3
        )[1]

    sizes = ((8, 8), (6, 10), (10, 6))
    losses = run(tmp_path / "s", sizes, 6)
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    # Wide and high images have positions of their own: the same numbers in another shape are another image.
    wide, high = (run(tmp_path / f"{size}", (size,), 1) for size in sizes[1:])
    assert wide != high


# ------------------------------------------------------------------------------------------------- training from it


def test_distill_reads_a_cache_without_encoders_and_vae(pipe: Any, model: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(model, tmp_path / "model")
    source, encoded = images(tmp_path / "images", MIXED), tmp_path / "encoded"
    cached(pipe, mine, source, encoded, buckets=True)
    options, said = DistillOptions(steps=3, batch=2, sensitivity="off"), list[str]()

    def begun(out: Path) -> Workspace:
        ws = Workspace(out, str(mine))
        # A removed norm needs the mean modulation input, which text encoders make.
        run_plan(ws, PlanOptions("manual", keep=None, components="2:norm,2:mlp", modulation_rank=None))
        run_prune(ws)
        return Workspace(out, str(mine))  # with nothing loaded

    folders = [tmp_path / "with", tmp_path / "without"]
    opened_folders = [begun(folder) for folder in folders]
    run_distill(opened_folders[0], options, DataOptions(str(encoded)))
    for weights in [*mine.glob("text_encoder*/*.safetensors"), *mine.glob("vae/*.safetensors")]:
        weights.unlink()
    assert run_distill(opened_folders[1], options, DataOptions(str(encoded)), lambda what, *_: said.append(what))
    a, b = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in folders)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert [line for line in said if "to compare with" in line] == [
        f"distill: {encoded} says what made it; no weights of text_encoder, text_encoder_2, vae here to compare with"
    ]
    assert not {"pipe", "encoders"} & vars(opened_folders[1]).keys()
    # Moved, it is the same data.
    encoded.rename(tmp_path / "moved")
    assert not run_distill(opened_folders[1], options, DataOptions(str(tmp_path / "moved"), samples=7))


def test_distill_makes_and_reads_a_cache_of_its_own(model: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(model))
    run_plan(ws, PlanOptions("manual", keep=None, blocks="1", modulation_rank=None))
    run_prune(ws)
    run_distill(ws, DistillOptions(steps=1, batch=2, sensitivity="off"), DataOptions("shapes", 6))
    (folder,) = ws.cache.glob("data-*")
    assert is_cache(str(folder)) and len(list(folder.glob("shard-*"))) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("vae/config.json", "'vae': found .*…, expected .*… as this model has it"),
        ("text_encoder_2/model.safetensors", "'text_encoder_2': found .*…, expected .*… as this model has it"),
        ("tokenizer/tokenizer.json", "'tokenizer': found"),
        ({"height": 72}, "'height': found 64, expected 72"),
        ({"max_sequence_length": 8}, "'max_sequence_length': found 0, expected 8"),
    ],
)
def test_a_cache_of_another_encoder_or_size_is_refused(
    pipe: Any, model: Path, tmp_path: Path, change: str | dict[str, int], said: str
) -> None:
    cached(pipe, model, images(tmp_path / "images", MIXED[:2]), tmp_path / "encoded")
    mine = shutil.copytree(model, tmp_path / "model")
    if isinstance(change, str):
        data = (mine / change).read_bytes()
        other = data[:-1] + bytes([data[-1] ^ 1]) if change.endswith("safetensors") else data + b"\n"
        (mine / change).write_bytes(other)
    ws = Workspace(tmp_path / "out", str(mine), generation=change if isinstance(change, dict) else None)
    run_plan(ws, PlanOptions("manual", keep=None, blocks="1", modulation_rank=None))
    run_prune(ws)
    with pytest.raises(InputError, match=f"encoded/cache.json: {said}"):
        run_distill(ws, DistillOptions(steps=1, sensitivity="off"), DataOptions(str(tmp_path / "encoded")))


# ------------------------------------------------------------------------------------------------- hostile and damaged


def whole(pipe: Any, model: Path, tmp_path: Path) -> Path:
    cached(pipe, model, images(tmp_path / "images", MIXED[:6]), tmp_path / "encoded")
    return tmp_path / "encoded"


def test_a_damaged_shard_is_one_line(pipe: Any, model: Path, tmp_path: Path) -> None:
    folder = whole(pipe, model, tmp_path)
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        InputError, match=r"shard-00001.safetensors: its SHA-256 is not the one in cache.json"
    ) as raised:
        opened(folder, model)
    assert "\n" not in str(raised.value)
    path.unlink()
    before = json.loads((folder / "cache.json").read_text())
    cached(pipe, model, tmp_path / "images", folder)
    assert json.loads((folder / "cache.json").read_text()) == before


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("shards.0.file", "../shard-00000.safetensors", "shards: 0: file: found '../shard"),
        ("shards.0.file", "/etc/shard.safetensors", "shards: 0: file: found '/etc/shard"),
        ("shards.0.file", "link.safetensors", "shards: 0: file: found 'link.safetensors', which leads out"),
        ("shards.0.file", "cache.json", "shards: 0: file: found"),
        ("shards.0.file", 7, "shards: 0: file: found 7"),
        ("shards.0.sizes", {"64x64": 10**12}, "shards: 0: sizes: 64x64: found 1000000000000"),
        ("shards.0.sizes", {"64x64": -1}, "shards: 0: sizes: 64x64: found -1"),
        ("shards.0.sizes", {"99999x99999": 1}, "shards: 0: sizes: found '99999x99999'"),
        ("shards.0.sizes", {"../x": 1}, "shards: 0: sizes: found '../x'"),
        ("shards.0.sizes", {"64x64": 3}, r"latents.64x64.: found \(4, 8, 8, 8\) F32, expected \(3, 8, 8, 8\)"),
        ("shards.0.sizes", {"64x64": 4, "8x8": 1}, "latents.8x8.: found None"),
        ("shards.0.sizes", [], r"shards: 0: sizes: found \[\]"),
        ("shards.0.skipped", None, "shards: 0: skipped: found None"),
        ("shards.0", [1], r"shards: 0: found \[1\]"),
        ("shards", [], "found no samples"),
        ("shards", {}, "shards: expected a list"),
        ("settings", [], "settings: expected an object"),
        ("settings.samples_per_shard", 10**30, "settings: samples_per_shard: found 1000000000000000000000000000000"),
        ("settings.vae", {"a": 1}, "settings: expected an object"),
        ("complete", 1, "complete: found 1"),
        ("schema_version", 2, "schema_version: found 2, expected 1; a newer edgeprune wrote it"),
    ],
)
def test_a_hostile_index_is_one_line(
    pipe: Any, model: Path, tmp_path: Path, path: str, value: object, said: str
) -> None:
    folder = whole(pipe, model, tmp_path)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "shard-00000.safetensors", outside)
    (folder / "link.safetensors").symlink_to(outside)
    data = json.loads((folder / "cache.json").read_text())
    *way, last = path.split(".")
    place: Any = functools.reduce(lambda at, key: at[int(key) if key.isdecimal() else key], way, data)
    place[int(last) if last.isdecimal() else last] = value
    (folder / "cache.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        opened(folder, model)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": NaN}', "[" * 100_000])
def test_a_damaged_index_is_one_line(model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "cache.json").write_text(text)
    with pytest.raises(InputError, match=r"cache\.json: "):
        opened(tmp_path, model)
    with pytest.raises(InputError, match=r"cache\.json: "):
        source_digest(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("rows.64x64", torch.tensor([0, 1, 2, 99]), "rows.64x64: found 0 to 99, expected texts from 0 to"),
        ("rows.64x64", torch.tensor([0, 1, 2, -1]), "rows.64x64: found -1 to 2, expected texts from 0 to"),
        ("rows.64x64", torch.zeros(4), "rows.64x64.: found .* F32, expected .* I64"),
        ("latents.64x64", torch.zeros(4, 8, 8, 40), r"latents.64x64.: found \(4, 8, 8, 40\)"),
        ("latents.64x64", torch.zeros(4, 8, 0, 8), r"latents.64x64.: found \(4, 8, 0, 8\)"),
        ("latents.64x64", torch.zeros(4, 16, 8, 8), r"latents.64x64.: found \(4, 16, 8, 8\)"),
        ("latents.64x64", torch.zeros(4), r"latents.64x64.: found \(4,\)"),
        ("hidden", torch.zeros(5, 16), r"hidden.: found \(5, 16\)"),
        ("hidden", torch.zeros(0, 16, 64), r"hidden.: found \(0, 16, 64\)"),
        ("pooled", torch.zeros(5, 63), r"pooled.: found \(5, 63\)"),
        ("more", torch.zeros(1), r"more.: found \(1,\) F32, expected None"),
    ],
)
def test_a_shard_that_is_not_as_the_index_and_the_model_say(
    pipe: Any, model: Path, tmp_path: Path, name: str, tensor: torch.Tensor, said: str
) -> None:
    folder = whole(pipe, model, tmp_path)
    path = folder / "shard-00000.safetensors"
    tensors = {n: t.clone() for n, t in load_file(path).items()}
    save_file(tensors | {name: tensor}, path)
    data = json.loads((folder / "cache.json").read_text())
    data["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "cache.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        opened(folder, model)


# ------------------------------------------------------------------------------------------------- reading, the command


def test_pages_are_mapped_not_read(pipe: Any, model: Path, tmp_path: Path) -> None:
    folder = whole(pipe, model, tmp_path)
    pairs = opened(folder, model)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc")
    assert str(folder / "shard-00000.safetensors") in maps.read_text()
    assert len(pairs) == 6


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
