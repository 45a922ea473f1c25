"""Qwen-Image: what the tests over tiny.KINDS do not cover, and from a folder to images, which are diffusers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from edgeprune import runtimes, targets
from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.loading import load, open_transformer
from edgeprune.artefact.manifest import Manifest
from edgeprune.artefact.staged import StagedPipeline, can_stage
from edgeprune.common.errors import InputError
from edgeprune.families import family_of
from edgeprune.families.encoders import DESCRIBING
from edgeprune.planning.fit import fit
from edgeprune.planning.options import PlanOptions
from edgeprune.residency.compute import Compute
from edgeprune.runtimes import base
from edgeprune.sampling.denoising import (
    Conditioning,
    decode,
    encode_images,
    encode_prompts,
    evaluate,
    generate,
    network_inputs,
    velocity,
)
from edgeprune.sampling.generation import Generation, hints_of
from edgeprune.stages import encoders, work
from edgeprune.stages.compress import compress
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions
from edgeprune.stages.workspace import STAGES, Workspace
from edgeprune.training.recipe import DistillOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PROMPTS = ["two red circles", "", "a drawing of a star above a ring " * 9]
"""The last one is cut."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen-image") / "model"
    tiny.tiny_qwen_image_pipeline(folder)
    return folder


def stock(folder: Path) -> Any:
    """Return the pipeline as diffusers loads it, with the vision tower of the text encoder."""
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.model.visual is not None
    return pipe


def staged(folder: Path) -> StagedPipeline:
    return StagedPipeline(folder, open_transformer(folder, quantized=False).running(), Compute())


def step_of(lengths: tuple[int, ...]) -> tuple[torch.Tensor, Conditioning, torch.Tensor]:
    """Return latents, text of these lengths and noise levels."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(len(lengths), max(lengths), 2 * tiny.TEXT_WIDTH, generator=generator)
    for row, length in zip(text, lengths, strict=True):
        row[length:] = 0
    latents = torch.randn(len(lengths), 8, 10, 6, generator=generator)
    return latents, Conditioning(text, torch.zeros(len(lengths), 0)), torch.linspace(0.9, 0.1, len(lengths))


def test_the_instruction_is_that_of_diffusers(source: Path) -> None:
    pipe = stock(source)
    assert pipe.prompt_template_encode.format("{}") == DESCRIBING.around("{}")
    assert pipe.prompt_template_encode_start_idx == DESCRIBING.unread


@torch.no_grad()
@pytest.mark.parametrize("way", ["whole", "in turn"])
def test_text_is_that_of_diffusers(source: Path, way: str) -> None:
    """The last state, normed, after the tokens that are left out; zeros where there is no token."""
    pipe = load(source) if way == "whole" else staged(source)
    tokens = tiny.QWEN_IMAGE_TOKENS
    expected, mask = stock(source).encode_prompt(list(PROMPTS), max_sequence_length=tokens)
    found = encode_prompts(pipe, PROMPTS, tokens)
    assert found.hidden.shape == (3, tokens, tiny.QWEN_WIDTH) and found.pooled.shape == (3, 0)
    assert ((found.hidden != 0).any(-1).sum(-1)).tolist() == mask.sum(-1).tolist()
    assert expected.std() > 0.5 and len(set(mask.sum(-1).tolist())) == 3
    torch.testing.assert_close(found.hidden, expected, rtol=1e-5, atol=1e-5)


def test_the_vision_tower_is_not_loaded(source: Path) -> None:
    names = load(source).text_encoder.state_dict()
    assert "model.norm.weight" in names and not [name for name in names if "visual" in name or "lm_head" in name]


@torch.no_grad()
def test_rows_of_different_texts_do_not_see_each_other() -> None:
    """In pieces and in diffusers' own forward, a row of a batch gets what it gets alone without padding."""
    model, (latents, condition, sigma) = tiny.tiny_qwen_image(), step_of((3, 20, 11))
    whole = velocity(model, latents, condition, sigma, 1.0)
    for i, length in enumerate((3, 20, 11)):
        one = Conditioning(condition.hidden[i : i + 1, :length], condition.pooled[i : i + 1])
        alone = velocity(model, latents[i : i + 1], one, sigma[i : i + 1], 1.0)
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    family = family_of(tiny.config_of(model))
    inputs = network_inputs(model, latents, condition, sigma, 1.0)
    for exact in (False, True):
        positions = family.positions(model, inputs, exact=exact)
        image, text, modulation = family.embed(model, inputs)
        for block in family.blocks(model):
            image, after = family.run(block, image, text, modulation, positions)
            assert after is not None
            text = after
        assert (text != 0).any(-1).sum(-1).tolist() == [3, 20, 11]
        output = family.unembed(model, image, modulation, ())
        torch.testing.assert_close(family.velocity(model.config, output, latents.shape), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_half_precision_keeps_time() -> None:
    model, (latents, condition, _) = tiny.tiny_qwen_image(), step_of((16, 16))
    sigma = torch.tensor([0.1234, 0.9876])
    expected = evaluate(model, latents, condition, sigma, 1.0)
    found = evaluate(model.bfloat16(), latents, condition, sigma, 1.0)
    assert ((found - expected).norm() / expected.norm()).item() < 0.05


def test_a_text_that_is_too_long_is_refused() -> None:
    family, config = family_of(tiny.config_of(tiny.tiny_qwen_image())), tiny.config_of(tiny.tiny_qwen_image())
    latents, text, sigma = torch.ones(1, 8, 4, 4), torch.ones(1, 1025, 64), torch.ones(1)
    family.inputs(config, latents, text[:, :1024], text, sigma, 1.0)
    with pytest.raises(InputError, match="found a text of 1025 tokens, expected up to 1024"):
        family.inputs(config, latents, text, text, sigma, 1.0)


@pytest.mark.parametrize(
    ("budget", "scale"), [(None, 4.0), (None, 1.0), pytest.param(2_000_000_000, 4.0, marks=pytest.mark.slow)]
)
def test_a_whole_image_is_that_of_diffusers(source: Path, budget: int | None, scale: float) -> None:
    """From the same noise, with and without guidance, also with a memory that was given in turn."""
    how: dict[str, Any] = {"seed": 3, "height": 64, "width": 48, "guidance_scale": scale}
    if scale > 1:
        how["negative_prompt"] = "blue"
    with runtimes.load(source, "eager", memory=budget) as model:
        ours = np.asarray(model.generate(PROMPTS[0], **how)[0], int)
        latents = model.generate_latents(PROMPTS[0], **how)
        noise = torch.from_numpy(base.initial_latents(model.settings, [3], 64, 48))
    pipe = stock(source)
    call = {
        "latents": pipe._pack_latents(noise, 1, 8, 8, 6), "num_inference_steps": 4, "true_cfg_scale": scale,
        "negative_prompt": "blue", "height": 64, "width": 48, "max_sequence_length": tiny.QWEN_IMAGE_TOKENS,
    }  # fmt: skip
    theirs = np.asarray(pipe(prompt=PROMPTS[0], **call).images[0], int)
    assert ours.shape == (64, 48, 3) and ours.std() > 5 and np.abs(ours - theirs).max() <= 1
    packed = pipe(prompt=PROMPTS[0], output_type="latent", **call).images
    expected = pipe._unpack_latents(packed, 64, 48, 8)[:, :, 0]
    torch.testing.assert_close(torch.from_numpy(latents), expected, rtol=1e-4, atol=1e-4)


def test_a_step_is_that_of_diffusers(source: Path) -> None:
    """The velocity is the pipeline's, whose first step ends at the noise level of the second."""
    with runtimes.load(source) as model:
        noise = base.initial_latents(model.settings, [5], 64, 48)
        sigmas = model.sigmas(Generation.load(source).changed(base.GenerationOptions(height=64, width=48), "test"))
        hidden, pooled = model.backend.encode(PROMPTS[:1])
        ours = torch.from_numpy(model.step(noise, hidden, pooled, sigmas[:1]))
    after: list[torch.Tensor] = []

    def stop(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        after.append(values["latents"])
        pipe._interrupt = True
        return values

    pipe = stock(source)
    packed = pipe._pack_latents(torch.from_numpy(noise), 1, 8, 8, 6)
    pipe(
        prompt=PROMPTS[0], latents=packed, num_inference_steps=4, true_cfg_scale=1.0, height=64, width=48,
        max_sequence_length=tiny.QWEN_IMAGE_TOKENS, callback_on_step_end=stop, output_type="latent",
    )  # fmt: skip
    theirs = pipe._unpack_latents((after[0] - packed) / (sigmas[1] - sigmas[0]), 64, 48, 8)[:, :, 0]
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_guidance_is_the_same_in_numpy_and_keeps_the_norm_of_each_token() -> None:
    family = family_of(tiny.config_of(tiny.tiny_qwen_image()))
    generator = torch.Generator().manual_seed(0)
    without, with_text = (torch.randn(2, 8, 6, 4, generator=generator) for _ in range(2))
    found = family.guide(without, with_text, 4.0)
    numbers = family.guide(without.numpy(), with_text.numpy(), 4.0)
    assert numbers.dtype == np.float32
    np.testing.assert_allclose(found.numpy(), numbers, rtol=1e-5)
    norms = [each.reshape(2, 8, 3, 2, 2, 2).square().sum((1, 3, 5)) for each in (found, with_text)]
    torch.testing.assert_close(*norms)
    assert not torch.allclose(found, without + 4 * (with_text - without))


def test_latents_are_normalised_by_channel(source: Path) -> None:
    pipe = load(source)
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    found = encode_images(pipe, images)
    x = images.float()[:, :, None] / 127.5 - 1
    with torch.no_grad():
        mean, std = (torch.tensor(pipe.vae.config[f"latents_{n}"]).view(1, 8, 1, 1, 1) for n in ("mean", "std"))
        expected = (pipe.vae.encode(x).latent_dist.mean - mean) / std
        torch.testing.assert_close(found, expected[:, :, 0], rtol=1e-5, atol=1e-5)
        pixels = pipe.vae.decode(expected * std + mean).sample[:, :, 0]
    theirs = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(decode(pipe, found).astype(int) - theirs).max() <= 1


def test_in_turn_draws_the_same_as_at_once(source: Path) -> None:
    """Also where one prompt's text is longer than the other's."""
    generation = Generation.load(source)
    assert can_stage(source)
    drawn = [generate(pipe, PROMPTS[1:], [1, 2], generation) for pipe in (load(source), staged(source))]
    assert drawn[0].std() > 5 and np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


@pytest.mark.parametrize("states", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_every_stage_runs_and_the_compressed_model_draws(source: Path, tmp_path: Path, states: int | None) -> None:
    """Distilled from the states before the first removed block, or from images."""
    options = CompressOptions(
        analyze=AnalyzeOptions(count=2),
        plan=PlanOptions("manual", blocks="2", components="1:mlp,3:attn,3:context_norm", stand_in=8),
        data=DataOptions("shapes", 8),
        distill=DistillOptions(steps=3, batch=2, states=states),
    )
    ws = Workspace(tmp_path / "small", str(source))
    assert compress(ws, options) == [*STAGES, "encoders"]
    assert Manifest.load(ws.out).encoders == "int8"
    again = Workspace(ws.out, str(source), fresh=True)
    assert encoders.run(again, "int4", 16) and Manifest.load(ws.out).encoders.startswith("int")
    assert encoders.run(again, "half", 64) and Manifest.load(ws.out).encoders == "half"
    with runtimes.load(ws.out) as model:
        assert np.asarray(model.generate(PROMPTS[0])[0]).std() > 5


def test_the_work_of_all_parts_is_counted(source: Path) -> None:
    """That of the VAE by running it without data."""
    config = json.loads((source / "transformer" / "config.json").read_text())
    subject = work.Subject(source, family_of(config), config, Generation.load(source))
    assert work.drawing(subject, 2).flops > work.encoding(subject, 3).flops > 0
    assert work.reading(subject, 2).flops > work.encoding(subject, 3).flops


def edited(source: Path, out: Path, file: str, **fields: Any) -> Path:
    """Return a copy of a pipeline in which a JSON file has other fields."""
    shutil.copytree(source, out)
    path = out / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return out


@pytest.mark.parametrize(
    ("file", "fields", "says"),
    [
        ("transformer/config.json", {"zero_cond_t": True}, "zero_cond_t: found True, expected false: Edit is not"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "use_layer3d_rope: found True, .*: Layered is not"),
        ("transformer/config.json", {"guidance_embeds": True}, "guidance_embeds: found True, expected false: a model"),
        ("transformer/config.json", {"patch_size": 1}, "patch_size: found 1, expected 2, as in the published model"),
        ("transformer/config.json", {"joint_attention_dim": 64}, "width of text: found 64, expected 32, the width of"),
        ("transformer/config.json", {"axes_dims_rope": [8, 12, 11]}, "axes_dims_rope: found .*expected 3 even numbers"),
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, r"pipelines that take more than a prompt"),
        ("model_index.json", {"_class_name": "QwenImageControlNetPipeline"}, r"pipelines that take more than a prompt"),
        ("vae/config.json", {"z_dim": 16}, "latents_mean: found .*expected 16 numbers"),
        ("vae/config.json", {"latents_std": [0.0] * 8}, "latents_std: found .*expected 8 numbers above 0"),
        ("vae/config.json", {"attn_scales": [0.5]}, r"attn_scales: found \[0.5\], expected \[\]"),
        ("vae/config.json", {"temperal_downsample": [True]}, "temperal_downsample: found .*expected 3 times true or"),
    ],
)
def test_what_does_not_fit_is_named(source: Path, tmp_path: Path, file: str, fields: dict[str, Any], says: str) -> None:
    bad = edited(source, tmp_path / "bad", file, **fields)
    with pytest.raises(InputError, match=says) as refused:
        check_pipeline(bad)
    assert "\n" not in str(refused.value)


def test_it_fits_every_kind_of_device(source: Path) -> None:
    for device in ("cpu-x86", "rtx", "macbook-m"):
        assert fit(source, targets.load(device), Generation.load(source)).memory_bytes > 0


@pytest.mark.parametrize(("name", "steps", "scale"), [("Qwen-Image", 50, 4.0), ("Qwen-Image-Lightning-8steps", 8, 1.0)])
def test_steps_and_guidance_are_guessed_by_name(
    source: Path, tmp_path: Path, name: str, steps: int, scale: float
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / name))
    (folder / "generation.json").unlink()
    family = family_of(json.loads((folder / "transformer" / "config.json").read_text()))
    found = family.defaults({}, hints_of(folder))
    assert (found["num_inference_steps"], found["guidance_scale"], found["max_sequence_length"]) == (steps, scale, 512)
