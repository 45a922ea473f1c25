"""bench: its worker in a real process, figures, table, assertions, and what a failing worker reports."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import fake_runtime, worker_reply

from edgeprune import api
from edgeprune.bench import run as bench_run
from edgeprune.bench import worker
from edgeprune.bench.assertions import assert_expressions, parse_expression
from edgeprune.bench.disk import disk_bytes, weights_bytes
from edgeprune.bench.machine import machine
from edgeprune.bench.results import MEASURES, BenchResult, Measured, Quality, compare, load
from edgeprune.bench.run import Variant, _score, _worker, originals, psnr_db, run
from edgeprune.bench.tables import table, way_rows
from edgeprune.bench.way import way
from edgeprune.common.errors import AssertionMissedError, EdgepruneError, InputError
from edgeprune.common.files import write_json
from edgeprune.common.intervals import paired_drop
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import PLAIN, WORLDS


def measured(name: str, scale: float, quality: Quality | None = None) -> Measured:
    values: dict[str, float | int | None] = {k: 100.0 * scale for k in MEASURES} | {"pss_bytes": None}
    steps = [scale, 1.1 * scale, 0.9 * scale]
    return Measured(
        name=name,
        folder="x",
        runtime="ort",
        provider="cpu",
        provider_why="the only one here",
        memory_of="process",
        precision="int4",
        values=values,
        steps_s=steps,
        images_s=[scale],
        how={},
        quality=quality,
    )


@pytest.fixture
def result() -> BenchResult:
    first = measured("original", 1.0, Quality(0.9, 0.8, 1.0, {"colors": 0.9}, 7))
    other = measured("compressed", 0.2, Quality(0.81, 0.7, 0.9, {"colors": 0.81}, 7))
    comparisons = {"compressed": compare(first, other, 31.0)}
    return BenchResult(variants=[first, other], comparisons=comparisons, machine=machine(1e9), settings={"repeats": 3})


def test_ratios(result: BenchResult) -> None:
    found = result.comparisons["compressed"]
    assert found.ratios["peak_ratio"] == pytest.approx(0.2)
    assert found.ratios["pss_ratio"] is None
    low, high = found.step_p50_ratio_interval
    assert 0.15 < low <= 0.2 <= high < 0.25
    assert found.score_drop == pytest.approx(0.1)
    one = dataclasses.replace(measured("x", 1.0), steps_s=[1.0])
    assert compare(one, measured("y", 2.0), None).step_p50_ratio_interval is None


def test_json_and_table(result: BenchResult) -> None:
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["schema_version"] == 2
    assert [v["name"] for v in data["variants"]] == ["original", "compressed"]
    assert data["variants"][1]["peak_bytes"] == 20.0 and data["variants"][1]["quality"]["score"] == 0.81
    assert data["comparisons"]["compressed"]["psnr_db"] == 31.0
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=140).print(table(result))
    assert all(said in text.getvalue() for said in ("peak memory", "the only one here", "0.200", "31.0 dB"))


def test_what_is_written_is_read_again(result: BenchResult, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_json(path, result.to_json())
    assert load(path) == json.loads(path.read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 1}, "schema_version: found 1, expected 2; run `edgeprune bench` again"),
        ({"variants": []}, r"variants: found \[\], expected objects"),
        ({"variants": [{"name": "x"}]}, "variants: runtime: "),
        ({"comparisons": 3}, "comparisons: found 3"),
        ({"comparisons": {"x": {"peak_ratio": "0.2"}}}, "peak_ratio: found '0.2', expected a number or null"),
        ({"machine": {}}, "machine: found {}, expected cpu and cores"),
    ],
)
def test_a_file_that_is_not_a_bench_is_refused(
    change: dict[str, Any], said: str, result: BenchResult, tmp_path: Path
) -> None:
    path = tmp_path / "bench.json"
    write_json(path, result.to_json() | change)
    with pytest.raises(InputError, match=f"bench.json: {said}"):
        load(path)


def test_documented(result: BenchResult) -> None:
    text = (Path(__file__).parents[2] / "docs" / "bench.md").read_text("utf-8")
    data = result.to_json()
    names = {*data, *data["variants"][0], *data["comparisons"]["compressed"], *data["machine"]}
    assert [n for n in sorted(names) if n not in text] == []


@pytest.mark.parametrize(
    "text", ["peak_ratio<=0.25", "peak_ratio < 2.5e-1", "compressed.score >= .8", "psnr_db>30", "original.load_s==100"]
)
def test_assertions_that_hold(result: BenchResult, text: str) -> None:
    assert_expressions(result, [text])


def test_assertions_that_do_not(result: BenchResult) -> None:
    with pytest.raises(AssertionMissedError, match=r"peak_ratio is 0\.2, not <= 0\.1; score_drop is 0\.1, not < 0\.05"):
        assert_expressions(result, ["peak_ratio<=0.1", "load_ratio<1", "score_drop<0.05"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("speed<=1", "peak_ratio"),
        ("peak_ratio=<1", "NAME OP NUMBER"),
        ("peak_ratio<=fast", "NAME OP NUMBER"),
        ("peak_ratio<=0.25 or true", "NAME OP NUMBER"),
        ("pss_ratio<=1", "not measured"),
    ],
)
def test_assertions_that_are_wrong(result: BenchResult, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        assert_expressions(result, [text])


def test_psnr() -> None:
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr_db(a, a) == 100
    assert psnr_db(a, a + 255) == pytest.approx(0)
    assert psnr_db(a, a + 16) == pytest.approx(10 * np.log10(255**2 / 256))
    assert psnr_db(a, a[:, :2]) is None


def test_score_counts_prompts_not_seeds() -> None:
    for world in WORLDS.values():
        tasks = world.grammar.names
        prompts = [p for p in world.grammar.evaluation_prompts(2) for _ in range(2)]
        rng = np.random.default_rng(0)
        images = np.stack([world.render(p.meaning, rng) for p in prompts])
        found = _score(images, prompts, world)
        assert (found.score, found.images) == (1.0, 4 * len(tasks)) and set(found.tasks) == set(tasks)
        images[:] = 238
        assert _score(images, prompts, world).score == 0
    with pytest.raises(InputError, match=r"found images of \(128, 128\), expected 64x64"):
        _score(images, prompts, PLAIN)


def test_bytes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    for name in ("transformer", "transformer_int4", "vae"):
        (tmp_path / name).mkdir()
    save_file({"a": np.zeros((3, 5), np.float16)}, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({"a": np.zeros((3, 5), np.float16)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({"a": np.zeros((3, 5), np.float32)}, tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "transformer_int4").rmdir()
    one = (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert disk_bytes(tmp_path) == {"transformer_disk_bytes": one, "total_disk_bytes": 2 * one}
    assert weights_bytes(tmp_path, "bf16") == 30 and weights_bytes(tmp_path, "fp32") == 60
    (tmp_path / "transformer_int4").mkdir()
    (tmp_path / "transformer_int4" / "model.safetensors").write_bytes(b"12345")
    assert disk_bytes(tmp_path) == {"transformer_disk_bytes": 5, "total_disk_bytes": 5 + one}
    assert weights_bytes(tmp_path, "int4") == 5
    with pytest.raises(InputError, match="safetensors"):
        weights_bytes(tmp_path, "bf16")


def test_a_modulation_apart_is_of_the_transformer_but_of_no_step(tmp_path: Path) -> None:
    for name, size in (("transformer", 10), ("modulation", 4), ("vae_decoder", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(bytes(size))
    assert disk_bytes(tmp_path) == {"transformer_disk_bytes": 14, "total_disk_bytes": 17}
    assert weights_bytes(tmp_path, "W4A32") == 14 and weights_bytes(tmp_path, "W4A32", each_step=True) == 10
    variant = Variant("exported", tmp_path)
    values = bench_run._measured(variant, worker_reply(variant) | {"precision": "W4A32"}, 2.0, None).values
    assert (values["transformer_weights_bytes"], values["step_floor_s"]) == (14, 5.0)


@pytest.mark.parametrize(
    ("variants", "options", "said"),
    [
        ([], {}, "variants"),
        ([Variant("a", Path("x")), Variant("a", Path("y"))], {}, "variants"),
        ([Variant("a", Path("no/such"))], {}, "no/such"),
        ([Variant("a", Path("x"))], {"repeats": 0}, "repeats"),
        ([Variant("a", Path("x"))], {"steps": 0}, "steps"),
    ],
)
def test_bad_input(variants: list[Variant], options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(variants, **options)


def replies(monkeypatch: pytest.MonkeyPatch, **more: Any) -> list[tuple[str, int]]:
    """Let workers reply at once: 134 ms a step in bf16, 49 ms in float32, 21 ms else; list name and images drawn."""
    calls = []

    def reply(variant: Variant, spec: dict[str, Any], progress: Any) -> dict[str, Any]:
        if spec.get("check"):
            return {}
        calls.append((variant.name, len(spec["prompts"])))
        if spec["prompts"]:
            np.save(spec["images"], np.zeros((len(spec["prompts"]), 64, 64, 3), np.uint8))
        step, precision = {"bf16": (0.134, "bf16"), "fp32": (0.049, "fp32"), None: (0.021, "W4A32")}[variant.dtype]
        rows: dict[str, Any] = dict.fromkeys(MEASURES, 100) | {
            "peak_bytes": 400 if variant.dtype == "bf16" else 500,
            "runtime_overhead_bytes": 300,
        }
        rows |= {"runtime": "eager", "provider": "cpu", "provider_why": "", "memory_of": "process", "how": {}}
        return rows | {"steps_s": [step] * 3, "images_s": [1.0], "precision": precision} | more

    monkeypatch.setattr(bench_run, "_worker", reply)
    monkeypatch.setattr(bench_run, "memory_bandwidth", lambda: 1e9)
    return calls


def test_the_baseline_is_the_faster_precision(
    tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = replies(monkeypatch)
    source, exported = tiny_folders
    monkeypatch.setattr(bench_run, "identity", lambda folder: "of it" if folder == exported else None)
    found = run([*originals(source), Variant("compressed", exported, "ort")], quality=1)
    assert [m.identity for m in found.variants] == [None, "of it"]
    assert calls == [("original-bf16", 0), ("original-fp32", 0), ("original-fp32", 7), ("compressed", 7)]
    assert [(m.name, m.precision) for m in found.variants] == [("original", "fp32"), ("compressed", "W4A32")]
    assert [(m.name, m.precision) for m in found.slower_originals] == [("original-bf16", "bf16")]
    ratios = found.comparisons["compressed"].ratios
    assert ratios["step_p50_ratio"] == pytest.approx(21 / 49) and ratios["peak_above_runtime_ratio"] == 2
    assert ratios["peak_ratio"] == 500 / 400  # in bf16 the original peaks lower
    assert found.variants[0].values["peak_above_runtime_bytes"] == 200 and found.variants[0].quality
    assert_expressions(found, ["original-bf16.step_p50_s>0.13", "original.step_p50_s<0.05"])
    write_json(tmp_path / "bench.json", found.to_json())
    assert load(tmp_path / "bench.json")["slower_originals"][0]["step_p50_s"] == 0.134
    caption = str(table(found).caption)
    assert "the original in fp32, those of bytes against the least. In bf16 it takes 134 ms" in caption
    near = [dataclasses.replace(v, dtype="fp32") for v in originals(source)]  # both take 49 ms
    assert bench_run.run(near).slower_originals[0].name == "original-fp32"


def test_float32_is_left_out_on_a_gpu(tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lines = replies(monkeypatch, memory_of="gpu"), []
    found = run(originals(tiny_folders[0]), progress=lines.append)
    assert calls == [("original-bf16", 0)] and found.slower_originals == []
    assert (found.variants[0].name, found.variants[0].precision) == ("original", "bf16")
    assert any("a GPU is faster in bf16" in line for line in lines)


def test_a_large_original_is_measured_once(tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_run, "SMALL_BYTES", 1000)
    calls = replies(monkeypatch)
    found = run(originals(tiny_folders[0], memory=10**10))
    assert calls == [("original", 0)] and (found.variants[0].name, found.slower_originals) == ("original", [])


def test_no_step_of_a_minute_is_spent_on_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=61)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: float(next(clock)))
    spec = {"prompt": "x", "warmup": 2, "repeats": 1, "settings": {"steps": None}}
    taken = worker._steps(fake_runtime(), spec)
    assert taken == {"first_step_s": 61.0, "steps_s": [61.0], "modulation_s": None} and next(clock) == 5 * 61
    clock = itertools.count()
    worker._steps(fake_runtime(), spec)
    assert next(clock) == 9


def test_what_is_computed_before_the_first_step_is_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every noise level of the image, with both halves of guidance; the timed steps find it computed."""
    asked, model = list[tuple[int, list[float]]](), fake_runtime()
    monkeypatch.setattr(
        model.backend, "modulate", lambda pooled, sigma, scale: asked.append((len(pooled), sigma.tolist())) or True
    )
    taken = worker._steps(model, {"prompt": "x", "warmup": 0, "repeats": 1, "settings": {"steps": 5}})
    levels = model.sigmas(dataclasses.replace(model.settings.generation, num_inference_steps=5))[:-1]
    assert asked == [(10, np.repeat(levels, 2).tolist())] and taken["modulation_s"] > 0


def test_steps_are_timed_with_the_settings_of_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heun visits every level but the last twice; where guidance does not act, a step has one row."""
    asked, model = list[int](), fake_runtime()
    monkeypatch.setattr(model.backend, "modulate", lambda pooled, sigma, scale: asked.append(len(pooled)))
    spec = {"prompt": "x", "warmup": 0, "repeats": 1}
    for settings in ({"steps": 5}, {"steps": 5, "solver": "heun"}, {"steps": 5, "guidance_range": [0.99, 1.0]}):
        worker._steps(model, spec | {"settings": settings})
    assert asked == [10, 18, 6]


def test_memory_is_for_every_process(tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Variant]()

    def recorded(variants: list[Variant], **_: Any) -> None:
        seen.extend(variants)

    monkeypatch.setattr(bench_run, "run", recorded)
    source, made = tiny_folders
    api.bench([made, source], memory=5 * 10**9)
    assert len(seen) == 4 and all(v.options == {"memory": 5 * 10**9} for v in seen)
    assert {"original-bf16", "original-fp32"} < {v.name for v in seen}
    seen.clear()
    api.bench([made], original=False)
    assert [(v.name, v.options) for v in seen] == [("compressed", {})]
    with pytest.raises(InputError, match="omit --no-original"):
        api.bench([made], original=False, baseline=source)


def test_a_worker_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    code = "import sys; print('so far'); print('out of luck', file=sys.stderr); sys.exit(9)"
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: real([sys.executable, "-c", code], **kw))
    with pytest.raises(EdgepruneError, match="a: .*status 9: out of luck"):
        _worker(Variant("a", Path("x")), {}, lambda _: None)


def test_importing_bench_is_light() -> None:
    code = "import edgeprune.bench.run, sys; assert not {'torch', 'scipy', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_variants_for_real(tiny_folders: tuple[Path, Path]) -> None:
    source, exported = tiny_folders
    lines: list[str] = []
    found = run(
        [Variant("original", source, "eager", "fp32"), Variant("exported", exported, "ort")],
        repeats=3, warmup=1, steps=2, quality=1, progress=lines.append,
    )  # fmt: skip
    first, other = found.variants
    assert (first.runtime, first.precision, other.runtime) == ("eager", "fp32", "ort")
    for m in found.variants:
        assert len(m.steps_s) == 3 and m.images_s
        # Weights of a few kB are smaller than the units of the system's counters.
        small = ("weights_bytes", "activations_bytes")
        assert [k for k, v in m.values.items() if v is None] == ["modulation_s"]  # each step computes it
        assert all(v > 0 for k, v in m.values.items() if v is not None and k not in small)
        parts = [m.values[k] or 0 for k in ("runtime_overhead_bytes", "weights_bytes", "activations_bytes")]
        assert sum(parts) >= (m.values["peak_bytes"] or 0)
        assert m.provider_why and set(m.how) >= {"peak_bytes", "runtime_overhead_bytes", "weights_bytes"}
        assert m.quality is not None and m.quality.images == 7
    # ONNX Runtime's process loads no torch.
    ratio = found.comparisons["exported"].ratios["runtime_overhead_ratio"]
    assert ratio is not None and ratio < 0.6
    psnr = found.comparisons["exported"].psnr_db
    assert psnr is not None and psnr > 60  # the same weights in float32
    assert any("7 of 7" in line for line in lines)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_damaged_folder_is_the_users_error(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(tiny_folders[1], tmp_path / "copy"))
    (copy / "transformer" / "model.onnx").write_bytes(b"no")
    with pytest.raises(InputError, match=r"compressed: .*model\.onnx"):
        run([Variant("compressed", copy, "ort")], repeats=1)


@pytest.mark.parametrize("short", ["ort", pytest.param("eager", marks=pytest.mark.slow)])
def test_too_little_memory_for_one_is_refused_before_any_is_measured(
    short: str, tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"ort": "onnxruntime"}.get(short, "torch"))
    source, exported = tiny_folders
    measured = list[str]()
    monkeypatch.setattr(bench_run, "memory_bandwidth", lambda: 1e9)
    monkeypatch.setattr(bench_run._Bench, "measure", lambda bench, variant, **_: measured.append(variant.name))
    first = Variant("first", exported, "ort", options={"memory": 10**11})  # whose process is quick to start
    second = Variant("short", exported if short == "ort" else source, short, options={"memory": 10**8})
    with pytest.raises(InputError, match=r"^short: .*memory: found 0\.10 GB, expected at least 0\.\d+ GB"):
        run([first, second])
    assert measured == []


def test_a_limit_is_checked_for_images_of_the_models_own_size(
    tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    monkeypatch.setattr("edgeprune.runtimes.Runtime.prepare", lambda model, *_: asked.append(model.name))
    assert worker.check({"folder": str(tiny_folders[0]), "runtime": "eager", "options": {}, "settings": {}}) == {}
    assert asked == ["eager"]


def test_worker_prints_errors_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"folder": "no/such", "runtime": None, "options": {}}
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(spec)])
    assert worker.main() == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "InputError"


def test_memory_of_a_process_and_of_a_gpu_have_no_ratio() -> None:
    from dataclasses import replace

    first, other = measured("a", 1.0), measured("b", 0.5)
    assert compare(first, other, None).ratios["peak_ratio"] == 0.5
    ratios = compare(replace(first, memory_of="gpu"), other, None).ratios
    assert ratios["peak_ratio"] is None and ratios["load_ratio"] == 0.5


def test_an_assertion_may_name_a_variant_of_several_folders() -> None:
    assert parse_expression("out/a.onnx:ort.step_p50_s<=1") == ("out/a.onnx:ort.step_p50_s", "<=", 1.0)
    for text in ("step_p50_s<=1", "small.speed<=1"):  # refused before anything is measured
        with pytest.raises(InputError, match="unknown, expected"):
            parse_expression(text)


def tuned(exported: Path, place: Path, **changes: Any) -> Path:
    """Copy an export, with other settings."""
    folder = Path(shutil.copytree(exported, place))
    path = folder / "generation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_the_way_is_a_row_per_change_on_top_of_the_last(tiny_folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, exported = tiny_folders
    export = tuned(exported, tmp_path / "export", solver="ab2", num_inference_steps=2, guidance_range=[0.5, 1])
    artefact = tmp_path / "artefact"
    for name in ("transformer", "transformer_int4"):
        (artefact / name).mkdir(parents=True)
    options = {"eager": {"memory": 5}, "ort": {"memory": 6}}
    drawn, rows, missing = way(source, [(export, "ort"), (artefact, "eager")], options)
    own = Generation.load(source)
    assert drawn == {"solver": "euler", "steps": own.num_inference_steps, "guidance_range": (0.0, 1.0)} and not missing
    assert [(row.name, row.folder, row.runtime, row.options) for row in rows] == [
        ("pruned", artefact, "eager", {"memory": 5, "quantized": False}),
        ("INT4", artefact, "eager", {"memory": 5}),
        ("export, ort", export, "ort", {"memory": 6}),
        ("ab2, 2 steps", export, "ort", {"memory": 6}),
        ("guidance at 0.5 to 1", export, "ort", {"memory": 6}),
    ]
    assert all(row.settings == drawn for row in rows[:3])
    assert rows[3].settings == drawn | {"solver": "ab2", "steps": 2}
    assert rows[4].settings == rows[3].settings | {"guidance_range": (0.5, 1.0)}

    _, rows, missing = way(source, [(exported, "ort")], {})
    assert [row.name for row in rows] == ["export, ort"]
    assert [line.partition(",")[0].removeprefix("way: without ") for line in missing] == [
        *("pruned", "INT4", "solver", "guidance range"),
    ]
    with pytest.raises(InputError, match="--way: found .*, expected an artefact folder, an export, or one of each"):
        way(source, [(exported, "ort"), (export, "ort")], {})


def test_the_way_measures_settings_on_one_folder(
    tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, exported = tiny_folders
    export = tuned(exported, tmp_path / "export", solver="ab2", num_inference_steps=2)
    specs: list[tuple[str, dict[str, Any]]] = []
    replies(monkeypatch)
    reply = bench_run._worker

    def noted(variant: Variant, spec: dict[str, Any], progress: Any) -> dict[str, Any]:
        specs.append((variant.name, variant.settings))
        return reply(variant, spec, progress)

    monkeypatch.setattr(bench_run, "_worker", noted)
    lines: list[str] = []
    found = api.bench(
        [export], runtime="ort", baseline=source, quality=1, way=True, progress=lambda what, *_: lines.append(what)
    )
    steps = Generation.load(source).num_inference_steps
    drawn = {"solver": "euler", "steps": steps, "guidance_range": (0.0, 1.0)}
    assert [*dict(specs).items()][-2:] == [
        ("export, ort", drawn),
        ("ab2, 2 steps", drawn | {"solver": "ab2", "steps": 2}),
    ]
    assert all(settings["steps"] == steps for name, settings in specs if name.startswith("original"))
    head, *rows = way_rows(found)
    assert [row[0].partition(" (")[0] for row in rows] == ["original", "+ export, ort", "+ ab2, 2 steps"]
    assert len({len(row) for row in (head, *rows)}) == 1 and rows[0][-1] == ""
    assert any("without pruned" in line for line in lines)
    assert found.to_json()["variants"][-1]["settings"]["solver"] == "ab2"
    for wrong in ({"steps": 3}, {"original": False, "baseline": None}):
        with pytest.raises(InputError, match="--way begins at the original"):
            api.bench([export], runtime="ort", **({"baseline": source} | wrong), way=True)


def test_a_worker_draws_with_the_settings_of_its_variant() -> None:
    spec = {"prompt": "x", "settings": {"steps": 4, "solver": "ab2", "guidance_range": [0.6, 1]}}
    model = fake_runtime()
    worker._images(model, spec)
    backend: Any = model.backend
    images = len(backend.decoded)
    assert backend.batches == [2, 2, 1, 1] * images  # at 1, 0.667, 0.334 and 0.001


def test_the_drop_has_an_interval_over_prompts() -> None:
    tasks = ["a"] * 10 + ["b"] * 10
    first = measured("original", 1.0, Quality(1.0, 1.0, 1.0, {}, 20, [1.0] * 20, tasks))
    other = measured("x", 1.0, Quality(0.9, 0.8, 1.0, {}, 20, [0.0, *[1.0] * 9, 0.0, *[1.0] * 9], tasks))
    found = compare(first, other, None)
    assert found.score_drop == pytest.approx(0.1)
    expected = paired_drop(first.quality.prompt_values, other.quality.prompt_values, tasks).relative  # type: ignore[union-attr]
    assert expected is not None and found.score_drop_interval == (expected.low, expected.high)
    assert compare(first, measured("y", 1.0, Quality(0.9, 0.8, 1.0, {}, 7)), None).score_drop_interval is None
