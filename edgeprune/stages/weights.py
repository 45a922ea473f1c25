"""Weights that several stages read and write: the original's tensors, and the artefact's `transformer/` in 16 bits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeprune.artefact.manifest import HALF
from edgeprune.artefact.writing import write_transformer
from edgeprune.common.progress import Progress
from edgeprune.common.tensors import Tensors
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import shorter_config
from edgeprune.residency.weights import Weights
from edgeprune.stages.workspace import Workspace


def original_weights(ws: Workspace) -> Weights:
    """Open the weights of the original transformer, on disk.

    Raises:
        InputError: tensors are missing, or their shapes do not fit the config.
    """
    weights = Weights(ws.source / HALF, ws.variant)
    weights.check(ws.family.tensor_shapes(ws.config))
    return weights


def by_block(ws: Workspace, sizes: dict[str, int], plan: PrunePlan) -> list[dict[str, int]]:
    """Split tensors by the block that they belong to, which is how they are made and written.

    Args:
        ws: the workspace.
        sizes: bytes by tensor name, of the transformer that is left.
        plan: which blocks are left.

    Returns:
        Bytes by tensor name, for each block that is left; last for the tensors outside blocks.
    """
    config = ws.family.shorter_config(ws.config, plan.kept)
    blocks: list[dict[str, int]] = [{} for _ in range(len(plan.kept) + 1)]
    for name, size in sizes.items():
        place = ws.family.place(config, name)
        blocks[-1 if place is None else place[0]][name] = size
    return blocks


def half(tensor: torch.Tensor) -> torch.Tensor:
    """Convert to float16; bfloat16 stays bfloat16."""
    return tensor if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.half()


def write_half(
    ws: Workspace,
    plan: PrunePlan,
    blocks: list[dict[str, int]],
    make: Callable[[int], Tensors],
    key: str,
    progress: Progress,
) -> None:
    """Write `transformer/` block by block, and note its plan and hashes in the manifest.

    Args:
        ws: the workspace.
        plan: what is pruned.
        blocks: bytes by tensor name, as `by_block` returns them.
        make: makes the tensors of one entry of `blocks`, given its index.
        key: digest of the stage's inputs.
        progress: see `Progress`.
    """
    config = shorter_config(ws.family, ws.config, plan)
    write_transformer(ws.out, HALF, config, blocks, make, inputs=key, progress=progress)
    ws.manifest.plan = plan.to_json()
    ws.manifest.hash_files(ws.out, HALF)
