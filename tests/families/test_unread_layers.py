"""Which layers of text encoders nothing reads: of the encoders that are exported none, of FLUX.2's those after 27."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import CLIPTextModel, Qwen3Config, Qwen3ForCausalLM

from edgeprune.artefact.loading import cut_unread
from edgeprune.artefact.staged import layers_of
from edgeprune.export import modules
from edgeprune.families import family_of
from edgeprune.families.encoders import CLIP, CLIP_POOLED, T5

VOCAB = 99


def outputs(model: Any, kind: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return what an exported encoder says, by the names that `Network.join` reads."""
    module = modules.T5Encoder(model) if kind == T5 else modules.TextEncoder(model)
    with torch.no_grad():
        said = module(torch.arange(3, 12)[None])
    return {name: tensor.numpy() for name, tensor in zip(module.outputs, said, strict=True)}


ENCODERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "sd3 clip": (CLIP, lambda: tiny.tiny_text_encoder(VOCAB, VOCAB - 1)),
    "flux clip": (CLIP_POOLED, lambda: tiny.tiny_text_encoder(VOCAB, VOCAB - 1, kind=CLIPTextModel)),
    "t5": (T5, lambda: tiny.tiny_t5(VOCAB, layers=3)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_layer_of_an_exported_encoder_is_read(name: str) -> None:
    """A change of any layer, the last one too, changes what the pipeline reads: nothing can be cut."""
    kind, make = ENCODERS[name]
    family = family_of(tiny.config_of(tiny.tiny_flux() if name.startswith("flux") else tiny.tiny_transformer()))
    clips = {e.name: outputs(ENCODERS[f"{family.name.split('-')[0]} clip"][1](), e.kind) for e in family.encoders[:1]}
    assert clips  # the family has the encoder that is named for it

    def read(model: Any) -> list[np.ndarray[Any, Any]]:
        said = outputs(model, kind)
        if kind == CLIP:
            last = max(int(key.rpartition(".")[2]) for key in said if key.startswith("hidden_states."))
            return [said[f"hidden_states.{last - 1}"], said["text_embeds"]]
        return [said["pooler_output" if kind == CLIP_POOLED else "last_hidden_state"]]

    model = make()
    before, count = read(model), len(list(layers_of(model, kind)))
    for index in range(count):
        other = copy.deepcopy(model)
        for parameter in dict(layers_of(other, kind))[list(dict(layers_of(other, kind)))[index]].parameters():
            parameter.data.mul_(1.5)
        assert any(not np.allclose(a, b, atol=1e-4) for a, b in zip(before, read(other), strict=True)), index


def language_model(layers: int = 30) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.norm.weight, mean=2.0)
    return model


@torch.no_grad()
def states(model: Any, which: tuple[int, ...]) -> list[torch.Tensor]:
    ids = torch.arange(3, 12)[None]
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    return [found[index] for index in which]


def test_the_states_that_flux2_reads_stay_when_the_rest_is_cut() -> None:
    (encoder,) = family_of({"_class_name": "Flux2Transformer2DModel", **tiny.config_of(tiny.tiny_flux2())}).encoders
    assert encoder.states == (9, 18, 27)
    whole, cut = language_model(), language_model()
    cut_unread(cut, encoder.states)
    assert len(cut.model.layers) == 27 < len(whole.model.layers)
    for before, after in zip(states(whole, encoder.states), states(cut, encoder.states), strict=True):
        assert torch.equal(before, after)


def test_cutting_the_layers_alone_would_change_the_last_state() -> None:
    """transformers norms the last state that it returns."""
    whole, cut = language_model(), language_model()
    cut.model.layers = cut.model.layers[:27]
    (before,), (after,) = states(whole, (27,)), states(cut, (27,))
    assert not torch.allclose(before, after, atol=1e-2)
