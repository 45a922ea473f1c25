"""What the card of an artefact or an export says of its license and of what was changed. Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from edgeprune.artefact.licensing import KEYS, Fields
from edgeprune.artefact.manifest import HALF, Manifest
from edgeprune.planning.plan import PrunePlan
from edgeprune.quantization.precision import TEXT_INT4, TEXT_INT4_WO8

MARK = "<!-- Written by edgeprune;"
"""Begins the comment by which edgeprune knows a card of its own."""


def front_matter(fields: Mapping[str, Any]) -> str:
    """Return a card's front matter with its lines `---`; a JSON value is YAML."""
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()) + "---\n"


def license_fields(fields: Fields) -> dict[str, Any]:
    """Return the license's part of the front matter; the hub shows a model with a base model as its derivative."""
    return fields | ({"base_model_relation": "quantized"} if "base_model" in fields else {})


def license_text(fields: Fields, names: Iterable[str]) -> str:
    """Return the text of the section on the license.

    Args:
        fields: see licensing.read.
        names: the license files in the card's folder.
    """
    names = list(names)
    known = [f"{key}: {escaped(fields[key])}" for key in KEYS[:3] if key in fields]
    if not known and not names:
        return "No license was found in the source, neither in its card nor as a file. Look it up before you use this."
    lines = [f"The license of the original applies to this model too: {'; '.join(known)}."] if known else []
    copied = f"Copied from the original: {', '.join(f'`{name}`' for name in names)}."
    lines.append(copied if names else "The original has no license file.")
    return "\n".join([*lines, "A license may ask for more with a derivative, for example a notice or a name."])


def changes(manifest: Manifest, plan: PrunePlan | None) -> list[str]:
    """Return what was changed in the original model, a line each; licenses ask for this."""
    lines = []
    if plan is not None:
        blocks = ", ".join(map(str, plan.blocks))
        lines.append(f"Blocks removed from the transformer: {blocks or 'none'} (of {plan.num_blocks}).")
        parts = ", ".join(f"{block}:{component}" for block, component in plan.components)
        lines.append(f"Components of other blocks removed: {parts or 'none'}.")
        if plan.modulation_rank is not None:
            lines.append(f"Modulation projected onto {plan.modulation_rank} directions.")
        if plan.stand_ins:
            lines.append(f"Affine maps of rank {plan.stand_in_rank} stand in for each removed run of blocks.")
    trained = "distill" in manifest.stages
    lines.append(f"The remaining weights were {'distilled from the original' if trained else 'not trained further'}.")
    if "quantize" in manifest.stages:
        lines.append(f"Weights of the transformer's blocks in INT4, groups of {manifest.group_size}.")
    if manifest.encoders in (TEXT_INT4, TEXT_INT4_WO8):
        folders = {name.split("/")[0] for name in manifest.files if name.startswith("text_encoder")}
        packed = sorted(name.removesuffix("_int4") for name in folders if name.endswith("_int4"))
        lines.append(f"Weights of {', '.join(packed)} in INT4 as well, beside those of the original.")
    merged = {part for lora in manifest.loras for part in lora["parts"]} - {HALF}
    if manifest.loras:
        files = ", ".join(f"{escaped(lora['file'])} (scale {lora['scale']:g})" for lora in manifest.loras)
        lines.append(f"LoRAs merged into the weights{' and text encoders' if merged else ''}: {files}.")
    same = "Text encoders, tokenizers" if not merged else "Tokenizers"
    lines.append(f"{same}, VAE and scheduler are those of the original.")
    return lines


def escaped(value: str | list[str]) -> str:
    """Return a text of the source as Markdown that shows it literally."""
    text = value if isinstance(value, str) else ", ".join(value)
    return re.sub(r"([\\`*_{}\[\]()#!|<>&~])", r"\\\1", text)
