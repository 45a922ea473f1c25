"""Adds what OpenVINO GenAI needs to an OpenVINO export: tokenizers as IR, and a scheduler for FLUX.1-dev.

GenAI 2026.4 shifts the noise levels of FLUX.1 as those of FLUX.2, if the scheduler's shift depends on the image's size.
So the folder also gets a scheduler with the constant shift that is right at the folder's own size and steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.common.files import read_json, write_json
from edgeprune.export import ir_tokenizer
from edgeprune.families.encoders import LANGUAGE, T5, text_encoders, tokenizer_of
from edgeprune.runtimes.base import read_settings
from edgeprune.sampling.generation import longest_prompt
from edgeprune.sampling.scheduler import FlowMatch
from edgeprune.sampling.scheduler_classes import EULER_CLASS

SCHEDULER = "openvino_genai.json"
"""Next to scheduler_config.json, if that one shifts by image size or is not Euler's.

For `openvino_genai.Scheduler.from_config`."""


def write(folder: Path) -> dict[str, Any]:
    """Add the files to an otherwise complete export.

    Returns:
        `tokenizers`, for edgeprune_export.json: what ir_tokenizer.write returns, by the tokenizer's name.

    Raises:
        DiskError: the disk is full, or a file cannot be written.
        InputError: scheduler_config.json has an unsupported field or an impossible value.
    """
    if set(LANGUAGE) & set(text_encoders(folder).values()):
        return {}  # GenAI has no pipeline of FLUX.2, Z-Image and Qwen-Image
    settings = read_settings(folder)
    made = settings.generation
    scheduler = FlowMatch.load(folder)
    if scheduler.use_dynamic_shifting or scheduler.kind != EULER_CLASS:
        tokens = settings.tokens(made.height, made.width)
        shift = scheduler.shifted_by(tokens, settings.family.shift(tokens, made.num_inference_steps))
        path = folder / "scheduler" / "scheduler_config.json"
        constant = {"_class_name": EULER_CLASS, "use_dynamic_shifting": False, "shift": shift}
        write_json(path.with_name(SCHEDULER), read_json(path) | constant)
    # Our runtimes pad the prompts of all CLIPs to the first tokenizer's length.
    clip, t5 = longest_prompt(folder), made.max_sequence_length
    return {
        "tokenizers": {
            tokenizer_of(name): ir_tokenizer.write(folder / tokenizer_of(name), t5 if kind == T5 else clip)
            for name, kind in text_encoders(folder).items()
        }
    }
