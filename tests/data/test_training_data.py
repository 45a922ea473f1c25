"""Distillation from a cache: what it reads, and which caches it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from caching import MIXED, cached, images
from safetensors.torch import load_file

from edgeprune.common.errors import InputError
from edgeprune.data.cache import is_cache
from edgeprune.planning.options import PlanOptions
from edgeprune.stages.distill import run as run_distill
from edgeprune.stages.options import DataOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.workspace import Workspace
from edgeprune.training.recipe import DistillOptions


def test_distill_reads_a_cache_without_encoders_and_vae(pipe: Any, model: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(model, tmp_path / "model")
    source, encoded = images(tmp_path / "images", MIXED), tmp_path / "encoded"
    cached(pipe, mine, source, encoded, buckets=True)
    options, said = DistillOptions(steps=3, batch=2, sensitivity="off"), list[str]()

    def begun(out: Path) -> Workspace:
        ws = Workspace(out, str(mine))
        # Removing a norm needs the mean modulation input, which text encoders compute.
        run_plan(ws, PlanOptions("manual", keep=None, components="2:norm,2:mlp", modulation_rank=None))
        run_prune(ws)
        return Workspace(out, str(mine))  # a new one, with nothing loaded

    folders = [tmp_path / "with", tmp_path / "without"]
    opened_folders = [begun(folder) for folder in folders]
    run_distill(opened_folders[0], options, DataOptions(str(encoded)))
    for weights in [*mine.glob("text_encoder*/*.safetensors"), *mine.glob("vae/*.safetensors")]:
        weights.unlink()
    assert run_distill(opened_folders[1], options, DataOptions(str(encoded)), lambda what, *_: said.append(what))
    a, b = (load_file(f / "transformer" / "diffusion_pytorch_model.safetensors") for f in folders)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert [line for line in said if "records its encoders" in line] == [
        f"distill: {encoded} records its encoders; the weights of text_encoder, text_encoder_2, vae are missing here, "
        "so they were not compared"
    ]
    assert not {"pipe", "encoders"} & opened_folders[1].original.loaded.keys()
    # After a move, it is still the same data.
    encoded.rename(tmp_path / "moved")
    assert not run_distill(opened_folders[1], options, DataOptions(str(tmp_path / "moved"), samples=7))


def test_distill_makes_and_reads_a_cache_of_its_own(model: Path, tmp_path: Path) -> None:
    ws = Workspace(tmp_path / "out", str(model))
    run_plan(ws, PlanOptions("manual", keep=None, blocks="1", modulation_rank=None))
    run_prune(ws)
    run_distill(ws, DistillOptions(steps=1, batch=2, sensitivity="off"), DataOptions("shapes", 6))
    (folder,) = ws.cache.glob("data-*")
    assert is_cache(str(folder)) and len(list(folder.glob("shard-*"))) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("vae/config.json", "'vae': found .*…, expected .*… as this model has it"),
        ("text_encoder_2/model.safetensors", "'text_encoder_2': found .*…, expected .*… as this model has it"),
        ("tokenizer/tokenizer_config.json", "'tokenizer': found"),
        ({"height": 72}, "'height': found 64, expected 72"),
        ({"max_sequence_length": 8}, "'max_sequence_length': found 0, expected 8"),
    ],
)
def test_a_cache_of_another_encoder_or_size_is_refused(
    pipe: Any, model: Path, tmp_path: Path, change: str | dict[str, int], said: str
) -> None:
    cached(pipe, model, images(tmp_path / "images", MIXED[:2]), tmp_path / "encoded")
    mine = shutil.copytree(model, tmp_path / "model")
    if isinstance(change, str):
        data = (mine / change).read_bytes()
        other = data[:-1] + bytes([data[-1] ^ 1]) if change.endswith("safetensors") else data + b"\n"
        (mine / change).write_bytes(other)
    ws = Workspace(tmp_path / "out", str(mine), generation=change if isinstance(change, dict) else None)
    run_plan(ws, PlanOptions("manual", keep=None, blocks="1", modulation_rank=None))
    run_prune(ws)
    with pytest.raises(InputError, match=f"encoded/cache.json: {said}"):
        run_distill(ws, DistillOptions(steps=1, sensitivity="off"), DataOptions(str(tmp_path / "encoded")))
