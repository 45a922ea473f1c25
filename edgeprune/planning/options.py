"""Options of `plan`, and the defaults. Torch-free and cheap to import: the command line lists the methods from here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.planning.methods import Baseline, Listed, Scored, methods

METHODS = tuple(methods())
"""Names that `--method` takes: the project's own methods, then the baselines."""
QUARTER = "quarter"
"""Value of `stand_in`: a quarter of the width, at which the maps do nearly as well as without a limit."""
MODULATION_BELOW = 0.75
"""Share of the parameters below which projected modulation makes the built-in model better, trained or not, by more
than the confidence intervals at equal bytes of the file (docs/modulation.md); `plan` then names the option. It is no
default, because exports hold the modulation in memory before the first step alone."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`. All of them enter the digest of the stage."""

    method: str = "hpp"
    """One of METHODS."""
    keep: float | None = None
    """Budget: the share of the transformer's parameters that may be left, above 0 and up to 1."""
    max_size_bytes: int | None = None
    """Budget: the bytes that the transformer's weights may take after INT4."""
    protect_first: int | dict[str, int] | None = None
    """Number of leading blocks that are never removed; by default half of all, none for baselines. Or a number for each
    kind of block, as in {"joint": 10, "single": 5}; kinds that are not named keep their default."""
    protect_last: int = 2
    """Number of trailing blocks that are never removed."""
    threshold: float = 0.15
    """For `hybrid`: share of the parameters removed as whole blocks before components are. Counted at the plan's
    modulation rank: 1 - parameters without these blocks / parameters with all blocks, both at that rank. So what the
    projected modulation saves does not count."""
    blocks: str = ""
    """For `manual`: blocks to remove, see `parse_blocks`."""
    components: str = ""
    """For `manual`: components to remove, see `parse_components`."""
    group_size: int = 64
    """Group size of the INT4 weights whose bytes are counted."""
    fit: str | None = None
    """Budget: name of a target whose memory sets it, see fit.py."""
    modulation_rank: int | str | None = None
    """Directions of the modulation input that stay. `auto` measures how many; None leaves the modulation unchanged. See
    `PrunePlan.modulation_rank`."""
    prompts: str | None = None
    """Text file of the prompts that these directions are found on; by default those given to `analyze`, else the
    captions of the calibration split."""
    seed: int = 0
    """Seed for a baseline that chooses at random."""
    keep_components: tuple[str, ...] = ()
    """Component types that no block loses on its own, such as ("attn",). A block that keeps no branch goes as a whole,
    with its norms."""
    stand_in: int | str | None = None
    """Rank of the maps that stand in for removed runs of blocks; QUARTER is that of the width, None is without them."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as stages digest them.

        `max_latency` was an option until 2026-11, and `max_size_bytes` had another name. Folders that were planned
        before stay current.
        """
        data = asdict(self) | {"max_latency": None}
        data["max_memory_bytes"] = data.pop("max_size_bytes")
        if self.method == "hybrid" and self.threshold and self.modulation_rank is not None:
            data["threshold_of"] = "projected"  # it was a share of the original, so these plans have changed
        if not self.keep_components:
            del data["keep_components"]  # older folders do not have this option; they stay current
        if self.stand_in is None:
            del data["stand_in"]  # nor this one
        return data

    def stand_in_rank(self, width: int) -> int | None:
        """Return the rank of the maps for a transformer of this width.

        Raises:
            InputError: it is above the width.
        """
        rank = width // 4 if self.stand_in == QUARTER else self.stand_in
        if isinstance(rank, str) or (rank is not None and not 1 <= rank <= width):
            raise InputError(f"--stand-in: found {self.stand_in!r}, expected none, {QUARTER}, or a rank up to {width}")
        return rank

    def check(self) -> None:
        """Check the method, and that it heeds what is set for it.

        Raises:
            InputError: there is no such method, or it has no threshold, or removes no components of its own choice.
        """
        if self.method not in METHODS:
            raise InputError(f"--method: found {self.method!r}, expected one of {', '.join(METHODS)}")
        if self.threshold != PlanOptions.threshold and self.method != "hybrid":
            raise InputError(f"--threshold works with --method hybrid only, found --method {self.method}")
        able = [name for name, method in methods().items() if isinstance(method, Scored) and method.components]
        if self.keep_components and self.method not in able:
            raise InputError(f"--keep-components works with --method {', '.join(able)} only, found {self.method}")

    @property
    def scored(self) -> bool:
        """Whether the method chooses by contribution scores."""
        return not isinstance(methods().get(self.method), (Listed, Baseline))


DEFAULT = PlanOptions(keep=0.79)
"""The options of `plan` for a model that draws no shapes world."""
