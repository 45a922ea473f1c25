"""Which files are the model: whatever else lies in its folder, the same files are fetched, hashed and copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from properties import holds

from edgeprune.artefact.writing import copy_surroundings
from edgeprune.common.errors import InputError
from edgeprune.families.encoders import read_index
from edgeprune.residency.model_files import INDEX, check_variant, files_among, model_files

PARTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""By part, the stem of its weights' names."""
CONFIGS = {
    INDEX: json.dumps({"_class_name": "P"} | {part: ["diffusers", "C"] for part in (*PARTS, "tokenizer", "scheduler")}),
    "scheduler/scheduler_config.json": "{}", "tokenizer/tokenizer.json": "{}", "tokenizer/spiece.model": "s",
    "generation.json": "{}", **{f"{part}/config.json": "{}" for part in PARTS},
}  # fmt: skip
OTHER = ("bf16", "non_ema", "ema", "fp32")


def weights(part: str, variant: str | None, shards: int, old_names: bool = False) -> dict[str, str]:
    """Return the files of a part's weights: one, or shards and their index."""
    stem, dot = PARTS[part], f".{variant}" if variant else ""
    if not shards:
        return {f"{part}/{stem}{dot}.safetensors": "w"}
    numbers = [f"-{i:05d}-of-{shards:05d}" for i in range(1, shards + 1)]
    names = [f"{stem}{n}{dot}" if old_names else f"{stem}{dot}{n}" for n in numbers]
    files = {f"{part}/{name}.safetensors": "w" for name in names}
    listed = {f"t{i}": f"{name}.safetensors" for i, name in enumerate(names)}
    return {f"{part}/{stem}.safetensors.index{dot}.json": json.dumps({"weight_map": listed})} | files


PLACES = ["", "images/", "text_encoders/", "onnx/", "vae/onnx/", "text_encoder/", "transformer/", "vae/", "tokenizer/"]
ENDINGS = [".bin", ".pt", ".ckpt", ".msgpack", ".h5", ".onnx", ".png", ".md", ".gguf", ".py", ".safetensors.aria2", ""]
DOUBLES = [
    *("sd3.5_large.safetensors", "flux1-dev.gguf", "workflow.json", "config.json", ".gitattributes", "README.MD"),
    *(
        "vae/consolidated.safetensors",
        "transformer/model_fp16.safetensors",
        "text_encoder/pytorch_model.bin.index.json",
    ),
    *("vae_1_0/config.json", "tokenizer/.cache.json", "vae/.config.json", "transformer/adapter.safetensors"),
    *("text_encoder/model.safetensors.bak", "vae/diffusion_pytorch_model-00001-of-00003.safetensors"),
]
STRAY = st.one_of(
    st.sampled_from(DOUBLES),
    st.tuples(st.sampled_from(PLACES), st.sampled_from(["model", "x", "é y"]), st.sampled_from(ENDINGS)).map("".join),
)
VARIANTS = st.tuples(st.sampled_from(list(PARTS)), st.sampled_from(OTHER), st.integers(0, 3), st.booleans())


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


@holds(
    st.fixed_dictionaries(
        {
            "own": st.fixed_dictionaries(
                {part: st.tuples(st.sampled_from([None, "fp16"]), st.integers(0, 2), st.booleans()) for part in PARTS}
            ),
            "wish": st.sampled_from([None, "fp16"]),
            "stray": st.lists(STRAY, max_size=8),
            "variants": st.lists(VARIANTS, max_size=3),
            "both": st.lists(st.sampled_from(list(PARTS)), max_size=2),
        }
    ),
    few=60,
)
def test_other_files_change_nothing(case: dict[str, Any], place: Path) -> None:
    """`own` are the weights of each part; `both` are parts that have the other of full weights and fp16 too."""
    chosen = {part: weights(part, *how) for part, how in case["own"].items()}
    model = CONFIGS | {name: content for files in chosen.values() for name, content in files.items()}
    extra = dict.fromkeys((name for name in case["stray"] if name not in model), "stray")
    for part, variant, shards, old in case["variants"]:
        extra |= weights(part, variant, shards, old)
    for part in case["both"]:
        mine = case["own"][part][0]
        extra |= weights(part, None if mine else "fp16", 0)
        if mine != case["wish"]:  # the other one is meant: full weights without a wish, fp16 with it
            model = {n: c for n, c in model.items() if n not in chosen[part]}
            extra |= chosen[part]
            chosen[part] = weights(part, None if mine else "fp16", 0)
            model |= chosen[part]
    extra = {n: c for n, c in extra.items() if n not in model}
    folder, wish = written(place / "folder", model | extra), case["wish"]
    paths, where = [*contents(folder)], "me/m"
    has_variants = {part for part, variant, *_ in case["variants"]}
    only = {part for part, how in case["own"].items() if how[0] == "fp16"} - set(case["both"])
    if wish is None and only & has_variants:
        for attempt in (lambda: files_among(read_index(folder), paths, None, where), lambda: model_files(folder)):
            with pytest.raises(InputError, match="found no full weights, but the variants .*choose one with --variant"):
                attempt()
        return
    if wish and not any(how[0] == wish for how in case["own"].values()) and not case["both"]:
        with pytest.raises(InputError, match="--variant fp16: .* has no such weights; found "):
            check_variant(folder, wish)
        return
    check_variant(folder, wish)
    assert set(files_among(read_index(folder), paths, wish, where)) == model.keys()
    assert {p.relative_to(folder).as_posix() for p in model_files(folder, wish)} == model.keys()
    plain = written(place / "plain", model)
    for source, copy in ((folder, "a"), (plain, "b")):
        copy_surroundings(source, place / copy, wish)
    parts = [{n: c for n, c in contents(place / copy).items() if "/" in n} for copy in "ab"]
    assert {n: c for n, c in parts[0].items() if not n.startswith("licenses/")} == parts[1]
    assert parts[1] and not [name for name in parts[1] if "fp16" in name]
