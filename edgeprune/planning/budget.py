"""How large a model is without some of its parts, and whether that meets a budget. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from edgeprune.analysis.contribution import Key, collapsed
from edgeprune.common.errors import InputError
from edgeprune.common.tables import with_unit
from edgeprune.families import Config, Family, Shape
from edgeprune.planning.plan import PrunePlan
from edgeprune.planning.remainder import modulation_width, remaining_shapes
from edgeprune.quantization.precision import Footprint, footprint


def check_keep(keep: float) -> None:
    """Refuse a share of the parameters that no plan can keep.

    Raises:
        InputError: it is not above 0 and up to 1.
    """
    if not 0 < keep <= 1:
        raise InputError(f"--keep: found {keep}, expected a share above 0 and up to 1, such as 0.79")


class ModelSize:
    """Counts the parameters and bytes of a model without some of its parts.

    Projected modulation counts first: what it saves is saved before any part is removed.

    Raises:
        InputError: the modulation rank is out of range.
    """

    def __init__(
        self, family: Family, config: Config, group_size: int, rank: int | None, stand_in_rank: int | None = None
    ) -> None:
        width = 0 if rank is None else modulation_width(family, config)
        if rank is not None and not 0 <= rank < width:
            raise InputError(f"--modulation-rank: found {rank}, expected 0 to {width - 1}, or full")
        self._family, self._config, self._group_size = family, config, group_size
        self._ranks = rank, stand_in_rank
        self.blocks = family.block_count(config)
        """Number of blocks of the original."""
        self.original = footprint(family, family.tensor_shapes(config), group_size=group_size)
        """The footprint of the original, its modulation unchanged."""
        self._counts: dict[tuple[tuple[int, ...], frozenset[str]], dict[int | None, Footprint]] = {}

    def without(self, parts: Iterable[Key]) -> Footprint:
        """Return the footprint without these blocks and components.

        A block that keeps no branch counts as removed, see `collapsed`.
        What a block keeps depends only on which blocks stay and on its own components. So all blocks are counted at
        once for each set of components, and a plan with hundreds of candidates needs only tens of counts.
        """
        parts = collapsed(self._family, self._config, parts)
        gone = {block for block, component in parts if component is None}
        kept = tuple(i for i in range(self.blocks) if i not in gone)
        components: dict[int, frozenset[str]] = dict.fromkeys(kept, frozenset())
        for block, component in parts:
            if component is not None and block in components:
                components[block] |= {component}
        blocks = [self._counted(kept, names)[block] for block, names in components.items()]
        return sum(blocks, self._counted(kept, frozenset())[None])

    def _counted(self, kept: tuple[int, ...], components: frozenset[str]) -> dict[int | None, Footprint]:
        """Return what is left of each kept block without these components, and outside blocks (key None)."""
        if (kept, components) not in self._counts:
            gone = set(range(self.blocks)) - set(kept)
            shapes = remaining_shapes(
                self._family, self._config, gone, [(b, c) for b in kept for c in components], *self._ranks
            )
            shorter = self._family.shorter_config(self._config, list(kept))
            by_block: dict[int | None, dict[str, Shape]] = {None: {}} | {block: {} for block in kept}
            for name, shape in shapes.items():
                place = self._family.place(shorter, name)
                by_block[kept[place[0]] if place else None][name] = shape
            self._counts[kept, components] = {
                block: footprint(self._family, in_block, group_size=self._group_size)
                for block, in_block in by_block.items()
            }
        return self._counts[kept, components]


def resident_bytes(family: Family, config: Config, plan: PrunePlan, group_size: int) -> int:
    """Return the bytes after INT4 of what an export holds in memory in each step.

    Budgets count the file. The modulation is in memory before the first step alone (docs/export.md), and so is the
    embedder, whose output only the modulation reads.

    Args:
        family: of the model.
        config: of the original transformer.
        plan: what is removed of it.
        group_size: of the INT4 weights.
    """
    shapes = remaining_shapes(family, config, plan.blocks, plan.components, plan.modulation_rank, plan.stand_in_rank)
    # The bias of a removed norm is alone, and stays.
    layers = {name.removesuffix(".weight") for name in shapes if name.endswith(".weight") and family.modulates(name)}
    gone = (*(f"{layer}." for layer in layers), *([f"{family.embedder}."] if layers else []))
    left = {name: shape for name, shape in shapes.items() if not name.startswith(gone)}
    return footprint(family, left, group_size=group_size).int4_bytes


class Budget:
    """The most that may be left: a share of the parameters, or bytes after INT4.

    Raises:
        InputError: not exactly one of the two is set, or the share is out of range.
    """

    def __init__(self, original: Footprint, keep: float | None, max_size_bytes: int | None) -> None:
        if (keep is None) == (max_size_bytes is None):
            raise InputError("give --keep or --max-size" + (", not both" if keep is not None else ""))
        if keep is not None:
            check_keep(keep)
        self.limit = float(max_size_bytes or 0) if keep is None else keep * original.parameters
        self._keep = keep
        self._text = f"--keep {keep}" if keep is not None else f"--max-size {bytes_text(max_size_bytes or 0)}"

    def amount(self, size: Footprint) -> int:
        """Return the quantity that is limited: parameters or bytes."""
        return size.int4_bytes if self._keep is None else size.parameters

    def met(self, size: Footprint) -> bool:
        """Return whether a model of this size meets the budget."""
        return self.amount(size) <= self.limit

    def __str__(self) -> str:
        return self._text


def bytes_text(number: int) -> str:
    """Return a number of bytes as people read it."""
    return with_unit("_bytes", number) if number >= 10**6 else f"{number:,} bytes"
