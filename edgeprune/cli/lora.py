"""`edgeprune lora`: LoRAs of the original for the pruned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.api.folders import is_begun
from edgeprune.cli import options, screen
from edgeprune.common.errors import InputError

EPILOG = "Example: edgeprune lora style.safetensors --model small -o style-small.safetensors"


def lora(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="LoRA made for the original, as safetensors.")],
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="Artefact folder of the pruned model.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="File to write, ending in .safetensors.")],
    as_json: options.AsJson = False,
) -> None:
    """Remap a LoRA of the original to the pruned model.

    Layers of the LoRA that no longer exist are counted and left out.
    """
    from collections import Counter

    from edgeprune.artefact.lora import read, remap
    from edgeprune.artefact.manifest import Manifest
    from edgeprune.common.tensors import save_tensors
    from edgeprune.families import family_of

    if out.suffix != ".safetensors":
        raise InputError(f"-o {out}: expected a name ending in .safetensors")
    if not is_begun(model):
        raise InputError(f"--model {model}: not an artefact folder; run `edgeprune compress` first")
    manifest = Manifest.load(model)
    family, plan = family_of(manifest.config), manifest.prune_plan(model)
    if plan is None:
        raise InputError(f"{model}: is not pruned yet; run `edgeprune prune -o {model}` first")
    original = read(file, family)
    remapped = remap(original, family, manifest.config, plan)
    if not remapped.kept:
        raise InputError(f"{file}: nothing of it applies: all of its {len(remapped.gone)} layers are gone from {model}")
    save_tensors(out, remapped.tensors, {"format": "pt", **original.metadata})
    reasons = sorted(Counter(remapped.gone.values()).items())
    screen.table([("layers that apply", str(len(remapped.kept))), *((f"gone: {why}", str(n)) for why, n in reasons)])
    screen.say(f"wrote {out}")
    screen.say(f'next: pipe = edgeprune.load("{model}", quantized=False); pipe.load_lora_weights("{out}")')
    if as_json:
        screen.print_json({"out": str(out), "kept": remapped.kept, "gone": remapped.gone})
