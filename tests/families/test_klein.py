"""FLUX.2 klein from a diffusers folder to images: its text encoder, its VAE and whole images are those of diffusers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from edgeprune import runtimes
from edgeprune.artefact import card, encoder_layers
from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.loading import load, open_transformer
from edgeprune.artefact.manifest import Manifest
from edgeprune.artefact.resolve import read_config
from edgeprune.artefact.staged import StagedPipeline, can_stage
from edgeprune.common.errors import InputError
from edgeprune.data.cache import Index, made_by
from edgeprune.export.folder import _vae_config
from edgeprune.families.encoders import CLIP, QWEN3, T5, check_tokens
from edgeprune.planning.options import PlanOptions
from edgeprune.residency.compute import Compute
from edgeprune.residency.weights import Weights
from edgeprune.runtimes import base
from edgeprune.sampling.denoising import decode, encode_images, encode_pooled, encode_prompts, generate
from edgeprune.sampling.generation import Generation
from edgeprune.stages import encoders, work
from edgeprune.stages.compress import compress
from edgeprune.stages.memory import Memory
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions
from edgeprune.stages.workspace import STAGES, Workspace
from edgeprune.training.recipe import DistillOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PROMPTS = ["two red circles", "", "a drawing of a star above a ring " * 9]
VARIANTS = {"distilled": True, "base": False}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("klein")
    for name, distilled in VARIANTS.items():
        tiny.tiny_klein_pipeline(root / name, distilled=distilled)
    return {name: root / name for name in VARIANTS}


@pytest.fixture(params=VARIANTS)
def source(request: pytest.FixtureRequest, sources: dict[str, Path]) -> Path:
    return sources[request.param]


def stock(folder: Path) -> Any:
    """Return the pipeline as diffusers loads it: with all layers of the text encoder."""
    from diffusers import Flux2KleinPipeline

    pipe = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def staged(folder: Path) -> StagedPipeline:
    return StagedPipeline(folder, open_transformer(folder, quantized=False).running(), Compute())


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Return latents (B, C, h, w) as the pipeline's call takes them: (B, 4 C, h / 2, w / 2)."""
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline._patchify_latents(latents)


@torch.no_grad()
@pytest.mark.parametrize("way", ["whole", "in turn"])
def test_text_is_that_of_diffusers(sources: dict[str, Path], way: str) -> None:
    """Hidden states 9, 18 and 27 of a whole model equal those of the layers that are loaded."""
    folder = sources["base"]
    pipe = load(folder) if way == "whole" else staged(folder)
    expected, _ = stock(folder).encode_prompt(PROMPTS, max_sequence_length=40)
    found = encode_prompts(pipe, PROMPTS, 40)
    assert found.hidden.shape == (3, 40, 3 * tiny.QWEN_WIDTH) and found.pooled.shape == (3, 0)
    assert expected.std() > 1
    torch.testing.assert_close(found.hidden, expected, rtol=1e-5, atol=1e-5)
    assert encode_pooled(pipe, PROMPTS, 40).shape == (3, 0)


def test_layers_that_nothing_reads_are_not_read(sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = list[str](), Weights.__getitem__
    monkeypatch.setattr(Weights, "__getitem__", lambda self, name: seen.append(name) or real(self, name))  # type: ignore[func-returns-value]
    for make, way in ((load, "whole"), (staged, "in turn")):
        encode_prompts(make(sources["base"]), PROMPTS, 40)
        # In turn, only the rows of words that the prompts have are read.
        assert ("model.embed_tokens.weight" in seen) == (way == "whole")
        read = Counter(name for name in seen if name.startswith("model.") or "lm_head" in name)
        layers = {int(name.split(".")[2]) for name in read if ".layers." in name}
        assert layers == set(range(27)) and not {"model.norm.weight", "lm_head.weight"} & read.keys()
        assert set(read.values()) == {1}  # each once, for all prompts
        seen.clear()


@pytest.mark.parametrize("budget", [None, pytest.param(2_000_000_000, marks=pytest.mark.slow)])
def test_a_whole_image_is_that_of_diffusers(source: Path, budget: int | None) -> None:
    """From the same noise, with a memory that was given in turn: text encoder, transformer, VAE."""
    with runtimes.load(source, "eager", memory=budget) as model:
        ours = np.asarray(model.generate(PROMPTS[0], seed=3, height=64, width=48)[0], int)
        latents = model.generate_latents(PROMPTS[0], seed=3, height=64, width=48)
        noise = torch.from_numpy(base.initial_latents(model.settings, [3], 64, 48))
        scale = model.settings.generation.guidance_scale
    call = {
        "latents": packed(noise), "num_inference_steps": 4, "guidance_scale": scale, "height": 64, "width": 48,
        "max_sequence_length": 40,
    }  # fmt: skip
    pipe = stock(source)
    assert pipe.config.is_distilled == (scale == 1.0)
    theirs = np.asarray(pipe(prompt=PROMPTS[0], **call).images[0], int)
    assert ours.shape == (64, 48, 3) and ours.std() > 5 and np.abs(ours - theirs).max() <= 1
    # What the pipeline calls latents is what the VAE decodes.
    for_vae = pipe(prompt=PROMPTS[0], output_type="latent", **call).images
    mean, std = pipe.vae.bn.running_mean, (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()
    expected = (packed(for_vae) - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(packed(torch.from_numpy(latents)), expected, rtol=1e-5, atol=2e-5)


def test_a_step_is_that_of_diffusers(sources: dict[str, Path]) -> None:
    """The velocity is the pipeline's, whose first step ends at the noise level of the second."""
    folder = sources["distilled"]
    with runtimes.load(folder) as model:
        noise = base.initial_latents(model.settings, [5], 64, 48)
        sigmas = model.sigmas(Generation.load(folder).changed(base.GenerationOptions(height=64, width=48), "test"))
        hidden, pooled = model.backend.encode(PROMPTS[:1])
        ours = model.step(noise, hidden, pooled, sigmas[:1])
    after: list[torch.Tensor] = []

    def stop(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        after.append(values["latents"])
        pipe._interrupt = True
        return values

    pipe = stock(folder)
    pipe(
        prompt=PROMPTS[0], latents=packed(torch.from_numpy(noise)), num_inference_steps=4, guidance_scale=1.0,
        height=64, width=48, max_sequence_length=40, callback_on_step_end=stop, output_type="latent",
    )  # fmt: skip
    tokens = pipe._pack_latents(packed(torch.from_numpy(noise)))
    theirs = (after[0] - tokens) / (sigmas[1] - sigmas[0])
    mine = pipe._pack_latents(packed(torch.from_numpy(ours)))
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_in_turn_draws_the_same_as_at_once(source: Path) -> None:
    generation = Generation.load(source)
    assert can_stage(source)
    drawn = [generate(pipe, PROMPTS[:2], [1, 2], generation) for pipe in (load(source), staged(source))]
    assert drawn[0].std() > 5 and np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


def test_images_are_encoded_as_diffusers_does_it(sources: dict[str, Path]) -> None:
    pipe, images = stock(sources["base"]), torch.randint(0, 255, (2, 3, 48, 64), dtype=torch.uint8)
    latents = encode_images(load(sources["base"]), images)
    with torch.no_grad():
        expected = [pipe._encode_vae_image(image / 127.5 - 1, None) for image in images.split(1)]
    torch.testing.assert_close(packed(latents), torch.cat(expected))
    with torch.no_grad():
        z = pipe._patchify_latents(latents)
        z = z * (pipe.vae.bn.running_var + 1e-4).sqrt()[:, None, None] + pipe.vae.bn.running_mean[:, None, None]
        pixels = pipe.vae.decode(pipe._unpatchify_latents(z)).sample
    again = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.abs(decode(load(sources["base"]), latents).astype(int) - again).max() <= 1


def test_data_that_was_encoded_without_the_statistics_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    now = made_by(sources["base"], Generation.load(sources["base"]), drawn=False)
    Index(now, [], complete=True).check_made_by(now, tmp_path)
    older = {name: value for name, value in now.items() if name != "latents"}
    says = r"cache.json: 'latents': found none, expected 'normalised' as this model has it; encode the data again"
    with pytest.raises(InputError, match=says) as refused:
        Index(older, [], complete=True).check_made_by(now, tmp_path)
    assert "\n" not in str(refused.value)


def test_a_long_prompt_is_said_to_be_cut(sources: dict[str, Path]) -> None:
    with runtimes.load(sources["base"]) as model, pytest.warns(UserWarning, match=r"text_encoder: \d+ of \d+ tokens"):
        model.backend.encode(PROMPTS)


def test_every_stage_runs_and_the_compressed_model_draws(sources: dict[str, Path], tmp_path: Path) -> None:
    options = CompressOptions(
        analyze=AnalyzeOptions(count=2),
        plan=PlanOptions("manual", blocks="3", components="1:mlp,2:attn"),
        data=DataOptions("shapes", 8),
        distill=DistillOptions(steps=3, batch=2),
    )
    ws, lines = Workspace(tmp_path / "small", str(sources["base"])), list[str]()
    assert compress(ws, options, progress=lambda line, *_: lines.append(line)) == [*STAGES, "encoders"]
    assert Manifest.load(ws.out).encoders == "int8"
    assert any("text_encoder: no INT4 form is within" in line for line in lines)  # of random weights
    again = Workspace(ws.out, str(sources["base"]), fresh=True)
    assert encoders.run(again, "half", 64) and Manifest.load(ws.out).encoders == "half"
    with runtimes.load(ws.out) as model:
        assert np.asarray(model.generate(PROMPTS[0])[0]).std() > 5


def edited(source: Path, out: Path, file: str, **fields: Any) -> Path:
    """Return a copy of a pipeline in which a JSON file has other fields."""
    shutil.copytree(source, out)
    path = out / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return out


@pytest.mark.parametrize(
    ("file", "fields", "says"),
    [
        ("text_encoder/config.json", {"num_hidden_layers": 27}, "num_hidden_layers: found 27, expected .* from 28"),
        ("transformer/config.json", {"joint_attention_dim": 64}, "width of text: found 64, expected 96, the wid"),
        ("text_encoder/config.json", {"attention_bias": True}, "attention_bias: found True, expected false"),
        ("text_encoder/config.json", {"use_sliding_window": True}, "use_sliding_window: found True, expected false"),
        ("text_encoder/config.json", {"num_key_value_heads": 3}, "num_key_value_heads: found 3, expected a divisor"),
        ("text_encoder/config.json", {"head_dim": 8}, r"self_attn.\w+.weight': found .*expected .* by config.json"),
        (
            "text_encoder/config.json",
            {"layer_types": ["sliding_attention"] * 29},
            "layer_types: found .*expected 29 times",
        ),
        ("text_encoder/config.json", {"rope_theta": "x"}, "rope_theta: found 'x', expected a number from 1 to"),
        ("text_encoder/config.json", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type: found 'yarn'"),
        ("text_encoder/config.json", {"rope_parameters": {"rope_type": "linear"}}, "rope_type: found 'linear'"),
        ("text_encoder/config.json", {"rope_parameters": {"rope_theta": 0}}, "rope_theta: found 0, expected a number"),
        ("text_encoder/config.json", {"rope_parameters": 3}, "rope_parameters: found 3, expected none or an object"),
        ("text_encoder/config.json", {"head_dim": 7}, "head_dim: found 7, expected an even number"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels: found 16, expected 8 by the transformer's"),
        ("vae/config.json", {"patch_size": [1, 1]}, r"patch_size: found \[1, 1\], expected \[2, 2\]"),
        ("vae/config.json", {"batch_norm_eps": "x"}, "batch_norm_eps: found 'x', expected a number"),
        ("vae/config.json", {"decoder_block_out_channels": [8, 8]}, "decoder_block_out_channels: found .*expected 4"),
    ],
)
def test_what_does_not_fit_is_named(
    sources: dict[str, Path], tmp_path: Path, file: str, fields: dict[str, Any], says: str
) -> None:
    bad = edited(sources["base"], tmp_path / "bad", file, **fields)
    with pytest.raises(InputError, match=says) as refused:
        check_pipeline(bad)
    assert "\n" not in str(refused.value)


def test_statistics_of_the_vae_are_needed_and_their_counter_is_not(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sources["base"], tmp_path / "m"))
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["bn.num_batches_tracked"]
    save_file(tensors, path)
    load(folder)
    save_file(tensors | {"bn.running_var": -tensors["bn.running_var"]}, path)
    for read in (load, lambda folder: _vae_config(folder / "vae")):
        with pytest.raises(InputError, match=r"vae: bn.running_var: found -\S+, expected numbers from 0"):
            read(folder)
    del tensors["bn.running_var"]
    save_file(tensors, path)
    with pytest.raises(InputError, match="vae: bn.running_var: found no such tensor"):
        load(folder)


def test_a_length_of_one_token_is_refused(sources: dict[str, Path]) -> None:
    """Nor one that the chat fills alone."""
    _, family = read_config(sources["base"])
    for tokens in (1, 12):
        with pytest.raises(InputError, match=f"length: found {tokens}, expected 13 or more with a Qwen encoder"):
            check_tokens(sources["base"], family.encoders, tokens)
    check_tokens(sources["base"], family.encoders, 13)


def test_only_what_is_read_of_the_text_encoder_counts(sources: dict[str, Path]) -> None:
    """Neither the last layers, the norm and the head, nor the table of words, of which rows are read."""
    encoder = load(sources["base"]).text_encoder
    layers = [sum(p.numel() for p in layer.parameters()) for layer in encoder.model.layers]
    assert work._encoders(sources["base"]) == [(QWEN3, sum(layers), sum(layers))]
    generation = Generation.load(sources["base"])
    config, family = read_config(sources["base"])
    subject = work.Subject(sources["base"], family, config, generation)
    found = Memory(subject, Compute())._encoder(sources["base"] / "text_encoder", QWEN3, (9, 18, 27))
    computed = Compute().dtype(torch.bfloat16, sum(p.numel() for p in tiny.tiny_qwen3(1200).parameters())).itemsize
    activations = generation.max_sequence_length * (3 * 48 + 2 * tiny.QWEN_WIDTH)
    assert found == computed * activations + (2 + computed) * layers[0]


def test_streams_of_a_prompt_are_counted_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    config, seen = SimpleNamespace(d_model=8, hidden_size=8), list[int]()
    monkeypatch.setattr(encoder_layers, "spare", lambda encoder, compute, size: size)
    monkeypatch.setattr(encoder_layers, "batches_together", lambda room, one, count: seen.append(one) or count)
    encoder = SimpleNamespace(config=config, dtype=torch.float32)
    for kind, states in ((CLIP, ()), (T5, ()), (QWEN3, (9, 18, 27))):
        encoder_layers.prompts_together(encoder, kind, Compute(), 3, 10, states)
    assert seen == [4 * 320, 4 * 320, 5 * 320]


def test_the_card_names_the_folder_in_int4() -> None:
    files = {"text_encoder_int4/model.safetensors": "", "text_encoder/model.safetensors": "", "transformer/x": ""}
    manifest = Manifest("s", "f", "flux2", {}, files=files, encoders="int4")
    assert "Weights of text_encoder in INT4 as well, beside those of the original." in card.changes(manifest, None)
