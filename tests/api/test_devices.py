"""`device` of `generate`, `score` and `bench`: it is torch's, and refused in a line where torch does not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgeprune import api, metrics
from edgeprune.api.scoring import _check_memory
from edgeprune.bench import run as bench_run
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.metrics import scoring
from edgeprune.runtimes import Runtime
from edgeprune.sampling.generation import Generation


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """What is read of an export before it is opened."""
    (folder := tmp_path / "onnx").mkdir()
    (folder / "edgeprune_export.json").write_text(json.dumps({"target": "onnx", "source": "built-in"}))
    Generation(num_inference_steps=1, guidance_scale=1.0, height=64, width=64, max_sequence_length=0).save(folder)
    return folder


def test_generate(source: Path, exported: Path) -> None:
    for device, why in (("cpu", "device=cpu"), ("auto", "torch finds ")):
        drawn = api.generate(source, "x", device=device, generation=api.GenerationOptions(num_inference_steps=1))
        assert drawn.runtime == "eager" and drawn.provider_why.startswith(why)
    with pytest.raises(InputError, match="--device: found 'cuda:77', expected one of auto, .*cpu, which torch finds"):
        api.generate(source, "x", device="cuda:77")
    for runtime, own in (("ort", "provider"), ("openvino", "device")):
        said = rf"--device cpu: is about torch, but {runtime} runs here; .*--option {own}=\.\.\.; omit --device"
        with pytest.raises(InputError, match=said):
            api.generate(exported, "x", runtime=runtime, device="cpu")


def test_score_draws_with_torch_there(source: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict[str, Any]()

    def drawn(place: Path, out: Path, *_: Any, loading: dict[str, Any], **__: Any) -> None:
        given[out.name] = loading
        if out.name == "original":
            raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "draw", drawn)
    monkeypatch.setattr("edgeprune.api.scoring._check_drawn", lambda *_: None)
    monkeypatch.setattr("edgeprune.api.scoring._check_memory", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        api.score(exported, ["psnr"], against=source, runtime="ort", device="cpu", memory=10**9)
    assert given == {"images": {"memory": 10**9}, "original": {"memory": 10**9, "device": "cpu"}}
    with pytest.raises(InputError, match="--device cpu: is about torch, but ort runs here"):
        api.score(exported, ["shapes"], runtime="ort", device="cpu")


def test_score_refuses_too_little_memory_before_it_draws(
    tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    source, exported = tiny_folders
    drawn = list[str]()
    monkeypatch.setattr(scoring, "draw", lambda place, *_, **__: drawn.append(place.name))
    with pytest.raises(InputError, match=r"memory: found 0\.10 GB, expected at least"):
        api.score(exported, ["psnr"], against=source, runtime="ort", memory=10**8)
    # The original alone is short.
    loading = {"images": {"memory": 10**10}, "original": {"memory": 10**8}}
    with pytest.raises(InputError, match=r"--memory: found 0\.10 GB, expected at least"):
        _check_memory({"images": exported, "original": source}, {name: {} for name in loading}, "ort", None, loading)

    def short(model: Runtime) -> None:
        raise InputError("too little for images of its own size")

    monkeypatch.setattr(Runtime, "prepare", short)
    with pytest.raises(InputError, match="of its own size"):
        api.score(exported, ["psnr"], against=source, runtime="ort", memory=10**11)
    assert drawn == []


def test_bench_measures_torch_there(source: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[bench_run.Variant]()

    def recorded(variants: list[bench_run.Variant], **_: Any) -> None:
        seen.extend(variants)

    monkeypatch.setattr(bench_run, "run", recorded)
    monkeypatch.setattr("edgeprune.sampling.generation.say_guesses", lambda *_, **__: None)
    api.bench([exported, source], baseline=source, device="cpu")  # the exports run in another runtime
    assert [v.options for v in seen] == [{"device": "cpu"}] * 2 + [{}, {"device": "cpu"}]
    with pytest.raises(InputError, match="--device: found 'nowhere', expected one of auto"):
        api.bench([exported], baseline=source, device="nowhere")
    with pytest.raises(InputError, match="--device cpu: is about torch, but"):
        api.bench([exported], original=False, device="cpu")


def test_options_of_score_are_for_the_first_folder(
    source: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = dict[str, Any]()

    def drawn(place: Path, out: Path, *_: Any, own: dict[str, Any], **__: Any) -> None:
        given[out.name] = own
        if out.name == "original":
            raise KeyboardInterrupt

    monkeypatch.setattr(scoring, "draw", drawn)
    monkeypatch.setattr("edgeprune.api.scoring._check_drawn", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        api.score(exported, ["psnr"], against=source, runtime="ort", options={"threads": "2"}, exact=True)
    assert given == {"images": {"threads": 2, "precision": "exact"}, "original": None}
    with pytest.raises(InputError, match="--exact: eager has no other precision to choose"):
        api.score(source, ["shapes"], exact=True)


def test_options_of_bench_are_not_for_the_original(
    source: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bench_run.Variant]()
    monkeypatch.setattr(bench_run, "run", lambda variants, **_: seen.extend(variants))
    monkeypatch.setattr("edgeprune.sampling.generation.say_guesses", lambda *_, **__: None)
    api.bench([exported, source], baseline=source, options={"threads": "1"}, exact=True)
    assert [v.options for v in seen] == [{}, {}, {"threads": 1, "precision": "exact"}, {"threads": 1}]
    with pytest.raises(InputError, match="--option turbo: unknown here: "):
        api.bench([exported], baseline=source, options={"turbo": "true"})


def test_generate_refuses_an_option_before_anything_is_opened(exported: Path) -> None:
    with pytest.raises(InputError, match="--option provider: unknown here: openvino has device, threads, precision"):
        api.generate(exported, "x", runtime="openvino", options={"provider": "cpu"})
    with pytest.raises(InputError, match="--option threads: found 'all', expected a whole number"):
        api.generate(exported, "x", runtime="ort", options={"threads": "all"})


def test_metrics_compute_there(source: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with networks: of images that exist, of an export's, and where `analyze` scores images."""
    asked = list[tuple[str, str]]()

    def of_images(name: str, weights: dict[str, str], device: str = "auto") -> None:
        asked.append((name, device))
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics, "of_images", of_images)
    (images := tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(images / "a.png")
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "a"}) + "\n")
    lines, weights = list[str](), {"clip": "clip", "lpips": "lpips"}
    monkeypatch.setattr(scoring, "draw", lambda place, out, *_, **__: shutil.copytree(images, out))
    monkeypatch.setattr("edgeprune.api.scoring._check_drawn", lambda *_: None)
    for folder, runtime in ((images, None), (exported, "ort")):
        with pytest.raises(KeyboardInterrupt):
            api.score(
                folder, ["clip"], weights=weights, runtime=runtime, device="cpu",
                progress=lambda what, *_: lines.append(what),
            )  # fmt: skip
    options = api.AnalyzeOptions(metric="lpips", weights=weights, count=1)
    with pytest.raises(KeyboardInterrupt):
        api.analyze(source, tmp_path / "out", options, compute=ComputeOptions("cpu"))
    assert asked == [("clip", "cpu"), ("clip", "cpu"), ("lpips", "cpu")] and not any("not used" in x for x in lines)
