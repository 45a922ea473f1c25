"""`edgeprune prune`: the shorter transformer."""

from __future__ import annotations

from pathlib import Path

from edgeprune import api
from edgeprune.cli import limits, options, screen

EPILOG = "Example: edgeprune prune -o small  ·  edgeprune prune -o small --no-half"


def prune(
    out: options.BegunFolder = Path("compressed"),
    no_half: options.NoHalf = False,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
) -> None:
    """Write the shorter transformer: transformer/.

    Stock diffusers opens it if the plan removes whole blocks only, and nothing stands in for them.
    """
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    with screen.bars() as progress:
        done = api.prune(out, no_half=no_half, compute=compute, fresh=fresh, progress=progress)
    written = "config written, the weights stay in the original" if no_half else "written"
    screen.say(f"{out / 'transformer'}: {written if done.ran else 'already done'}")
    screen.say(f"next: edgeprune {'quantize' if no_half else 'distill'} -o {screen.quoted(out)}")
    if as_json:
        screen.print_json(done.to_json())
