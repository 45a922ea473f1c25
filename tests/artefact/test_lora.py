"""LoRAs of the original on the pruned model: merging before or after pruning is equal; removed layers are reported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import config_of, tiny_flux, tiny_pipeline, tiny_transformer
from typer.testing import CliRunner

from edgeprune.artefact.lora import Lora, read, remap
from edgeprune.artefact.surgery import prune_state
from edgeprune.common.errors import InputError
from edgeprune.families import family_of
from edgeprune.planning.make import make_plan
from edgeprune.planning.options import PlanOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.workspace import Workspace

RANK, ALPHA = 2, 3.0


def lora_of(model: Any, alpha: bool = True) -> dict[str, torch.Tensor]:
    """Return a LoRA on every linear layer of the blocks."""
    g = torch.Generator().manual_seed(0)
    out = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "transformer_blocks" in name:
            key = f"transformer.{name}"
            out[f"{key}.lora_A.weight"] = torch.randn(RANK, layer.in_features, generator=g)
            out[f"{key}.lora_B.weight"] = torch.randn(layer.out_features, RANK, generator=g)
            if alpha:
                out[f"{key}.alpha"] = torch.tensor(ALPHA)
    return out


def merged(state: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    out = dict(state)
    for name in lora:
        if name.endswith("lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            added = lora[f"{layer}.lora_B.weight"] @ lora[name] * scale
            key = f"{layer.removeprefix('transformer.')}.weight"
            out[key] = out[key] + added
    return out


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_adding_before_or_after_pruning_is_the_same(kind: str) -> None:
    model = tiny_flux() if kind == "flux" else tiny_transformer(num_layers=5)
    config = config_of(model)
    family = family_of(config)
    # For FLUX, 3 is a single block, where removing the MLP cuts columns of another layer.
    plan = make_plan(family, config, None, method="manual", blocks="1", components="3:mlp")
    state, lora = dict(model.state_dict()), lora_of(model)
    found = remap(Lora(lora), family, config, plan)
    before = prune_state(family, config, plan, merged(state, lora, ALPHA / RANK).__getitem__, None)
    after = merged(prune_state(family, config, plan, state.__getitem__, None), found.tensors, 1.0)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-5)
    assert not any(name.endswith("alpha") for name in found.tensors)
    assert {"block 1 is removed", "3:mlp is removed"} == set(found.gone.values())
    assert len(found.kept) + len(found.gone) == len(lora) / 3
    assert found.kept["transformer_blocks.0.attn.to_q"] == "transformer_blocks.0.attn.to_q"


def test_projected_modulation_is_reported() -> None:
    model = tiny_transformer(num_layers=3)
    config = config_of(model)
    family = family_of(config)
    plan = make_plan(family, config, None, method="manual", modulation_rank=4)
    found = remap(Lora(lora_of(model)), family, config, plan)
    assert set(found.gone.values()) == {"its modulation is projected"}
    assert found.gone.keys() == {layer for layer in found.gone if "norm1" in layer} and found.kept


def test_a_lora_of_another_model_is_refused() -> None:
    model = tiny_transformer(num_layers=3)
    config = config_of(model)
    family = family_of(config)
    plan = make_plan(family, config, None, method="manual", blocks="1")
    lora = lora_of(tiny_transformer(num_layers=4))
    with pytest.raises(InputError, match=r"found 384 x 64, expected \(128, 64\): the LoRA is for another model"):
        remap(Lora(lora), family, config, plan)
    half = {name: tensor for name, tensor in lora_of(model).items() if not name.endswith("lora_B.weight")}
    with pytest.raises(InputError, match="found one of lora_A and lora_B"):
        remap(Lora(half), family, config, plan)


def test_the_command(tmp_path: Path) -> None:
    from edgeprune.cli import app

    tiny_pipeline(tmp_path / "source")
    ws = Workspace(tmp_path / "small", str(tmp_path / "source"))
    run_plan(ws, PlanOptions("manual", blocks="1"))
    run_prune(ws)
    lora = lora_of(ws.pipe.transformer, alpha=False)
    lora["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 3)
    save_file(lora, tmp_path / "style.safetensors")
    words = ["lora", str(tmp_path / "style.safetensors"), "--model", str(ws.out), "-o"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "new.safetensors")])
    assert done.exit_code == 0, done.output
    written = load_file(tmp_path / "new.safetensors")
    blocks = {name.split(".")[2] for name in written if name.startswith("transformer.")}
    assert blocks == {"0", "1"} and any(name.startswith("text_encoder.") for name in written)
    with pytest.raises(InputError, match=r"found \.bin, expected a \.safetensors file"):
        read(tmp_path / "style.bin", ws.family)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="bad.safetensors: not readable"):
        read(tmp_path / "bad.safetensors", ws.family)
    said = {"text_encoder.lora_alpha": 8, "transformer.lora_alpha": 4}
    save_file(lora, tmp_path / "said.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    given = read(tmp_path / "said.safetensors", ws.family)
    assert given.alpha == 4 and json.loads(given.metadata["lora_adapter_metadata"]) == {"text_encoder.lora_alpha": 8}
    kohya = {"lora_unet_joint_blocks_0_x.lora_down.weight": torch.ones(2, 2)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    with pytest.raises(InputError, match="found 'lora_unet_joint_blocks_0_x.lora_down.weight', expected names of"):
        read(tmp_path / "kohya.safetensors", ws.family)


def test_flux_keeps_its_alphas(tmp_path: Path) -> None:
    """diffusers' conversion drops them; `read` keeps them."""
    model = tiny_flux()
    config = config_of(model)
    family = family_of(config)
    save_file(lora_of(model), tmp_path / "flux.safetensors")
    given = read(tmp_path / "flux.safetensors", family)
    whole = make_plan(family, config, None, method="manual")
    found = remap(given, family, config, whole).tensors
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    torch.testing.assert_close(found[name], given.tensors[name] * ALPHA / RANK)
