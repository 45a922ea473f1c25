"""The stage `merge`: a LoRA added to an artefact's weights in a new folder, which is then quantized as the old one was.

The weights come from the old folder, distilled or not, so the LoRA is added only once however often a run is killed.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from edgeprune.artefact import licensing
from edgeprune.artefact.lora import encoders as lora_encoders
from edgeprune.artefact.lora.merging import Differences, encoders_of
from edgeprune.artefact.lora.names import TRANSFORMER
from edgeprune.artefact.lora.reading import Lora
from edgeprune.artefact.manifest import HALF, INT4, MANIFEST, Manifest, packed_encoders
from edgeprune.artefact.writing import copy_surroundings
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.common.files import sha256_file
from edgeprune.common.lock import is_free
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors
from edgeprune.planning.remainder import tensor_sources
from edgeprune.residency.weights import Weights
from edgeprune.stages import encoders, quantize
from edgeprune.stages.modulation import MODULATION
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.weights import STAND_INS, by_block, mean_and_basis, original_weights, write_half
from edgeprune.stages.workspace import ENCODERS_STAGE, ORDER, Workspace

_RECORDS = (
    *("plan.json", "analysis.json", "scores.json", "generation.json", MODULATION, STAND_INS),
    "cache/mean-*.safetensors",
)
"""What the new folder takes from the old one, besides the pipeline."""


def begin(base: Path, out: Path, lora: Lora, scale: float) -> None:
    """Begin the folder of an artefact with a LoRA, or find it begun; its stages up to `distill` are those of `base`.

    Raises:
        InputError: `out` is `base`, or holds something else.
        StaleStageError: `out` is another artefact.
    """
    if out.resolve() == base.resolve():
        raise InputError(f"-o {out}: is --model itself; merging writes a new folder")
    manifest = Manifest.load(base)
    manifest.need_half(base)
    parts = sorted({TRANSFORMER, *encoders_of(lora)}) if _changes_transformer(lora) else encoders_of(lora)
    entry = {"file": lora.path.name, "sha256": sha256_file(lora.path), "scale": scale, "parts": parts}
    manifest.loras = [*manifest.loras, entry]
    for stage in ORDER[ORDER.index("merge") :]:
        manifest.stages.pop(stage, None)
    if (out / MANIFEST).is_file():
        if _identity(Manifest.load(out)) != _identity(manifest):
            raise StaleStageError(f"{out}: is another artefact than {base} with {lora.path.name}; use another -o")
        return
    if not is_free(out, MANIFEST):
        raise InputError(f"{out}: exists and is not a folder of edgeprune (no {MANIFEST}); use another -o")
    dropped = (HALF, INT4, *packed_encoders(base))
    manifest.files = {name: sha256 for name, sha256 in manifest.files.items() if name.split("/")[0] not in dropped}
    manifest.encoders = None
    out.mkdir(parents=True, exist_ok=True)
    manifest.save(out)


def run(ws: Workspace, base: Path, lora: Lora, scale: float, progress: Progress = silent) -> bool:
    """Write the merged weights to `ws` in half precision, then in INT4 if `base` has it; return whether anything ran.

    Args:
        ws: a folder that `begin` began.
        base: the artefact without the LoRA.
        lora: what the file says.
        scale: multiplies what it changes.
        progress: called after each file and block.

    Raises:
        InputError: files of `base` or of the original are missing or damaged, or a layer has no bias to change; or
            INT4 takes too much memory or time, which is refused before weights are written.
    """
    old = Manifest.load(base)
    options, stored = (old.stages.get(stage, {}).get("options") for stage in ("quantize", ENCODERS_STAGE))
    known = {field.name for field in fields(QuantizeOptions)}
    chosen = QuantizeOptions(**{k: v for k, v in options.items() if k in known}) if options else None

    def check() -> None:
        if chosen is not None:
            settled, prompts = quantize.settled(ws, chosen)
            quantize.check_time(ws, settled, ws.plan(), len(prompts), silent)
            if stored is not None:
                encoders.check_time(ws, stored["encoders"], chosen.group_size, silent)

    inputs = {"loras": ws.manifest.loras}
    ran = ws.stage("merge", inputs, lambda key: _write(ws, base, old, lora, scale, key, progress), check)
    if chosen is None:
        return ran
    ran = quantize.run(ws, chosen, progress) or ran
    return (stored is not None and encoders.run(ws, stored["encoders"], chosen.group_size, progress)) or ran


def copy_records(base: Path, out: Path) -> None:
    """Copy the plan and what it was made from."""
    for pattern in _RECORDS:
        for path in base.glob(pattern):
            target = out / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def _write(
    ws: Workspace, base: Path, old: Manifest, lora: Lora, scale: float, key: str, progress: Progress
) -> dict[str, Any]:
    old.verify(base, HALF)
    plan, half = ws.plan(), Weights(base / HALF)
    mean, basis = mean_and_basis(ws, plan, ws.manifest.stages["prune"]["inputs"])
    sources = tensor_sources(ws.family, ws.config, plan.kept, plan.removed, plan.modulation_rank)
    shapes, original = ws.family.tensor_shapes(ws.config), original_weights(ws)
    differences = Differences(lora, TRANSFORMER, shapes, original.__getitem__, scale)
    blocks = by_block(ws, {name: 2 * math.prod(shape) for name, shape in half.shapes.items()}, plan)

    def make(index: int) -> Tensors:
        tensors = {}
        for name in blocks[index]:
            tensors[name] = half[name]
            source = sources.get(name)  # none of a stand-in, which the LoRA does not know
            difference = differences.pruned(source, mean, basis) if source else None
            if difference is not None:
                tensors[name] = (tensors[name].float() + difference).to(tensors[name].dtype)
        return tensors

    write_half(ws, plan, blocks, make, key, progress)
    copy_surroundings(base, ws.out)
    for encoder in encoders_of(lora):
        lora_encoders.merge(ws.out, encoder, lora, scale)
    for entry in {name.partition("/")[0] for name in licensing.files(ws.out)}:
        ws.manifest.hash_files(ws.out, entry)
    return {}


def _changes_transformer(lora: Lora) -> bool:
    return any(change.part == TRANSFORMER for change in lora.changes)


def _identity(manifest: Manifest) -> tuple[Any, ...]:
    """Return what tells artefacts apart: the original, the LoRAs, and the stages before `merge`."""
    stages = [manifest.stages.get(stage, {}).get("inputs") for stage in ORDER[: ORDER.index("merge")]]
    return manifest.source, manifest.commit, manifest.loras, stages
