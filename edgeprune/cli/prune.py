"""`edgeprune prune`: the shorter transformer."""

from __future__ import annotations

from pathlib import Path

from edgeprune import api
from edgeprune.cli import options, screen

EPILOG = "Example: edgeprune prune -o small"


def prune(
    out: options.BegunFolder = Path("compressed"),
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    device: options.Device = "auto",
    memory: options.Memory = None,
) -> None:
    """Write the shorter transformer: transformer/.

    Stock diffusers opens it if the plan removes whole blocks only.
    """
    with screen.bars() as progress:
        done = api.prune(out, compute=options.compute_options(device, memory), fresh=fresh, progress=progress)
    screen.say(f"{out / 'transformer'}: {'written' if done.ran else 'already done'}")
    screen.say(f"next: edgeprune distill -o {screen.quoted(out)}")
    if as_json:
        screen.print_json(done.to_json())
