"""Checks: with one value of a config changed, a pipeline is refused in one line before any work, or it loads."""

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
from tiny import tiny_flux_pipeline, tiny_pipeline

from edgeprune.artefact.checks import check_pipeline
from edgeprune.artefact.loading import load
from edgeprune.common.errors import InputError
from edgeprune.families.parts import tensor_of
from edgeprune.residency.weights import Weights
from edgeprune.sampling.generation import Generation

pytestmark = pytest.mark.filterwarnings("ignore")  # vendors' deprecations
PARTS = ["transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"]
FILES = [
    *("model_index.json", "scheduler/scheduler_config.json", "generation.json"),
    *(f"{part}/config.json" for part in PARTS),
]  # fmt: skip
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 65537, 2**31, 2**63, 10**30, 0.0, 0.5, -0.5, 1e-6, 1e300, 1e-300),
    *("", "x", "1", "none", "silu", "float8_e4m3fn", "../x", "\0", "é", "\u202e", "x" * 300),
    *([], [1], [None], ["x"], [32, 64], {}, {"x": 1}, {"quant_method": "x"}, [[1]], [8, 8, 16, 16], "fp16", "bfloat16"),
]
NEW = ["a_later_field", "quantization_config", "torch_dtype", "_name_or_path", "latents_mean", "force_upcast", "shift"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny SD3 with a T5, and a tiny FLUX."""
    root = tmp_path_factory.mktemp("checks")
    tiny_pipeline(root / "sd3", t5=True, num_layers=1)
    tiny_flux_pipeline(root / "flux", num_layers=1, num_single_layers=1)
    return {name: root / name for name in ("sd3", "flux")}


def mutated(case: dict[str, Any], source: Path, folder: Path) -> tuple[str, str]:
    """Copy a model and change a value of a config; return file and field."""
    shutil.copytree(source, folder, copy_function=os.link)
    files = [file for file in FILES if (folder / file).is_file()]
    file = files[case["file"] % len(files)]
    data = json.loads((folder / file).read_text())
    names = [*sorted(data), *NEW]
    field = names[case["field"] % len(names)]
    owner: Any = data
    key: Any = field
    if case["inner"] and isinstance(data.get(field), list) and data[field]:
        owner, key = data[field], case["inner"] % len(data[field])
    if case["remove"] and field in data and owner is data:
        del owner[key]
    else:
        owner[key] = case["value"]
    (folder / file).unlink()  # a hard link to the model's own
    (folder / file).write_text(json.dumps(data))
    return file, field


@holds(
    st.fixed_dictionaries(
        {
            "model": st.sampled_from(["sd3", "flux"]), "file": st.integers(0, 99), "field": st.integers(0, 999),
            "inner": st.integers(0, 4), "remove": st.booleans(), "value": st.sampled_from(VALUES),
        }
    ),
    few=25,
)  # fmt: skip
def test_a_changed_config_is_refused_at_once_or_loads(
    case: dict[str, Any], place: Path, models: dict[str, Path]
) -> None:
    folder = place / "model"
    file, field = mutated(case, models[case["model"]], folder)
    try:
        index = check_pipeline(folder)
        Generation.load(folder).check_size(folder)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        assert str(folder) in str(error) or field in str(error)
        return
    try:
        pipe = load(folder)
    except InputError as error:  # fields without a tensor, such as a dropout, whose types transformers checks
        assert file.startswith("text_encoder") and "cannot be loaded" in str(error) and "\n" not in str(error)
        return
    for part in PARTS:
        if not (folder / part).is_dir() or index.get(part, [None])[0] is None:
            continue
        kind = index[part][1]
        found = {tensor_of(kind, n) or n: t for n, t in getattr(pipe, part).state_dict().items()}
        weights = Weights(folder / part)
        for name in weights.shapes:
            assert torch.equal(found[tensor_of(kind, name) or name], weights[name].float()), f"{part}: {name}"
