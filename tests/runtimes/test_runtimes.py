"""Runtimes: the tokens of transformers, the images of torch, and errors that name the file."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeBackend, fake_runtime

from edgeprune import api, runtimes
from edgeprune.common.errors import InputError, MissingExtraError
from edgeprune.residency.streaming import is_streamed
from edgeprune.runtimes import base, memory
from edgeprune.sampling.scheduler import FlowMatch

PROMPTS = ["two red circles", "a drawing of a star above a ring"]


def test_an_image_does_not_depend_on_its_batch() -> None:
    both = fake_runtime().generate(PROMPTS, seed=5)
    alone = fake_runtime().generate(PROMPTS[1], seed=6)
    assert both[0].size == (16, 32)
    np.testing.assert_array_equal(np.asarray(both[1]), np.asarray(alone[0]))
    same = fake_runtime().generate(PROMPTS, seed=[6, 6])
    np.testing.assert_array_equal(np.asarray(same[1]), np.asarray(alone[0]))


def test_the_vae_gets_one_image_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, decode = list[int](), FakeBackend.decode

    def counted(backend: FakeBackend, latents: base.Array) -> base.Array:
        seen.append(len(latents))
        return decode(backend, latents)

    monkeypatch.setattr(FakeBackend, "decode", counted)
    fake_runtime().generate(["a", "b", "c"])
    assert seen == [1, 1, 1]


def test_guidance_doubles_the_batch_and_can_be_off() -> None:
    model = fake_runtime()
    seen: list[tuple[int, int]] = []
    model.generate("x", progress=lambda done, total: seen.append((done, total)))
    assert isinstance(model.backend, FakeBackend)
    assert model.backend.batches == [2, 2, 2] and seen == [(1, 3), (2, 3), (3, 3)]
    model.backend.batches.clear()
    model.generate("x", guidance_scale=1.0, steps=2)
    assert model.backend.batches == [1, 1]
    # Guidance 1 by hand: v = v0 + 1 (v1 - v0) = v1.
    with_text = model.generate_latents("x", guidance_scale=1.0)
    nearly = model.generate_latents("x", guidance_scale=1.0000001)
    np.testing.assert_allclose(nearly, with_text, atol=1e-5)


@pytest.mark.parametrize(
    ("most", "scale", "batches"),
    [
        (None, 2.0, [10]),
        (None, 1.0, [5]),
        (4, 2.0, [4, 4, 2]),
        (3, 2.0, [2] * 5),
        (2, 2.0, [2] * 5),
        (2, 1.0, [2, 2, 1]),
        (1, 2.0, [1] * 10),  # the halves one after the other
        (1, 1.0, [1] * 5),
    ],
)
def test_many_prompts_fit_into_the_batch_that_the_backend_takes(
    most: int | None, scale: float, batches: list[int]
) -> None:
    prompts, seen = ["a" * (i + 1) for i in range(5)], []
    model = fake_runtime(most)
    images = model.generate(prompts, seed=3, steps=1, guidance_scale=scale, progress=lambda *done: seen.append(done))
    assert isinstance(model.backend, FakeBackend)
    assert model.backend.batches == batches and model.backend.decoded == [1] * 5
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    for i, image in enumerate(images):
        (alone,) = fake_runtime().generate(prompts[i], seed=3 + i, steps=1, guidance_scale=scale)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(alone))


def test_a_size_that_the_model_does_not_take_is_refused_before_anything_runs() -> None:
    model = fake_runtime()
    with pytest.raises(InputError, match="width: found 1600, expected at most 1584, the model's largest"):
        model.generate("x", width=1600)
    for sides, span in (({"height": (32, 32)}, "32"), ({"height": (16, 32)}, "16 to 32")):
        model.settings = replace(model.settings, sides=sides)
        with pytest.raises(InputError, match=f"height: found 48, expected {span}, which this export was made for"):
            model.generate("x", height=48)
    assert isinstance(model.backend, FakeBackend) and model.backend.batches == []
    assert model.generate("x", height=32)[0].size == (16, 32)


def test_the_sizes_of_an_export_are_read_from_its_record(copy: Path) -> None:
    path = copy / "edgeprune_export.json"
    record = json.loads(path.read_text())
    assert base.read_settings(copy).sides == {}
    profile = {"latent_sample": [[1, 8, 2, 3], [1, 8, 8, 8], [2, 8, 16, 12]]}
    path.write_text(json.dumps(record | {"target": "trt", "networks": {"vae_decoder": {"profile": profile}}}))
    assert base.read_settings(copy).sides == {"height": (16, 128), "width": (24, 96)}
    for networks in ([], {"vae_decoder": {"profile": {"latent_sample": [[1, 2]]}}}, {"vae_decoder": None}):
        path.write_text(json.dumps(record | {"target": "trt", "networks": networks}))
        assert base.read_settings(copy).sides == {}
    path.write_text(json.dumps(record | {"target": "coreml"}))
    assert base.read_settings(copy).sides == {"height": (64, 64), "width": (64, 64)}


def test_a_negative_prompt_without_guidance_is_said_to_be_ignored() -> None:
    with pytest.warns(UserWarning, match="negative prompt: ignored"):
        fake_runtime().generate("x", negative_prompt="y", guidance_scale=1.0)


def test_steps_that_no_schedule_has_are_refused_before_text_is_encoded() -> None:
    model = fake_runtime()
    model.scheduler = FlowMatch(shift_terminal=0.1)
    model.backend.close()  # it would say that it is closed
    with pytest.raises(InputError, match="steps: found 1, expected at least 2"):
        model.generate("x", steps=1)


def test_large_images_run_one_at_a_time() -> None:
    model = fake_runtime()
    model.generate(["a", "b", "c"], height=1024, width=1024, steps=1, guidance_scale=1.0)
    model.generate(["a", "b", "c"], height=1024, width=512, steps=1, guidance_scale=1.0)
    assert isinstance(model.backend, FakeBackend)
    assert model.backend.batches == [1, 1, 1, 2, 1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": []}, "prompt"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "seed"),
        ({"steps": 0}, "steps"),
        ({"height": 24}, "height"),
        ({"width": 0}, "width"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        fake_runtime().generate(**({"prompt": "x"} | options))


def test_every_backend_has_the_whole_interface() -> None:
    """The fake and the real backends have the names and parameters of the Protocol."""
    from edgeprune.runtimes.eager import EagerBackend
    from edgeprune.runtimes.networks import NetworkBackend

    methods = {n: m for n, m in vars(base.Backend).items() if inspect.isfunction(m) and not n.startswith("_")}
    assert set(methods) == {
        *("open", "prepare", "encode", "encode_ahead", "modulate", "step", "largest_batch", "images_together"),
        *("decode", "memory", "close"),
    }
    for kind in (FakeBackend, NetworkBackend, EagerBackend):
        for name, method in methods.items():
            theirs = inspect.signature(getattr(kind, name)).parameters
            assert list(theirs) == list(inspect.signature(method).parameters), (kind, name)
    assert set(base.Backend.__annotations__) == {"name", "provider", "why", "precision"}


def test_precision_is_what_is_computed_in() -> None:
    words = [base.precision_of(a, quantized=q) for q in (False, True) for a in ("fp32", "bf16", "fp16", "int8")]
    assert words == ["fp32", "bf16", "fp16", "int8", "W4A32", "W4A16", "W4A16", "W4A8"]


def test_a_runtime_is_closed_by_its_with() -> None:
    with pytest.raises(ZeroDivisionError), fake_runtime() as model:
        assert {"load", "Runtime"} <= set(runtimes.__all__) and model.name == "fake"
        assert set(model.memory()) >= set(memory.SPLIT)
        raise ZeroDivisionError
    assert isinstance(model.backend, FakeBackend) and model.backend.closed
    with pytest.raises(InputError, match="closed"):
        model.generate("x")
    model.close()


# ------------------------------------------------------------------------------------- real files


@pytest.fixture
def source(tiny_folders: tuple[Path, Path]) -> Path:
    """A tiny diffusers folder."""
    return tiny_folders[0]


@pytest.fixture
def exported(tiny_folders: tuple[Path, Path]) -> Path:
    """The folder's ONNX export, not quantised."""
    return tiny_folders[1]


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the export that a test may damage."""
    yield Path(shutil.copytree(exported, tmp_path / "copy"))


def test_tokens_equal_transformers(exported: Path) -> None:
    from transformers import CLIPTokenizer

    from edgeprune.runtimes.text import PromptTokenizer

    theirs = CLIPTokenizer.from_pretrained(exported / "tokenizer")
    texts = [
        *PROMPTS,
        "",
        "  Two   RED\ncircles!! ",
        "a " * 40,
        "x" * 99,
        "déjà vu, it's 12345 <|endoftext|> 🙂",
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen",
    ]
    ids = theirs(texts, padding="max_length", max_length=theirs.model_max_length, truncation=True).input_ids
    ours = PromptTokenizer(exported / "tokenizer", chat=False)
    assert ours.max_length == 16
    np.testing.assert_array_equal(ours(texts), ids)
    np.testing.assert_array_equal(
        PromptTokenizer(exported / "tokenizer", chat=False, max_length=7)(texts),
        theirs(texts, padding="max_length", max_length=7, truncation=True).input_ids,
    )


@pytest.mark.filterwarnings("ignore")
def test_same_seed_same_image_as_torch(source: Path, exported: Path) -> None:
    """With the same float32 weights, latents agree to 1e-4 of their size and pixels to 1 of 255."""
    with runtimes.load(exported, "ort") as ours, runtimes.load(source) as theirs:
        assert (ours.name, theirs.name) == ("ort", "eager")
        for mine, reference in zip(ours.backend.encode(PROMPTS), theirs.backend.encode(PROMPTS), strict=True):
            np.testing.assert_allclose(mine, reference, atol=2e-5)
        mine, reference = (m.generate_latents(PROMPTS, seed=7) for m in (ours, theirs))
        assert np.linalg.norm(mine - reference) <= 1e-4 * np.linalg.norm(reference)
        images = [m.generate(PROMPTS, seed=7) for m in (ours, theirs)]
        for a, b in zip(*images, strict=True):
            assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
        assert np.asarray(images[0][0]).std() > 5
        # Another size than the exported example's, and no guidance.
        wide = [m.generate(PROMPTS[0], height=32, width=96, guidance_scale=0, steps=2)[0] for m in (ours, theirs)]
        assert wide[0].size == (96, 32)
        assert np.abs(np.asarray(wide[0], int) - np.asarray(wide[1], int)).max() <= 1
    with pytest.raises(InputError, match="closed"):
        ours.generate("x")


@pytest.mark.filterwarnings("ignore")
def test_eager_equals_stock_diffusers(source: Path) -> None:
    """Compare our loop, guidance and decoding with StableDiffusion3Pipeline itself, from the same noise."""
    import torch

    with runtimes.load(source) as model:
        ours = np.asarray(model.generate(PROMPTS[0], seed=3)[0], int)
        noise = base.initial_latents(model.settings, [3], 64, 64)
        pipe = model.backend.pipeline  # type: ignore[attr-defined]
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(
            PROMPTS[0], latents=torch.from_numpy(noise), num_inference_steps=4, guidance_scale=3.0, height=64, width=64,
            max_sequence_length=0,
        ).images[0]  # fmt: skip
    assert np.abs(ours - np.asarray(theirs, int)).max() <= 1


@pytest.mark.filterwarnings("ignore")
def test_eager_within_a_budget_draws_the_same(source: Path) -> None:
    """Given memory, parts are in memory one after the other and blocks are read when they run."""
    drawn = []
    for options in ({}, {"memory": 10**11}):
        with runtimes.load(source, "eager", **options) as model:
            drawn.append(np.asarray(model.generate("two red circles", seed=3)[0]))
            streamed = is_streamed(model.backend.pipeline.transformer.transformer_blocks[0])
            assert streamed is bool(options)
    assert np.array_equal(*drawn)


def test_too_little_memory_is_refused_by_the_plan(source: Path, exported: Path) -> None:
    """Which opens nothing."""
    pytest.importorskip("onnxruntime")
    for folder in (source, exported):
        with pytest.raises(InputError, match=r"memory: found 0\.10 GB, expected at least \d+\.\d+ GB"):
            runtimes.plan(folder, memory=10**8)
        with runtimes.plan(folder) as model:
            held = vars(model.backend)["_pipeline" if folder == source else "_networks"]
            assert not held
            model.prepare()
            assert model.generate("two red circles", steps=1)[0].size == (64, 64)
        with pytest.raises(InputError, match="closed"):
            model.generate("x")


def memory_of(exported: Path) -> int:
    """Return the least memory in bytes that the plan of an export names."""
    with pytest.raises(InputError) as refused:
        runtimes.plan(exported, "ort", memory=1)
    return int(1e9 * float(re.findall(r"at least (\S+) GB", str(refused.value))[0]))


def test_a_size_that_does_not_fit_is_refused_before_anything_is_opened(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model's values are few, so they count a thousandfold here."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("edgeprune.common.pieces.SLACK", 1000)
    opened = list[object]()
    monkeypatch.setattr("edgeprune.runtimes.networks.NetworkBackend.open", opened.append)
    options, memory = api.GenerationOptions(height=128, width=128), memory_of(exported) + 5 * 10**7
    with pytest.raises(InputError, match=r"expected at least \d+\.\d+ GB, which .* image of 128x128"):
        api.generate(exported, "x", generation=options, runtime="ort", memory=memory)
    assert opened == []
    with runtimes.plan(exported, "ort", memory=memory) as model:
        model.prepare()


def test_a_large_model_computes_in_what_the_machine_multiplies(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compute", "running"):
        monkeypatch.setattr(f"edgeprune.residency.{module}.is_small", lambda numbers: False)
    monkeypatch.setattr("edgeprune.residency.running._stored_dtype", lambda _: torch.bfloat16)
    for fast, name, dtype in ((True, "bf16", torch.bfloat16), (False, "fp32", torch.float32)):
        monkeypatch.setattr("edgeprune.residency.compute.multiplies_bf16", lambda fast=fast: fast)
        with runtimes.load(source, "eager") as model:
            held = next(p for p in model.backend.pipeline.transformer.parameters() if not p.is_meta)
            assert (model.backend.precision, held.dtype) == (name, dtype)


def test_half_precision_reference_draws_about_the_same(source: Path) -> None:
    with runtimes.load(source, dtype="bf16") as half, runtimes.load(source) as full:
        assert half.backend.precision == "bf16"
        a, b = (np.asarray(m.generate(PROMPTS[0])[0], float) for m in (half, full))
    assert np.abs(a - b).mean() < 8


def test_folders_that_are_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        runtimes.load(tmp_path / "absent")
    with pytest.raises(InputError, match=r"model_index\.json"):
        runtimes.load(tmp_path)
    (tmp_path / "edgeprune_export.json").write_text('{"target": "toaster"}')
    with pytest.raises(InputError, match="toaster"):
        runtimes.load(tmp_path)


def test_wrong_runtime_for_a_folder(exported: Path, source: Path) -> None:
    with pytest.raises(InputError, match="export it first"):
        runtimes.load(source, "ort")
    with pytest.raises(InputError, match="eager"):
        runtimes.load(exported, "eager")
    with pytest.raises(InputError, match="expected one of openvino, ort, .*eager"):
        runtimes.load(exported, "abacus")


def test_missing_package_says_the_extra(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"edgeprune\[onnx\]"):
        runtimes.load(exported)


@pytest.mark.parametrize("name", ["transformer/model.onnx", "text_encoder_2/model.onnx", "vae_decoder/model.onnx"])
def test_truncated_or_missing_onnx(copy: Path, name: str) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=name):
        runtimes.load(copy, "ort")
    path.unlink()
    with pytest.raises(InputError, match=name):
        runtimes.load(copy, "ort")


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("generation.json", "num_inference_steps", 0),
        ("generation.json", "guidance_scale", "high"),
        ("generation.json", "height", 63),
        ("transformer/config.json", "patch_size", None),
        ("transformer/config.json", "joint_attention_dim", "wide"),
        ("vae_decoder/config.json", "block_out_channels", []),
        ("scheduler/scheduler_config.json", "stochastic_sampling", True),
        ("tokenizer/tokenizer_config.json", "model_max_length", 1e30),
        ("tokenizer/tokenizer_config.json", "pad_token", "<nothing>"),
    ],
)
def test_bad_field(copy: Path, name: str, field: str, value: object) -> None:
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=rf"{name}.*{field}"):
        runtimes.load(copy)


@pytest.mark.parametrize(
    "name",
    ["generation.json", "edgeprune_export.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"],
)
def test_damaged_json(copy: Path, name: str) -> None:
    (copy / name).write_text('{"half')
    with pytest.raises(InputError, match=name):
        runtimes.load(copy)
    (copy / name).write_text("{}")
    if name.startswith("tokenizer"):
        with pytest.raises(InputError, match=name):
            runtimes.load(copy)


def test_bad_runtime_options(exported: Path, source: Path) -> None:
    with pytest.raises(InputError, match="precision: found 'int4', expected exact or int8 on CPUExecutionProvider"):
        runtimes.load(exported, "ort", precision="int4")
    for folder, runtime in ((exported, "ort"), (source, "eager")):
        with pytest.raises(InputError, match="threads: found -1, expected 0 or more"):
            runtimes.load(folder, runtime, threads=-1)


def test_refuses_to_be_imported_under_another_name() -> None:
    root = Path(runtimes.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", "import runtimes"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and "edgeprune.runtimes" in done.stderr


def test_an_option_that_a_runtime_does_not_have(source: Path, exported: Path) -> None:
    with pytest.raises(InputError, match="eager: option provider: unknown, expected one of dtype, threads"):
        runtimes.load(source, provider="cpu")
    with pytest.raises(InputError, match="ort: option dtype: unknown"):
        runtimes.load(exported, "ort", dtype="bf16")


def test_nothing_that_runs_here_is_an_error(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ort" in runtimes.runnable(exported)
    monkeypatch.setattr(runtimes.RuntimeInfo, "has_hardware", lambda self: False)
    with pytest.raises(InputError, match="none of which runs here; see edgeprune doctor"):
        runtimes.runnable(exported)


def test_networks_are_closed_when_a_later_one_fails(exported: Path) -> None:
    from edgeprune.runtimes.base import read_settings
    from edgeprune.runtimes.networks import NetworkBackend, WholeEngine

    class Opened:
        provider, why, closed = "x", "y", False

        def __call__(self, **arrays: object) -> dict[str, Any]:
            return {}

        def largest_batch(self, name: str) -> None:
            return None

        def close(self) -> None:
            self.closed = True

    opened: list[Opened] = []

    def open_network(path: Path) -> Opened:
        if path.name == "transformer":
            raise InputError("damaged")
        opened.append(Opened())
        return opened[-1]

    with pytest.raises(InputError, match="damaged"):
        NetworkBackend(WholeEngine("x", open_network), exported, read_settings(exported)).open()
    assert len(opened) == 2 and all(network.closed for network in opened)


def test_int8_is_for_the_transformer_alone(tiny_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoders, modulation and VAE compute in float32: their errors would be the transformer's input."""
    from edgeprune.runtimes import ort

    seen, real = {}, ort.session_of

    def session_of(model: Any, options: Any, choice: Any) -> Any:
        seen[model.parent.name] = options.get_session_config_entry(ort.ACCURACY)
        return real(model, options, choice)

    monkeypatch.setattr(ort, "session_of", session_of)
    for provider in (None, "cpu"):
        with runtimes.load(tiny_folders[1], "ort", threads=1, precision="int8", provider=provider):
            assert seen.pop("transformer") == "4" and len(seen) == 3 and set(seen.values()) == {"1"}
        seen.clear()
