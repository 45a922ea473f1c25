"""Surgery: the shorter model computes what the original does with those branches skipped, in every family."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny import COSTLY_KINDS, KINDS, TWINS, config_of, tiny_inputs, tiny_step, tiny_velocity

from edgeprune.analysis.contribution import parts, removed
from edgeprune.artefact.surgery import build, load_strictly, prune
from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family, family_of
from edgeprune.planning.make import make_plan
from edgeprune.quantization.precision import footprint
from edgeprune.sampling.denoising import network_inputs


def setup(kind: str) -> tuple[Any, Config, Family, torch.Tensor]:
    model = KINDS[kind]()
    config = config_of(model)
    family = family_of(config)
    inputs = tiny_inputs()
    mean = family.modulation_input(model, inputs["timestep"], inputs["pooled_projections"], 3.0).mean(0).detach()
    return model, config, family, mean


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_weights_equal_the_model(kind: str) -> None:
    model, config, family, _ = setup(kind)
    assert family.tensor_shapes(config) == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert footprint(family, family.tensor_shapes(config)).parameters == sum(p.numel() for p in model.parameters())
    prefixes = [family.block_prefix(model, i) for i in range(family.block_count(config))]
    blocks = family.blocks(model)
    for name, parameter in model.named_parameters():
        place = family.place(config, name)
        assert family.in_block(name) == (place is not None)
        if place is not None:
            rest = name.removeprefix(prefixes[place[0]])
            assert rest != name and blocks[place[0]].get_parameter(rest) is parameter


@pytest.mark.parametrize("blocks", ["0", "1-2", "3", "2-3", "0,3"])
@pytest.mark.parametrize("kind", COSTLY_KINDS)
def test_whole_blocks_equal_skipped_blocks_and_load_in_stock_diffusers(kind: str, blocks: str) -> None:
    model, config, family, mean = setup(kind)
    plan = make_plan(family, config, None, method="manual", blocks=blocks)
    short = prune(family, model, config, plan, mean)
    assert type(short) is type(model)
    with removed(family, model, plan.keys, mean):
        expected = tiny_velocity(model)
    assert (tiny_velocity(short) - expected).abs().max() <= 1e-5
    assert (tiny_velocity(model) - expected).abs().max() > 1e-3  # the original is restored, and differs
    stock = type(model)(**{k: v for k, v in short.config.items() if not k.startswith("_")}).eval()
    stock.load_state_dict(short.state_dict(), strict=True)
    assert torch.equal(tiny_velocity(stock), tiny_velocity(short))
    assert sum(p.numel() for p in short.parameters()) == plan.after.parameters


def every(kind: str) -> list[str]:
    """Return each component of each block, several of a block together, and all of them."""
    config = config_of(KINDS[kind]())
    family = family_of(config)
    names = [f"{b}:{c}" for b, c in parts(family, config, blocks=False)]
    last = family.block_count(config) - 1
    several = f"1:norm,1:attn,{last}:norm,{last}:mlp" if family.norms else f"1:attn,{last}:mlp"
    return [*names, f"{last}:attn,{last}:mlp", several, ",".join(names)]


def components_and_blocks() -> Iterator[Any]:
    """Of blocks that are whole; with a removed block between them, only several components are not slow."""
    for kind in KINDS:
        for components in every(kind):
            yield pytest.param(kind, components, "", marks=pytest.mark.slow if kind in TWINS else ())
            if not components.startswith("3"):  # a block that is removed itself
                quick = "," in components and kind not in TWINS
                yield pytest.param(kind, components, "3", marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "components", "blocks"), list(components_and_blocks()))
def test_components_equal_skipped_branches(kind: str, components: str, blocks: str) -> None:
    model, config, family, mean = setup(kind)
    plan = make_plan(family, config, None, method="manual", blocks=blocks, components=components)
    short = prune(family, model, config, plan, mean)
    with removed(family, model, plan.keys, mean):
        expected = tiny_velocity(model)
    assert (tiny_velocity(short) - expected).abs().max() <= 1e-5
    assert (tiny_velocity(model) - expected).abs().max() > 1e-4
    assert sum(p.numel() for p in short.parameters()) == plan.after.parameters < plan.before.parameters


@pytest.mark.parametrize(("kind", "block"), [("sd3", 1), ("sd3-dual", 1), ("flux", 1), ("flux", 3)])
def test_removed_branch_contributes_nothing(kind: str, block: int) -> None:
    """Unlike in the reference code, no identity takes its place: the residual stream passes the block unchanged."""
    model, config, family, mean = setup(kind)
    image, context, embedding = torch.randn(2, 5, 64), torch.randn(2, 3, 64), torch.randn(2, 64)
    branches = [(block, c) for c in family.components if c not in family.norms]
    turned = torch.ones(8, 32), torch.zeros(8, 32)
    options = {"image_rotary_emb": turned} if kind == "flux" else {}
    with torch.no_grad(), removed(family, model, branches, mean):
        loaded = family.blocks(model)[block]
        context_out, image_out = loaded(image, context, embedding, **options)
    assert torch.equal(image_out, image)
    assert torch.equal(context_out, context)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_removed_norm_ignores_timestep_and_prompt(kind: str) -> None:
    model, _, family, mean = setup(kind)
    norm = model.transformer_blocks[1].norm1
    x = torch.randn(2, 5, 64)
    with torch.no_grad(), removed(family, model, [(1, "norm")], mean):
        a, b = norm(x, emb=torch.randn(2, 64))[0], norm(x, emb=torch.randn(2, 64))[0]
    assert torch.equal(a, b)
    assert not torch.equal(norm(x, emb=torch.randn(2, 64))[0], a)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_whole(kind: str) -> None:
    """Compare the forward pass that exports trace with diffusers' own."""
    model, config, family, _ = setup(kind)
    step = tiny_step(height=6, width=10)
    inputs = network_inputs(model, *step)
    assert list(inputs) == list(family.axes(config)[0])
    with torch.no_grad():
        positions = family.positions(model, inputs)
        image, context, modulation = family.embed(model, inputs)
        for block in family.blocks(model):
            image, context = family.run(block, image, context, modulation, positions)
        out = family.unembed(model, image, modulation, family.grid(model, inputs))
    found = family.velocity(config, out, step[0].shape)
    assert (found - tiny_velocity(model, height=6, width=10)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_packing_in_numpy_equals_torch_and_comes_back(kind: str) -> None:
    _, config, family, _ = setup(kind)
    latents, condition, sigma, guidance = tiny_step(height=6, width=10)
    given = latents, condition.hidden, condition.pooled, sigma
    torch_side = family.inputs(config, *given, guidance)
    numpy_side = family.inputs(config, *(g.numpy() for g in given), guidance)
    for name, value in torch_side.items():
        assert numpy_side[name].dtype == (np.int64 if name == "text_lengths" else np.float32)
        np.testing.assert_array_equal(np.asarray(value), numpy_side[name])
    back = family.velocity(config, torch_side["hidden_states"], latents.shape)
    assert torch.equal(-back if kind == "z-image" else back, latents)  # whose output is the negated velocity


def test_packing_is_that_of_diffusers() -> None:
    from diffusers import FluxPipeline

    _, config, family, _ = setup("flux")
    latents = tiny_inputs(height=6, width=10)["hidden_states"]
    ours = family.inputs(config, latents, torch.zeros(2, 4, 8), torch.zeros(2, 8), torch.ones(2), 3.5)
    assert torch.equal(ours["hidden_states"], FluxPipeline._pack_latents(latents, 2, 8, 6, 10))
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(torch.tensor(ours["img_ids"]), ids)
    assert ours["guidance"].tolist() == [3.5, 3.5] and ours["txt_ids"].shape == (4, 3)


def test_strict_state_names_the_first_misfit() -> None:
    model, config, family, _ = setup("sd3")
    plan = make_plan(family, config, None, method="manual", blocks="1")
    state = dict(model.state_dict())
    with pytest.raises(InputError, match="transformer_blocks"):
        build(family, config, plan, state)
    state.pop("proj_out.bias")
    with pytest.raises(InputError, match=r"proj_out.bias: found none"):
        load_strictly(model, state)
