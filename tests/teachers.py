"""Tiny teachers of the rich world: what the recipes make, but with few blocks, and untrained."""

from __future__ import annotations

from pathlib import Path

import torch

from edgeprune.demo.train.flux import Flux
from edgeprune.demo.train.networks import Networks
from edgeprune.demo.train.saving import save_pipeline
from edgeprune.demo.train.sd3 import Sd3
from edgeprune.demo.train.vae import make_vae
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import RICH


def rich_teacher(folder: Path, kind: str = "rich-sd3") -> Path:
    """Write a teacher that draws in two steps; return its folder."""
    torch.manual_seed(0)
    words, tokens = folder.with_name(f"{folder.name}-words"), 22
    networks: Networks = (
        Sd3(words, RICH.grammar, tokens=tokens, blocks=3, patch=2)
        if kind == "rich-sd3"
        else Flux(words, RICH.grammar, tokens=tokens, joint=1, single=2)
    )
    length = 0 if kind == "rich-sd3" else tokens
    save_pipeline(
        networks.pipeline(make_vae(RICH.size)), folder, Generation(2, 2.0, RICH.size, RICH.size, length), RICH
    )
    return folder
