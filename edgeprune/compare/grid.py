"""A grid: the methods to compare at one budget, read from a TOML file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from edgeprune.common.errors import InputError
from edgeprune.common.fields import shown
from edgeprune.planning.methods import baselines
from edgeprune.planning.options import METHODS, PlanOptions
from edgeprune.stages.options import AnalyzeOptions, CompressOptions
from edgeprune.training.recipe import DistillOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GRIDS = Path(__file__).parent / "grids"
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Row:
    """One way to compress."""

    name: str
    options: CompressOptions
    quantized: bool
    seeds: int
    group: str
    """Rows of one group share a plot style."""
    work: int | None = None
    """Evaluations of a block by one sample that its training takes, see training/work.py; None for its own steps."""

    @property
    def varies(self) -> bool:
        """Whether another seed gives another result: it is trained, or its plan is drawn at random."""
        return self.options.distill is not None or _is_drawn(self.options.plan.method)

    @property
    def reads_contributions(self) -> bool:
        """Whether its plan or its training needs the analysis of the original."""
        return self.options.reads_scores

    def seeded(self, seed: int, budget_bytes: int) -> CompressOptions:
        """Return the row's options for one training seed and the grid's budget."""
        plan = replace(self.options.plan, seed=seed)
        if plan.method != "manual":
            plan = replace(plan, keep=None, max_size_bytes=budget_bytes)
        training = self.options.distill and replace(self.options.distill, seed=seed)
        return replace(self.options, plan=plan, distill=training)


@dataclass(frozen=True)
class Grid:
    """Rows at one budget."""

    budget: float
    """Share of the original's bf16 bytes that the weights may take after INT4; `manual` plans ignore it."""
    reference: str
    """The row that the summary compares with every other row."""
    rows: tuple[Row, ...]

    @property
    def reads_contributions(self) -> bool:
        """Whether any row needs the analysis of the original."""
        return any(row.reads_contributions for row in self.rows)

    @property
    def analyze(self) -> AnalyzeOptions:
        """Options to analyze the original with; all rows start from one preset, so they agree."""
        return self.rows[0].options.analyze

    @classmethod
    def load(cls, path: Path, start: CompressOptions) -> Grid:
        """Read a grid, whose tables take the fields of the option classes.

        Args:
            start: values of the fields that the file does not set.

        Raises:
            InputError: a name or a value does not fit; the message says where.
        """
        try:
            data = _Grid.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
            rows = tuple(_row(row, data, start) for row in data.rows)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or error.title
            raise InputError(f"{path}: {where}: found {shown(first['input'])}: {first['msg']}") from error
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise InputError(f"{path}: found a folder, expected a file") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a readable TOML file ({error})") from error
        names = [row.name for row in rows]
        if len(set(names)) < len(names) or data.reference not in names:
            raise InputError(
                f"{path}: reference: found {data.reference!r} among {', '.join(names)}, expected one of them, once"
            )
        return cls(budget=data.budget, reference=data.reference, rows=rows)


class _Row(BaseModel, extra="forbid"):
    """A row of the file; `distill = false` and `quantize = false` leave a stage out."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    group: str = ""
    seeds: int | None = Field(default=None, ge=1, le=_MOST_SEEDS)
    plan: dict[str, Any] = {}
    distill: dict[str, Any] | Literal[False] = {}
    quantize: dict[str, Any] | Literal[False] = {}
    aware: bool = True
    """Whether a row that becomes INT4 trains with weights rounded to INT4."""


class _Grid(BaseModel, extra="forbid"):
    """The file; its `distill` and `quantize` hold for all rows, and a row's own fields override them."""

    budget: float = Field(gt=0, lt=1)
    reference: str
    seeds: int = Field(default=1, ge=1, le=_MOST_SEEDS)
    work: int | None = Field(default=None, ge=1)
    """Each row that is trained takes as many steps as this work allows."""
    distill: dict[str, Any] = {}
    quantize: dict[str, Any] = {}
    rows: list[_Row] = Field(min_length=1)


T = TypeVar("T")


def _set(base: T, *changes: Mapping[str, Any]) -> T:
    """Return the options with these fields changed, checked by their types; later changes win."""
    changed = {name: value for change in changes for name, value in change.items()}
    current = {f.name: getattr(base, f.name) for f in fields(base)}  # type: ignore[arg-type]
    if unknown := sorted(changed.keys() - current):
        raise InputError(f"found {unknown[0]!r}, expected one of {', '.join(current)}")
    return TypeAdapter(type(base)).validate_python(current | changed)


def _row(row: _Row, grid: _Grid, start: CompressOptions) -> Row:
    if "prompts" in row.plan:
        raise InputError(f"{row.name}: plan.prompts: a grid takes no file names, they depend on the folder; remove it")
    plan, training, quantize = _set(PlanOptions(), row.plan), None, start.quantize
    if plan.method not in METHODS:
        raise InputError(f"{row.name}: plan.method: found {plan.method!r}, expected one of {', '.join(METHODS)}")
    if row.quantize is not False:
        quantize = _set(start.quantize, grid.quantize, row.quantize)
    if row.distill is not False:
        rounded = quantize.group_size if row.quantize is not False and row.aware else None
        training = _set(replace(start.distill or DistillOptions(), int4_group_size=rounded), grid.distill, row.distill)
        training.check()
        if grid.work is not None and "steps" in grid.distill | row.distill:
            raise InputError(f"{row.name}: distill.steps: the grid's work says how many steps it takes; remove one")
        if training.guidance is not None:
            raise InputError(
                f"{row.name}: distill.guidance: every row is drawn as the original is, with guidance; remove it"
            )
    plan = replace(plan, group_size=quantize.group_size)
    options = replace(start, plan=plan, distill=training, quantize=quantize)
    made = Row(
        name=row.name, options=options, quantized=row.quantize is not False, seeds=1, group=row.group,
        work=grid.work if training is not None else None,
    )  # fmt: skip
    return replace(made, seeds=row.seeds or grid.seeds) if made.varies else made


def _is_drawn(method: str) -> bool:
    """Return whether a method of `plan` chooses at random."""
    return method in baselines() and baselines()[method].drawn


def grid_named(name: str) -> Path:
    """Return the file of a grid that comes with the package.

    Raises:
        InputError: no grid has this name.
    """
    path = GRIDS / f"{name}.toml"
    names = sorted(p.stem for p in GRIDS.glob("*.toml"))
    if name not in names:
        raise InputError(f"--preset: found {name!r}, expected one of {', '.join(names)}")
    return path
