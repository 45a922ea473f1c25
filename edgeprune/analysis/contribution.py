"""How much each block, each component and each group of them contributes: the score without it against the whole.

What is removed together is a group of parts; a single part is a group of one, the untouched model the group of none.
No-ops are left out, raw scores per prompt are kept, and each contribution is a mean of per-prompt differences with a
95 % interval. Results are appended to `<report>.partial` one by one, so that a killed run goes on where it was. Several
processes share the groups, each with a file of its own; any number of them can go on with what others have left.
What it leaves out: how scores are come by (estimators/), and drawing them (plots.py).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.fields import MOST_BLOCKS, shown, text, texts, whole
from edgeprune.common.files import check_schema, digest, parse_json, read_json, whole_lines, write_json
from edgeprune.families import Config, Family
from edgeprune.families.base import Swap

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA_VERSION = 2
PARTIAL = ".partial"
_LARGEST = 1e12
"""Of a score, so that sums of squares stay finite."""
Key = tuple[int, str | None]
"""A block's index and a component, or None for the whole block."""
Group = tuple[Key, ...]
"""What is removed together, in the order of `group`."""
Estimate = Callable[[list[Group]], Iterator[tuple[Group, list[float]]]]
"""Scores of the model without each of these groups, in whatever order they are found; one value per prompt."""

JOINT = (
    ("norm", "mlp"),
    ("context_mlp", "mlp"),
    ("norm", "context_norm"),
    ("context_norm", "context_mlp"),
    ("context_norm", "mlp", "context_mlp"),
    ("norm", "context_norm", "mlp", "context_mlp"),
)
"""The joint removals of figure 4 of HierarchicalPrune."""


def group(parts: Iterable[Key]) -> Group:
    """The parts in the one order that a group has."""
    return tuple(sorted(parts, key=lambda part: (part[0], part[1] or "")))


@dataclass(frozen=True)
class Contribution:
    """How far the score falls without a group: mean and half-width of its 95 % interval."""

    parts: Group
    drop: float
    half_width: float | None
    """None where the source gives no raw scores."""

    @property
    def block(self) -> int:
        """The first block that is touched."""
        return self.parts[0][0]

    @property
    def component(self) -> str | None:
        """Of a single part; None for a whole block."""
        return self.parts[0][1]

    def __str__(self) -> str:
        return " + ".join(f"{block}:{component or 'block'}" for block, component in self.parts)


@dataclass(frozen=True)
class ContributionReport:
    """Scores of a model with each group removed. Higher scores are better."""

    fingerprint: str
    """Of the model's config, see `fingerprint`."""
    family: str
    num_blocks: int
    metric: str
    prompts: list[str]
    untouched: list[float]
    """Score of the whole model per prompt."""
    scores: dict[Group, list[float]]
    """Score per prompt without that group."""
    summary: dict[Group, float] | None = None
    """Mean drops alone, where that is all a source gives."""
    estimator: str = "exhaustive"
    """How the scores were come by, see estimators/."""

    def contributions(self) -> dict[Key, Contribution]:
        """Mean drop and interval for every single part, in the order they were scored."""
        return {parts[0]: c for parts, c in self._all().items() if len(parts) == 1}

    def joint(self) -> dict[Group, Contribution]:
        """Mean drop and interval for every group of several parts, in the order they were scored."""
        return {parts: c for parts, c in self._all().items() if len(parts) > 1}

    def _all(self) -> dict[Group, Contribution]:
        if self.summary is not None:
            return {parts: Contribution(parts, drop, None) for parts, drop in self.summary.items()}
        out = {}
        for parts, scores in self.scores.items():
            drops = [u - s for u, s in zip(self.untouched, scores, strict=True)]
            mean = sum(drops) / len(drops)
            variance = sum((d - mean) ** 2 for d in drops) / max(1, len(drops) - 1)
            out[parts] = Contribution(parts, mean, 1.96 * math.sqrt(variance / len(drops)))
        return out

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        data = asdict(self) | {"schema_version": SCHEMA_VERSION}
        data["scores"] = [{"parts": list(parts), "scores": scores} for parts, scores in self.scores.items()]
        data.pop("summary")
        return data

    @classmethod
    def load(cls, path: Path) -> ContributionReport:
        """Read a report, or a published summary `{"metric": …, "drop": {"0": change of score, …}}` of whole blocks.

        Reports of schema 1 had single parts only, and are read as such.

        Raises:
            InputError: not such a file.
        """
        data = read_json(path)
        metric = text(data, "metric", path)
        if "drop" in data:
            return cls("", "", *_summary(data["drop"], metric, path))
        if (version := data.get("schema_version")) != 1:
            check_schema(path, version, SCHEMA_VERSION, "analyze again")
        entries = data.get("scores")
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InputError(f"{path}: scores: found {shown(entries)}, expected a list of parts with their scores")
        count, untouched = whole(data, "num_blocks", path, most=2 * MOST_BLOCKS), _scores(data.get("untouched"), path)
        scores = {
            _group(e.get("parts") if version != 1 else [[e.get("block"), e.get("component")]], count, path): _scores(
                e.get("scores"), path
            )
            for e in entries
        }
        if any(len(s) != len(untouched) for s in scores.values()) or not untouched:
            raise InputError(f"{path}: scores: expected {len(untouched)} per group, one for each prompt")
        return cls(
            *(text(data, "fingerprint", path), text(data, "family", path), count, metric),
            *(texts(data, "prompts", path), untouched, scores),
            estimator=text({"estimator": "exhaustive"} | data, "estimator", path),
        )


def _summary(drops: Any, metric: str, path: Path) -> tuple[int, str, list[str], list[float], Any, dict[Group, float]]:
    """The fields of a report, from its published summary."""
    if not isinstance(drops, dict) or not drops or drops.keys() != {str(i) for i in range(len(drops))}:
        raise InputError(f"{path}: drop: found {shown(drops)}, expected a number for every block from 0 on")
    # Published as the change of the score, so a loss is negative.
    values = zip(drops, _scores([*drops.values()], path), strict=True)
    return len(drops), metric, [], [], {}, {((int(k), None),): -v for k, v in values}


def _scores(found: Any, path: Path) -> list[float]:
    fits = isinstance(found, list) and all(type(s) in (int, float) and abs(s) <= _LARGEST for s in found)
    if not fits:
        raise InputError(f"{path}: scores: found {shown(found)}, expected a list of numbers up to {_LARGEST:g}")
    return [float(s) for s in found]


def _group(found: Any, count: int, path: Path) -> Group:
    if not isinstance(found, list) or not found or not all(_is_key(part, count) for part in found):
        raise InputError(f"{path}: parts: found {shown(found)}, expected blocks below {count} and their components")
    return group((block, component) for block, component in found)


def _is_key(found: Any, count: int) -> bool:
    """Whether this is a pair of a block's index and a component's name or null."""
    if not isinstance(found, list) or len(found) != 2:
        return False
    return type(found[0]) is int and 0 <= found[0] < count and (found[1] is None or isinstance(found[1], str))


def fingerprint(config: Config) -> str:
    """Identity of an architecture: its config without what diffusers adds for bookkeeping."""
    return digest({k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"})[:16]


def parts(family: Family, config: Config, *, blocks: bool = True, components: bool = True) -> list[Key]:
    """Every block, then every component that is not a no-op."""
    count, noops = family.block_count(config), family.noops(config)
    keys: list[Key] = [(b, None) for b in range(count)] if blocks else []
    if components:
        keys += [(b, c) for c in family.components for b in range(count) if (b, c) not in noops]
    return keys


def groups(
    family: Family, config: Config, *, components: bool = True, joint: bool = False, pairs: bool = False
) -> list[Group]:
    """Every part alone, then groups of a block's components (`JOINT`) and any two parts that do not overlap.

    A group that has a no-op in it is left out, because another says the same.
    """
    singles = parts(family, config, components=components)
    out: list[Group] = [(part,) for part in singles]
    if joint:
        candidates = [[(b, c) for c in names] for names in JOINT for b in range(family.block_count(config))]
        out += [group(parts) for parts in candidates if set(parts) <= set(singles)]
    if pairs:
        both = itertools.combinations(singles, 2)
        out += [group((a, b)) for a, b in both if a[0] != b[0] or None not in (a[1], b[1])]
    return list(dict.fromkeys(out))


@contextmanager
def swapped(swaps: Iterable[Swap]) -> Iterator[None]:
    """A model with these modules in the place of its own; afterwards it is as before."""
    originals: list[tuple[Swap, nn.Module]] = []
    try:
        for swap in swaps:
            originals.append((swap, getattr(swap.owner, swap.attribute)))
            setattr(swap.owner, swap.attribute, swap.replacement)
        yield
    finally:
        for swap, original in reversed(originals):
            setattr(swap.owner, swap.attribute, original)


def removal(family: Family, model: nn.Module, parts: Iterable[Key], mean: torch.Tensor) -> list[Swap]:
    """The swaps that take these parts out; `mean` is the mean modulation input (D)."""
    return [swap for block, component in parts for swap in family.removal(model, block, component, mean)]


@contextmanager
def removed(family: Family, model: nn.Module, parts: Iterable[Key], mean: torch.Tensor) -> Iterator[None]:
    """A model without these parts; afterwards it is as before."""
    with swapped(removal(family, model, parts, mean)):
        yield


def analyze(
    family: Family,
    config: Config,
    estimate: Estimate,
    *,
    groups: list[Group],
    metric: str,
    estimator: str,
    prompts: list[str],
    path: Path,
    inputs_digest: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ContributionReport:
    """Score a model whole and without each group, and write the report to `path`.

    Args:
        estimate: scores the model without groups; higher is better.
        metric, estimator: their names.
        inputs_digest: identity of everything that the scores depend on; a partial file of other inputs is dropped.
        progress: called with groups done and groups in all, the untouched model among them.
    """
    wanted: list[Group] = [(), *groups]
    done = processes.from_main(_read_partials(path, inputs_digest) if processes.is_main() else None)
    missing = [parts for parts in wanted if parts not in done]
    own = missing[processes.index() :: processes.count()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL + (f".{processes.index()}" if processes.index() else ""))
    current = _read_partial(partial, inputs_digest) is not None
    with partial.open("a" if current else "w", encoding="utf-8") as file:
        if not current:
            file.write(json.dumps({"inputs": inputs_digest}) + "\n")
        progress(len(done), len(wanted))
        for number, (parts, scores) in enumerate(estimate(own) if own else (), 1):
            file.write(json.dumps({"parts": parts, "scores": scores}) + "\n")
            file.flush()
            progress(min(len(done) + number * processes.count(), len(wanted)), len(wanted))
    processes.meet()
    done = _read_partials(path, inputs_digest)
    report = ContributionReport(
        fingerprint(config), family.name, family.block_count(config), metric, prompts, done[()],
        {parts: done[parts] for parts in groups}, estimator=estimator,
    )  # fmt: skip
    if processes.is_main():
        write_json(path, report.to_json())
    processes.meet()
    return report


def partials_of(path: Path) -> list[Path]:
    """Where a report's scores are kept until whoever asked for it has noted that it is done, and removes them."""
    return sorted(path.parent.glob(f"{path.name}{PARTIAL}*"))


def _read_partials(path: Path, inputs_digest: str) -> dict[Group, list[float]]:
    """What earlier runs have scored, whichever process did."""
    found = [_read_partial(partial, inputs_digest) for partial in partials_of(path)]
    return {parts: scores for done in found if done for parts, scores in done.items()}


def _read_partial(path: Path, inputs_digest: str) -> dict[Group, list[float]] | None:
    """What a killed run has scored, or None if there is nothing to go on with. A torn last line is dropped."""
    if not path.exists():
        return None
    try:
        complete = whole_lines(path)
        if parse_json(complete[0]) != {"inputs": inputs_digest}:
            return None
        done: dict[Group, list[float]] = {}
        for row in map(parse_json, complete[1:]):
            parts = _group(row["parts"], 2 * MOST_BLOCKS, path) if row["parts"] else ()  # () is the untouched model
            done[parts] = _scores(row["scores"], path)
    except (ValueError, KeyError, TypeError, IndexError, InputError):
        return None
    return done
