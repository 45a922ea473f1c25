"""What a plan may remove: the blocks that are not protected, and the component types that are not kept. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.analysis.contribution import Key
from edgeprune.common.errors import InputError
from edgeprune.families import Config, Family
from edgeprune.planning.methods import Listed, methods
from edgeprune.planning.options import PlanOptions


@dataclass(frozen=True)
class Removable:
    """The blocks and the component types that a plan may remove."""

    blocks: list[int]
    """Original indices, ascending."""
    components: frozenset[str]
    """Names of components."""

    @classmethod
    def of(cls, family: Family, config: Config, options: PlanOptions) -> Removable:
        """Return what the options leave removable in a model.

        Raises:
            InputError: a number of protected blocks is out of range, or the model has no such kind or component.
        """
        count, last = family.block_count(config), options.protect_last
        protected = _protected_first(family, config, options)
        _check("--protect-last", last, count)
        if unknown := sorted(set(options.keep_components) - set(family.components)):
            names = ", ".join(family.components)
            raise InputError(f"--keep-components: found {unknown[0]!r}, expected names from {names}")
        blocks = [block for block in range(count - last) if block not in protected]
        return cls(blocks=blocks, components=frozenset(family.components) - set(options.keep_components))

    def __contains__(self, part: Key) -> bool:
        block, component = part
        return block in self.blocks and (component is None or component in self.components)

    def __str__(self) -> str:
        """Return the blocks as closed ranges: `10 to 18, 24 to 54`."""
        starts = [b for b in self.blocks if b - 1 not in self.blocks]
        ends = [b for b in self.blocks if b + 1 not in self.blocks]
        runs = (f"{a} to {b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))
        return ", ".join(runs) or "none"

    @staticmethod
    def shown(family: Family, config: Config, options: PlanOptions) -> str:
        """Return what `by_kind` says of these options; empty for a method that removes what the user lists."""
        if isinstance(methods().get(options.method), Listed):
            return ""
        return Removable.of(family, config, options).by_kind(family, config)

    def by_kind(self, family: Family, config: Config) -> str:
        """Return the blocks and, in a model with several kinds of blocks, how many of each kind may go."""
        kinds = {kind: blocks for kind, blocks in family.kinds(config).items() if blocks}
        if len(kinds) == 1:
            return str(self)
        numbers = {kind: len(set(blocks) & set(self.blocks)) for kind, blocks in kinds.items()}
        text = f"{self} ({', '.join(f'{numbers[kind]} of {len(kinds[kind])} {kind}' for kind in kinds)})"
        spared = [kind for kind, number in numbers.items() if not number]
        return text + "".join(f"; --protect-first {kind}=N lets {kind} blocks after the first N go" for kind in spared)


def _protected_first(family: Family, config: Config, options: PlanOptions) -> set[int]:
    """Return the leading blocks that never go.

    Raises:
        InputError: a number is out of range, or the model has no such kind of block.
    """
    count, first = family.block_count(config), options.protect_first
    if first is None or isinstance(first, dict):
        usual = range(count // 2 if options.scored else 0)
    else:
        _check("--protect-first", first, count)
        usual = range(first)
    if not isinstance(first, dict):
        return set(usual)
    kinds = family.kinds(config)
    if unknown := sorted(first.keys() - kinds.keys()):
        has = ", ".join(f"{kind} ({len(blocks)} blocks)" for kind, blocks in kinds.items())
        raise InputError(f"--protect-first: found a kind {unknown[0]!r}, expected a kind of block of this model: {has}")
    protected = set(usual)
    for kind, number in first.items():
        _check(f"--protect-first {kind}", number, len(kinds[kind]))
        protected = protected - set(kinds[kind]) | set(kinds[kind][:number])
    return protected


def _check(option: str, number: int, count: int) -> None:
    """Check a number of protected blocks among `count`; the default of --protect-last fits every model.

    Raises:
        InputError: it is out of range.
    """
    if not 0 <= number <= max(count, PlanOptions().protect_last):
        raise InputError(f"{option}: found {number}, expected 0 to {count}, the number of blocks")
