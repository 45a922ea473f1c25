"""Loaders: of any part, a tensor that is missing, renamed or of another shape or dtype is refused by its name, and one
with other numbers is loaded with exactly these numbers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from properties import holds
from safetensors.torch import load_file, save_file
from tiny import tiny_flux_pipeline, tiny_pipeline

from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.loading import load_part, load_transformer
from edgeprune.common.errors import InputError
from edgeprune.families.parts import tensor_of
from edgeprune.residency.model_files import weights_of

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
Tensors = dict[str, torch.Tensor]
MODELS = {
    "sd3": ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"],
    "flux": ["transformer", "vae", "text_encoder", "text_encoder_2"],
    "shards": ["transformer", "vae", "text_encoder", "text_encoder_3"],
}
PLACES = [(model, part) for model, parts in MODELS.items() for part in parts]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny SD3 with a T5, the same in shards, and a tiny FLUX."""
    root = tmp_path_factory.mktemp("loaders")
    pipe = tiny_pipeline(root / "sd3", t5=True, num_layers=1)
    tiny_flux_pipeline(root / "flux", num_layers=1, num_single_layers=1)
    shutil.copytree(root / "sd3", root / "shards")
    for part in MODELS["shards"]:
        for path in (root / "shards" / part).glob("*.safetensors"):
            path.unlink()
        getattr(pipe, part).half().save_pretrained(root / "shards" / part, max_shard_size="40KB")
        assert len(list((root / "shards" / part).glob("*.safetensors"))) > 1
    return {name: root / name for name in MODELS}


def removed(tensors: Tensors, name: str, number: int) -> Tensors:
    return {n: t for n, t in tensors.items() if n != name}


def renamed(tensors: Tensors, name: str, number: int) -> Tensors:
    others = [f"{name}2", name[1:], f"model.{name}", name.replace(".", "_"), f"{name}_scale", name[:-1], f"{name} "]
    return {others[number % len(others)] if n == name else n: t for n, t in tensors.items()}


def added(tensors: Tensors, name: str, number: int) -> Tensors:
    ends = (".weight_scale", "_ema", ".lora_A.weight", "x", ".scale_weight", ".absmax")
    return tensors | {f"{name}{ends[number % len(ends)]}": torch.ones(1)}


def reshaped(tensors: Tensors, name: str, number: int) -> Tensors:
    tensor = tensors[name]
    ways = [
        lambda t: t[:1] if len(t) > 1 else torch.cat([t, t]), lambda t: t[None], lambda t: torch.cat([t, t]),
        lambda t: t.flatten() if t.dim() > 1 else t[:, None], lambda t: t[:0], lambda t: t[..., None],
        lambda t: t.T.contiguous() if t.dim() == 2 and t.shape[0] != t.shape[1] else t[None],
    ]  # fmt: skip
    return tensors | {name: ways[number % len(ways)](tensor)}


def retyped(tensors: Tensors, name: str, number: int) -> Tensors:
    kinds = [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16]
    return tensors | {name: tensors[name].to(kinds[number % len(kinds)])}


def permuted(tensors: Tensors, name: str, number: int) -> Tensors:
    order = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(number))
    return tensors | {name: tensors[name][order]}


def swapped(tensors: Tensors, name: str, number: int) -> Tensors:
    same = [n for n, t in tensors.items() if t.shape == tensors[name].shape]
    other = same[number % len(same)]
    return tensors | {name: tensors[other], other: tensors[name]}


def widened(tensors: Tensors, name: str, number: int) -> Tensors:
    return tensors | {name: tensors[name].to([torch.float32, torch.float64, torch.bfloat16][number % 3])}


REFUSED = [removed, renamed, added, reshaped, retyped]
LOADED = [permuted, swapped, widened]
EDITS = {edit.__name__: edit for edit in (*REFUSED, *LOADED)}
"""In the order of how a tensor is changed; `number` chooses among variants."""


def edited(case: dict[str, Any], source: Path, folder: Path) -> tuple[list[str], Tensors]:
    """Copy a model and change a tensor; return the names in the file that it had and has, and the part's tensors."""
    shutil.copytree(source, folder, copy_function=os.link)
    part = folder / case["place"][1]
    found = weights_of(part)
    assert found is not None
    files = sorted(found.files)
    path = part / files[case["file"] % len(files)]
    before = load_file(path)
    name = sorted(before)[case["tensor"] % len(before)]
    after = EDITS[case["edit"]](before, name, case["number"])
    path.unlink()  # a hard link to the model's own
    save_file({n: t.clone().contiguous() for n, t in after.items()}, path, {"format": "pt"})
    if found.index and after.keys() != before.keys():  # as a trainer's own tool would write it
        index = json.loads((part / found.index).read_text())
        listed = {n: f for n, f in index["weight_map"].items() if f != path.name}
        (part / found.index).unlink()
        (part / found.index).write_text(json.dumps(index | {"weight_map": listed | dict.fromkeys(after, path.name)}))
    tensors: Tensors = {}
    for file in files:
        tensors |= load_file(part / file)
    return sorted(before.keys() ^ after.keys()) or [name], tensors


def loaded(folder: Path, part: str) -> Tensors:
    """Load a part as every stage does."""
    if part == "transformer":
        return dict(load_transformer(folder, quantized=False).state_dict())
    kind = json.loads((folder / "model_index.json").read_text())[part][1]
    found = load_part(folder / part, kind).state_dict()
    return {tensor_of(kind, name) or name: tensor for name, tensor in found.items()}


@holds(
    st.fixed_dictionaries(
        {
            "place": st.sampled_from(PLACES), "edit": st.sampled_from(list(EDITS)), "file": st.integers(0, 99),
            "tensor": st.integers(0, 999), "number": st.integers(0, 99),
        }
    ),
    few=50,
)  # fmt: skip
def test_a_changed_tensor_is_refused_by_name_or_loaded(
    case: dict[str, Any], place: Path, models: dict[str, Path]
) -> None:
    model, part = case["place"]
    kind = json.loads((models[model] / "model_index.json").read_text())[part][1]
    names, stored = edited(case, models[model], place / "model")
    if case["edit"] in {edit.__name__ for edit in REFUSED}:
        with pytest.raises(InputError) as refused:
            check_pipeline(place / "model")
        text = str(refused.value)
        assert f"model/{part}" in text and "\n" not in text
        assert any(name in text or (tensor_of(kind, name) or name) in text for name in names)
        with pytest.raises(InputError):
            loaded(place / "model", part)
        return
    check_pipeline(place / "model")
    wanted = {tensor_of(kind, n) or n: t.float() for n, t in stored.items()}
    found = loaded(place / "model", part)
    assert found.keys() == wanted.keys()
    for n in wanted:
        assert torch.equal(found[n], wanted[n]), n
