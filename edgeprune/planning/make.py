"""From scores and a budget to a plan: ask a method (methods/) which parts to remove, and check the result. Torch-free.

The config and, for methods that need them, contribution scores are enough; no weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from edgeprune.analysis.contribution import ContributionReport, Key, collapsed, fingerprint
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.families import Config, Family
from edgeprune.planning.budget import Budget, ModelSize, bytes_text
from edgeprune.planning.methods import Baseline, Blocks, Listed, Problem, Scored, methods
from edgeprune.planning.options import PlanOptions
from edgeprune.planning.plan import PrunePlan, followers
from edgeprune.planning.removable import Removable


def make_plan(
    family: Family,
    config: Config,
    report: ContributionReport | None,
    options: PlanOptions | None = None,
    device_bytes: int | None = None,
    magnitudes: Sequence[float] = (),
    **changes: Any,
) -> PrunePlan:
    """Return a plan that meets the budget with the least loss that the method can find.

    Args:
        report: contribution scores; None for `manual` and baselines, which need none.
        options: by default `PlanOptions()`.
        device_bytes: the budget if `options.fit` names a device: the bytes that the device leaves for the weights.
        magnitudes: root mean square of each block's weights, which some baselines need.
        changes: fields of `options` to replace.

    Raises:
        InputError: wrong options, or a report of another model.
        BudgetError: nothing that the method may remove meets the budget.
    """
    options = replace(options or PlanOptions(), **changes)
    if options.fit:
        options = replace(options, max_size_bytes=device_bytes)
    rank = options.modulation_rank
    if isinstance(rank, str):
        raise InputError(f"--modulation-rank {rank}: is measured on a model: give -o (a folder), or a number")
    stand_in_rank = options.stand_in_rank(family.width(config))
    size = ModelSize(family, config, options.group_size, rank, stand_in_rank)
    options.check()
    method = methods()[options.method]
    if isinstance(method, Listed):
        if options.keep is not None or options.max_size_bytes is not None:
            raise InputError(f"--method {method.name} removes what you list; omit --keep and --max-size")
        removed = method.choose(family, config, options.blocks, options.components)
    else:
        removable = Removable.of(family, config, options)
        removed = _within_budget(method, config, report, options, removable, size, magnitudes)
    removed = collapsed(family, config, removed)
    blocks = sorted(block for block, component in removed if component is None)
    return PrunePlan(
        fingerprint=fingerprint(config),
        family=family.name,
        num_blocks=size.blocks,
        method=method.name,
        blocks=blocks,
        components=sorted((block, component) for block, component in removed if component is not None),
        before=size.original,
        after=size.without(removed),
        modulation_rank=rank,
        stand_in_rank=stand_in_rank if followers(blocks, size.blocks) else None,
    )


def _within_budget(
    method: Scored | Baseline,
    config: Config,
    report: ContributionReport | None,
    options: PlanOptions,
    removable: Removable,
    size: ModelSize,
    magnitudes: Sequence[float],
) -> list[Key]:
    """Return the parts that a method removes to meet the budget.

    Raises:
        InputError: wrong options, or the method lacks scores or measurements.
        BudgetError: the method cannot meet the budget.
    """
    if options.blocks or options.components:
        raise InputError(f"--blocks and --components work with --method manual only, found --method {method.name}")
    budget = Budget(size.original, options.keep, options.max_size_bytes)
    if isinstance(method, Baseline):
        if method.magnitudes and not magnitudes:
            raise InputError(f"--method {method.name} reads weights: give -o (a folder), not --config")
        blocks = Blocks(count=size.blocks, removable=removable.blocks, magnitudes=magnitudes, seed=options.seed)
        removed = _fewest_blocks(method, blocks, size, budget)
    else:
        if report is None:
            raise InputError(f"--method {method.name} needs contribution scores; run `edgeprune analyze` first")
        _check_report(report, config, size.blocks)
        removed = method.choose(_problem(report, removable, size, budget, options.threshold))
    left = size.without(removed)
    if not budget.met(left):
        raise BudgetError(
            f"{budget} cannot be met by --method {method.name}: removing all it may (of blocks {removable}) "
            f"leaves {left.parameters / size.original.parameters:.3f} of the parameters, "
            f"{bytes_text(left.int4_bytes)} after INT4; {_way_out(method.name, report, options)}"
        )
    return removed


def _fewest_blocks(baseline: Baseline, blocks: Blocks, size: ModelSize, budget: Budget) -> list[Key]:
    """Return the smallest choice of a baseline that meets the budget, or the largest if none does."""
    most = min(len(blocks.removable), blocks.count - 1)
    for number in range(most):
        removed = _as_parts(baseline.choose(blocks, number))
        if budget.met(size.without(removed)):
            return removed
    return _as_parts(baseline.choose(blocks, most))


def _as_parts(blocks: Sequence[int]) -> list[Key]:
    """Return blocks as parts: a part without a component is the block itself."""
    return [(block, None) for block in blocks]


def _problem(
    report: ContributionReport, removable: Removable, size: ModelSize, budget: Budget, threshold: float
) -> Problem:
    """Return what a scored method chooses from: the removable blocks and their components."""
    losses = {part: c.drop for part, c in report.contributions().items() if part in removable}
    return Problem(
        metric=report.metric,
        losses=losses,
        joint={parts: c.drop for parts, c in report.joint().items() if set(parts) <= losses.keys()},
        left=lambda removed: budget.amount(size.without(removed)),
        limit=budget.limit,
        blocks=size.blocks,
        parameters=lambda removed: size.without(removed).parameters,
        block_floor=(1 - threshold) * size.without([]).parameters,
    )


def _check_report(report: ContributionReport, config: Config, blocks: int) -> None:
    """Check that a report is of this model; a published summary has no fingerprint.

    Raises:
        InputError: it is of another model.
    """
    expected = fingerprint(config)
    if report.num_blocks != blocks or (report.fingerprint and report.fingerprint != expected):
        raise InputError(
            f"scores: made for another model ({report.num_blocks} blocks, {report.fingerprint or 'summary'}), "
            f"expected {blocks} blocks, {expected}"
        )


def _way_out(method: str, report: ContributionReport | None, options: PlanOptions) -> str:
    """Return what to try when a budget cannot be met."""
    has_components = report is not None and any(part[1] is not None for part in report.contributions())
    if method == "hybrid" and not has_components:
        return "the analysis has whole blocks alone; use --method hpp, or analyze components too"
    advice = "allow more, lower --protect-first or --protect-last"
    if options.modulation_rank is None:
        advice += ", project the modulation with --modulation-rank"
    return f"{advice}, or use --method hybrid" if method == "hpp" else advice
