"""Single files of any layout, prefix, order and storage: a conversion has the values of the file, or is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import singles
import torch
from hypothesis import strategies as st
from properties import holds
from tiny import tiny_flux_pipeline, tiny_pipeline

from edgeprune import api
from edgeprune.common.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
STORAGES = ("F32", "BF16", "F16", "fp8", "scaled", "scaled rows", "new scaled", "Q8_0", "Q4_0", "gguf F16")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "gguf F16": torch.float16}
"""What a weight of two axes becomes; from all other storages bfloat16."""
CASE = {
    "model": st.sampled_from(["flux", "schnell", "sd3", "medium"]),
    "layout": st.sampled_from(["authors", "diffusers"]),
    "prefix": st.sampled_from(["", "model.diffusion_model.", "diffusion_model.", "transformer."]),
    "storage": st.sampled_from(STORAGES),
    "order": st.integers(0, 2**16),
    "damage": st.sampled_from([None] * 6 + ["missing", "unknown", "shape"]),
    "tensor": st.integers(0, 2**16),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each kind of transformer."""
    root = tmp_path_factory.mktemp("convert")
    tiny_flux_pipeline(root / "flux")
    tiny_flux_pipeline(root / "schnell", guidance_embeds=False)
    tiny_pipeline(root / "sd3", qk_norm=None)
    tiny_pipeline(root / "medium", dual_attention_layers=(0, 1))
    return {path.name: path for path in root.iterdir()}


def stored(case: dict[str, Any], state: singles.Tensors, file: Path) -> singles.Tensors:
    """Write the tensors as the case says; return what they stand for, in float32."""
    storage, sd3 = case["storage"], case["model"] in ("sd3", "medium")
    names = sorted(state)
    random.Random(case["order"]).shuffle(names)
    state = {case["prefix"] + name: state[name] for name in names}
    if file.suffix == ".gguf":
        made = singles.write_gguf(state, file, storage.split()[-1], architecture="sd3" if sd3 else "flux")
    elif "scaled" in storage:
        state = singles.scaled_fp8(state, new="new" in storage, rows="rows" in storage)
        singles.save(state, file)
        made = singles.unscaled(state)
    else:
        kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "fp8": torch.float8_e4m3fn}
        kind = kinds[storage]
        made = {n: t.to(kind) if t.ndim == 2 or kind != torch.float8_e4m3fn else t for n, t in state.items()}
        singles.save(made, file)
    return {name.removeprefix(case["prefix"]): tensor.float() for name, tensor in made.items()}


@holds(st.fixed_dictionaries(CASE), few=60)
def test_a_conversion_has_the_values_of_the_file(case: dict[str, Any], place: Path, models: dict[str, Path]) -> None:
    source, sd3 = models[case["model"]], case["model"] in ("sd3", "medium")
    weights = {name: tensor.float() for name, tensor in singles.weights(source / "transformer").items()}
    state = singles.original(weights, sd3=sd3) if case["layout"] == "authors" else dict(weights)
    names = sorted(name for name in state if state[name].ndim == 2)
    chosen = names[case["tensor"] % len(names)]
    if case["damage"] == "missing":
        del state[chosen]
    elif case["damage"] == "unknown":
        state[f"{chosen}_more.weight"] = torch.ones(32, 32)
    elif case["damage"] == "shape":
        state[chosen] = torch.cat([state[chosen], state[chosen]], 1)
    file = place / f"{case['model']}.{'gguf' if case['storage'][0] in 'Qg' else 'safetensors'}"
    expected = stored(case, state, file)
    if case["damage"]:
        with pytest.raises(InputError) as refused:
            api.convert(file, place / "out", config=source)
        assert len(str(refused.value).splitlines()) == 1 and not (place / "out").exists()
        return
    done = api.convert(file, place / "out", config=source)
    found = singles.weights(place / "out" / "transformer")
    found = singles.original(found, sd3=sd3) if case["layout"] == "authors" else found
    assert found.keys() == expected.keys() and "transformer" in done.converted
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.to(found[name].dtype).float()), name
        assert tensor.ndim != 2 or found[name].dtype == DTYPES.get(case["storage"], torch.bfloat16), name
