"""`edgeprune lora`: LoRAs of the original for the pruned model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import api
from edgeprune.cli import limits, options, screen
from edgeprune.common.errors import InputError

EPILOG = (
    "Example: edgeprune lora style.safetensors --model small -o style-small.safetensors  ·  "
    "edgeprune lora style.safetensors --model small -o small-style --merge"
)


def lora(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="LoRA made for the original, as safetensors.")],
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="Artefact folder of the pruned model.")],
    out: Annotated[
        Path,
        typer.Option(
            "-o", "--out", metavar="PATH", help="File to write, ending in .safetensors; a folder for --merge."
        ),
    ],
    merge: Annotated[
        bool,
        typer.Option(
            "--merge", help="Add the LoRA to the weights, in a new artefact that is quantized as the old one."
        ),
    ] = False,
    scale: Annotated[
        float | None,
        typer.Option(metavar="X", help="Strength of a merged LoRA.", show_default="1"),
    ] = None,
    as_json: options.AsJson = False,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
) -> None:
    """Remap a LoRA of the original to the pruned model, or merge it into the weights.

    Files of kohya, ComfyUI, ai-toolkit, PEFT and diffusers are read. What became of each layer is shown; a file with a
    tensor that cannot be used is refused.
    """
    if scale is not None and not merge:
        raise InputError("--scale: needs --merge; for a LoRA file, give the scale when you load it")
    if (device, memory, yes, longest) != ("auto", None, False, None) and not merge:
        raise InputError(
            "--device, --memory, --yes, --time: are about what --merge computes, a LoRA file takes seconds; "
            "omit them, or give --merge"
        )
    if merge:
        compute = limits.compute_options(device, memory, yes=yes, longest=longest)
        strength = 1.0 if scale is None else scale
        with screen.bars() as progress:
            done = api.merge_lora(file, model, out, scale=strength, compute=compute, progress=progress)
    else:
        done = api.remap_lora(file, model, out)
    _show(done, model, merge=merge)
    if as_json:
        screen.print_json(done.to_json())


def _show(done: api.AppliedLora, model: Path, *, merge: bool) -> None:
    fate = done.fate
    tensors = ", ".join(f"{number} {name}" for name, number in fate.counts.items() if number)
    rows = [("tensors in the file", f"{fate.tensors}: {tensors}"), ("layers that apply unchanged", str(len(fate.kept)))]
    for word, layers in (("changed", fate.changed), ("gone", fate.gone), ("unused", fate.unused)):
        for why, number in sorted(Counter(layers.values()).items()):
            first = next(layer for layer, reason in layers.items() if reason == why)
            rows.append((f"{word}: {why}", f"{number} ({first}{', ...' if number > 1 else ''})"))
    screen.table(rows)
    if done.assumed_scales:
        screen.say(
            f"{done.assumed_scales} layers have no alpha, and there is no adapter_config.json next to the file: "
            "their scale is taken to be 1"
        )
    screen.say(f"wrote {done.out}" if done.ran else f"nothing to do, {done.out} is merged already")
    if merge:
        return screen.say(
            f"next: edgeprune export {screen.quoted(done.out)} --target onnx -o {screen.quoted(done.out, '-onnx')}"
        )
    load = f'edgeprune.load("{model}", quantized=False)'
    screen.say(f'next: pip install peft; in Python: pipe = {load}; pipe.load_lora_weights("{done.out}")')
