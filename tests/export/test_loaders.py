"""Vendors' loaders are not believed: a tensor that one of them misplaces fails the comparison with the checkpoint."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
import traced
import transformers

from edgeprune.common.errors import ParityError
from edgeprune.export import loaders, parity, to_onnx

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
SWAPPED: dict[str, tuple[Any, str, str, str]] = {
    "text_encoder_3": (
        transformers.T5EncoderModel, "encoder.block.0.layer.0.SelfAttention.", "q.weight", "k.weight",
    ),
    "text_encoder": (
        transformers.CLIPTextModelWithProjection, "text_model.encoder.layers.0.", "layer_norm1.weight",
        "layer_norm2.bias",
    ),
    "vae_decoder": (diffusers.AutoencoderKL, "decoder.mid_block.resnets.", "0.conv1.weight", "1.conv2.weight"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD3 with a T5."""
    folder = tmp_path_factory.mktemp("loaders") / "source"
    tiny.tiny_pipeline(folder, t5=True, num_layers=1)
    return folder


def compared(folder: Path, name: str, path: Path) -> dict[str, Any]:
    """Write one network and compare it with the checkpoint."""
    (source,) = to_onnx.sources(folder, lambda other: other != name)
    to_onnx.save(name, source.to_ir(), path)
    module = source.checkpoint()
    return parity.check(name, parity.session(path), module, source.examples, list(module.outputs))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "text_encoder" else pytest.mark.slow) for name in SWAPPED]
)
def test_two_swapped_tensors_fail_parity(
    name: str, folder: Path, tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, prefix, one, other = SWAPPED[name]
    with monkeypatch.context() as patch:
        traced.reuse(patch, tiny_folders[1], "text_encoder", "vae_decoder")
        assert compared(folder, name, tmp_path / "good.onnx")["max_relative"] < parity.BOUND
    load = network.from_pretrained

    def swapped(*given: Any, **options: Any) -> Any:
        model = load(*given, **options)
        state = model.state_dict()
        first, second = state[prefix + one], state[prefix + other]
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        return model

    monkeypatch.setattr(network, "from_pretrained", swapped)
    by_name = name != "vae_decoder"  # what is written, too
    says = f"{one}: found other numbers with transformers" if by_name else "found a relative error"
    with pytest.raises(ParityError, match=f"{name}: .*{says}"):
        compared(folder, name, tmp_path / "bad.onnx")


def test_the_written_network_is_freed_before_the_checkpoint_is_read(folder: Path) -> None:
    networks = to_onnx.sources(folder, lambda other: other != "vae_decoder")
    source = next(networks)
    written = weakref.ref(source.module)
    held = []

    def load() -> Any:
        gc.collect()
        held.append(written() is not None)
        return loaders.vae_decoder(folder, loaders.by_name)

    source.reread = load
    module = source.checkpoint()
    assert held == [False] and source.module is module is source.checkpoint()
    vendors = loaders.vae_decoder(folder, loaders.by_vendor).state_dict()
    assert all(torch.equal(tensor, vendors[name]) for name, tensor in module.state_dict().items())
