"""`edgeprune quantize`: INT4 weights."""

from __future__ import annotations

from pathlib import Path

from edgeprune.cli import options, screen
from edgeprune.cli.folder import workspace
from edgeprune.common import heap

EPILOG = "Example: edgeprune quantize -o small --group-size 64"


def quantize(
    out: options.BegunFolder = Path("compressed"),
    fresh: options.Fresh = False,
    group_size: options.GroupSize = 64,
    calibration: options.Calibration = "none",
) -> None:
    """Quantize the weights to INT4 with NNCF, block by block: transformer_int4/."""
    heap.large_pages()
    from edgeprune.stages.options import QuantizeOptions
    from edgeprune.stages.quantize import run as run_quantize

    ws = workspace(out, fresh=fresh)
    chosen = QuantizeOptions(group_size=group_size, calibration=calibration)
    with screen.bars() as progress:
        ran = run_quantize(ws, chosen, progress)
    size = ws.manifest.stages["quantize"]["weights_bytes"]
    screen.say(f"{out / 'transformer_int4'}: {size / 1e6:,.1f} MB" + ("" if ran else " (already done)"))
    screen.say(f"next: edgeprune export {out} --target onnx -o {out}-onnx")
