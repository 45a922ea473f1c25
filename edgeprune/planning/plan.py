"""From contributions and a budget to a plan: which blocks and components go. Torch-free; config and scores are enough.

Methods: `hpp` removes the least contributing whole blocks among the later ones; `hybrid` goes on, past a share of
removed parameters, with the components of the later blocks that remain, by loss per parameter; `manual` takes the
user's list, and removes nothing without one; `milp` (planners/) knows how parts act together; the others
are those of baselines/. Where the modulation is projected on a basis (modulation.py), that comes first: its savings
count towards the budget before any part is removed.
A plan holds explicit indices and the fingerprint of the model it was made for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgeprune.analysis.contribution import Contribution, ContributionReport, Key, fingerprint
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.common.fields import MOST_BLOCKS, shown, text, whole
from edgeprune.common.files import check_schema, read_json
from edgeprune.families import Config, Family, family_of
from edgeprune.families.base import CHANGED, Shape, Source
from edgeprune.planning.baselines import Blocks, baselines
from edgeprune.planning.planners import PLANNERS, Measured, Problem, planner_named
from edgeprune.quantization.precision import Footprint, footprint

SCHEMA_VERSION = 1
_MOST_BYTES = 10**15
METHODS = ("hpp", "hybrid", "manual", *PLANNERS, *baselines())


@dataclass(frozen=True)
class PrunePlan:
    """Which parts of which model are removed, and what is left."""

    fingerprint: str
    family: str
    num_blocks: int
    method: str
    blocks: list[int]
    """Original indices of removed blocks, rising."""
    components: list[tuple[int, str]] = field(default_factory=list)
    """Removed components of blocks that stay."""
    before: Footprint = Footprint(0, 0, 0)
    after: Footprint = Footprint(0, 0, 0)
    modulation_rank: int | None = None
    """Directions of the modulation input that stay; 0 makes all modulation constant, None leaves it as it is."""

    @property
    def kept(self) -> list[int]:
        """Original indices of the blocks that stay, rising."""
        return [i for i in range(self.num_blocks) if i not in set(self.blocks)]

    @property
    def removed(self) -> frozenset[tuple[int, str]]:
        """The components as a set."""
        return frozenset(self.components)

    @property
    def first_pruned(self) -> int:
        """Original index of the first block that is removed or loses a component; the number of blocks if none does.

        Projected modulation changes every block, though little: where it is all that changes, the first.
        """
        none = self.num_blocks if self.modulation_rank is None else 0
        return min([*self.blocks, *(b for b, _ in self.components)], default=none)

    @property
    def stock(self) -> bool:
        """Whether diffusers' own class is what is left: nothing but whole blocks went."""
        return not self.components and self.modulation_rank is None

    @property
    def keys(self) -> list[Key]:
        """Everything that is removed."""
        return [*((b, None) for b in self.blocks), *self.components]

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {"schema_version": SCHEMA_VERSION} | asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any], where: Path | str) -> PrunePlan:
        """Check and build.

        Raises:
            InputError: a field is missing or of a wrong kind.
        """
        check_schema(where, data.get("schema_version"), SCHEMA_VERSION, "run `edgeprune plan --fresh` again")
        count = whole(data, "num_blocks", where, most=2 * MOST_BLOCKS)
        blocks, parts = data.get("blocks"), data.get("components")
        if not isinstance(blocks, list) or not all(type(b) is int and 0 <= b < count for b in blocks):
            raise InputError(f"{where}: blocks: found {shown(blocks)}, expected indices from 0 to {count - 1}")
        if len(set(blocks)) >= count:
            raise InputError(f"{where}: blocks: found all {count}, expected that one stays")
        if not isinstance(parts, list) or not all(_is_part(part, count) for part in parts):
            raise InputError(f"{where}: components: found {shown(parts)}, expected pairs of a block and a component")
        rank = None if data.get("modulation_rank") is None else whole(data, "modulation_rank", where, least=0)
        return cls(
            *(text(data, "fingerprint", where), text(data, "family", where), count, text(data, "method", where)),
            *(sorted(set(blocks)), sorted({(b, c) for b, c in parts})),
            *(_footprint(data, "before", where), _footprint(data, "after", where)),
            modulation_rank=rank,
        )

    @classmethod
    def load(cls, path: Path) -> PrunePlan:
        """Read a plan file."""
        return cls.from_json(read_json(path), path)

    def check(self, config: Config, where: Path | str) -> None:
        """Refuse to be used with another model, or with components that the model does not know."""
        family = family_of(config)
        unknown = [c for _, c in self.components if c not in family.components]
        if unknown:
            raise InputError(f"{where}: components: found {shown(unknown[0])}, expected {', '.join(family.components)}")
        found = fingerprint(config)
        if found != self.fingerprint or self.num_blocks != family.block_count(config):
            raise InputError(
                f"{where}: fingerprint: the plan is for another model ({self.num_blocks} blocks of {self.family}, "
                f"{self.fingerprint}), found {family.block_count(config)} blocks, {found}; make a plan for this model"
            )


def _is_part(found: Any, count: int) -> bool:
    """Whether this is a pair of a block's index and a component's name."""
    if not isinstance(found, (list, tuple)) or len(found) != 2:
        return False
    return type(found[0]) is int and 0 <= found[0] < count and isinstance(found[1], str)


def _footprint(data: Mapping[str, Any], name: str, where: Path | str) -> Footprint:
    found, names = data.get(name), [f.name for f in fields(Footprint)]
    if not isinstance(found, Mapping) or sorted(found) != sorted(names):
        raise InputError(f"{where}: {name}: found {shown(found)}, expected {', '.join(names)}")
    return Footprint(*(whole(found, n, f"{where}: {name}", least=0, most=_MOST_BYTES) for n in names))


def modulation_width(family: Family, config: Config) -> int:
    """D, as the modulation layers read it.

    Raises:
        InputError: the family has none that can be projected.
    """
    for name, shape in family.tensor_shapes(config).items():
        if len(shape) == 2 and family.modulates(name):
            return shape[1]
    raise InputError(f"--modulation-rank: found a model of {family.name}, which has no modulation layer in its blocks")


def is_projectable(family: Family, config: Config) -> bool:
    """Whether there is a modulation that reads fewer directions as well."""
    return any(family.modulates(name) for name in family.tensor_shapes(config))


def tensor_sources(
    family: Family, config: Config, kept: list[int], removed: frozenset[tuple[int, str]], rank: int | None
) -> dict[str, Source]:
    """For every tensor of the smaller model, what it is made from; see `PrunePlan.modulation_rank` for `rank`."""
    sources = family.tensor_sources(config, kept, removed)
    if rank is None:
        return sources
    out, embedder = {}, f"{family.embedder}."
    for name, source in sources.items():
        if name.startswith(embedder):
            if rank:
                out[f"{embedder}embedder.{name.removeprefix(embedder)}"] = source
        elif not family.modulates(name):
            out[name] = source
        elif name.endswith(".bias"):
            out[name] = replace(source, constant=True)
        elif rank:
            out[name] = replace(source, projected=True)
    if rank:
        out |= {f"{embedder}{made}": Source(made, calibrated=True) for made in ("mean", "basis")}
    return out


def shorter_config(family: Family, config: Config, plan: PrunePlan) -> Config:
    """The config of what a plan leaves. Stock diffusers refuses it where its own class would not fit.

    Diffusers ignores a `_class_name` that it does not know, and fills what is missing at random. What it does refuse,
    in every way of loading, is a quantisation that it does not know.
    """
    shorter = family.shorter_config(config, plan.kept)
    if plan.stock:
        return shorter
    return shorter | {
        "_class_name": f"{CHANGED}{config['_class_name']}",
        "quantization_config": {"quant_method": "edgeprune"},
    }


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`, see `make_plan`."""

    method: str = "hpp"
    keep: float | None = None
    max_memory_bytes: int | None = None
    protect_first: int | None = None
    protect_last: int = 2
    threshold: float = 0.15
    blocks: str = ""
    components: str = ""
    group_size: int = 64
    """Of the INT4 weights whose bytes are counted."""
    fit: str | None = None
    """Name of a target whose memory sets the budget, see fit.py."""
    modulation_rank: int | str | None = None
    """Directions of the modulation input that stay; `auto` measures how many, `needed` does so where less than
    MODULATION_BELOW would stay without it; None leaves it as it is."""
    prompts: str | None = None
    """A text file of the prompts that these directions are found on; by default as for `analyze`, but all of them."""
    seed: int = 0
    """Of what a baseline draws by lot."""

    def check(self) -> None:
        """Refuse a method that there is not, naming the option."""
        if self.method not in METHODS:
            raise InputError(f"--method: found {self.method!r}, expected one of {', '.join(METHODS)}")

    @property
    def scored(self) -> bool:
        """Whether the method chooses by contributions."""
        return self.method != "manual" and self.method not in baselines()


NEEDED = "needed"
MODULATION_BELOW = 0.75
"""Share of the parameters below which the built-in model is better with projected modulation, trained or not, beyond
its intervals (docs/modulation.md). Above it they tell nothing apart, and stock diffusers opens what has it whole."""
DEFAULT = PlanOptions(keep=0.79, modulation_rank=NEEDED)


def stock_config(config: Config) -> Config:
    """A shorter config as diffusers' own class has it, for those who read no weights by it."""
    stock = {k: v for k, v in config.items() if k != "quantization_config"}
    return stock | {"_class_name": config["_class_name"].removeprefix(CHANGED)}


def remaining_shapes(
    family: Family,
    config: Config,
    blocks: Iterable[int],
    components: Iterable[tuple[int, str]],
    rank: int | None = None,
) -> dict[str, Shape]:
    """Tensor shapes of the model that a plan leaves."""
    removed_blocks = set(blocks)
    kept = [i for i in range(family.block_count(config)) if i not in removed_blocks]
    original = family.tensor_shapes(config)
    sources = tensor_sources(family, config, kept, frozenset(components), rank)
    width = 0 if rank is None else modulation_width(family, config)
    shapes: dict[str, Shape] = {}
    for name, source in sources.items():
        if source.calibrated:
            shapes[name] = (width,) if source.name == "mean" else (rank or 0, width)
            continue
        shape = original[source.name]
        for axis, ranges in enumerate((source.rows, source.columns)):
            if ranges is not None:
                shape = (*shape[:axis], sum(b - a for a, b in ranges), *shape[axis + 1 :])
        shapes[name] = (shape[0], rank or 0) if source.projected else shape
    return shapes


def _way_out(method: str, report: ContributionReport | None) -> str:
    """What a budget that cannot be met leaves to try."""
    known = [] if report is None else [part for part in report.contributions() if part[1] is not None]
    if method == "hybrid" and not known:
        return "the analysis has whole blocks alone; use --method hpp, or analyze components too"
    return "allow more, lower --protect-first or --protect-last" + (
        ", or use --method hybrid" if method == "hpp" else ""
    )


def make_plan(
    family: Family,
    config: Config,
    report: ContributionReport | None,
    *,
    method: str = "hpp",
    keep: float | None = None,
    max_memory_bytes: int | None = None,
    protect_first: int | None = None,
    protect_last: int = 2,
    threshold: float = 0.15,
    blocks: str = "",
    components: str = "",
    group_size: int = 64,
    modulation_rank: int | None = None,
    seed: int = 0,
    measured: Measured | None = None,
) -> PrunePlan:
    """A plan that meets the budget with the least loss the method knows.

    Args:
        report: contributions; not needed for `manual` and baselines.
        keep: share of the transformer's parameters that may be left, 0..1.
        max_memory_bytes: bytes that its weights may take after INT4.
        protect_first: leading blocks never removed; half of all by default, none for baselines.
        protect_last: trailing blocks never removed.
        threshold: for `hybrid`, the share of parameters removed as whole blocks before components join.
        blocks, components: for `manual`, see `parse_blocks` and `parse_components`.
        modulation_rank: see `PrunePlan`.
        seed: of what a baseline draws by lot.
        measured: what baselines may ask of a model.

    Raises:
        InputError: wrong options, or a report of another model.
        BudgetError: nothing the method may remove meets the budget.
    """
    model = _Model(family, config, group_size, modulation_rank)
    if method == "manual":
        if keep is not None or max_memory_bytes is not None:
            raise InputError("--method manual removes what you list; leave --keep and --max-memory out")
        gone, parts = _listed(model, blocks, components)
    elif method in METHODS:
        if blocks or components:
            raise InputError(f"--blocks and --components go with --method manual, found --method {method}")
        budget = _Budget(model.before, keep, max_memory_bytes)
        baseline = baselines().get(method)
        first = protect_first if protect_first is not None else 0 if baseline else model.count // 2
        later = range(first, model.count - protect_last)
        measured = measured or Measured()
        if baseline is not None:
            if baseline.magnitudes and not measured.magnitudes:
                raise InputError(f"--method {method} reads weights: give -o (a folder), not --config")
            known = Blocks(model.count, later, measured.magnitudes, seed)
            gone, parts = _smallest(model, lambda number: baseline.choose(known, number), budget, len(later)), []
        else:
            if report is None:
                raise InputError(f"--method {method} needs contribution scores; run `edgeprune analyze` first")
            _check_report(report, config, model.count)
            gone, parts = _by_scores(model, report, method, budget, later, threshold)
        now = model.after(gone, parts)
        if not budget.met(now):
            raise BudgetError(
                f"{budget} cannot be met by --method {method}: removing all it may (of blocks {first} to "
                f"{later.stop - 1}) leaves {now.parameters / model.before.parameters:.3f} of the parameters, "
                f"{now.int4_bytes} bytes after INT4; {_way_out(method, report)}"
            )
    else:
        raise InputError(f"--method: found {method!r}, expected one of {', '.join(METHODS)}")
    gone, parts = sorted(gone), sorted(parts)
    after = model.after(gone, parts)
    return PrunePlan(
        *(fingerprint(config), family.name, model.count, method, gone, parts, model.before, after, modulation_rank)
    )


def plan_for(
    family: Family,
    config: Config,
    report: ContributionReport | None,
    options: PlanOptions,
    budget: int | None = None,
    measured: Measured | None = None,
) -> PrunePlan:
    """`make_plan` with options; `budget` is the bytes that a device leaves, where one was named.

    Raises:
        InputError: the modulation's rank is `auto`, which only a folder's own stage can measure.
    """
    if options.modulation_rank == NEEDED:
        options = replace(options, modulation_rank=None)
    if isinstance(options.modulation_rank, str):
        raise InputError(
            f"--modulation-rank {options.modulation_rank}: is measured on a model: give -o (a folder), or a number"
        )
    choices = asdict(options)
    del choices["prompts"]
    if choices.pop("fit"):
        choices["max_memory_bytes"] = budget
    return make_plan(family, config, report, **choices, measured=measured)


class _Model:
    """What is planned for, and what it costs with parts gone."""

    def __init__(self, family: Family, config: Config, group_size: int, rank: int | None) -> None:
        width = 0 if rank is None else modulation_width(family, config)
        if rank is not None and not 0 <= rank < width:
            raise InputError(f"--modulation-rank: found {rank}, expected 0 to {width - 1}, or full")
        self.family, self.config, self.rank, self._group_size = family, config, rank, group_size
        self.count = family.block_count(config)
        self.before = footprint(family, family.tensor_shapes(config), group_size=group_size)
        self._counts: dict[tuple[tuple[int, ...], frozenset[str]], dict[int | None, Footprint]] = {}

    def after(self, gone: list[int], parts: list[tuple[int, str]]) -> Footprint:
        """The footprint without these blocks and components.

        What a block keeps depends on the blocks that stay and on its own components alone. So blocks are counted all at
        once for each set of components, and a plan of hundreds of candidates takes tens of counts.
        """
        kept = tuple(i for i in range(self.count) if i not in gone)
        removed: dict[int, frozenset[str]] = dict.fromkeys(kept, frozenset())
        for block, component in parts:
            if block in removed:
                removed[block] |= {component}
        blocks = [self._counted(kept, components)[block] for block, components in removed.items()]
        return sum(blocks, self._counted(kept, frozenset())[None])

    def _counted(self, kept: tuple[int, ...], components: frozenset[str]) -> dict[int | None, Footprint]:
        """What is left of each block without these components, and outside blocks (None)."""
        if (kept, components) not in self._counts:
            gone = set(range(self.count)) - set(kept)
            shapes = remaining_shapes(
                self.family, self.config, gone, [(b, c) for b in kept for c in components], self.rank
            )
            shorter = self.family.shorter_config(self.config, list(kept))
            by_block: dict[int | None, dict[str, Shape]] = {None: {}} | {block: {} for block in kept}
            for name, shape in shapes.items():
                place = self.family.place(shorter, name)
                by_block[kept[place[0]] if place else None][name] = shape
            self._counts[kept, components] = {
                block: footprint(self.family, mine, group_size=self._group_size) for block, mine in by_block.items()
            }
        return self._counts[kept, components]


class _Budget:
    """A share of the parameters or bytes after INT4."""

    def __init__(self, before: Footprint, keep: float | None, max_memory_bytes: int | None) -> None:
        if (keep is None) == (max_memory_bytes is None):
            raise InputError("budget: give exactly one of --keep and --max-memory")
        if keep is not None and not 0 < keep <= 1:
            raise InputError(f"--keep: found {keep}, expected a share above 0 and up to 1")
        self.limit = float(max_memory_bytes or 0) if keep is None else keep * before.parameters
        self._keep = keep
        self._text = f"--keep {keep}" if keep is not None else f"--max-memory {max_memory_bytes} bytes"

    def left(self, now: Footprint) -> int:
        """Parameters or bytes, whichever are limited."""
        return now.int4_bytes if self._keep is None else now.parameters

    def met(self, now: Footprint) -> bool:
        """Whether no more need go."""
        return self.left(now) <= self.limit

    def __str__(self) -> str:
        return self._text


def _listed(model: _Model, blocks: str, components: str) -> tuple[list[int], list[tuple[int, str]]]:
    """Blocks and components as the user lists them."""
    gone = parse_blocks(blocks, model.count)
    parts = [p for p in parse_components(components, model.count, model.family) if p[0] not in gone]
    if len(gone) == model.count:
        raise InputError(f"--blocks: all {model.count} blocks would be removed; at least one must stay")
    if noops := [p for p in parts if p in model.family.noops(model.config)]:
        raise InputError(
            f"--components: {noops[0][0]}:{noops[0][1]} is not in this model, so there is nothing to remove"
        )
    return gone, parts


def _smallest(model: _Model, choose: Callable[[int], list[int]], budget: _Budget, most: int) -> list[int]:
    """The fewest blocks of a baseline's choice that meet the budget, or all that may go."""
    most = min(most, model.count - 1)
    numbers = (n for n in range(most) if budget.met(model.after(choose(n), [])))
    return choose(next(numbers, most))


def _by_scores(
    model: _Model,
    report: ContributionReport,
    method: str,
    budget: _Budget,
    later: range,
    threshold: float,
) -> tuple[list[int], list[tuple[int, str]]]:
    """What a method removes that chooses by contributions."""
    if method in PLANNERS:
        chosen = planner_named(method)(_problem(model, report, budget, later))
        return [b for b, c in chosen if c is None], [(b, c) for b, c in chosen if c is not None]
    return _ranked(model, report.contributions(), budget, later, threshold if method == "hybrid" else None)


def _problem(
    model: _Model,
    report: ContributionReport,
    budget: _Budget,
    later: range,
) -> Problem:
    """What a planner chooses from: parts of later blocks."""

    def left(chosen: list[Key]) -> float:
        return budget.left(model.after([b for b, c in chosen if c is None], [(b, c) for b, c in chosen if c]))

    losses = {part: c.drop for part, c in report.contributions().items() if part[0] in later}
    joint = {parts: c.drop for parts, c in report.joint().items() if set(parts) <= losses.keys()}
    return Problem(report.metric, losses, joint, left, budget.limit, model.count)


def _ranked(
    model: _Model, contributions: dict[Key, Contribution], budget: _Budget, later: range, threshold: float | None
) -> tuple[list[int], list[tuple[int, str]]]:
    """Later blocks, the least contributing first, until the budget is met; past `threshold` (hybrid) components."""
    order = sorted((b for b in later if (b, None) in contributions), key=lambda b: contributions[b, None].drop)
    gone: list[int] = []
    for block in order:
        if budget.met(model.after(gone, [])) or len(gone) + 1 == model.count:
            break
        candidate = model.after([*gone, block], [])
        if threshold is not None and candidate.parameters < (1 - threshold) * model.before.parameters:
            break
        gone.append(block)
    return gone, [] if threshold is None else _components(model, contributions, budget, later, gone)


def _components(
    model: _Model, contributions: dict[Key, Contribution], budget: _Budget, later: range, gone: list[int]
) -> list[tuple[int, str]]:
    """Components of the remaining later blocks, least loss per parameter first, until the budget is met."""
    now = model.after(gone, [])
    ranked = []
    for (block, component), c in contributions.items():
        if component is not None and block in later and block not in gone:
            saved = now.parameters - model.after(gone, [(block, component)]).parameters
            if saved > 0:
                ranked.append((max(c.drop, 0.0) / saved, -saved, block, component))
    parts: list[tuple[int, str]] = []
    for *_, block, component in sorted(ranked):
        if budget.met(now):
            break
        parts.append((block, component))
        now = model.after(gone, parts)
    return parts


def _check_report(report: ContributionReport, config: Config, count: int) -> None:
    found = fingerprint(config)
    if report.num_blocks != count or (report.fingerprint and report.fingerprint != found):
        raise InputError(
            f"scores: made for another model ({report.num_blocks} blocks, {report.fingerprint or 'summary'}), "
            f"expected {count} blocks, {found}"
        )


def parse_blocks(text: str, count: int) -> list[int]:
    """`25-28,31` to [25, 26, 27, 28, 31]: ranges are closed."""
    found: set[int] = set()
    for item in filter(None, (t.strip() for t in text.split(","))):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high or high >= count:
            raise InputError(
                f"--blocks: found {item!r}, expected indices or closed ranges from 0 to {count - 1}, like 25-28,31"
            )
        found.update(range(low, high + 1))
    return sorted(found)


def parse_components(text: str, count: int, family: Family) -> list[tuple[int, str]]:
    """`30:mlp,30:context_mlp` to pairs."""
    found: set[tuple[int, str]] = set()
    for item in filter(None, (t.strip() for t in text.split(","))):
        block, _, component = item.partition(":")
        if not block.isdigit() or int(block) >= count or component not in family.components:
            names = ", ".join(family.components)
            raise InputError(
                f"--components: found {item!r}, expected BLOCK:NAME with BLOCK below {count} and NAME of {names}"
            )
        found.add((int(block), component))
    return sorted(found)
