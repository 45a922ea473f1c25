"""`edgeprune score`: generating with resuming, pairing, intervals, and the command line on folders of images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shell import run, run_here

from edgeprune import shapes
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.data.imagefolder import Sample, read_samples
from edgeprune.metrics import scoring
from edgeprune.metrics.scoring import Wish


def image_folder(folder: Path, images: list[Any], texts: list[str], seeds: list[int] | None = None) -> Path:
    folder.mkdir()
    lines = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        Image.fromarray(image).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text} | ({"seed": seeds[i]} if seeds else {})))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make shapes-world images: eight correct ones, and a copy in which the second and the last are blank."""
    root = tmp_path_factory.mktemp("worlds")
    prompts = [p for p in shapes.evaluation_prompts(4) if p.meaning.task in ("single_object", "colors")]
    texts = [p.text for p in prompts]
    right = [shapes.render(p.meaning, np.random.default_rng(i)) for i, p in enumerate(prompts)]
    blank = [np.full_like(image, 255) if i in (1, 7) else image for i, image in enumerate(right)]
    return image_folder(root / "original", right, texts), image_folder(root / "images", blank, texts)


def test_scores_and_drops_in_pairs(worlds: tuple[Path, Path]) -> None:
    original, images = map(read_samples, worlds)
    shapes_, psnr = scoring.score(images, ["shapes", "psnr"], against=original)
    assert shapes_.tasks == {"single_object": 0.75, "colors": 0.75} and shapes_.score.mean == 0.75
    assert shapes_.values == [1, 0, 1, 1, 1, 1, 1, 0] and shapes_.original_values == [1] * 8
    assert shapes_.original == (1, 1, 1) and shapes_.drop is not None and shapes_.relative_drop is not None
    assert shapes_.drop == shapes_.relative_drop and shapes_.drop.mean == 0.25
    assert shapes_.drop.low < 0 < 0.25 < shapes_.drop.high < 1  # eight values with two failures do not show a drop
    assert shapes_.score.low > 0 and shapes_.score.high == 1  # a share; Student's t alone would reach 1.18
    assert psnr.values[0] == 100 and psnr.values[1] < 20 and psnr.drop is None
    assert scoring.score(images, ["shapes"])[0].original is None


def test_seeds_of_a_prompt_are_averaged(tmp_path: Path) -> None:
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    mine = read_samples(image_folder(tmp_path / "a", [black, white, black], ["p", "p", "q"]))
    other = read_samples(image_folder(tmp_path / "b", [black] * 3, ["p", "p", "q"]))
    (found,) = scoring.score(mine, ["psnr"], against=other)
    assert found.values == [50, 100] and found.score.mean == 75 and found.images == 3


def test_images_must_be_of_the_same_prompts_and_seeds() -> None:
    one, other = Sample(Path("a"), "p", 3), Sample(Path("b"), "q", 3)
    with pytest.raises(InputError, match="image 1: found the prompt 'q', expected 'p'"):
        scoring.pair([one], [other])
    with pytest.raises(InputError, match="found seed 4, expected 3"):
        scoring.pair([one], [Sample(Path("b"), "p", 4)])
    with pytest.raises(InputError, match="found 2 images, expected 1"):
        scoring.pair([one], [one, one])
    scoring.pair([one], [Sample(Path("b"), "p")])


def test_what_is_drawn() -> None:
    seeds = [w.seed for w in scoring.wishes(["shapes"], per_task=1, seeds=2)]
    assert seeds == Split.HELD_OUT.seeds(2 * len(shapes.TASKS))
    assert len(scoring.wishes(["geneval", "clip"])) == 553
    assert len(scoring.wishes(["clip"])) == scoring.CAPTIONS
    with pytest.raises(InputError, match="each have prompts of their own"):
        scoring.wishes(["geneval", "shapes"])
    with pytest.raises(InputError, match="--per-task is for metrics"):
        scoring.wishes(["clip"], per_task=2)


def test_own_prompts_are_checked_before_drawing(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of a bench\na lighthouse\n")
    assert len(scoring.wishes(["clip"], prompts=path)) == 2
    with pytest.raises(InputError, match="'a lighthouse' is not one of GenEval's"):
        scoring.wishes(["geneval"], prompts=path)


class Artist:
    """A runtime whose images encode the seed; it can fail after some batches."""

    def __init__(self, batches: int = 99) -> None:
        self.left, self.drawn = batches, list[int]()

    def __call__(self, *_: Any) -> Artist:
        return self

    def __enter__(self) -> Artist:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def draw(self, texts: list[str], seeds: list[int], *, steps: int | None) -> Iterator[Image.Image]:
        for seed in seeds:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.drawn.append(seed)
            yield Image.new("RGB", (8, 8), (seed, 0, 0))


def test_a_killed_drawing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    (model / "transformer").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    (model / "transformer" / "w").write_text("1")
    wanted = [Wish(f"p{i}", i) for i in range(20)]
    first, second, third = Artist(16), Artist(), Artist()
    monkeypatch.setattr(scoring.runtimes, "load", first)
    with pytest.raises(KeyboardInterrupt):
        scoring.draw(model, out, wanted)
    with (out / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "000')  # incomplete because of the kill
    monkeypatch.setattr(scoring.runtimes, "load", second)
    scoring.draw(model, out, wanted)
    assert (first.drawn, second.drawn) == (list(range(16)), list(range(16, 20)))
    samples = read_samples(out)
    assert [(s.text, s.seed) for s in samples] == [(w.text, w.seed) for w in wanted]
    assert Image.open(samples[17].path).getpixel((0, 0)) == (17, 0, 0)
    monkeypatch.setattr(scoring.runtimes, "load", third)
    scoring.draw(model, out, wanted)
    (model / "cache").mkdir()
    (model / "cache" / "c").write_text("kept by a runtime")
    scoring.draw(model, out, wanted)
    assert third.drawn == []
    for change in (wanted[:19] + [Wish("other", 19)], wanted[:3]):
        with pytest.raises(InputError, match="images of another model, prompts or settings; give another --out"):
            scoring.draw(model, out, change)
    with pytest.raises(InputError, match="images of another model, prompts or settings"):
        scoring.draw(model, out, wanted, own={"precision": "exact"})
    (model / "transformer" / "w").write_text("12")
    with pytest.raises(InputError, match="images of another model"):
        scoring.draw(model, out, wanted)


def test_memory_is_for_what_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    given: list[dict[str, Any]] = []
    artist = Artist()
    monkeypatch.setattr(scoring.runtimes, "load", lambda *_, **options: given.append(options) or artist)
    for name in ("eager", "ort"):
        monkeypatch.setattr(scoring.runtimes, "choose", lambda *_, name=name: name)
        scoring.draw(tmp_path, tmp_path / name, [Wish("a", 0)], loading={"memory": 6 * 10**9})
    assert given == [{"memory": 6 * 10**9}] * 2


def test_command_line_on_images(worlds: tuple[Path, Path]) -> None:
    original, images = map(str, worlds)
    found = run("score", images, "--against", original, "--metric", "shapes", "--metric", "ssim", "--json")
    assert found.returncode == 0, found.stderr
    data = json.loads(found.stdout.splitlines()[-1])
    assert data["schema_version"] == 1 and len(data["prompts"]) == 8
    first, second = data["scores"]
    assert (first["metric"], first["score"][0], first["drop"][0]) == ("shapes", 0.75, 0.25)
    assert second["metric"] == "ssim" and second["drop"] is None and len(second["values"]) == 8
    assert "0.75 [" in found.stderr and "25.0% [" in found.stderr and "8 images of 8 prompts" in found.stderr
    alone = run_here("score", images, "--metric", "shapes")
    assert alone.returncode == 0 and "next: edgeprune score" in alone.stderr and "--against ORIGINAL" in alone.stderr


def test_command_line_says_what_is_wrong(worlds: tuple[Path, Path], tmp_path: Path) -> None:
    images = str(worlds[1])
    found = run_here("score", images, "--metric", "shapes", "--seeds", "2")
    assert found.returncode == 2 and "already has prompts" in found.stderr
    white = np.full((32, 32, 3), 255, np.uint8)
    small = image_folder(tmp_path / "small", [white], [read_samples(worlds[1])[0].text])
    found = run_here("score", str(small), "--metric", "shapes")
    assert found.returncode == 2 and "found images of 32x32, expected all of 64x64 or 128x128" in found.stderr
    (small / "0.png").write_text("not an image")
    found = run_here("score", str(small), "--metric", "shapes")
    assert found.returncode == 2 and "not a readable image" in found.stderr and "Traceback" not in found.stderr
