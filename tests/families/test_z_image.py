"""Z-Image: what the tests over tiny.KINDS do not cover, and from a diffusers folder to images, which are diffusers'."""

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
from edgeprune.export import modules
from edgeprune.families import family_of, family_of_model
from edgeprune.planning.fit import fit
from edgeprune.planning.options import PlanOptions
from edgeprune.residency.compute import Compute
from edgeprune.runtimes import base
from edgeprune.sampling.denoising import Conditioning, encode_prompts, evaluate, generate, velocity
from edgeprune.sampling.generation import Generation, GenerationOptions, heed, hints_of
from edgeprune.stages import encoders
from edgeprune.stages.compress import compress
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions
from edgeprune.stages.workspace import STAGES, Workspace
from edgeprune.training.rank_memory import _activations
from edgeprune.training.recipe import DistillOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PROMPTS = ["two red circles", "", "a drawing of a star above a ring " * 9]
"""Of 21, 8 and 40 tokens with the chat: up to 32, 32 and 64 tokens with padding."""
VARIANTS = {"turbo": False, "base": True}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("z-image")
    for name, guided in VARIANTS.items():
        tiny.tiny_z_image_pipeline(root / name, guided=guided)
    return {name: root / name for name in VARIANTS}


@pytest.fixture(params=VARIANTS)
def source(request: pytest.FixtureRequest, sources: dict[str, Path]) -> Path:
    return sources[request.param]


def stock(folder: Path) -> Any:
    """Return the pipeline as diffusers loads it: with all layers of the text encoder."""
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert len(pipe.text_encoder.layers) == 36
    return pipe


def staged(folder: Path) -> StagedPipeline:
    return StagedPipeline(folder, open_transformer(folder, quantized=False).running(), Compute())


@torch.no_grad()
@pytest.mark.parametrize("way", ["whole", "in turn"])
def test_text_is_that_of_diffusers(sources: dict[str, Path], way: str) -> None:
    """The last but one of all hidden states, though the last layer is not loaded; zeros where there is no token."""
    folder = sources["base"]
    pipe = load(folder) if way == "whole" else staged(folder)
    expected, _ = stock(folder).encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=40)
    found = encode_prompts(pipe, PROMPTS, 40)
    assert found.hidden.shape == (3, 40, tiny.QWEN_WIDTH) and found.pooled.shape == (3, 0)
    assert [len(text) for text in expected] == [(row != 0).any(-1).sum() for row in found.hidden]
    for row, text in zip(found.hidden, expected, strict=True):
        assert text.std() > 1
        torch.testing.assert_close(row[: len(text)], text, rtol=1e-5, atol=1e-5)
        assert not row[len(text) :].any()


@torch.no_grad()
def test_rows_of_different_texts_do_not_see_each_other() -> None:
    """In pieces and in diffusers' own forward, a row of a batch gets what it gets alone."""
    model, generator = tiny.tiny_z_image(), torch.Generator().manual_seed(0)
    text, latents = torch.randn(3, 70, 64, generator=generator), torch.randn(3, 8, 10, 6, generator=generator)
    for row, length in zip(text, (3, 70, 40), strict=True):
        row[length:] = 0
    condition, sigma = Conditioning(text, torch.zeros(3, 0)), torch.tensor([0.9, 0.5, 0.1])
    whole = velocity(model, latents, condition, sigma, 1.0)
    alone = [velocity(model, latents[i : i + 1], condition[i : i + 1], sigma[i : i + 1], 1.0) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-5, atol=1e-5)
    family = family_of(tiny.config_of(model))
    inputs = {n: torch.as_tensor(v) for n, v in family.inputs(model.config, latents, text, text, sigma, 1.0).items()}
    assert inputs["hidden_states"].shape == (3, 32, 32) and inputs["encoder_hidden_states"].shape == (3, 96, 64)
    for exact in (False, True):
        positions = family.positions(model, inputs, exact=exact)
        image, after, modulation = family.embed(model, inputs)
        for block in family.blocks(model):
            image, after = family.run(block, image, after, modulation, positions)
        output = family.unembed(model, image, modulation, family.grid(model, inputs))
        assert not output[:, 15:].any() and torch.equal(output[:, 15:], family.call(model, inputs)[:, 15:])
        torch.testing.assert_close(family.velocity(model.config, output, latents.shape), whole, rtol=1e-5, atol=1e-5)


def test_a_text_without_a_place_for_the_image_is_refused() -> None:
    family, config = family_of(tiny.config_of(tiny.tiny_z_image())), tiny.config_of(tiny.tiny_z_image())
    latents, text, sigma = torch.ones(1, 8, 4, 4), torch.ones(1, 225, 64), torch.ones(1)
    family.inputs(config, latents, text[:, :224], text, sigma, 1.0)
    with pytest.raises(InputError, match="found a text of 225 tokens, expected up to 224"):
        family.inputs(config, latents, text, text, sigma, 1.0)


@torch.no_grad()
def test_the_lengths_of_axes_only_limit() -> None:
    """Published configs have 1536 or, as diffusers' default, 1024 places for text and image: angles are the same."""
    short, long = (modules.Transformer(tiny.tiny_z_image(axes_lens=lens)) for lens in ((256, 32, 32), (384, 64, 48)))
    inputs = short.example(batch=2, height=3, width=5, tokens=70)
    assert torch.equal(short(*inputs.values())[0], long(*inputs.values())[0])
    longest = long.example(batch=1, height=3, width=5, tokens=352)
    with pytest.raises(InputError, match="found a text of 352 tokens, expected up to 224"):
        short.example(batch=1, height=3, width=5, tokens=352)
    torch.testing.assert_close(long(*longest.values()), long.reference(**longest), rtol=1e-4, atol=1e-4)
    sides = [m.family.latents(m.model.config).largest for m in (short, long)]
    assert sides == [32, 48]


@torch.no_grad()
def test_half_precision_keeps_time_and_lengths() -> None:
    model = tiny.tiny_z_image()
    latents, condition, _, _ = tiny.tiny_step(tokens=70)
    sigma = torch.tensor([0.1234, 0.9876])
    expected = evaluate(model, latents, condition, sigma, 1.0)
    found = evaluate(model.bfloat16(), latents, condition, sigma, 1.0)
    assert ((found - expected).norm() / expected.norm()).item() < 0.05


@torch.no_grad()
def test_bf16_sees_the_whole_of_a_long_text() -> None:
    """bf16 has not every whole number above 256: neither the length nor the place after the text is rounded to it."""
    model = tiny.tiny_z_image(axes_lens=(512, 64, 64)).bfloat16()
    generator, found = torch.Generator().manual_seed(0), list[torch.Tensor]()
    latents, text = torch.randn(1, 8, 8, 8, generator=generator), torch.randn(1, 288, 64, generator=generator)
    for _ in range(2):
        text[0, 287] = torch.randn(64, generator=generator)
        found.append(evaluate(model, latents, Conditioning(text, torch.zeros(1, 0)), torch.tensor([0.5]), 1.0))
    assert not torch.equal(*found)
    inputs = family_of_model(model).inputs(model.config, latents, text.bfloat16(), text, torch.tensor([0.5]), 1.0)
    assert inputs["text_lengths"].tolist() == [288] and inputs["text_lengths"].dtype == torch.int64


def test_activations_are_forecast_without_data() -> None:
    options, step = DistillOptions(int4_group_size=None), tiny.tiny_step(tokens=40)
    models = [(tiny.tiny_z_image(), batch) for batch in (1, 2)]
    one, two = (_activations(family_of_model(model), model, options, step, batch) for model, batch in models)
    assert 1.5 * one < two < 2.5 * one


@pytest.mark.parametrize("budget", [None, pytest.param(2_000_000_000, marks=pytest.mark.slow)])
def test_a_whole_image_is_that_of_diffusers(source: Path, budget: int | None) -> None:
    """From the same noise, with a memory that was given in turn: text encoder, transformer, VAE."""
    with runtimes.load(source, "eager", memory=budget) as model:
        ours = np.asarray(model.generate(PROMPTS[0], seed=3, height=64, width=48)[0], int)
        latents = model.generate_latents(PROMPTS[0], seed=3, height=64, width=48)
        noise = torch.from_numpy(base.initial_latents(model.settings, [3], 64, 48))
        scale = model.settings.generation.guidance_scale
    call = {
        "latents": noise, "num_inference_steps": 4, "guidance_scale": max(0.0, scale - 1), "height": 64, "width": 48,
        "max_sequence_length": 40,
    }  # fmt: skip
    pipe = stock(source)
    theirs = np.asarray(pipe(prompt=PROMPTS[0], **call).images[0], int)
    assert pipe.do_classifier_free_guidance == (source.name == "base")
    assert ours.shape == (64, 48, 3) and ours.std() > 5 and np.abs(ours - theirs).max() <= 1
    expected = pipe(prompt=PROMPTS[0], output_type="latent", **call).images
    torch.testing.assert_close(torch.from_numpy(latents), expected, rtol=1e-4, atol=1e-4)


def test_a_step_is_that_of_diffusers(sources: dict[str, Path]) -> None:
    """The velocity is the pipeline's, whose first step ends at the noise level of the second."""
    folder = sources["turbo"]
    with runtimes.load(folder) as model:
        noise = base.initial_latents(model.settings, [5], 64, 48)
        sigmas = model.sigmas(Generation.load(folder).changed(base.GenerationOptions(height=64, width=48), "test"))
        hidden, pooled = model.backend.encode(PROMPTS[:1])
        ours = torch.from_numpy(model.step(noise, hidden, pooled, sigmas[:1]))
    after: list[torch.Tensor] = []

    def stop(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        after.append(values["latents"])
        pipe._interrupt = True
        return values

    stock(folder)(
        prompt=PROMPTS[0], latents=torch.from_numpy(noise), num_inference_steps=4, guidance_scale=0.0, height=64,
        width=48, max_sequence_length=40, callback_on_step_end=stop, output_type="latent",
    )  # fmt: skip
    theirs = (after[0] - torch.from_numpy(noise)) / (sigmas[1] - sigmas[0])
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_in_turn_draws_the_same_as_at_once(source: Path) -> None:
    """Also where one prompt's text is longer than the other's."""
    generation = Generation.load(source)
    assert can_stage(source)
    drawn = [generate(pipe, PROMPTS[1:], [1, 2], generation) for pipe in (load(source), staged(source))]
    assert drawn[0].std() > 5 and np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1


def test_every_stage_runs_and_the_compressed_model_draws(sources: dict[str, Path], tmp_path: Path) -> None:
    options = CompressOptions(
        analyze=AnalyzeOptions(count=2),
        plan=PlanOptions("manual", blocks="2", components="1:mlp,3:attn"),
        data=DataOptions("shapes", 8),
        distill=DistillOptions(steps=3, batch=2),
    )
    ws = Workspace(tmp_path / "small", str(sources["base"]))
    assert compress(ws, options) == [*STAGES, "encoders"]
    assert Manifest.load(ws.out).encoders == "int8"
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
        ("text_encoder/config.json", {"num_hidden_layers": 37}, "num_hidden_layers: found 37, expected 36, as in the"),
        ("text_encoder/config.json", {"num_hidden_layers": 30}, "num_hidden_layers: found 30, expected .* from 36"),
        (
            "transformer/config.json",
            {"cap_feat_dim": 64},
            "width of text: found 64, expected 32, the width of 1 h",
        ),
        ("transformer/config.json", {"all_patch_size": [2, 4]}, r"all_patch_size: found \[2, 4\], expected \[2\]"),
        ("transformer/config.json", {"siglip_feat_dim": 8}, "siglip_feat_dim: found 8, expected null: Omni"),
        (
            "transformer/config.json",
            {"axes_dims": [8, 12, 10]},
            "axes_dims: found .*expected three even .*sum 32",
        ),
        ("transformer/config.json", {"axes_lens": [32, 8, 8]}, "axes_lens: found .*the first above 33"),
        ("transformer/config.json", {"n_heads": 3}, "n_heads: found 3, expected a divisor of dim, 64"),
        ("vae/config.json", {"latent_channels": 16}, "latent_channels: found 16, expected 8 by the transformer's"),
    ],
)
def test_what_does_not_fit_is_named(
    sources: dict[str, Path], tmp_path: Path, file: str, fields: dict[str, Any], says: str
) -> None:
    bad = edited(sources["base"], tmp_path / "bad", file, **fields)
    with pytest.raises(InputError, match=says) as refused:
        check_pipeline(bad)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("device", ["cpu-x86", "macbook-m", "rtx"])
def test_it_is_planned_for_any_device(sources: dict[str, Path], device: str) -> None:
    assert fit(sources["base"], targets.load(device), Generation.load(sources["base"])).transformer_bytes > 0


def test_the_guidance_scale_counts_from_1_and_says_so(sources: dict[str, Path]) -> None:
    with pytest.warns(UserWarning, match="guidance scale 5: 1 is no guidance, so this is 4 in ZImagePipeline"):
        assert heed(sources["base"], {"guidance_scale": 5.0}) == {"guidance_scale": 5.0}
    assert GenerationOptions(guidance_scale=0.0).given() == heed(sources["base"], {"guidance_scale": 0.0})


@pytest.mark.parametrize(("name", "steps", "scale"), [("Z-Image-Turbo", 8, 0.0), ("Z-Image", 50, 5.0)])
def test_steps_and_guidance_are_guessed_by_name(
    sources: dict[str, Path], tmp_path: Path, name: str, steps: int, scale: float
) -> None:
    folder = Path(shutil.copytree(sources["base"], tmp_path / name))
    (folder / "generation.json").unlink()
    family = family_of(json.loads((folder / "transformer" / "config.json").read_text()))
    found = family.defaults({}, hints_of(folder))
    assert found == {"num_inference_steps": steps, "guidance_scale": scale, "max_sequence_length": 512}
