"""Error feedback: the integers are those of its definition, and cost less of the output than the nearest ones."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from edgeprune.common.errors import InputError
from edgeprune.families import family_of_model
from edgeprune.quantization import feedback
from edgeprune.quantization.feedback import rounded, second_moments
from edgeprune.quantization.int4 import PackedLinear, unpack
from edgeprune.quantization.quantize import quantize_part

OUTPUTS, INPUTS, GROUP = 24, 128, 32


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (O, I), its steps (O, G), and inputs that depend on one another and differ in size."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, generator=g)
    mixed = torch.randn(600, INPUTS, generator=g) @ torch.randn(INPUTS, INPUTS, generator=g)
    steps = weight.view(OUTPUTS, -1, GROUP).abs().amax(-1) / 7.5
    return weight, steps.half(), mixed * torch.exp(torch.randn(INPUTS, generator=g))


def nearest(weight: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Round each weight alone: integers (O, I)."""
    return (weight.view(*steps.shape, -1) / steps.float()[..., None]).round().clamp(-8, 7).view_as(weight)


def lost(weight: torch.Tensor, steps: torch.Tensor, integers: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the squared error of the output."""
    found = integers.float().view(*steps.shape, -1) * steps.float()[..., None]
    return float(((found.view_as(weight) - weight) @ inputs.T).square().sum())


def by_definition(weight: torch.Tensor, steps: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Round column by column, solving for the best change of all later columns each time, in float64."""
    moments = moments.double()
    moments = moments + feedback.DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    order = moments.diagonal().argsort(descending=True)
    left, wide = weight.double(), steps.double().repeat_interleave(GROUP, dim=1)
    out = torch.empty_like(left)
    for place, j in enumerate(order):
        out[:, j] = (left[:, j] / wide[:, j]).round().clamp(-8, 7)
        error = out[:, j] * wide[:, j] - left[:, j]
        later = order[place + 1 :]
        if len(later):  # least squares: the change d of the later ones with (d, error) of the least output
            change = -torch.linalg.solve(moments[later][:, later], moments[later, j])
            left[:, later] += error[:, None] * change
    return out


def test_the_integers_are_those_of_the_definition(layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    weight, steps, inputs = layer
    moments = inputs.T @ inputs / len(inputs)
    (found,) = rounded([(weight, steps)], [moments])
    assert found.dtype == torch.int8
    assert torch.equal(found.double(), by_definition(weight, steps, moments))
    assert lost(weight, steps, found, inputs) < 0.5 * lost(weight, steps, nearest(weight, steps), inputs)


def test_more_inputs_than_a_factor_holds_make_up_for_one_another_in_parts(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    weight, steps, inputs = layer
    moments = inputs.T @ inputs / len(inputs)
    parts = [moments[:64, :64], moments[64:, 64:]]
    (found,) = rounded([(weight, steps)], parts)
    for columns, part in ((slice(0, 64), parts[0]), (slice(64, 128), parts[1])):
        groups = slice(columns.start // GROUP, columns.stop // GROUP)
        (alone,) = rounded([(weight[:, columns], steps[:, groups])], [part])
        assert torch.equal(found[:, columns], alone)


@pytest.mark.parametrize("seen", [0, 1, 5])
def test_with_few_inputs_or_none_nothing_breaks(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor], seen: int
) -> None:
    """Also not where the next inputs have little to do with those that were seen, as no model's have."""
    weight, steps, inputs = layer
    few = inputs[:seen]
    (found,) = rounded([(weight, steps)], [few.T @ few / max(1, seen)])
    assert lost(weight, steps, found, inputs) < 1.3 * lost(weight, steps, nearest(weight, steps), inputs)
    if not seen:
        assert torch.equal(found.float(), nearest(weight, steps))


@pytest.mark.parametrize("seen", [1, 5, INPUTS // 4])
def test_a_few_inputs_suffice_where_all_are_alike(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor], seen: int
) -> None:
    """As those of modulation layers, which see one vector a state: see docs/int4.md."""
    weight, steps, inputs = layer
    alike = inputs / inputs.std() + 3 * torch.randn(INPUTS, generator=torch.Generator().manual_seed(9))
    few, others = alike[:seen], alike[300:]
    (found,) = rounded([(weight, steps)], [few.T @ few / seen])
    assert lost(weight, steps, found, others) < 0.25 * lost(weight, steps, nearest(weight, steps), others)


def test_a_group_of_zeros_stays_zero() -> None:
    (found,) = rounded([(torch.zeros(2, 32), torch.zeros(2, 1))], [torch.eye(32)])
    assert not found.any()


class Parts(nn.Module):
    """Two layers that get one tensor, and one that gets another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.out(self.q(x) + self.k(x))
        return found


def test_moments_are_those_of_all_rows_of_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Parts(), torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0))
    layers: dict[str, nn.Linear] = {"q": model.q, "k": model.k, "out": model.out}

    def run() -> None:
        for part in x.split(2):
            model(part)

    (q,), (k,), (out,) = second_moments(layers, run, calls=2).values()
    torch.testing.assert_close(q, x.flatten(0, 1).T @ x.flatten(0, 1) / 20)
    assert k is q and not torch.allclose(out, q)
    monkeypatch.setattr(feedback, "CHANNELS", 4)
    first, second = second_moments(layers, run, calls=2)["q"]
    torch.testing.assert_close(first, q[:3, :3])
    torch.testing.assert_close(second, q[3:, 3:])


def test_moments_of_many_rows_are_of_as_many_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row counts alike, whatever the size of its call."""
    monkeypatch.setattr(feedback, "ROWS", 30)
    layer, rows = nn.Linear(350, 1), torch.eye(350)

    def run() -> None:
        for part in rows.split(100):  # the last has 50
            layer(part)

    ((moments,),) = second_moments({"layer": layer}, run, calls=4).values()
    counted = [350 * moments.diagonal()[start : start + 100] for start in range(0, 350, 100)]
    assert [int((part > 0).sum()) for part in counted] == [8, 8, 8, 8]  # each call's share, rounded up
    assert [round(float(part.sum())) for part in counted] == [100, 100, 100, 50]
    chosen = {tuple(part.nonzero().flatten().tolist()) for part in counted}
    assert len(chosen) == 4  # not the same rows of each


def test_many_weights_are_rounded_in_pieces(
    layer: tuple[torch.Tensor, torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, steps, inputs = layer
    moments = [inputs.T @ inputs / len(inputs)]
    whole = rounded([(weight, steps), (weight.flip(0), steps.flip(0))], moments)
    assert torch.equal(whole[0].flip(0), whole[1])
    monkeypatch.setattr(feedback, "_WEIGHTS", 5 * INPUTS)
    pieces = rounded([(weight, steps), (weight.flip(0), steps.flip(0))], moments)
    assert all(torch.equal(one, two) for one, two in zip(whole, pieces, strict=True))


def test_each_layer_of_a_block_gets_its_own_integers() -> None:
    """Layers that share inputs, and all others: each has those that it gets alone, and the block's output is closer."""
    model = tiny.tiny_transformer().requires_grad_(False)
    family, block = family_of_model(model), model.transformer_blocks[0]
    g = torch.Generator().manual_seed(0)
    width = model.inner_dim
    samples = [torch.randn(2, tokens, width, generator=g) for tokens in (12, 7)]
    modulation = torch.randn(2, width, generator=g)

    def run() -> None:
        family.run(block, *samples, modulation, ())

    before, outputs, layers = copy.deepcopy(block), {}, {}
    for calibration in ("none", "feedback"):
        model.transformer_blocks[0] = block = copy.deepcopy(before)
        quantize_part(family, model, 0, calibration=calibration, run=run)
        outputs[calibration] = family.run(block, *samples, modulation, ())
        layers[calibration] = {n: m for n, m in block.named_modules() if isinstance(m, PackedLinear)}
    block = before  # that `run` runs
    moments = second_moments({n: before.get_submodule(n) for n in layers["none"]}, run, calls=1)
    assert moments["attn.to_q"] is moments["attn.to_v"] is not moments["attn.add_q_proj"]
    for name, packed in layers["feedback"].items():
        weight = before.get_submodule(name).weight
        (alone,) = rounded([(weight, packed.weight_scale)], moments[name])
        assert torch.equal(unpack(packed.weight_packed, 4), alone), name
        assert torch.equal(packed.weight_scale, layers["none"][name].weight_scale)
    exact = family.run(before, *samples, modulation, ())
    lost = {}
    for calibration, found in outputs.items():
        lost[calibration] = sum(float((a - b).square().sum()) for a, b in zip(exact, found, strict=True))
    assert lost["feedback"] < 0.6 * lost["none"]


def test_inputs_that_are_not_finite_are_refused() -> None:
    layer, inputs = nn.Linear(4, 1), torch.ones(2, 4)

    def run() -> None:
        layer(inputs)

    assert set(second_moments({"layer": layer, "never runs": nn.Linear(4, 1)}, run, calls=1)) == {"layer"}
    inputs[0, 1] = torch.inf
    with pytest.raises(InputError, match=r"layer: the model makes NaN or infinity"):
        second_moments({"layer": layer}, run, calls=1)
    with pytest.raises(ValueError, match="not finite"):
        rounded([(layer.weight, torch.ones(1, 1))], [torch.full((4, 4), torch.nan)])
