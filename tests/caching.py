"""Sources, caches and their contents: what the tests of training data share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.artefact.resolve import read_config
from edgeprune.data.cache import open_pairs
from edgeprune.data.encode import Made, make_cache
from edgeprune.data.pairs import Pairs
from edgeprune.data.settings import CacheOptions, settings_of
from edgeprune.sampling.generation import Generation

MIXED = [(64, 64), (80, 60), (48, 90), (64, 70), (100, 50), (64, 64), (30, 90), (20, 20), (64, 64), (50, 80), (64, 64)]


def images(root: Path, sizes: list[tuple[int, int]], *, bad: tuple[int, ...] = ()) -> Path:
    """Make an imagefolder of these (height, width), each with other pixels; the files of `bad` ones are not images."""
    root.mkdir()
    rng = np.random.default_rng(0)
    with (root / "metadata.jsonl").open("w") as lines:
        for i, (height, width) in enumerate(sizes):
            path = root / f"{i}.png"
            Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path)
            if i in bad:
                path.write_bytes(b"no image")
            lines.write(json.dumps({"file_name": path.name, "text": f"a {i % 5} circle"}) + "\n")
    return root


def cached(pipe: Any, model: Path, source: Path | str, out: Path, *, workers: int = 2, **chosen: Any) -> Made:
    """Make a cache of a source with these `CacheOptions`."""
    options, generation = CacheOptions(str(source), **chosen), Generation.load(model)
    settings = settings_of(model, generation, options, computed_in="")
    return make_cache(lambda: pipe, model, out, settings, generation, options, workers=workers)


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def opened(folder: Path, model: Path) -> Pairs:
    """Open a cache for a model."""
    config, family = read_config(model)
    return open_pairs(folder, family, config)
