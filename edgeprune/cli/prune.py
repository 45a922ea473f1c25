"""`edgeprune prune`: the shorter transformer."""

from __future__ import annotations

from pathlib import Path

from edgeprune.cli import options, screen
from edgeprune.cli.folder import workspace
from edgeprune.common import heap

EPILOG = "Example: edgeprune prune -o small"


def prune(out: options.BegunFolder = Path("compressed"), fresh: options.Fresh = False) -> None:
    """Write the shorter transformer: transformer/.

    Stock diffusers opens it if the plan removes whole blocks only.
    """
    heap.large_pages()
    from edgeprune.stages.prune import run as run_prune

    ws = workspace(out, fresh=fresh)
    with screen.bars() as progress:
        ran = run_prune(ws, progress)
    screen.say(f"{out / 'transformer'}: {'written' if ran else 'already done'}\nnext: edgeprune distill -o {out}")
