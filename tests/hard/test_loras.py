"""LoRAs: for any layers, names, ranks, alphas, DoRA and biases, the pruned model gets what the original has."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from loras import applied, names_of
from properties import holds
from safetensors.torch import save_file
from tiny import KINDS, config_of

from edgeprune.artefact.lora.merging import Differences
from edgeprune.artefact.lora.names import TRANSFORMER, Names, _originals
from edgeprune.artefact.lora.reading import read
from edgeprune.artefact.lora.remap import Places, remap
from edgeprune.artefact.surgery import prune_state
from edgeprune.common.errors import InputError
from edgeprune.families import family_of
from edgeprune.planning.make import make_plan
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import modulation_width

Tensors = dict[str, torch.Tensor]
PLANS: list[tuple[str, str, str, int | None]] = [
    ("sd3", "3", "0:mlp,2:attn", None), ("sd3", "1", "", 8), ("sd3", "", "1:norm", None), ("sd3", "0,3", "", 0),
    ("sd3-dual", "1", "0:attn2,2:context_mlp", None), ("flux", "1", "2:mlp,3:attn,0:context_mlp", None),
    ("flux", "2,4", "", 8), ("flux", "", "0:norm,2:norm", None), ("flux2", "2", "3:attn,0:mlp", None),
]  # fmt: skip
"""Kind of model, blocks, components, and rank of the modulation."""
SCHEMES: dict[str, tuple[str, dict[str, str]]] = {
    "kohya": ("lora_unet_{flat}", {"A": "lora_down.weight", "B": "lora_up.weight"}),
    "onetrainer": ("lora_transformer_{flat}", {"A": "lora_down.weight", "B": "lora_up.weight"}),
    "lycoris": ("lycoris_{flat}", {"A": "lora_down.weight", "B": "lora_up.weight"}),
    "comfyui": ("diffusion_model.{name}", {"A": "lora_down.weight", "B": "lora_up.weight"}),
    "checkpoint": ("model.diffusion_model.{name}", {"A": "lora_A.weight", "B": "lora_B.weight"}),
    "bare": ("{name}", {"A": "lora_A.weight", "B": "lora_B.weight"}),
    "peft": ("base_model.model.{name}", {"A": "lora_A.weight", "B": "lora_B.weight"}),
    "named": ("base_model.model.transformer.{name}", {"A": "lora_A.x.weight", "B": "lora_B.x.weight"}),
    "diffusers": ("transformer.{name}", {"A": "lora_A.weight", "B": "lora_B.weight"}),
    "old": ("transformer.{name}", {"A": "lora.down.weight", "B": "lora.up.weight"}),
}
ROLES = {"dora": "dora_scale", "bias": "diff_b", "whole": "diff", "norm": "diff", "alpha": "alpha"}
LAYER = st.fixed_dictionaries(
    {
        "layer": st.integers(0, 9999), "rank": st.integers(1, 5), "seed": st.integers(0, 999),
        "alpha": st.sampled_from([None, 0.5, 1.0, 3.0, 16.0, -2.0]), "dora": st.booleans(),
        "bias": st.booleans(), "kind": st.sampled_from(["lora", "lora", "lora", "whole", "norm"]),
        "original": st.booleans(),
    }
)  # fmt: skip
CASE = {
    "plan": st.sampled_from(PLANS), "scheme": st.sampled_from(list(SCHEMES)),
    "layers": st.lists(LAYER, min_size=1, max_size=12), "dora": st.booleans(), "plain": st.booleans(),
    "everywhere": st.booleans(), "foreign": st.sampled_from([None] * 6 + ["unknown", "lokr", "half", "text", "zero"]),
}  # fmt: skip
"""`dora`: all layers or none; `plain`: only matrices, which a LoRA file for the pruned model can hold."""


class Model:
    """A tiny model, its plan, and mean and basis of its modulation input."""

    def __init__(self, kind: str, blocks: str, components: str, rank: int | None) -> None:
        model = KINDS[kind]()
        self.config = config_of(model)
        self.family = family_of(self.config)
        self.names: Names = names_of(model)
        self.state: Tensors = {n: t.detach().clone() for n, t in model.state_dict().items()}
        self.plan: PrunePlan = make_plan(
            self.family, self.config, None, method="manual", blocks=blocks, components=components, modulation_rank=rank
        )
        self.mean = self.basis = None
        if rank is not None or "norm" in components:
            g, width = torch.Generator().manual_seed(9), modulation_width(self.family, self.config)
            self.mean = torch.randn(width, generator=g)
            square = torch.linalg.qr(torch.randn(width, max(rank or 1, 1), generator=g))[0]
            self.basis = None if rank is None else square.T[:rank].contiguous()
        shapes = self.names.shapes[TRANSFORMER]
        self.matrices = [n[:-7] for n, shape in shapes.items() if n.endswith(".weight") and len(shape) > 1]
        self.norms = [n[:-7] for n, shape in shapes.items() if n.endswith(".weight") and len(shape) == 1]
        originals = _originals(self.family, shapes, self.family.block_count(self.config))
        self.originals = [(n, layers) for n, layers in originals if len(shapes[f"{layers[0]}.weight"]) > 1]
        self.plain = self.pruned(self.state)

    def pruned(self, state: Tensors) -> Tensors:
        return prune_state(self.family, self.config, self.plan, state.__getitem__, self.mean, self.basis)


model_of = functools.cache(Model)


class File:
    """A LoRA file of a case, and the original with it, computed here by the formulas alone."""

    def __init__(self, case: dict[str, Any], model: Model) -> None:
        self.case, self.model, self.tensors = case, model, Tensors()
        self.state, self.taken = dict(model.state), set[str]()
        chosen = case["layers"]
        if case["everywhere"]:
            chosen = [{**chosen[i % len(chosen)], "layer": i, "original": False} for i in range(len(model.matrices))]
        for layer in chosen:
            self._add(layer)

    def _add(self, layer: dict[str, Any]) -> None:
        model, plain = self.model, self.case["plain"]
        kind = "lora" if plain else layer["kind"]
        name, targets = "", list[str]()
        if kind == "norm" and model.norms:
            name = model.norms[layer["layer"] % len(model.norms)]
            targets = [name]
        elif layer["original"] and kind != "norm":
            name, targets = model.originals[layer["layer"] % len(model.originals)]
        else:
            kind = "lora" if kind == "norm" else kind
            name = model.matrices[layer["layer"] % len(model.matrices)]
            targets = [name]
        if self.taken & {*targets}:
            return
        self.taken |= {*targets}
        weights = [model.state[f"{target}.weight"] for target in targets]
        outs, g = [len(w) for w in weights], torch.Generator().manual_seed(layer["seed"])
        if kind == "norm":
            self._put(name, {"diff": torch.randn(outs[0], generator=g) / 4})
            self.state[f"{name}.weight"] = weights[0] + self.tensors[self._key(name, "diff")]
            return
        total, rows = sum(outs), self._rows(name, targets, outs)
        made = {}
        if kind == "whole":
            made["diff"] = torch.randn(total, *weights[0].shape[1:], generator=g) / 4
            change = made["diff"].flatten(1)
        else:
            rank = layer["rank"]
            made["A"] = torch.randn(rank, weights[0][0].numel(), generator=g) / 4
            made["B"] = torch.randn(total, rank, generator=g) / 4
            change = made["B"] @ made["A"]
            if layer["alpha"] is not None:
                made["alpha"] = torch.tensor(layer["alpha"])
                change = change * layer["alpha"] / rank
            if weights[0].dim() > 2:
                made["A"] = made["A"].reshape(rank, *weights[0].shape[1:])
                made["B"] = made["B"][:, :, None, None]
            if self.case["dora"] and (layer["dora"] or self.case["everywhere"]):
                made["dora_scale"] = torch.rand(total, 1, generator=g) + 0.5
        has_bias = all(f"{target}.bias" in model.state for target in targets)
        if layer["bias"] and has_bias and not (plain and self.case["dora"]):
            made["diff_b"] = torch.randn(total, generator=g) / 4
        self._put(name, made)
        for target, part, weight in zip(targets, rows, weights, strict=True):
            new = weight.flatten(1) + change[part]
            if "dora_scale" in made:
                new = new / new.norm(dim=1, keepdim=True) * made["dora_scale"][part]
            self.state[f"{target}.weight"] = new.reshape(weight.shape)
            if "diff_b" in made:
                self.state[f"{target}.bias"] = self.state[f"{target}.bias"] + made["diff_b"][part]

    def _rows(self, name: str, targets: list[str], outs: list[int]) -> list[torch.Tensor]:
        """Return which rows of a file's layer are each target's. test_lora_names.py compares these with diffusers."""
        start, out = 0, []
        for target, count in zip(self.model.names.find(name)[1], outs, strict=True):
            ranges = target.rows or ((start, start + count),)
            out.append(torch.cat([torch.arange(a, b) for a, b in ranges]))
            start += count
        assert sorted(torch.cat(out).tolist()) == list(range(start)) and len(out) == len(targets)
        return out

    def _key(self, name: str, role: str) -> str:
        prefix, roles = SCHEMES[self.case["scheme"]]
        return f"{prefix.format(name=name, flat=name.replace('.', '_'))}.{roles.get(role, role)}"

    def _put(self, name: str, made: Tensors) -> None:
        self.tensors |= {self._key(name, role): tensor for role, tensor in made.items()}

    def foreign(self, how: str | None) -> tuple[str | None, int]:
        """Add tensors of another kind; return the word that their refusal has, and how many have no effect."""
        extra: dict[str | None, tuple[Tensors, str | None, int]] = {
            None: ({}, None, 0),
            "unknown": ({"transformer.no_such_layer.lora_A.weight": torch.ones(1, 8),
                         "transformer.no_such_layer.lora_B.weight": torch.ones(8, 1)}, "no_such_layer", 0),
            "lokr": ({"lycoris_x.lokr_w1": torch.ones(2, 2)}, "LoKr.*lokr_w1", 0),
            "half": ({"transformer.proj_out2.lora_A.weight": torch.ones(1, 64)}, "proj_out2", 0),
            "text": ({"text_encoder_3.encoder.final.lora_A.weight": torch.ones(1, 8),
                      "text_encoder_3.encoder.final.lora_B.weight": torch.ones(8, 1)}, None, 2),
            "zero": ({"transformer.no_such_layer.lora_A.weight": torch.ones(1, 8),
                      "transformer.no_such_layer.lora_B.weight": torch.zeros(8, 1)}, None, 2),
        }  # fmt: skip
        tensors, word, unused = extra[how]
        self.tensors |= tensors
        return word, unused


def same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@holds(st.fixed_dictionaries(CASE), few=60)
def test_the_pruned_model_gets_what_the_original_has(case: dict[str, Any], place: Path) -> None:
    model = model_of(*case["plan"])
    file = File(case, model)
    word, unused = file.foreign(case["foreign"])
    save_file({n: t.contiguous() for n, t in file.tensors.items()}, place / "lora.safetensors")
    if word:
        with pytest.raises(InputError, match=word):
            read(place / "lora.safetensors", model.names)
        return
    lora = read(place / "lora.safetensors", model.names)
    assert lora.tensors == len(file.tensors) and len(lora.unused) == unused
    differences = Differences(lora, TRANSFORMER, model.names.shapes[TRANSFORMER], model.state.__getitem__)
    places, merged = Places(model.family, model.config, model.plan), dict(model.plain)
    for name, source in places.sources.items():
        if (difference := differences.pruned(source, model.mean, model.basis)) is not None:
            merged[name] = merged[name] + difference
    expected = model.pruned(file.state)
    same(merged, expected)
    fate = places.fates(lora)
    assert sum(fate.counts.values()) == fate.tensors == len(file.tensors) and fate.counts["unused"] == unused
    assert fate.kept.keys() | fate.changed.keys() | fate.gone.keys() == file.taken
    for layer in fate.gone:  # what is gone has no place in the pruned model
        assert places.of(f"{layer}.weight") is None
    try:
        converted, again = remap(lora, model.family, model.config, model.plan, model.mean, model.basis)
    except InputError as error:
        text = str(error)
        assert "cannot hold" in text or ("nothing of it applies" in text and not fate.kept)
        assert "cannot hold" not in text or any(json.dumps(n)[1:-1] in text for n in file.tensors)
        return
    assert again.counts == fate.counts
    same(applied(model.plain, converted), expected)
