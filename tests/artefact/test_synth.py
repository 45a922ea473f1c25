"""Published pipelines with random weights: real sizes, tokenizers and settings, and no network whole in memory."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CLIPTokenizer, Qwen2TokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

import edgeprune
from edgeprune import api
from edgeprune.artefact import synth
from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.synth import drawing, networks, tokenizers
from edgeprune.common.errors import EdgepruneError, InputError
from edgeprune.common.files import read_json, sha256_file
from edgeprune.families import family_of, published
from edgeprune.families.parts import tensor_of
from edgeprune.residency.shards import ShardWriter
from edgeprune.residency.weights import Weights
from edgeprune.sampling.generation import Generation, GenerationOptions
from edgeprune.sampling.scheduler import FlowMatch

SHARED = Path(__file__).parents[3] / "shared" / "data"
TRANSFORMERS = {
    "sd3.5-large": 8_056_627_520, "sd3.5-large-turbo": 8_056_627_520, "sd3.5-medium": 2_243_171_520,
    "flux.1-dev": 11_901_408_320, "flux.1-schnell": 11_891_178_560,
    "flux.2-klein-4b": 3_875_544_576, "flux.2-klein-base-4b": 3_875_544_576, "z-image-turbo": 6_154_908_736,
    "qwen-image": 20_430_401_088,
}  # fmt: skip
KLEIN = ("flux.2-klein-4b", "flux.2-klein-base-4b")
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32, "num_hidden_layers": 2}
SMALL: dict[str, dict[str, Any]] = {
    "clip-l": SMALL_TEXT | {"num_attention_heads": 2},
    "clip-l-pooled": SMALL_TEXT | {"num_attention_heads": 2},
    "clip-g": SMALL_TEXT | {"num_attention_heads": 4},
    "t5-xxl": {"d_model": 96, "d_ff": 128, "num_heads": 2, "num_layers": 2},
    "qwen3-4b": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 36, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16,
    },
    "qwen2.5-vl-7b-text": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        },
    },
    "vae-qwen-image": {"base_dim": 8, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    "vae-sd3.5": {"block_out_channels": [16, 16, 16, 32], "norm_num_groups": 8, "layers_per_block": 1},
    "vae-flux.1": {"block_out_channels": [16, 16, 16, 32], "norm_num_groups": 8, "layers_per_block": 1},
    "vae-flux.2": {"block_out_channels": [16, 16, 16, 32], "norm_num_groups": 8, "layers_per_block": 1},
}  # fmt: skip
FEW_BLOCKS: dict[str, dict[str, Any]] = {
    "sd3.5-large": {
        "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "caption_projection_dim": 64,
        "joint_attention_dim": 96, "pooled_projection_dim": 64,
    },
    "flux.1-dev": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
        "axes_dims_rope": [8, 12, 12], "joint_attention_dim": 96, "pooled_projection_dim": 32,
    },
    "flux.2-klein-4b": {
        "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32,
        "axes_dims_rope": [8, 8, 8, 8], "joint_attention_dim": 96,
    },
    "z-image-turbo": {
        "n_layers": 1, "n_refiner_layers": 1, "dim": 64, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [8, 12, 12],
        "cap_feat_dim": 32,
    },
    "qwen-image": {
        "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12],
        "joint_attention_dim": 32,
    },
}  # fmt: skip


@pytest.fixture
def scaled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every published network small; names, tokenizers and settings stay."""
    known = {n: dataclasses.replace(e, config=e.config | SMALL[n]) for n, e in published.networks().items()}
    configs = {n: c | FEW_BLOCKS.get(n, {}) for n, c in published.transformers().items()}
    monkeypatch.setattr(networks, "networks", lambda: copy.deepcopy(known))
    monkeypatch.setattr(published, "transformers", lambda: copy.deepcopy(configs))


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", published.pipelines())
def test_every_network_has_its_published_number_of_parameters(name: str) -> None:
    pipeline, known = published.pipelines()[name], published.networks()
    config = published.transformers()[pipeline.transformer]
    family = family_of(config)

    def count(network: networks.RandomNetwork) -> int:
        return sum(math.prod(shape) for piece in network.pieces for shape in piece.values())

    tables = sum(math.prod(s) for n, s in family.tensor_shapes(config).items() if family.is_buffer(n))
    assert count(networks.transformer(family, config)) - tables == TRANSFORMERS[name]
    others = {part.folder: part for part in networks.others(family, pipeline)}
    assert others.keys() == pipeline.networks.keys()
    for folder, part in others.items():
        statistics = 257 if folder == "vae" and family.vae == "AutoencoderKLFlux2" else 0  # of its batch norm
        assert count(part) - statistics == known[pipeline.networks[folder]].parameters
    assert {round(known[n].parameters / 1e6) for n in ("clip-l-pooled", "clip-g", "t5-xxl")} == {123, 695, 4762}


@pytest.mark.parametrize("name", ["clip-l", "clip-l-pooled", "clip-g", "t5-xxl", "vae-flux.1"])
def test_shapes_are_those_of_the_classes(name: str) -> None:
    """The table of families/parts.py and the vendors' classes agree; T5's class names its embedding twice."""
    config = published.networks()[name].config
    kind = config.get("_class_name") or config["architectures"][0]
    found = networks._shapes_of_class(kind, config)
    assert networks.part_shapes(kind, config, name) == {tensor_of(kind, n): shape for n, shape in found.items()}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the facts in shared/data")
def test_the_facts_are_those_of_the_model_cards() -> None:
    cards, configs = (read_json(SHARED / f"{n}.json") for n in ("pipelines", "encoder_configs"))
    for name, pipeline in published.pipelines().items():
        card, settings = cards[name], pipeline.generation
        steps = card.get("evaluations", card["steps"])  # Z-Image's card says 9 of a diffusers whose last did nothing
        scale = card["guidance"] if "guidance" in card else card["true_cfg"]
        assert (settings["num_inference_steps"], settings["guidance_scale"]) == (steps, scale)
        assert (settings["height"], settings["max_sequence_length"]) == (card["size"], card["max_sequence_length"])
        assert pipeline.scheduler.items() >= card.get("dynamic_shifting", {}).items()
        assert pipeline.scheduler["shift"] == card.get("shift", 1.0 if "true_cfg" in card else 3.0)
        assert pipeline.index.get("is_distilled") == card.get("is_distilled")
        encoders = {n.replace("-pooled", " pooled") for f, n in pipeline.networks.items() if f != "vae"}
        assert encoders == set(card["encoders"])
    for name, network in published.networks().items():
        facts = configs.get(name, configs["vae-16"] if name in ("vae-sd3.5", "vae-flux.1") else {})
        assert network.config.items() >= {k: v for k, v in facts.items() if k not in ("class", "read_by")}.items()


# ------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["sd3.5-large", pytest.param("flux.1-dev", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("scaled_down")
def test_a_scaled_down_pipeline_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synth.synth(name, tmp_path / "m")
    index = check_pipeline(tmp_path / "m")
    assert not list((tmp_path / "m").rglob("unfinished.json")) and not list((tmp_path / "m").rglob("*.tmp"))
    assert {p.name for p in (tmp_path / "m").iterdir() if p.is_dir()} == {n for n in index if not n.startswith("_")}
    assert Weights(tmp_path / "m" / "text_encoder_2").shapes
    monkeypatch.setattr("edgeprune.artefact.loading.is_small", lambda numbers: False)
    pipe = edgeprune.load(tmp_path / "m")
    assert {p.dtype for part in (pipe.transformer, pipe.vae) for p in part.parameters()} == {torch.bfloat16}
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a red fox", num_inference_steps=2, height=64, width=64, output_type="pt").images
    assert images.isfinite().all() and images.std() > 0.05
    generation = Generation.load(tmp_path / "m")
    assert generation.to_json() == published.pipelines()[name].generation


@pytest.mark.usefixtures("scaled_down")
def test_turbo_and_dev_come_with_their_settings(tmp_path: Path) -> None:
    synth.synth("sd3.5-large-turbo", tmp_path / "any-name")
    assert Generation.load(tmp_path / "any-name") == Generation(4, 0.0, 1024, 1024, 256)
    synth.synth("flux.1-dev", tmp_path / "dev")
    assert Generation.load(tmp_path / "dev") == Generation(50, 3.5, 1024, 1024, 512)
    scheduler = FlowMatch.from_config(read_json(tmp_path / "dev" / "scheduler" / "scheduler_config.json"))
    assert scheduler.use_dynamic_shifting and scheduler.mu(4096) == pytest.approx(1.15)
    config = read_json(tmp_path / "any-name" / "text_encoder_3" / "config.json")
    assert (config["vocab_size"], config["torch_dtype"]) == (32_128, "float16")
    shared = Weights(tmp_path / "any-name" / "text_encoder_3")["shared.weight"]
    assert shared.dtype == torch.float16 and shared.shape == (32_128, 96)


@pytest.mark.usefixtures("scaled_down")
def test_klein_encodes_a_prompt(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", minversion="0.37")
    synth.synth("flux.2-klein-4b", tmp_path / "m")
    assert read_json(tmp_path / "m" / "model_index.json")["is_distilled"] is True
    check_pipeline(tmp_path / "m")
    pipe = edgeprune.load(tmp_path / "m")
    pipe.set_progress_bar_config(disable=True)
    images = pipe(prompt="a red fox", num_inference_steps=1, height=64, width=64, output_type="pt").images
    assert images.isfinite().all()


@pytest.mark.parametrize("tiny_encoders", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("scaled_down")
def test_qwen_image_draws(tmp_path: Path, tiny_encoders: bool) -> None:
    """Also what is drawn depends on the prompt, of which an instruction leaves enough tokens."""
    synth.synth("qwen-image", tmp_path / "m", tiny_encoders=tiny_encoders)
    check_pipeline(tmp_path / "m")
    pipe, tokens = edgeprune.load(tmp_path / "m"), Generation.load(tmp_path / "m").max_sequence_length
    how = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt", "max_sequence_length": tokens}
    fox, ring = (pipe(prompt=text, latents=torch.ones(1, 16, 64), **how).images for text in ("a red fox", "a ring"))
    assert fox.isfinite().all() and fox.std() > 0.02 and not torch.equal(fox, ring)


@pytest.mark.parametrize("tiny_encoders", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("scaled_down")
def test_z_image_draws(tmp_path: Path, tiny_encoders: bool) -> None:
    synth.synth("z-image-turbo", tmp_path / "m", tiny_encoders=tiny_encoders)
    check_pipeline(tmp_path / "m")
    pipe = edgeprune.load(tmp_path / "m")
    image = pipe(prompt="a red fox", num_inference_steps=2, height=64, width=64, output_type="pt").images
    assert image.isfinite().all() and image.std() > 0.02
    steps = 4 if tiny_encoders else 8
    assert Generation.load(tmp_path / "m").num_inference_steps == steps


@pytest.mark.usefixtures("scaled_down")
def test_a_killed_run_resumes_within_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "PIECE_BYTES", 100_000)
    monkeypatch.setattr("edgeprune.residency.shards.SHARD_BYTES", 100_000)
    synth.synth("sd3.5-large", tmp_path / "whole")
    put, names = ShardWriter.put, list[str]()

    def record(self: ShardWriter, index: int, tensors: Any) -> None:
        if len(names) == 7:
            raise EdgepruneError("killed")
        names.append(f"{self.folder.name}/{index}")
        put(self, index, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", record)
        with pytest.raises(EdgepruneError, match="killed"):
            synth.synth("sd3.5-large", tmp_path / "killed")
    assert not (tmp_path / "killed" / "model_index.json").exists()
    before = names[:]
    names.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", lambda s, i, t: names.append(f"{s.folder.name}/{i}") or put(s, i, t))
        synth.synth("sd3.5-large", tmp_path / "killed")
    assert names and not set(before) & set(names)  # nothing is drawn twice
    hashes = [
        {p.relative_to(tmp_path / n): sha256_file(p) for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("whole", "killed")
    ]
    assert hashes[0] == hashes[1]


@pytest.mark.usefixtures("scaled_down")
def test_another_kind_of_encoders_needs_another_folder(tmp_path: Path) -> None:
    synth.synth("flux.1-dev", tmp_path / "m", tiny_encoders=True)
    assert Generation.load(tmp_path / "m").height == 512
    with pytest.raises(InputError, match=r"synth\.json: found another architecture, expected flux\.1-dev; use another"):
        synth.synth("flux.1-dev", tmp_path / "m")
    with pytest.raises(InputError, match="expected one of sd3.5-large, sd3.5-large-turbo"):
        synth.synth("sd4", tmp_path / "n")


@pytest.mark.parametrize(
    ("name", "distilled"),
    [("flux.2-klein-4b", True), pytest.param("flux.2-klein-base-4b", False, marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("scaled_down")
def test_klein_with_a_tiny_encoder_draws_as_diffusers_does(name: str, distilled: bool, tmp_path: Path) -> None:
    synth.synth(name, tmp_path / "m", tiny_encoders=True)
    assert check_pipeline(tmp_path / "m")["is_distilled"] == distilled
    assert Generation.load(tmp_path / "m").max_sequence_length == 77
    size = sum(p.stat().st_size for part in ("text_encoder", "vae") for p in (tmp_path / "m" / part).iterdir())
    assert size < 2_000_000
    pipe = edgeprune.load(tmp_path / "m")
    image = pipe(prompt="a red fox", num_inference_steps=2, height=64, width=64, output_type="pt").images
    assert image.isfinite().all() and image.std() > 0.02
    found = api.verify(tmp_path / "m", generation=GenerationOptions(height=64, width=64))
    assert found.passed and {f.check for f in found.findings if f.verdict == "pass"} >= {"text", "step"}
    with pytest.raises(InputError, match=r"synth\.json: found another architecture"):
        synth.synth({*KLEIN}.difference({name}).pop(), tmp_path / "m", tiny_encoders=True)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.slow
def test_an_encoder_is_never_whole_in_memory(tmp_path: Path) -> None:
    """A T5 of 0.24 GB in shards of 20 MB adds less than half of that to the peak."""
    script = f"""if True:
        import resource
        from pathlib import Path
        import torch
        from edgeprune.artefact.synth import networks
        from edgeprune.families import published
        from edgeprune.residency import shards
        networks.PIECE_BYTES = shards.SHARD_BYTES = 10_000_000
        t5 = published.networks()["t5-xxl"]
        t5 = published.PublishedNetwork("", 0, t5.config | {{"d_model": 1024, "d_ff": 2816, "num_layers": 6}})
        part = networks._network("text_encoder_3", "T5EncoderModel", t5, "float16")
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        torch.randn(4096, 1024).to(torch.float16)
        before = peak()
        networks.write_all(Path({str(tmp_path)!r}), [part], "key", label="t5", progress=lambda *_: None)
        print(part.size, peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    size, growth = map(int, done.stdout.split())
    assert size > 300_000_000 and growth < size / 2


# ------------------------------------------------------------------------------------- weights


def test_a_tensor_depends_on_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawing.draw("a.weight", (300, 48))
    monkeypatch.setattr(drawing, "AT_ONCE", 16 * 48)
    assert torch.equal(whole, drawing.draw("a.weight", (300, 48)))
    assert not torch.equal(whole, drawing.draw("b.weight", (300, 48)))
    table = drawing.draw("shared.weight", (300, 48)).float()
    assert 0.8 < table.std() < 1.4 and whole.float().std() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_stays_finite_and_its_attention_is_no_choice_of_one(dtype: torch.dtype) -> None:
    config = T5Config(
        **published.networks()["t5-xxl"].config | {"d_model": 256, "d_ff": 640, "num_heads": 4, "vocab_size": 100}
    )
    model = T5EncoderModel(config)
    model.load_state_dict({name: drawing.draw(name, tuple(t.shape)) for name, t in model.state_dict().items()})
    model.encoder.embed_tokens.weight = model.shared.weight
    ids = torch.arange(90)[None]
    with torch.no_grad():
        hidden = model.to(dtype)(ids).last_hidden_state
        attention = model.encoder.block[0].layer[0]
        normed = attention.layer_norm(model.shared(ids))
        q, k = (getattr(attention.SelfAttention, n)(normed).view(90, 4, 64).float() for n in "qk")
    assert hidden.isfinite().all() and hidden.float().std() > 0.1
    assert 0.3 < torch.einsum("ihd,jhd->hij", q, k).std() < 3


# ------------------------------------------------------------------------------------- tokenizers


def test_tokenizers_have_the_published_sizes_and_ids(tmp_path: Path) -> None:
    tokenizers.write_clip(tmp_path / "l", pad=tokenizers.CLIP_END)
    tokenizers.write_clip(tmp_path / "g", pad="!")
    tokenizers.write_t5(tmp_path / "t5")
    tokenizers.write_qwen(tmp_path / "qwen")
    small, large = (CLIPTokenizer.from_pretrained(tmp_path / n) for n in "lg")
    assert len(small) == 49_408 and small.model_max_length == 77 == large.model_max_length
    assert (small.bos_token_id, small.eos_token_id, small.pad_token_id, large.pad_token_id) == (49406, 49407, 49407, 0)
    assert small("a")["input_ids"] == [49406, 320, 49407]  # as published
    t5 = T5TokenizerFast.from_pretrained(tmp_path / "t5")
    assert len(t5) == 32_100 and t5.model_max_length == 512 and t5.convert_tokens_to_ids("<extra_id_0>") == 32_099
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    qwen = Qwen2TokenizerFast.from_pretrained(tmp_path / "qwen")
    assert len(qwen) == 151_669 and qwen.convert_tokens_to_ids("<|im_end|>") == 151_645
    text = "a red fox, 12 cats; straße"
    for tokenizer in (small, t5, qwen, AutoTokenizer.from_pretrained(tmp_path / "t5")):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) < 35
        read = tokenizer.decode(ids, skip_special_tokens=True)
        assert read.replace(" ", "") == text.replace(" ", "")


def test_no_word_is_in_a_vocabulary_twice(tmp_path: Path) -> None:
    tokenizers.write_clip(tmp_path / "l", pad=tokenizers.CLIP_END)
    vocabulary = json.loads((tmp_path / "l" / "vocab.json").read_text("utf-8"))
    merges = (tmp_path / "l" / "merges.txt").read_text("utf-8").splitlines()[1:]
    assert sorted(vocabulary.values()) == list(range(49_408)) and len(merges) == 48_894
    assert all(part in vocabulary for merge in merges for part in merge.split(" "))
