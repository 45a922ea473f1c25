"""Weights that several stages read and write: the original's tensors, and those of the pruned transformer in 16 bits.

These are in `transformer/`, or made from the original's whenever they are read (`prune --no-half`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping

import torch

from edgeprune.artefact.loading import open_transformer, readable
from edgeprune.artefact.manifest import HALF
from edgeprune.artefact.surgery import prune_tensor, structure
from edgeprune.artefact.writing import write_transformer
from edgeprune.common.errors import InputError, StaleStageError
from edgeprune.common.files import write_json
from edgeprune.common.progress import Progress
from edgeprune.common.tensors import Tensors, load_tensors, save_tensors
from edgeprune.families import Shape
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import remaining_shapes, shorter_config, tensor_sources
from edgeprune.residency.stored import StoredTransformer
from edgeprune.residency.weights import Weights
from edgeprune.stages.modulation import MODULATION, modulation_mean
from edgeprune.stages.prompts import calibrating
from edgeprune.stages.workspace import Workspace

STAND_INS = "stand_ins.safetensors"
"""The maps that stand in for removed blocks, under their names in the pruned transformer, in float32. Written by
`prune`."""


def original_weights(ws: Workspace) -> Weights:
    """Open the weights of the original transformer, on disk.

    Raises:
        InputError: tensors are missing, or their shapes do not fit the config.
    """
    weights = Weights(ws.source / HALF, ws.variant)
    weights.check(ws.family.tensor_shapes(ws.config))
    return weights


class PrunedWeights:
    """The tensors of the transformer that a plan leaves, in 16 bits, each made from the original's when it is read.

    Args:
        ws: the workspace.
        plan: what is pruned.
        key: digest of the inputs of `prune`.

    Raises:
        InputError: a file is missing or damaged.
    """

    def __init__(self, ws: Workspace, plan: PrunePlan, key: str) -> None:
        self.original, (self.mean, self.basis) = original_weights(ws), mean_and_basis(ws, plan, key)
        self.sources = tensor_sources(ws.family, ws.config, plan.kept, plan.removed, plan.modulation_rank)
        self.stand_ins = stand_ins_of(ws, plan)
        stored = next(self.original.dtype(name) for name in self.original.shapes if ws.family.in_block(name))
        self._kind = half(torch.empty(0, dtype=stored)).dtype
        self.shapes = remaining_shapes(
            ws.family, ws.config, plan.blocks, plan.components, plan.modulation_rank, plan.stand_in_rank
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        """Make one tensor.

        Raises:
            InputError: a tensor of the original cannot be read, or holds NaN or infinity; or a stand-in is beyond the
            range of the dtype that the blocks are stored in.
        """
        if name in self.stand_ins:
            tensor = self.stand_ins[name].to(self._kind)
            if not tensor.isfinite().all():
                raise InputError(f"{STAND_INS}: {name}: found values beyond {self._kind}; plan with --stand-in none")
            return tensor
        return half(prune_tensor(self.original.__getitem__, self.sources[name], self.mean, self.basis))

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a tensor is made."""
        if name in self.stand_ins:
            return self._kind
        source = self.sources[name]
        stored = torch.float32 if source.calibrated else self.original.dtype(source.name)
        return half(torch.empty(0, dtype=stored)).dtype

    def ahead(self, names: Iterable[str]) -> None:
        """Ask the operating system to read what these tensors are made from."""
        sources = (self.sources[name] for name in names if name in self.sources)
        self.original.ahead(source.name for source in sources if not source.calibrated)

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Check that names and shapes are those of a model.

        Raises:
            InputError: one differs; names the first.
        """
        for name in sorted(expected.keys() | self.shapes.keys()):
            if expected.get(name) != self.shapes.get(name):
                raise InputError(
                    f"plan: {name}: found {self.shapes.get(name, 'none')}, expected {expected.get(name, 'none')}"
                )


def open_pruned(ws: Workspace) -> StoredTransformer:
    """Open the pruned transformer in half precision, from `transformer/` or from the original.

    Raises:
        InputError: files are missing, damaged or do not fit.
        StaleStageError: see `check_pruned`.
    """
    if not ws.manifest.half_in_source:
        return open_transformer(ws.out, quantized=False)
    check_pruned(ws)
    plan = ws.plan()
    weights = PrunedWeights(ws, plan, ws.manifest.stages["prune"]["inputs"])
    return StoredTransformer(ws.family, structure(ws.family, ws.config, plan), weights)


def stand_ins_of(ws: Workspace, plan: PrunePlan) -> Tensors:
    """Return the tensors of a plan's stand-ins, as `prune` has fitted them; none without.

    Raises:
        InputError: the file is missing or damaged.
    """
    if not plan.stand_ins:
        return {}
    path = ws.out / STAND_INS
    if not path.is_file():
        raise InputError(f"{path}: no such file; run `edgeprune prune -o {ws.out} --fresh` again")
    ws.manifest.verify(ws.out, STAND_INS)
    with readable(path):
        return load_tensors(path)


def check_pruned(ws: Workspace) -> None:
    """Refuse weights that would be made from another original than was pruned; those in `transformer/` are not.

    Raises:
        StaleStageError: the original has changed.
    """
    if not ws.manifest.half_in_source:
        return
    pruned = ws.manifest.stages["prune"]
    if ws.key("prune", pruned.get("options", {})) != pruned["inputs"]:
        raise StaleStageError(
            f"{ws.source}: has changed since it was pruned; run `edgeprune prune -o {ws.out} --no-half --fresh` first"
        )


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
    _note_half(ws, plan, in_source=False)


def leave_half(ws: Workspace, plan: PrunePlan) -> None:
    """Write nothing of `transformer/` but its config, and note in the manifest where its weights are."""
    for name in (HALF, f"{HALF}.tmp"):
        shutil.rmtree(ws.out / name, ignore_errors=True)
    write_json(ws.out / HALF / "config.json", shorter_config(ws.family, ws.config, plan))
    _note_half(ws, plan, in_source=True)


def _note_half(ws: Workspace, plan: PrunePlan, *, in_source: bool) -> None:
    ws.manifest.plan, ws.manifest.half_in_source = plan.to_json(), in_source
    ws.manifest.hash_files(ws.out, HALF)


def needs_mean(ws: Workspace, plan: PrunePlan) -> bool:
    """Return whether `prune` measures the mean modulation input; `plan` does where it projects the modulation."""
    return plan.modulation_rank is None and any(c in ws.family.norms for _, c in plan.components)


def mean_and_basis(ws: Workspace, plan: PrunePlan, key: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the mean modulation input (D) and the basis (R, D), each None where the plan does not need it.

    A projected modulation needs both; a removed norm needs the mean, which `prune` computes and caches, so that
    `distill` finds it without loading text encoders.

    Args:
        ws: the workspace.
        plan: what is pruned.
        key: digest of the inputs of `prune`.

    Raises:
        InputError: a file is missing or damaged.
    """
    if plan.modulation_rank is not None:
        path = ws.out / MODULATION
        if not path.is_file():
            raise InputError(f"{path}: no such file; run `edgeprune plan -o {ws.out} --fresh` again")
        ws.manifest.verify(ws.out, MODULATION)
        with readable(path):
            tensors = load_tensors(path)
            return tensors["mean"], tensors["basis"]
    if needs_mean(ws, plan):
        path = ws.cache / f"mean-{key[:12]}.safetensors"
        if not path.is_file():
            save_tensors(path, {"mean": modulation_mean(ws, calibrating(ws))})
        with readable(path):
            return load_tensors(path)["mean"], None
    return None, None
