"""Each verb that takes a reference, once through the command line, and those that refuse it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from references import tiny_chroma
from typer.testing import CliRunner

from edgeprune.cli import app
from edgeprune.common.errors import EdgepruneError


def run(*words: object) -> Any:
    """Run a command and return what it prints as JSON last.

    Raises:
        EdgepruneError: it refused something.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes, which main() prints as lines
        found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None:
        raise found.exception
    return json.loads(found.stdout[found.stdout.index("\n{\n") if not found.stdout.startswith("{") else 0 :])


def refused(*words: object) -> str:
    """Return the line with which a command refuses."""
    with pytest.raises(EdgepruneError) as caught:
        run(*words)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Chroma's, and a file with two prompts beside it."""
    folder = tmp_path_factory.mktemp("verbs") / "chroma"
    tiny_chroma(folder)
    (folder.parent / "prompts.txt").write_text("two red circles\na blue square\n")
    return folder


def test_score(chroma: Path, tmp_path: Path) -> None:
    """A reference is scored, and other images are scored against it, at the same prompts and seeds."""
    prompts = chroma.parent / "prompts.txt"
    words, settings = ("--metric", "shapes", "--json"), ("--steps", 1, "--guidance-scale", 1.0)
    one = run("score", chroma, *words, "--prompts", prompts, *settings, "-o", tmp_path / "one")
    assert one["scores"][0]["images"] == 2 and one["settings"]["pipelines"] == {"images": "ChromaPipeline"}
    images = tmp_path / "one" / "images"
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    assert [line["runtime"] for line in lines] == ["diffusers"] * 2 and lines[0]["steps"] == 1
    assert lines[0]["guidance_scale"] == 1
    limited = ("--memory", "1000GB", "-o", tmp_path / "both")
    both = run("score", images, "--against", chroma, *words, *settings, *limited)
    assert both["settings"]["pipelines"] == {"original": "ChromaPipeline"}
    for name in ("00000.png", "00001.png"):
        assert (tmp_path / "both" / "original" / name).read_bytes() == (images / name).read_bytes()


def test_score_refuses(chroma: Path) -> None:
    words = ("score", chroma, "--metric")
    assert "omit --runtime" in refused(*words, "shapes", "--runtime", "eager")
    assert "and none is drawn" in refused("score", "built-in", "--metric", "shapes", "--guidance-scale", 2.0)
    assert "omit them" in refused(*words, "shapes", "--exact")
    assert "is of another architecture" in refused(*words, "ssim", "--against", chroma)


@pytest.mark.parametrize(
    "words",
    ["compress M -o out", "analyze M -o out", "plan -o M", "quantize -o M", "distill -o M",
     "export M --target onnx -o out", "generate prompt --model M", "verify M", "convert M -o out"],
)  # fmt: skip
def test_what_needs_a_family(words: str, chroma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names the class, the families that there are, and the pages."""
    monkeypatch.chdir(tmp_path)
    line = refused(*(str(chroma) if word == "M" else word for word in words.split()))
    assert "found 'ChromaPipeline' with ['diffusers', 'ChromaTransformer2DModel'], expected an MMDiT: SD3" in line
    assert "CONTRIBUTING.md" in line and "docs/references.md" in line
    assert not any(tmp_path.iterdir())


def spec(folder: Path, images: Path) -> dict[str, Any]:
    """Return what `bench` tells the process that measures a reference."""
    options = {"device": "cpu", "memory": 10**12}
    settings = {"steps": None, "height": 32, "width": 48}
    asked = {"repeats": 1, "warmup": 0, "prompt": "two red circles", "prompts": ["a blue square"], "seeds": [3]}
    return {"folder": str(folder), "runtime": "diffusers", "options": options, "settings": settings, **asked} | {
        "images": str(images)
    }


def test_bench_measures_a_reference(chroma: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peak, its images and the steps of these, by its own pipeline in its own number of steps."""
    from edgeprune.bench import worker
    from edgeprune.bench.run import Variant, _measured

    monkeypatch.setattr(worker, "IMAGES", 2)
    reply = worker.measure(spec(chroma, tmp_path / "images.npy"))
    assert np.load(tmp_path / "images.npy").shape == (1, 32, 48, 3)
    assert len(reply["images_s"]) == 2 and len(reply["steps_s"]) == 2 * 2 - 1  # two images of two steps, but the first
    assert reply["first_step_s"] + sum(reply["steps_s"]) < sum(reply["images_s"])
    assert reply["peak_bytes"] > reply["weights_bytes"] > 0 and reply["memory_of"] == "process"
    values = _measured(Variant("reference", chroma, "diffusers"), reply, 1e9, None).values
    size = (chroma / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert values["transformer_disk_bytes"] == size and values["total_disk_bytes"] > size
    assert worker.check(spec(chroma, tmp_path)) == {}


def test_bench_refuses(chroma: Path, tiny_folders: tuple[Path, Path]) -> None:
    source, _ = tiny_folders
    assert "measured as --reference" in refused("bench", chroma)
    assert "measured as --reference" in refused("bench", source, "--baseline", chroma)
    assert "expected a text-to-image folder" in refused("bench", source, "--no-original", "--reference", source)
    assert "omit --reference" in refused("bench", source, "--way", "--reference", chroma)


@pytest.mark.slow
def test_bench(chroma: Path, tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Each in a process of its own; the reference is a further column."""
    words = ("--no-original", "--reference", chroma, "--repeats", 1, "--device", "cpu", "--json", tmp_path / "b.json")
    with pytest.raises(ValueError, match="substring"):  # the table, and no JSON
        run("bench", tiny_folders[0], *words)
    result = json.loads((tmp_path / "b.json").read_text())
    assert [v["name"] for v in result["variants"]] == ["compressed", "reference"]
    assert result["comparisons"]["reference"]["peak_ratio"] > 0
    assert result["comparisons"]["reference"]["psnr_db"] is None
    assert result["variants"][1]["provider_why"] == "ChromaPipeline of diffusers draws it"
    assert result["variants"][1]["settings"] == {"steps": None, "height": 64, "width": 64}


def test_study(chroma: Path, tmp_path: Path) -> None:
    """A reference draws the original's prompts, at its seeds and its size, under the names of its images."""
    from edgeprune.reference.drawing import open_drawer

    (tmp_path / "a").mkdir()
    lines = []
    for name, text, seed in (("x", "two red circles", 7), ("y", "a blue square", 8)):
        Image.new("RGB", (48, 32), "red").save(tmp_path / "a" / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": text, "seed": seed}))
    (tmp_path / "a" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    words = ("study", "new", tmp_path / "s", "--variants", f"original={tmp_path / 'a'}", f"other={chroma}", "--json")
    assert run(*words)["variants"] == ["original", "other"]
    with open_drawer(chroma) as drawer:
        expected = list(drawer.draw(["two red circles", "a blue square"], [7, 8], height=32, width=48))
    found = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "s" / "images" / "other").iterdir())]
    assert len(found) == 2 and all((a == np.asarray(b)).all() for a, b in zip(found, expected, strict=True))
    said = [str(words[2]) + "-2", *words[3:-1]]
    assert "is read whole: give more --memory" in refused("study", "new", *said, "--memory", "1MB")
    assert "--device: found 'cuda:77'" in refused("study", "new", *said, "--device", "cuda:77")
    alone = ("--variants", f"original={tmp_path / 'a'}", f"other={tmp_path / 'a'}", "--device", "cpu")
    assert "are about references, and all variants are images" in refused("study", "new", tmp_path / "t", *alone)
    swapped = ("--variants", f"original={chroma}", f"other={tmp_path / 'a'}")
    assert "expected images, the original's" in refused("study", "new", tmp_path / "t", *swapped)


def test_compare_scores_a_reference(chroma: Path) -> None:
    """Its row has the bytes of its files, and its score on the same prompts and seeds."""
    from edgeprune.common.splits import Split
    from edgeprune.compare import page, reference
    from edgeprune.residency.compute import Compute

    texts, size = ["two red circles", "a blue square"], {"height": 64, "width": 64}
    result = reference.score(chroma, "shapes", texts, None, Split.HELD_OUT, Compute(), size)
    assert len(result["scores"]) == 2 and 0 < result["bytes"] < result["disk_bytes"]
    original = {"scores": [1.0, 1.0], "bytes": 2 * result["bytes"]}
    summary = {"original": {"score": (1.0, 1.0, 1.0), "bytes": original["bytes"]}, "rows": []}
    row = page.cells(summary | {reference.NAME: reference.summarise(result, original, None)})[1]
    assert row[0] == "ChromaPipeline, as it is" and row[3] == "0.500"


def test_compare_refuses(chroma: Path, tmp_path: Path) -> None:
    words = ("compare", "-o", tmp_path / "out", "--reference")
    assert "expected a text-to-image folder" in refused(*words, tmp_path)
    assert "--metric psnr compares with the original" in refused(*words, chroma, "--metric", "psnr")


@pytest.mark.slow
def test_compare(chroma: Path, tmp_path: Path) -> None:
    """The row comes after the grid's, from the command line."""
    row = 'name = "whole"\nplan = { method = "uniform" }\ndistill = false\n'
    grid = f'budget = 0.9\nreference = "whole"\n[[rows]]\n{row}'
    (tmp_path / "grid.toml").write_text(grid)
    words = ("--grid", tmp_path / "grid.toml", "--per-task", 1, "--reference", chroma, "--json")
    found = run("compare", "-o", tmp_path / "out", *words)["reference_model"]
    assert found["pipeline"] == "ChromaPipeline" and found["bytes_ratio"] > 0 and len(found["score"]) == 3
    assert "| ChromaPipeline, as it is |" in (tmp_path / "out" / "compare.md").read_text()
