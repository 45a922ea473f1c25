"""`edgeprune quantize`: INT4 weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from edgeprune import api
from edgeprune.api.folders import check_begun
from edgeprune.cli import limits, options, screen

EPILOG = "Example: edgeprune quantize -o small --group-size 64"


def quantize(
    out: options.BegunFolder = Path("compressed"),
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    group_size: options.GroupSize = 64,
    calibration: options.Calibration = "auto",
    count: Annotated[int | None, options.calibration_count("--count")] = None,
    states: options.States = None,
    encoders: options.Encoders = None,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
) -> None:
    """Quantize the weights to INT4 with NNCF, block by block: transformer_int4/, and those of a T5 or Qwen3."""
    check_begun(out)
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    chosen = api.QuantizeOptions(group_size=group_size, calibration=calibration, count=count, states=states)
    if calibration == "none" and encoders != "int4" and (device != "auto" or memory):
        screen.say("--device and --memory: --calibration none runs no network, so they are not used")
    with screen.bars() as progress:
        done = api.quantize(out, chosen, encoders=encoders, compute=compute, fresh=fresh, progress=progress)
    size = f"{done.weights_bytes / 1e6:,.1f} MB" + ("" if done.ran else " (already done)")
    screen.say(f"{out / 'transformer_int4'}: {size}")
    screen.say(f"next: edgeprune export {screen.quoted(out)} --target onnx -o {screen.quoted(out, '-onnx')}")
    if as_json:
        screen.print_json(done.to_json())
