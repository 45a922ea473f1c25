"""How much each block, each component and each group of them contributes: the score without it against the full score.

A part is a block or a component of a block. A group is a set of parts that are removed together; a single part is a
group of one, and the untouched model is the empty group. No-ops are skipped. Raw scores are kept per prompt, and each
contribution is the mean of per-prompt differences with a 95 % interval.

Results are appended to `<report>.partial` one by one, so an interrupted run resumes. Several processes share the
groups, each with its own partial file; a later run with any number of processes resumes from all of them. estimators/
obtain the scores, plots.py draws them.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.fields import MOST_BLOCKS, shown, text, texts, whole_number
from edgeprune.common.files import check_schema, digest, parse_json, read_json, whole_lines, write_json
from edgeprune.common.intervals import half_width
from edgeprune.families import Config, Family, Swap

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA_VERSION = 2
PARTIAL = ".partial"
_LARGEST = 1e12
"""Largest absolute score that is accepted, so that sums of squares stay finite."""
Key = tuple[int, str | None]
"""A part: a block's index and a component's name, or None for the whole block."""
Group = tuple[Key, ...]
"""Parts that are removed together, in the order that `group` gives them."""
Estimate = Callable[[list[Group]], Iterator[tuple[Group, list[float]]]]
"""Yields the scores of the model without each of these groups, one value per prompt, in any order of groups."""

TOGETHER = {
    "joint": (
        ("norm", "mlp"),
        ("context_mlp", "mlp"),
        ("norm", "context_norm"),
        ("context_norm", "context_mlp"),
        ("context_norm", "mlp", "context_mlp"),
        ("norm", "context_norm", "mlp", "context_mlp"),
    ),
    "single": (("norm", "attn"), ("norm", "mlp"), ("attn", "mlp")),
}
"""Components that figure 4 of HierarchicalPrune removes together, by the kind of block (`Architecture.kinds`)."""


def group(parts: Iterable[Key]) -> Group:
    """Return the parts as a group, in its canonical order."""
    return tuple(sorted(parts, key=lambda part: (part[0], part[1] or "")))


@dataclass(frozen=True)
class Contribution:
    """How far the score drops without a group: mean and half-width of the 95 % interval (Student's t over prompts)."""

    parts: Group
    drop: float
    half_width: float | None
    """None if it is unknown: there is a single prompt, or the source has no raw scores."""

    @property
    def block(self) -> int:
        """Index of the first block that the group touches."""
        return self.parts[0][0]

    @property
    def component(self) -> str | None:
        """The component of the first part; None for a whole block."""
        return self.parts[0][1]

    def __str__(self) -> str:
        return " + ".join(f"{block}:{component or 'block'}" for block, component in self.parts)


@dataclass(frozen=True)
class ContributionReport:
    """Scores of a model without each group. Higher scores are better."""

    fingerprint: str
    """Fingerprint of the model's config, see the function `fingerprint`."""
    family: str
    num_blocks: int
    metric: str
    prompts: list[str]
    untouched: list[float]
    """Score of the untouched model per prompt."""
    scores: dict[Group, list[float]]
    """Score per prompt without each group."""
    summary: dict[Group, float] | None = None
    """Mean drop without each group, if the source has no raw scores; None if it has."""
    estimator: str = "exhaustive"
    """Name of the estimator that obtained the scores, see estimators/."""

    def contributions(self) -> dict[Key, Contribution]:
        """Return mean drop and interval of every single part, in the order they were scored."""
        return {parts[0]: c for parts, c in self._all().items() if len(parts) == 1}

    def joint(self) -> dict[Group, Contribution]:
        """Return mean drop and interval of every group of several parts, in the order they were scored."""
        return {parts: c for parts, c in self._all().items() if len(parts) > 1}

    def _all(self) -> dict[Group, Contribution]:
        """Return mean drop and interval of every group."""
        if self.summary is not None:
            return {
                parts: Contribution(parts=parts, drop=drop, half_width=None) for parts, drop in self.summary.items()
            }
        out = {}
        for parts, scores in self.scores.items():
            drops = [u - s for u, s in zip(self.untouched, scores, strict=True)]
            mean = sum(drops) / len(drops)
            out[parts] = Contribution(parts=parts, drop=mean, half_width=half_width(drops))
        return out

    def to_json(self) -> dict[str, Any]:
        """Return the content of the report's file."""
        data = asdict(self) | {"schema_version": SCHEMA_VERSION}
        data["scores"] = [{"parts": list(parts), "scores": scores} for parts, scores in self.scores.items()]
        data.pop("summary")
        return data

    @classmethod
    def load(cls, path: Path) -> ContributionReport:
        """Read a report, or a published summary `{"metric": …, "drop": {"0": change of score, …}}` of whole blocks.

        Also reads schema 1, which had single parts only.

        Raises:
            InputError: the file is neither.
        """
        data = read_json(path)
        metric = text(data, "metric", path)
        if "drop" in data:
            summary = _summary(data["drop"], path)
            return cls(
                fingerprint="", family="", num_blocks=len(summary), metric=metric, prompts=[], untouched=[], scores={},
                summary=summary,
            )  # fmt: skip
        if (version := data.get("schema_version")) != 1:
            check_schema(path, version, SCHEMA_VERSION, "analyze again")
        entries = data.get("scores")
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise InputError(f"{path}: scores: found {shown(entries)}, expected a list of parts with their scores")
        count, untouched = (
            whole_number(data, "num_blocks", path, most=2 * MOST_BLOCKS),
            _scores(data.get("untouched"), path),
        )
        scores = {
            _group(e.get("parts") if version != 1 else [[e.get("block"), e.get("component")]], count, path): _scores(
                e.get("scores"), path
            )
            for e in entries
        }
        if any(len(s) != len(untouched) for s in scores.values()) or not untouched:
            raise InputError(f"{path}: scores: expected {len(untouched)} per group, one for each prompt")
        return cls(
            fingerprint=text(data, "fingerprint", path),
            family=text(data, "family", path),
            num_blocks=count,
            metric=metric,
            prompts=texts(data, "prompts", path),
            untouched=untouched,
            scores=scores,
            estimator=text({"estimator": "exhaustive"} | data, "estimator", path),
        )


def _summary(changes: Any, path: Path) -> dict[Group, float]:
    """Return the mean drop of each block from a published summary, which has the change of the score: its negative."""
    if not isinstance(changes, dict) or not changes or changes.keys() != {str(i) for i in range(len(changes))}:
        raise InputError(f"{path}: drop: found {shown(changes)}, expected a number for every block from 0 on")
    values = zip(changes, _scores([*changes.values()], path), strict=True)
    return {((int(block), None),): -change for block, change in values}


def _scores(value: Any, path: Path) -> list[float]:
    """Return a JSON value that must be a list of scores."""
    fits = isinstance(value, list) and all(type(s) in (int, float) and abs(s) <= _LARGEST for s in value)
    if not fits:
        raise InputError(f"{path}: scores: found {shown(value)}, expected a list of numbers up to {_LARGEST:g}")
    return [float(s) for s in value]


def _group(value: Any, count: int, path: Path) -> Group:
    """Return a JSON value that must be a list of parts of a model with `count` blocks."""
    if not isinstance(value, list) or not value or not all(_is_part(part, count) for part in value):
        raise InputError(f"{path}: parts: found {shown(value)}, expected blocks below {count} and their components")
    return group((block, component) for block, component in value)


def _is_part(value: Any, count: int) -> bool:
    """Return whether a JSON value is a pair of a block's index and a component's name or null."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return type(value[0]) is int and 0 <= value[0] < count and (value[1] is None or isinstance(value[1], str))


def fingerprint(config: Config) -> str:
    """Return a digest of an architecture: of its config without what diffusers adds for bookkeeping."""
    return digest({k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"})[:16]


def parts(family: Family, config: Config, *, blocks: bool = True, components: bool = True) -> list[Key]:
    """Return every block, then every component that is not a no-op."""
    count, noops = family.block_count(config), family.noops(config)
    keys: list[Key] = [(b, None) for b in range(count)] if blocks else []
    if components:
        keys += [(b, c) for c in family.components for b in range(count) if (b, c) not in noops]
    return keys


def groups(
    family: Family, config: Config, *, components: bool = True, joint: bool = False, pairs: bool = False
) -> list[Group]:
    """Return the groups to score, each once.

    Groups that contain a no-op are left out: the same group without it gives the same score.

    Args:
        components: every component alone, in addition to every block.
        joint: the combinations of a block's components in `TOGETHER`.
        pairs: any two parts that do not overlap.
    """
    singles = parts(family, config, components=components)
    out: list[Group] = [(part,) for part in singles]
    if joint:
        kinds = family.kinds(config)
        candidates = [[(b, c) for c in names] for kind in kinds for names in TOGETHER[kind] for b in kinds[kind]]
        out += [group(parts) for parts in candidates if set(parts) <= set(singles)]
    if pairs:
        both = itertools.combinations(singles, 2)
        out += [group((a, b)) for a, b in both if a[0] != b[0] or None not in (a[1], b[1])]
    return list(dict.fromkeys(out))


@contextmanager
def swapped(swaps: Iterable[Swap]) -> Iterator[None]:
    """Replace modules of a model inside the context; on exit the originals are restored."""
    originals: list[tuple[Swap, nn.Module]] = []
    try:
        for swap in swaps:
            originals.append((swap, getattr(swap.owner, swap.attribute)))
            setattr(swap.owner, swap.attribute, swap.replacement)
        yield
    finally:
        for swap, original in reversed(originals):
            setattr(swap.owner, swap.attribute, original)


def collapsed(family: Family, config: Config, parts: Iterable[Key]) -> list[Key]:
    """Return removed parts, with the whole block in place of its components where it keeps no branch.

    A branch is a component that is not a norm. Without branches a block passes its streams on unchanged, and nothing
    reads its norms. In a single-stream block of FLUX.1 the bias that attention and MLP share goes as well. One block
    always stays.
    """
    removed = set(parts)
    branches = set(family.components) - set(family.norms)
    while True:
        whole = {block for block, component in removed if component is None}
        kept = [block for block in range(family.block_count(config)) if block not in whole]
        touched = {block for block, component in removed if component in branches} - whole
        # What has no effect depends on the blocks that stay: nothing reads the context of the last one.
        noops = family.noops(family.shorter_config(config, kept)) if touched else frozenset()
        gone = removed | {(kept[new], component) for new, component in noops}
        empty = [block for block in touched if all((block, branch) in gone for branch in branches)]
        if not empty or len(kept) == 1:
            return sorted(removed, key=lambda part: (part[0], part[1] or ""))
        removed = {part for part in removed if part[0] != empty[0]} | {(empty[0], None)}


def removal(family: Family, model: nn.Module, parts: Iterable[Key], mean: torch.Tensor) -> list[Swap]:
    """Return the swaps that remove these parts; `mean` is the mean modulation input (D)."""
    from edgeprune.residency.streaming import filled  # here, because it loads torch

    blocks, swaps = family.blocks(model), []
    for block, component in collapsed(family, dict(cast("Any", model).config), parts):
        # Constant modulation is computed from the block's weights; nothing else is.
        with filled(blocks[block]) if component in family.norms else nullcontext():
            swaps += family.removal(model, block, component, mean)
    return swaps


@contextmanager
def removed(family: Family, model: nn.Module, parts: Iterable[Key], mean: torch.Tensor) -> Iterator[None]:
    """Remove these parts of a model inside the context; on exit they are restored. `mean` as for `removal`."""
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
    """Score a model untouched and without each group, and write the report to `path`.

    Collective: every process must call it, and all return the same report.

    Args:
        estimate: scores the model without groups; higher is better.
        metric: its name.
        estimator: its name.
        inputs_digest: digest of everything that the scores depend on; a partial file of other inputs is discarded.
        progress: called with groups done and groups in total, including the untouched model.
    """
    wanted: list[Group] = [(), *groups]
    done = processes.from_main(_read_partials(path, inputs_digest) if processes.is_main() else None)
    missing = [parts for parts in wanted if parts not in done]
    share = missing[processes.index() :: processes.count()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL + (f".{processes.index()}" if processes.index() else ""))
    current = _read_partial(partial, inputs_digest) is not None
    with partial.open("a" if current else "w", encoding="utf-8") as file:
        if not current:
            file.write(json.dumps({"inputs": inputs_digest}) + "\n")
        progress(len(done), len(wanted))
        for number, (parts, scores) in enumerate(estimate(share) if share else (), 1):
            file.write(json.dumps({"parts": parts, "scores": scores}) + "\n")
            file.flush()
            progress(min(len(done) + number * processes.count(), len(wanted)), len(wanted))
    processes.meet()
    done = _read_partials(path, inputs_digest)
    report = ContributionReport(
        fingerprint=fingerprint(config),
        family=family.name,
        num_blocks=family.block_count(config),
        metric=metric,
        prompts=prompts,
        untouched=done[()],
        scores={parts: done[parts] for parts in groups},
        estimator=estimator,
    )
    if processes.is_main():
        write_json(path, report.to_json())
    processes.meet()
    return report


def partials_of(path: Path) -> list[Path]:
    """Return the partial files of a report. The caller removes them once it has recorded that the report is done."""
    return sorted(path.parent.glob(f"{path.name}{PARTIAL}*"))


def _read_partials(path: Path, inputs_digest: str) -> dict[Group, list[float]]:
    """Return what the processes of earlier runs have scored."""
    every = [_read_partial(partial, inputs_digest) for partial in partials_of(path)]
    return {parts: scores for done in every if done for parts, scores in done.items()}


def _read_partial(path: Path, inputs_digest: str) -> dict[Group, list[float]] | None:
    """Return what an interrupted run has scored, or None if it cannot be used. An incomplete last line is dropped."""
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
