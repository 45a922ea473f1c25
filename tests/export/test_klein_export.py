"""FLUX.2 klein on a device: the language model that encodes its text, its chat, and whole images as in torch."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
import torch
import traced

from edgeprune import runtimes, targets
from edgeprune.artefact.loading import cut_unread, load
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.artefact.synth import tokenizers
from edgeprune.common.errors import BudgetError, InputError, ParityError
from edgeprune.common.pieces import RESERVE
from edgeprune.export import language_model, parity, stored_encoder, to_onnx, to_openvino
from edgeprune.export.stored_qwen3 import StoredQwen3
from edgeprune.families import published
from edgeprune.families.encoders import QWEN3, THOUGHTLESS
from edgeprune.families.parts import VAE_FLUX2, is_read, part_shapes
from edgeprune.planning import fit
from edgeprune.quantization.precision import text_precision_of
from edgeprune.quantization.text import quantize_text_encoder
from edgeprune.residency.compute import Compute
from edgeprune.runtimes import base, networks, piecewise
from edgeprune.runtimes.text import CHAT, PromptTokenizer
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.latents import exported_scale

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PROMPTS = ["two red circles", "", "a small green ring left of a large blue star " * 9]
STATES = (1, 3, 4)
"""Of a text encoder of six layers: klein's states, 9, 18 and 27 of 29, take minutes to trace."""
READ = STATES[-1]
EXPORTED = pytest.mark.slow
"""What needs the exports: three traces and a conversion. Quick tests export FLUX.1, and a T5."""
NETWORKS = ("transformer", "text_encoder", "vae_decoder")


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Iterator[None]:
    with tiny.shallow_klein(STATES):
        yield


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, shallow: None) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("klein")
    for name, distilled in (("base", False), ("distilled", True)):
        tiny.tiny_klein_pipeline(root / name, distilled=distilled, num_layers=1, num_single_layers=1)
    return {name: root / name for name in ("base", "distilled")}


@pytest.fixture(scope="module")
def onnx_folder(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("out") / "onnx"
    record = to_onnx.export(sources["base"], out)
    assert list(record["parity"]) == list(NETWORKS) and record["encoders"] == {"text_encoder": "int8"}
    assert max(found["max_relative"] for found in record["parity"].values()) < 1e-4
    return out


@pytest.fixture(scope="module")
def surroundings(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export without its networks."""
    out = tmp_path_factory.mktemp("surroundings") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "networks", lambda *_, **__: {})
        patch.setattr(to_onnx.precisions, "measured", lambda *_: {})
        to_onnx.export(sources["base"], out)
    return out


@pytest.fixture(scope="module")
def folders(onnx_folder: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The export of each runtime: klein base in ONNX, the distilled one, of the same weights, in OpenVINO."""
    pytest.importorskip("openvino")
    out = tmp_path_factory.mktemp("out") / "openvino"
    with pytest.MonkeyPatch.context() as patch:
        traced.reuse(patch, onnx_folder, *NETWORKS)
        to_openvino.export(sources["distilled"], out, device=targets.load("intel-igpu"))
    return {"ort": onnx_folder, "openvino": out}


@pytest.fixture(scope="module")
def rounded(sources: dict[str, Path]) -> Any:
    """The pipeline as diffusers runs it, with a text encoder of the weights that an export has."""
    pipe = load(sources["base"])
    integers = dict(quantize_text_encoder(copy.deepcopy(pipe.text_encoder)).named_modules())
    for name, layer in pipe.text_encoder.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = integers[name].weight
    return pipe


# ------------------------------------------------------------------------------------- the network


@torch.no_grad()
def test_states_are_those_of_transformers() -> None:
    model = tiny.tiny_qwen3(300)
    whole = copy.deepcopy(model)
    cut_unread(model, STATES)
    module = language_model.LanguageModel(model, STATES)
    inputs = module.example(batch=3, tokens=13)
    assert inputs["attention_mask"].sum(1).tolist() == [13, 9, 5]
    states = whole(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    for found, reference, state in zip(module(**inputs), module.reference(**inputs), STATES, strict=True):
        torch.testing.assert_close(found, states[state], rtol=1e-5, atol=1e-5)
        assert torch.equal(reference, states[state])
    other = module(inputs["input_ids"], torch.ones_like(inputs["attention_mask"]))
    assert (other[2] - states[READ]).abs().max() > 0.1  # a padding token attends to no padding


def test_positions_are_those_of_both_versions_of_transformers() -> None:
    from types import SimpleNamespace

    config = tiny.tiny_qwen3(9, layers=1).config
    expected = tiny.tiny_qwen3(9, layers=1).model.rotary_emb.inv_freq
    assert torch.equal(language_model.speeds_of(config), expected)
    old = SimpleNamespace(rope_theta=1_000_000.0, rope_scaling=None, head_dim=16)
    assert torch.equal(language_model.speeds_of(old), expected)


@EXPORTED
def test_only_what_is_read_is_written_in_8_bits(onnx_folder: Path) -> None:
    model = onnx.load(str(onnx_folder / "text_encoder" / "model.onnx"))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in kinds if ".layers." in name}
    assert layers == set(range(READ)) and not any("lm_head" in name or name == "model.norm.weight" for name in kinds)
    linear = [kind for name, kind in kinds.items() if "_proj" in name and "weight_packed" in name]
    assert len(linear) == 7 * READ and set(linear) == {onnx.TensorProto.INT8}
    (words,) = [kind for name, kind in kinds.items() if "embed_tokens" in name]
    assert words == onnx.TensorProto.FLOAT16
    assert [value.name for value in model.graph.output] == [f"hidden_states.{state}" for state in STATES]


@EXPORTED
def test_a_wrong_number_fails_parity(
    sources: dict[str, Path], onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, name = StoredQwen3._original, "model.layers.3.self_attn.k_proj.weight"
    monkeypatch.setattr(StoredQwen3, "_original", lambda of, read: -real(of, read) if read == name else real(of, read))
    stored = StoredQwen3(sources["base"] / "text_encoder", STATES)
    examples = [stored.running().example(batch=2, tokens=9)]
    runner = parity.session(onnx_folder / "text_encoder" / "model.onnx")
    with pytest.raises(ParityError, match=rf"hidden_states.{READ}: found a relative error"):
        parity.check("text_encoder", runner, stored.checkpoint(), examples, [f"hidden_states.{s}" for s in STATES])


# ------------------------------------------------------------------------------------- the chat


def texts() -> list[str]:
    """Return 200 prompts: words, scripts, emoji, spaces, special tokens, the empty one, very long ones."""
    rng = random.Random(0)
    special = ["<|im_end|>", "<|endoftext|>", "<|im_start|>", "</think>", "<think>", "\n", "\t", "  ", "e\u0301", "ﬁ"]
    scripts = [(0x20, 0x7F), (0xC0, 0x250), (0x370, 0x500), (0x5D0, 0x6FF), (0x4E00, 0x5000), (0x1F300, 0x1F6FF)]
    found = [
        "",
        " ",
        "\n",
        "two red circles",
        "👩‍👩‍👧‍👦 🏳️‍🌈",
        "naïve café",
        "word " * 700,
        "<|endoftext|>",
        "<|endoftext|>" * 60,
    ]
    while len(found) < 200:
        low, high = rng.choice(scripts)
        words = [
            "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 9))) for _ in range(rng.randrange(30))
        ]
        words[rng.randrange(len(words) + 1) : 0] = rng.sample(special, rng.randrange(3))
        found.append(rng.choice([" ", "", "\n", ", "]).join(words))
    return found


def chats_of(tokenizer: Any) -> list[str]:
    """Return the texts in the chat that diffusers makes of them."""
    chats = ([{"role": "user", "content": text}] for text in texts())
    how = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
    return [tokenizer.apply_chat_template(chat, **how) for chat in chats]


@pytest.mark.parametrize("length", [2, 40, 512])
def test_tokens_equal_transformers(surroundings: Path, sources: dict[str, Path], length: int) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(sources["base"] / "tokenizer")
    chats = chats_of(theirs)
    expected = theirs(chats, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    ours = PromptTokenizer(surroundings / "tokenizer", chat=True, max_length=length)
    found = ours.masked(texts())
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])
    np.testing.assert_array_equal(found["attention_mask"], expected["attention_mask"])
    assert [ours.count(text) for text in texts()] == [len(theirs(chat).input_ids) for chat in chats]


def test_a_tokenizer_that_is_not_built_yet_is_written_as_transformers_reads_it(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Of a folder with vocabulary and merges alone; transformers also ignores the rules of a tokenizer.json."""
    from edgeprune.export.folder import _tokenizer

    tokenizers.write_qwen(tmp_path / "plain", words=900)
    ruined = Path(shutil.copytree(sources["base"] / "tokenizer", tmp_path / "ruined"))
    rules = json.loads((ruined / "tokenizer.json").read_text())
    (ruined / "tokenizer.json").write_text(json.dumps(rules | {"normalizer": {"type": "Lowercase"}}))
    from transformers import AutoTokenizer

    for folder in (tmp_path / "plain", ruined):
        _tokenizer(folder, tmp_path / "out" / folder.name, THOUGHTLESS)
        theirs = AutoTokenizer.from_pretrained(folder)
        chats = chats_of(theirs)
        expected = theirs(chats, padding="max_length", truncation=True, max_length=60, return_tensors="np")
        ours = PromptTokenizer(tmp_path / "out" / folder.name, chat=True, max_length=60)
        np.testing.assert_array_equal(ours(texts()), expected["input_ids"])


def test_a_chat_that_is_not_klein_s_is_refused_before_anything_is_written(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sources["base"], tmp_path / "m"))
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0]['content'] | upper }}")
    with pytest.raises(InputError, match=r"chat_template\.jinja: chat template makes .*THE PROMPT") as refused:
        to_onnx.export(folder, tmp_path / "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_only_a_language_model_has_a_chat(surroundings: Path, tmp_path: Path) -> None:
    """A file that happens to be there changes no prompt of another encoder, and one that is missing is named."""
    folder = Path(shutil.copytree(surroundings / "tokenizer", tmp_path / "tokenizer"))
    plain = PromptTokenizer(folder, chat=False, max_length=40)
    assert plain.count("two red circles") < PromptTokenizer(folder, chat=True, max_length=40).count("two red circles")
    (folder / CHAT).write_text("{")
    np.testing.assert_array_equal(PromptTokenizer(folder, chat=False, max_length=40)(PROMPTS), plain(PROMPTS))
    (folder / CHAT).unlink()
    with pytest.raises(InputError, match=r"chat\.json: no such file") as refused:
        PromptTokenizer(folder, chat=True, max_length=40)
    assert "\n" not in str(refused.value)


def test_a_damaged_chat_is_named(surroundings: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(surroundings / "tokenizer", tmp_path / "tokenizer"))
    (folder / CHAT).write_text('{"prefix": 3, "suffix": ""}')
    with pytest.raises(InputError, match=r"chat\.json: prefix: found 3, expected a string"):
        PromptTokenizer(folder, chat=True, max_length=40)


# ------------------------------------------------------------------------------------- the whole pipeline


@EXPORTED
@pytest.mark.parametrize("name", ["ort", "openvino"])
@pytest.mark.parametrize("free", [10**12, 0])
def test_encode_is_diffusers_own(
    folders: dict[str, Path], rounded: Any, name: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "allowed", lambda: free)
    with torch.no_grad():
        expected, _ = rounded.encode_prompt(PROMPTS, max_sequence_length=40, text_encoder_out_layers=STATES)
    with runtimes.load(folders[name], name) as model:
        hidden, pooled = model.backend.encode(PROMPTS)
    assert hidden.shape == (3, 40, 3 * tiny.QWEN_WIDTH) and pooled.shape == (3, 0)
    assert parity.relative_error(hidden, expected.numpy())[0] <= 1e-4


@EXPORTED
@pytest.mark.parametrize("name", ["ort", "openvino"])
@pytest.mark.parametrize("free", [10**12, 0])
def test_same_seed_same_image_as_torch(
    folders: dict[str, Path], sources: dict[str, Path], name: str, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided and distilled; most of the difference comes from the export's 8-bit text encoder."""
    folder = sources["base" if name == "ort" else "distilled"]
    monkeypatch.setattr(networks, "allowed", lambda: free)

    def encode(prompts: Sequence[str]) -> tuple[Any, ...]:
        return tuple(value.numpy() for value in StagedPipeline(folder, None, Compute()).encode(list(prompts), 40))

    with runtimes.load(folders[name], name) as ours, runtimes.load(folder) as theirs:
        assert ours.settings.generation == theirs.settings.generation
        text = encode(PROMPTS[:2])
        latents = base.initial_latents(ours.settings, [1, 2], 48, 80)
        mine, reference = (m.step(latents, *text, np.asarray([0.9, 0.2], np.float32)) for m in (ours, theirs))
        assert np.linalg.norm(mine - reference) <= 1e-5 * np.linalg.norm(reference)
        for backend in (ours.backend, theirs.backend):
            monkeypatch.setattr(backend, "encode", encode)
        drawn = [m.generate(PROMPTS[0], seed=3)[0] for m in (ours, theirs)]
    pixels = [np.asarray(image, int) for image in drawn]
    assert pixels[1].std() > 5 and np.abs(pixels[0] - pixels[1]).max() <= 1


@EXPORTED
def test_a_device_needs_no_vae_weights_for_its_latents(onnx_folder: Path, sources: dict[str, Path]) -> None:
    config = json.loads((onnx_folder / "vae_decoder" / "config.json").read_text())
    pipe = load(sources["base"])
    std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    np.testing.assert_array_equal(np.asarray(config["batch_norm_mean"], np.float32), pipe.vae.bn.running_mean)
    np.testing.assert_array_equal(np.asarray(config["batch_norm_std"], np.float32), std)


@EXPORTED
@pytest.mark.parametrize(
    "change",
    [
        {"batch_norm_std": [1.0]},
        {"batch_norm_mean": "x"},
        {"batch_norm_mean": None},
        {"batch_norm_mean": [True] * 32},
        {"batch_norm_mean": None, "batch_norm_std": None},  # not a VAE that has a scaling factor
    ],
)
def test_bad_statistics_are_named(onnx_folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "m"))
    path = folder / "vae_decoder" / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(InputError, match=rf"config.json: {next(iter(change))}: found .*, expected four numbers"):
        runtimes.load(folder, "ort")


@pytest.mark.parametrize("least", [0.0, -1.0])
def test_a_deviation_that_is_not_above_0_is_named(least: float) -> None:
    config = {"latent_channels": 1, "batch_norm_mean": [0.0] * 4, "batch_norm_std": [1.0, least, 1.0, 1.0]}
    with pytest.raises(InputError, match=rf"c: batch_norm_std: found {least:g}, expected numbers above 0"):
        exported_scale(config, VAE_FLUX2, "c")


@EXPORTED
def test_prompts_are_kept(onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtimes.load(onnx_folder, "ort", keep_embeddings=tmp_path) as model:
        first = model.backend.encode(PROMPTS)
    with runtimes.load(onnx_folder, "ort", keep_embeddings=tmp_path) as model:
        monkeypatch.setattr(type(model.backend), "_encode", None)
        for one, other in zip(model.backend.encode(PROMPTS), first, strict=True):
            np.testing.assert_array_equal(one, other)


# ------------------------------------------------------------------------------------- memory


@EXPORTED
@pytest.mark.parametrize("name", ["ort", "openvino"])
def test_in_pieces_it_computes_the_same(folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In little memory layers are opened one after the other, and words are looked up in the file."""
    monkeypatch.setattr(piecewise, "TABLE", 1000)
    monkeypatch.setattr(piecewise, "resident", lambda: 0)
    inputs = language_model.LanguageModel(tiny.tiny_qwen3(1200, layers=1), (1,)).example(batch=2, tokens=40)
    feed = {key: value.numpy() for key, value in inputs.items()}
    with runtimes.load(folders[name], name) as model:
        engine, folder = model.backend._engine, folders[name] / "text_encoder"  # type: ignore[attr-defined]
        needs = engine.needs(folder, {key: value.shape for key, value in feed.items()})
        whole, pieces = engine.open(folder, None), engine.open(folder, RESERVE + needs.least + 100_000)
        expected, found = whole(**feed), pieces(**feed)
    assert needs.least < needs.whole and len(pieces._pieces) > 1
    assert any(isinstance(piece, piecewise.Lookup) for piece in pieces._pieces)
    for state in expected:
        np.testing.assert_allclose(found[state], expected[state], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_keeps_the_weights(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_encoder, "form_of", lambda folder: "half")
    stored = StoredQwen3(sources["base"] / "text_encoder", STATES)
    inputs = stored.running().example(batch=2, tokens=11)
    model = load(sources["base"]).text_encoder
    expected = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    for found, state in zip(stored.running()(**inputs), STATES, strict=True):
        torch.testing.assert_close(found, expected[state], rtol=1e-5, atol=1e-5)
    half, inputs = stored.running(torch.float16), stored.empty().example(batch=2, tokens=300)
    expected = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
    for found, state in zip(half(**inputs), STATES, strict=True):
        assert found.dtype == torch.float32  # the stream
        error = parity.relative_error(found.numpy(), expected[state].numpy())[1]
        assert 1e-4 < error < parity.HALF_BOUND  # positions are exact
    kinds = {name: tensor.dtype for name, tensor in stored.empty().state_dict().items() if "_proj" in name}
    assert len(kinds) == 7 * READ and set(kinds.values()) == {torch.float16}


def test_fit_counts_what_is_exported(sources: dict[str, Path]) -> None:
    device, generation = targets.load("cpu-x86"), Generation.load(sources["base"])
    state = {n: tuple(t.shape) for n, t in load(sources["base"]).text_encoder.state_dict().items()}
    assert len(state) == READ * 11 + 1
    for encoders, form in {"int4": "int4-wo8", "int8": "int8", "half": "half"}.items():
        expected = sum(text_precision_of(name, shape, form).nbytes(shape) for name, shape in state.items())
        assert fit.fit(sources["base"], device, generation, encoders).text_encoder_bytes == expected


def test_fit_names_what_can_be_done(sources: dict[str, Path]) -> None:
    """No pipeline without T5 is asked for."""
    generation = Generation.load(sources["base"])
    small = dataclasses.replace(targets.load("cpu-x86"), memory_bytes=1)
    with pytest.raises(BudgetError, match=r"the largest text encoder takes .*; use a device with more memory"):
        fit.fit(sources["base"], small, generation)


def test_klein_4b_in_bytes() -> None:
    """Its Qwen3 has 4.02 G parameters, of which 3.11 G are read; 0.39 G are words."""
    config = published.networks()["qwen3-4b"].config
    shapes = {n: s for n, s in (part_shapes(QWEN3, config, "c") or {}).items() if is_read(QWEN3, n, (9, 18, 27))}
    for form, size in {"int4": 1.84, "int4-wo8": 2.15, "int8": 3.51, "half": 6.23}.items():
        found = sum(text_precision_of(name, shape, form).nbytes(shape) for name, shape in shapes.items()) / 1e9
        assert found == pytest.approx(size, abs=0.01), form
