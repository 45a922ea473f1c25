"""How much each block and component contributes: take it out, score, put it back.

One model load; branches are swapped out and in in place. The untouched model is scored the same way, no-ops
are left out, raw scores per prompt are kept, and each contribution is a mean of per-prompt differences with a 95 %
interval. Results are appended to `<report>.partial` one by one, so that a killed run goes on where it was.
What it leaves out: joint removals and cheap estimators.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.families import Config, Family
from edgeprune.files import digest, read_json, write_json

if TYPE_CHECKING:
    import torch
    from torch import nn

SCHEMA_VERSION = 1
Key = tuple[int, str | None]
"""A block's index and a component, or None for the whole block."""


@dataclass(frozen=True)
class Contribution:
    """How far the score falls without one block or component: mean and half-width of its 95 % interval."""

    block: int
    component: str | None
    drop: float
    half_width: float | None
    """None where the source gives no raw scores."""


@dataclass(frozen=True)
class ContributionReport:
    """Scores of a model with each part removed. Higher scores are better."""

    fingerprint: str
    """Of the model's config, see `fingerprint`."""
    family: str
    num_blocks: int
    metric: str
    prompts: list[str]
    untouched: list[float]
    """Score of the whole model per prompt."""
    scores: dict[Key, list[float]]
    """Score per prompt without that part."""
    summary: dict[Key, float] | None = None
    """Mean drops alone, where that is all a source gives."""

    def contributions(self) -> dict[Key, Contribution]:
        """Mean drop and interval for every part, in the order they were scored."""
        if self.summary is not None:
            return {k: Contribution(*k, drop, None) for k, drop in self.summary.items()}
        out = {}
        for key, scores in self.scores.items():
            drops = [u - s for u, s in zip(self.untouched, scores, strict=True)]
            mean = sum(drops) / len(drops)
            variance = sum((d - mean) ** 2 for d in drops) / max(1, len(drops) - 1)
            out[key] = Contribution(*key, mean, 1.96 * math.sqrt(variance / len(drops)))
        return out

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        data = asdict(self) | {"schema_version": SCHEMA_VERSION}
        data["scores"] = [{"block": b, "component": c, "scores": s} for (b, c), s in self.scores.items()]
        data.pop("summary")
        return data

    @classmethod
    def load(cls, path: Path) -> ContributionReport:
        """Read a report, or a published summary `{"metric": …, "drop": {"0": change of score, …}}` of whole blocks.

        Raises:
            InputError: not such a file.
        """
        data = read_json(path)
        try:
            if "drop" in data:
                # Published as the change of the score, so a loss is negative.
                summary: dict[Key, float] = {(int(k), None): -float(v) for k, v in data["drop"].items()}
                return cls("", "", len(summary), str(data["metric"]), [], [], {}, summary)
            if data["schema_version"] != SCHEMA_VERSION:
                found = data["schema_version"]
                raise InputError(f"{path}: schema_version: found {found!r}, expected {SCHEMA_VERSION}; analyze again")
            scores = {(int(e["block"]), e["component"]): [float(s) for s in e["scores"]] for e in data["scores"]}
            report = cls(
                *(str(data["fingerprint"]), str(data["family"]), int(data["num_blocks"]), str(data["metric"])),
                *(list(data["prompts"]), [float(s) for s in data["untouched"]], scores),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not a contribution report ({type(error).__name__}: {error})") from error
        if any(len(s) != len(report.untouched) for s in report.scores.values()) or not report.untouched:
            raise InputError(f"{path}: scores: expected {len(report.untouched)} per part, one for each prompt")
        if not all(math.isfinite(s) for row in (report.untouched, *report.scores.values()) for s in row):
            raise InputError(f"{path}: scores: found a value that is not a finite number")
        return report


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


class Removed:
    """Context manager: the model without these parts; afterwards it is as before."""

    def __init__(self, family: Family, model: nn.Module, keys: list[Key], mean: torch.Tensor) -> None:
        self.swaps = [s for block, component in keys for s in family.removal(model, block, component, mean)]
        self.originals: list[nn.Module] = []

    def __enter__(self) -> None:
        """Swap out."""
        for swap in self.swaps:
            self.originals.append(getattr(swap.owner, swap.attribute))
            setattr(swap.owner, swap.attribute, swap.replacement)

    def __exit__(self, *_: object) -> None:
        """Swap back in, the last first."""
        for swap in reversed(self.swaps):
            setattr(swap.owner, swap.attribute, self.originals.pop())


def analyze(
    family: Family,
    config: Config,
    model: nn.Module,
    score: Callable[[], list[float]],
    *,
    mean: torch.Tensor,
    metric: str,
    prompts: list[str],
    path: Path,
    inputs_digest: str,
    components: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ContributionReport:
    """Score `model` whole and without each part, and write the report to `path`.

    Args:
        score: scores the model as it is now, one value per prompt, higher is better.
        mean: mean modulation input (D), for removed norms.
        inputs_digest: identity of everything that the scores depend on; a partial file of other inputs is dropped.
        components: False scores whole blocks only.
        progress: called with parts done and parts in all.
    """
    partial = path.with_name(path.name + ".partial")
    keys: list[Key | None] = [None, *parts(family, config, components=components)]
    done = _read_partial(partial, inputs_digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a" if done is not None else "w", encoding="utf-8") as file:
        if done is None:
            done = {}
            file.write(json.dumps({"inputs": inputs_digest}) + "\n")
        for index, key in enumerate(keys):
            progress(index, len(keys))
            if key in done:
                continue
            with Removed(family, model, [] if key is None else [key], mean):
                done[key] = score()
            file.write(json.dumps({"part": key, "scores": done[key]}) + "\n")
            file.flush()
    progress(len(keys), len(keys))
    report = ContributionReport(
        fingerprint(config), family.name, family.block_count(config), metric, prompts, done[None],
        {key: done[key] for key in keys if key is not None},
    )  # fmt: skip
    write_json(path, report.to_json())
    partial.unlink()
    return report


def _read_partial(path: Path, inputs_digest: str) -> dict[Key | None, list[float]] | None:
    """What a killed run has scored, or None if there is nothing to go on with. A torn last line is dropped."""
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").split("\n")
    whole = lines[:-1]  # a complete file ends with a newline
    try:
        if json.loads(whole[0]) != {"inputs": inputs_digest}:
            return None
        rows = [json.loads(line) for line in whole[1:]]
        done: dict[Key | None, list[float]] = {tuple(r["part"]) if r["part"] else None: r["scores"] for r in rows}
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    if lines[-1]:
        path.write_text("\n".join(whole) + "\n", encoding="utf-8")
    return done
