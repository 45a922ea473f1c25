"""Draws one scene of each task with its caption: python -m edgeprune.shapes [--world rich] -o FILE."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edgeprune.common.splits import Split
from edgeprune.shapes import WORLDS, World

_COLUMNS, _FONT, _LINES = 3, 11, 3
_EDGE = 12  # pixels between scenes


def sheet(world: World, seed: int = 0) -> Image.Image:
    """Draw a scene of each task, of the training split, above its caption."""
    rng = np.random.default_rng(seed)
    prompts = world.grammar.evaluation_prompts(1, split=Split.TRAINING, seed=seed)
    width, height = world.size + 5 * _EDGE, world.size + 2 * _EDGE + _LINES * (_FONT + 3)
    rows = -(-len(prompts) // _COLUMNS)
    page = Image.new("RGB", (_COLUMNS * width, rows * height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=_FONT)
    for index, prompt in enumerate(prompts):
        row, column = divmod(index, _COLUMNS)
        x, y = column * width + _EDGE, row * height + _EDGE
        page.paste(Image.fromarray(world.render(prompt.meaning, rng)), (x, y))
        lines = textwrap.wrap(prompt.text, width // 6)
        draw.multiline_text((x, y + world.size + 3), "\n".join(lines), fill="black", font=font, spacing=2)
    return page


def main() -> None:
    """Read the command line and write the sheet."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.shapes", description=__doc__)
    parser.add_argument("--world", choices=[world.name for world in WORLDS.values()], default="rich")
    parser.add_argument("-o", "--out", type=Path, required=True, help="PNG file to write")
    args = parser.parse_args()
    world = next(world for world in WORLDS.values() if world.name == args.world)
    sheet(world).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
