"""A plan as data: which parts of which model are removed, its JSON file, and the checks when it is read. Torch-free.

A plan holds explicit indices and the fingerprint of the model it was made for. make.py makes plans;
remainder.py computes what a plan leaves of a model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from edgeprune.analysis.contribution import Key, fingerprint
from edgeprune.common.errors import InputError
from edgeprune.common.fields import MOST_BLOCKS, shown, text, whole_number
from edgeprune.common.files import check_schema, read_json
from edgeprune.families import Config, family_of
from edgeprune.quantization.precision import Footprint

SCHEMA_VERSION = 1
_MOST_BYTES = 10**15


@dataclass(frozen=True)
class PrunePlan:
    """Which parts of which model are removed, and how large the model is before and after."""

    fingerprint: str
    """Fingerprint of the original transformer's config."""
    family: str
    num_blocks: int
    """Number of blocks of the original."""
    method: str
    blocks: list[int]
    """Original indices of removed blocks, ascending."""
    components: list[tuple[int, str]] = field(default_factory=list)
    """Removed components of blocks that stay: pairs of an original block index and a name, sorted."""
    before: Footprint = Footprint(0, 0, 0)
    after: Footprint = Footprint(0, 0, 0)
    modulation_rank: int | None = None
    """Directions of the modulation input that stay; 0 makes all modulation constant, None leaves it unchanged."""
    stand_in_rank: int | None = None
    """Rank of the affine maps that stand in for each removed run of blocks, see `stand_ins`; None for none."""

    @property
    def kept(self) -> list[int]:
        """Original indices of the blocks that stay, ascending."""
        return [i for i in range(self.num_blocks) if i not in set(self.blocks)]

    @property
    def removed(self) -> frozenset[tuple[int, str]]:
        """The removed components as a set."""
        return frozenset(self.components)

    @property
    def stand_ins(self) -> list[int]:
        """The blocks before which a removed run is stood in for, as indices among the blocks that stay."""
        return [] if self.stand_in_rank is None else followers(self.blocks, self.num_blocks)

    @property
    def first_pruned(self) -> int:
        """Original index of the first block that is removed or loses a component.

        If there is none, this is 0 for a plan that projects modulation, since that changes every block a little, and
        the number of blocks for a plan that changes nothing.
        """
        none = self.num_blocks if self.modulation_rank is None else 0
        return min([*self.blocks, *(b for b, _ in self.components)], default=none)

    @property
    def stock(self) -> bool:
        """Whether diffusers' own class fits what is left: whole blocks are removed, and nothing stands in for them."""
        return not self.components and self.modulation_rank is None and self.stand_in_rank is None

    @property
    def keys(self) -> list[Key]:
        """All removed parts: blocks, then components."""
        return [*((b, None) for b in self.blocks), *self.components]

    def to_json(self) -> dict[str, Any]:
        """Return the content of the plan's file; plans of versions before `stand_in_rank` stay as they are."""
        data = {"schema_version": SCHEMA_VERSION} | asdict(self)
        if self.stand_in_rank is None:
            del data["stand_in_rank"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any], where: Path | str) -> PrunePlan:
        """Check the content of a plan's file and build the plan.

        Raises:
            InputError: a field is missing or of the wrong type.
        """
        check_schema(where, data.get("schema_version"), SCHEMA_VERSION, "run `edgeprune plan --fresh` again")
        count = whole_number(data, "num_blocks", where, most=2 * MOST_BLOCKS)
        blocks, components = data.get("blocks"), data.get("components")
        if not isinstance(blocks, list) or not all(type(b) is int and 0 <= b < count for b in blocks):
            raise InputError(f"{where}: blocks: found {shown(blocks)}, expected indices from 0 to {count - 1}")
        if len(set(blocks)) >= count:
            raise InputError(f"{where}: blocks: all {count} blocks would be removed; at least one must stay")
        if not isinstance(components, list) or not all(_is_component(c, count) for c in components):
            raise InputError(
                f"{where}: components: found {shown(components)}, expected pairs of a block and a component"
            )
        ranks = {
            name: None if data.get(name) is None else whole_number(data, name, where, least=least)
            for name, least in (("modulation_rank", 0), ("stand_in_rank", 1))
        }
        return cls(
            fingerprint=text(data, "fingerprint", where),
            family=text(data, "family", where),
            num_blocks=count,
            method=text(data, "method", where),
            blocks=sorted(set(blocks)),
            components=sorted({(b, c) for b, c in components}),
            before=_footprint(data, "before", where),
            after=_footprint(data, "after", where),
            **ranks,
        )

    @classmethod
    def load(cls, path: Path) -> PrunePlan:
        """Read a plan file.

        Raises:
            InputError: it is missing or is not a plan.
        """
        return cls.from_json(read_json(path), path)

    def check(self, config: Config, where: Path | str) -> None:
        """Check that the plan was made for this model and knows only components that the model has.

        Raises:
            InputError: it was made for another model, or names an unknown component.
        """
        family = family_of(config)
        unknown = [c for _, c in self.components if c not in family.components]
        if unknown:
            raise InputError(f"{where}: components: found {shown(unknown[0])}, expected {', '.join(family.components)}")
        digest, count = fingerprint(config), family.block_count(config)
        if digest != self.fingerprint or self.num_blocks != count:
            raise InputError(
                f"{where}: fingerprint: the plan is for another model ({self.num_blocks} blocks of {self.family}, "
                f"{self.fingerprint}), found {count} blocks, {digest}; make a plan for this model"
            )


def followers(removed: Collection[int], count: int) -> list[int]:
    """Return the blocks that stay and follow a removed one, as indices among those that stay.

    A run that is removed at the end has none.

    Args:
        removed: original indices of the removed blocks.
        count: number of blocks of the original.
    """
    gone = set(removed)
    kept = [block for block in range(count) if block not in gone]
    return [new for new, old in enumerate(kept) if old - 1 in gone]


def _is_component(value: Any, count: int) -> bool:
    """Return whether a JSON value is a pair of a block's index below `count` and a component's name."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return type(value[0]) is int and 0 <= value[0] < count and isinstance(value[1], str)


def _footprint(data: Mapping[str, Any], name: str, where: Path | str) -> Footprint:
    """Read a footprint whose numbers are all present and in range."""
    value, names = data.get(name), [f.name for f in fields(Footprint)]
    if not isinstance(value, Mapping) or sorted(value) != sorted(names):
        raise InputError(f"{where}: {name}: found {shown(value)}, expected {', '.join(names)}")
    return Footprint(**{n: whole_number(value, n, f"{where}: {name}", least=0, most=_MOST_BYTES) for n in names})
