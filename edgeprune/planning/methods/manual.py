"""Manual: removes the blocks and components that the user lists, and nothing without a list."""

from __future__ import annotations

import re

from edgeprune.analysis.contribution import Key
from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family
from edgeprune.planning.methods import Listed


def choose(family: Family, config: Config, blocks: str, components: str) -> list[Key]:
    """Return the listed blocks, and the listed components of other blocks.

    Raises:
        InputError: an entry is malformed or not in this model, or no block would stay.
    """
    count = family.block_count(config)
    removed = parse_blocks(blocks, count)
    remaining = [part for part in parse_components(components, count, family) if part[0] not in removed]
    if len(removed) == count:
        raise InputError(f"--blocks: all {count} blocks would be removed; at least one must stay")
    if noops := [part for part in remaining if part in family.noops(config)]:
        block, component = noops[0]
        raise InputError(f"--components: {block}:{component} is not in this model, so there is nothing to remove")
    return [*((block, None) for block in removed), *remaining]


def parse_blocks(text: str, count: int) -> list[int]:
    """Parse indices and ranges: `25-28,31` becomes [25, 26, 27, 28, 31]. Ranges are closed.

    Raises:
        InputError: an entry is malformed, or an index is not below `count`.
    """
    indices: set[int] = set()
    for item in filter(None, (t.strip() for t in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high or high >= count:
            raise InputError(
                f"--blocks: found {item!r}, expected indices or closed ranges from 0 to {count - 1}, like 25-28,31"
            )
        indices.update(range(low, high + 1))
    return sorted(indices)


def parse_components(text: str, count: int, family: Family) -> list[tuple[int, str]]:
    """Parse `30:mlp,30:context_mlp` to pairs of a block's index and a component's name, sorted.

    Raises:
        InputError: an entry is malformed, an index is not below `count`, or the family has no such component.
    """
    pairs: set[tuple[int, str]] = set()
    for item in filter(None, (t.strip() for t in text.split(","))):
        block, _, component = item.partition(":")
        if not block.isdigit() or int(block) >= count or component not in family.components:
            names = ", ".join(family.components)
            raise InputError(
                f"--components: found {item!r}, expected BLOCK:NAME with BLOCK below {count} and NAME one of {names}"
            )
        pairs.add((int(block), component))
    return sorted(pairs)


METHOD = Listed(name="manual", choose=choose)
