"""Surgery: the shorter model computes what the original does with those branches skipped."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny import tiny_inputs, tiny_transformer

from edgeprune.contribution import Removed
from edgeprune.errors import InputError
from edgeprune.families import family_of
from edgeprune.plan import make_plan
from edgeprune.surgery import build, load_strictly, prune


def velocity(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_inputs(), return_dict=False)[0]


def setup(**overrides: object):
    model = tiny_transformer(num_layers=4, **overrides)
    config = {"_class_name": "SD3Transformer2DModel"} | {k: v for k, v in model.config.items() if not k.startswith("_")}
    family = family_of(config)
    inputs = tiny_inputs()
    mean = family.modulation_input(model, inputs["timestep"], inputs["pooled_projections"]).mean(0).detach()
    return model, config, family, mean


@pytest.mark.parametrize("overrides", [{}, {"dual_attention_layers": (0, 1, 3)}], ids=["sd3.5-large", "sd3.5-medium"])
def test_shapes_without_weights_equal_the_model(overrides: dict[str, object]) -> None:
    model, config, family, _ = setup(**overrides)
    assert family.tensor_shapes(config) == {n: tuple(t.shape) for n, t in model.state_dict().items()}


@pytest.mark.parametrize("blocks", ["0", "1-2", "3", "2-3", "0,3"])
@pytest.mark.parametrize("dual", [(), (0, 2)])
def test_whole_blocks_equal_skipped_blocks_and_load_in_stock_diffusers(blocks: str, dual: tuple[int, ...]) -> None:
    model, config, family, mean = setup(dual_attention_layers=dual)
    plan = make_plan(family, config, None, method="manual", blocks=blocks)
    short = prune(family, model, config, plan, mean)
    assert type(short) is SD3Transformer2DModel
    with Removed(family, model, plan.keys, mean):
        expected = velocity(model)
    assert (velocity(short) - expected).abs().max() <= 1e-5
    assert (velocity(model) - expected).abs().max() > 1e-3  # the original is whole again, and differs
    stock = SD3Transformer2DModel(**{k: v for k, v in short.config.items() if not k.startswith("_")}).eval()
    stock.load_state_dict(short.state_dict(), strict=True)
    assert torch.equal(velocity(stock), velocity(short))
    assert sum(p.numel() for p in short.parameters()) == plan.after.parameters


EVERY = [
    "1:norm",
    "1:context_norm",
    "1:attn",
    "1:mlp",
    "1:context_mlp",
    "3:norm",
    "3:context_norm",
    "3:attn",
    "0:attn2",
]


@pytest.mark.parametrize("components", [*EVERY, ",".join(EVERY)])
@pytest.mark.parametrize("blocks", ["", "3"])
def test_components_equal_skipped_branches(components: str, blocks: str) -> None:
    model, config, family, mean = setup(dual_attention_layers=(0, 1))
    if blocks and components.startswith("3"):
        pytest.skip("the block itself is removed")
    plan = make_plan(family, config, None, method="manual", blocks=blocks, components=components)
    short = prune(family, model, config, plan, mean)
    with Removed(family, model, plan.keys, mean):
        expected = velocity(model)
    assert (velocity(short) - expected).abs().max() <= 1e-5
    assert (velocity(model) - expected).abs().max() > 1e-4
    assert sum(p.numel() for p in short.parameters()) == plan.after.parameters


def test_removed_branch_contributes_nothing() -> None:
    """Not the identity in its place, as in the reference code: block and residual stream stay as they are."""
    model, _, family, mean = setup()
    block = model.transformer_blocks[1]
    image, context, embedding = torch.randn(2, 5, 64), torch.randn(2, 3, 64), torch.randn(2, 64)
    with torch.no_grad(), Removed(family, model, [(1, c) for c in ("attn", "mlp", "context_mlp")], mean):
        context_out, image_out = block(image, context, embedding)
    assert torch.equal(image_out, image)
    assert torch.equal(context_out, context)


def test_removed_norm_ignores_timestep_and_prompt() -> None:
    model, _, family, mean = setup()
    norm = model.transformer_blocks[1].norm1
    x = torch.randn(2, 5, 64)
    with torch.no_grad(), Removed(family, model, [(1, "norm")], mean):
        a, b = norm(x, emb=torch.randn(2, 64))[0], norm(x, emb=torch.randn(2, 64))[0]
    assert torch.equal(a, b)
    assert not torch.equal(norm(x, emb=torch.randn(2, 64))[0], a)


def test_strict_state_names_the_first_misfit() -> None:
    model, config, family, _ = setup()
    plan = make_plan(family, config, None, method="manual", blocks="1")
    state = dict(model.state_dict())
    with pytest.raises(InputError, match="transformer_blocks"):
        build(family, config, plan, state)
    state.pop("proj_out.bias")
    with pytest.raises(InputError, match=r"proj_out.bias: found none"):
        load_strictly(model, state)
