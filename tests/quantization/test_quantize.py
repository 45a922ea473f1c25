"""INT4: packing, the custom op, NNCF's integers, the precision rule, and bytes."""

import os
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from tiny import KINDS, config_of, quantize, tiny_transformer, tiny_velocity
from torch import nn

from edgeprune.artefact.surgery import load_strictly
from edgeprune.common.errors import InputError
from edgeprune.families import family_of
from edgeprune.quantization import quantize as rounding
from edgeprune.quantization.int4 import PackedLinear, dequantize, pack, packed_linear, round_int4, unpack
from edgeprune.quantization.precision import Precision, footprint, precision_of
from edgeprune.quantization.quantize import packed_from, prepare, round_to_nearest

CONFIG = {"_class_name": "SD3Transformer2DModel"}
SD3 = family_of(CONFIG)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_and_unpack_are_inverse(bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    values = torch.randint(low, high, (6, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack(values, bits)
    assert packed.dtype == torch.uint8 and packed.numel() * 8 == values.numel() * bits
    assert torch.equal(unpack(packed, bits), values)


def test_low_nibble_comes_first() -> None:
    assert pack(torch.tensor([[1, -2]]), 4).item() == 0xE1


@pytest.mark.parametrize("bits", [4, 8])
def test_op_equals_the_plain_product_and_passes_opcheck(bits: int) -> None:
    linear = nn.Linear(64, 24)
    precision = Precision(bits, 32 if bits == 4 else 64)
    layer = packed_from(linear, *round_to_nearest(linear.weight.detach(), precision), precision)
    x = torch.randn(3, 5, 64)
    weight = dequantize(layer.weight_packed, layer.weight_scale, bits, torch.float32)
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias.float())
    assert (weight - linear.weight).abs().max() < linear.weight.abs().max() / (6 if bits == 4 else 120)
    torch.library.opcheck(packed_linear, (x, layer.weight_packed, layer.weight_scale, layer.bias, bits))


def test_layer_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(InputError, match="does not divide"):
        PackedLinear(96, 8, bits=4, group_size=64)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("transformer_blocks.0.attn.to_q.weight", (64, 128), Precision(4, 64)),
        ("transformer_blocks.0.attn.to_q.weight", (64, 96), Precision(4, 32)),
        ("transformer_blocks.0.attn.to_q.weight", (64, 50), Precision(8, 50)),
        ("transformer_blocks.0.attn.norm_q.weight", (64,), Precision(16)),
        ("transformer_blocks.0.attn.to_q.bias", (64,), Precision(16)),
        ("single_transformer_blocks.0.proj_out.weight", (64, 320), Precision(8, 320)),  # of another family
        ("proj_out.weight", (8, 128), Precision(8, 128)),
        ("pos_embed.proj.weight", (128, 8, 1, 1), Precision(16)),
    ],
)
def test_rule(name: str, shape: tuple[int, ...], expected: Precision) -> None:
    assert precision_of(SD3, name, shape) == expected


@pytest.mark.parametrize("kind", ["sd3", "sd3-dual", "flux", "flux2", "z-image", "qwen-image"])
def test_quantised_model_is_close_and_as_small_as_forecast(kind: str) -> None:
    model = KINDS[kind]()
    config = config_of(model)
    family = family_of(config)
    expected = tiny_velocity(model)
    quantize(family, model)
    found = tiny_velocity(model)
    error = ((found - expected).norm() / expected.norm()).item()
    assert 0 < error < 0.25
    assert not [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    keep = (".weight_packed", ".weight_scale")
    state = {n: t if n.endswith(keep) else t.half() for n, t in model.state_dict().items()}
    stored = sum(t.numel() * t.element_size() for t in state.values())
    assert stored == footprint(family, family.tensor_shapes(config)).int4_bytes
    # A strict load into an empty model prepared by the same rule gives the same numbers.
    again = prepare(family, KINDS[kind]())
    load_strictly(again, {n: t if n.endswith(keep) else t.float() for n, t in state.items()})
    torch.testing.assert_close(tiny_velocity(again), found, rtol=1e-2, atol=1e-2)


def test_nncf_rounds_no_worse_than_we_would() -> None:
    model = tiny_transformer()
    weight = model.transformer_blocks[0].ff.net[2].weight.detach().clone()
    quantize(SD3, model)
    layer = model.transformer_blocks[0].ff.net[2]
    values, scale = round_to_nearest(weight, Precision(4, 64))
    ours = packed_from(nn.Linear(weight.shape[1], weight.shape[0]), values, scale, Precision(4, 64)).weight
    assert (layer.weight - weight).norm() <= 1.05 * (ours - weight).norm()


def test_training_rounds_as_nncf_will() -> None:
    """Distillation with rounded weights helps only if NNCF later chooses the same values."""
    model = tiny_transformer()
    names = ("attn.to_q", "ff.net.0.proj", "norm1.linear")
    block = model.transformer_blocks[0]
    expected = {n: round_int4(block.get_submodule(n).weight.detach().clone(), 64) for n in names}
    quantize(SD3, model)
    for name, weight in expected.items():
        layer = block.get_submodule(name)
        assert (layer.weight_scale >= 0).all()  # TensorRT accepts no negative scales
        # A weight halfway between two steps may round either way.
        assert ((layer.weight - weight).abs() > 1e-3 * weight.abs() + 1e-6).float().mean() < 1e-3
        assert (layer.weight - weight).abs().max() <= layer.weight_scale.max() * 1.001


def test_rounding_passes_the_gradient_straight_through() -> None:
    weight = torch.randn(4, 64, requires_grad=True)
    rounded = round_int4(weight, 32)
    (rounded * 3).sum().backward()
    assert torch.equal(weight.grad, torch.full((4, 64), 3.0))
    assert 0 < (rounded - weight).abs().max() < weight.abs().max() / 8
    assert torch.equal(round_int4(torch.zeros(2, 32), 32), torch.zeros(2, 32))


def test_nncf_sends_no_telemetry() -> None:
    """By default NNCF forks the process at every call to send telemetry, but not under pytest: hence a subprocess."""
    code = """
import os, torch
from edgeprune.quantization.quantize import _nncf_integers
_nncf_integers([torch.randn(8, 64)], 64)
os.register_at_fork(before=lambda: print("forked"))
_nncf_integers([torch.randn(8, 64)], 64)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "NNCF"))}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "forked" not in found.stdout


def test_a_weight_goes_to_nncf_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    ((values, scale),) = rounding._integers([weight], 32)
    called, real = list[int](), rounding._nncf_integers
    monkeypatch.setattr(rounding, "_BATCH", 16 * 64)
    monkeypatch.setattr(rounding, "_nncf_integers", lambda w, g: called.append(len(w[0])) or real(w, g))
    ((parts, steps),) = rounding._integers([weight], 32)
    assert called == [16, 16, 8] and torch.equal(parts, values) and torch.equal(steps, scale)


def test_weights_are_freed_as_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of SD3.5 Large has 0.9 GB in float32."""
    model = tiny_transformer()
    layers = [weakref.ref(layer) for layer in rounding.linear_layers(SD3.blocks(model)[0]).values()]
    alive, real = list[int](), rounding.packed_from

    def seen(*arguments: Any) -> PackedLinear:
        alive.append(sum(layer() is not None for layer in layers))
        return real(*arguments)

    monkeypatch.setattr(rounding, "packed_from", seen)
    rounding.quantize_part(SD3, model, 0)
    assert alive[0] == len(layers) and alive[-1] < len(layers) // 2
