"""Guesses: what is said to be guessed is what is used afterwards, and nothing is guessed in silence."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from properties import holds

from edgeprune.api.folders import GUESSED, images_of
from edgeprune.families import family_of
from edgeprune.sampling.generation import FILE, Generation, GenerationOptions, say_guesses
from edgeprune.sampling.scheduler import FlowMatch

CONFIGS = json.loads((Path(__file__).parents[1] / "samples" / "transformer_configs.json").read_text())
NAMES = [
    *("mine", "stable-diffusion-3.5-large-turbo", "FLUX.1-schnell", "flux-dev-de-distill", "x-8steps", "turbo", "é"),
    *("FLUX.1-Turbo-Alpha", "hyper-16-steps", "0steps", "99999999steps", "hyper--turbo"),
]
NAME = st.one_of(st.none(), st.sampled_from(NAMES), st.text("abturo-. 48step", min_size=1, max_size=12))
SCHEDULER = st.fixed_dictionaries(
    {}, optional={
        "shift": st.sampled_from([1.0, 3.0, 1, 0.5]), "use_dynamic_shifting": st.booleans(),
        "_class_name": st.just("FlowMatchEulerDiscreteScheduler"), "max_shift": st.just(1.15),
    },
)  # fmt: skip
FIELDS = {"num_inference_steps": "steps", "guidance_scale": "guidance"}
CASE = {
    "config": st.sampled_from(list(CONFIGS)), "folder": NAME, "name_or_path": NAME, "index_name": NAME, "base": NAME,
    "distilled": st.one_of(st.none(), st.booleans()), "scheduler": SCHEDULER, "snapshot": st.booleans(),
    "given": st.fixed_dictionaries(
        {}, optional={"num_inference_steps": st.integers(1, 60), "guidance_scale": st.sampled_from([0.0, 1.0, 3.5, 7])}
    ),
    "file": st.one_of(st.none(), st.none(), st.fixed_dictionaries({}, optional={"num_inference_steps": st.just(9)})),
}  # fmt: skip


def pipeline(case: dict[str, Any], place: Path) -> Path:
    """Make the configs of a folder."""
    name = (case["folder"] or "m").strip(". ") or "m"
    folder = place / (f"models--me--{name}/snapshots/1" if case["snapshot"] else name)
    config = CONFIGS[case["config"]] | ({"_name_or_path": case["name_or_path"]} if case["name_or_path"] else {})
    index: dict[str, Any] = {"_class_name": family_of(config).pipeline}
    index |= {} if case["distilled"] is None else {"is_distilled": case["distilled"]}
    index |= {"_name_or_path": case["index_name"]} if case["index_name"] else {}
    files = {"transformer/config.json": config, "scheduler/scheduler_config.json": case["scheduler"]}
    files["vae/config.json"] = {"block_out_channels": [128, 256, 512, 512]}
    for path, data in (
        files | {"model_index.json": index} | ({FILE: case["file"]} if case["file"] is not None else {})
    ).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(data))
    if case["base"]:
        (folder / "README.md").write_text(f"---\nbase_model: {case['base']}\n---\n")
    return folder


@holds(st.fixed_dictionaries(CASE), few=150)
def test_what_is_said_is_what_is_used(case: dict[str, Any], place: Path) -> None:
    folder, given = pipeline(case, place), case["given"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        used = images_of(folder, None, GenerationOptions(**given))
    lines = [str(one.message) for one in caught if ": guessed for " in str(one.message)]
    assert len(lines) <= 1 and not any("\n" in line for line in lines)
    said = (
        dict(re.findall(r"(steps|guidance|shift) ([\d.e+-]+)(?:,|:)", lines[0].partition(": guessed")[0] + ":"))
        if lines
        else {}
    )
    schedule = FlowMatch.from_config(case["scheduler"])
    for field, word in FIELDS.items():
        assert (word in said) == (field not in given and case["file"] is None), word
        if word in said:
            assert float(said[word]) == getattr(used, field)
            assert GUESSED[word] in lines[0]
        elif field in given and not (
            field == "guidance_scale" and any("guidance" in str(one.message) for one in caught)
        ):
            assert getattr(used, field) == given[field]  # or it was said that the model does not heed it
    if lines:
        known = "shift" in case["scheduler"] or schedule.use_dynamic_shifting
        assert ("shift" in said) != known and float(said.get("shift", schedule.shift)) == schedule.shift
    # Settings that are saved, as in a compressed folder, are those that were said.
    used.save(folder)
    assert Generation.load(folder) == used
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        say_guesses(folder, ())
