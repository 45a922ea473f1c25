"""What a pipeline holds besides networks: scheduler, tokenizers, settings of generation, and the index."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from edgeprune.artefact.synth import tokenizers
from edgeprune.common.files import replace_folder, write_json
from edgeprune.families import Config, Family
from edgeprune.families.encoders import CLIP, CLIP_POOLED, T5, tokenizer_of
from edgeprune.families.published import PublishedPipeline
from edgeprune.sampling.generation import Generation
from edgeprune.sampling.scheduler_classes import EULER_CLASS

_CLASSES = {CLIP: "CLIPTokenizer", CLIP_POOLED: "CLIPTokenizer", T5: "T5TokenizerFast"}
"""The class in transformers of each encoder's tokenizer."""
_QWEN = "Qwen2TokenizerFast"


def write_surroundings(family: Family, pipeline: PublishedPipeline, out: Path) -> None:
    """Write a published pipeline's scheduler, settings of generation, and tokenizers that are not there yet."""
    write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": EULER_CLASS} | pipeline.scheduler)
    Generation(**pipeline.generation).save(out)
    for encoder in family.encoders:
        if encoder.name in pipeline.networks:
            folder = out / tokenizer_of(encoder.name)
            _write_once(folder, _writer(encoder.kind, pipeline.networks[encoder.name]))


def write_index(family: Family, pipeline: PublishedPipeline, config: Config, out: Path) -> None:
    """Write model_index.json."""
    index = {"_class_name": family.pipeline, "_diffusers_version": version("diffusers")} | pipeline.index
    for encoder in family.encoders:
        if encoder.name in pipeline.networks:
            index[encoder.name] = ["transformers", encoder.kind]
            index[tokenizer_of(encoder.name)] = ["transformers", _CLASSES.get(encoder.kind, _QWEN)]
    index |= {"transformer": ["diffusers", config["_class_name"]], "vae": ["diffusers", family.vae]}
    write_json(out / "model_index.json", index | {"scheduler": ["diffusers", EULER_CLASS]})


def _writer(kind: str, network: str) -> Callable[[Path], None]:
    if kind in (CLIP, CLIP_POOLED):  # CLIP-G's tokenizer pads with its first token
        return lambda folder: tokenizers.write_clip(folder, pad="!" if network == "clip-g" else tokenizers.CLIP_END)
    if kind == T5:
        return tokenizers.write_t5
    return tokenizers.write_qwen


def _write_once(folder: Path, write: Callable[[Path], None]) -> None:
    if folder.is_dir():
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    replace_folder(temporary, folder)
