"""The packages of a Core ML network in the order in which they run, and which of them are open at one time.

    chain = Chain([Package(path, 400_000_000, {"x": ([(1, 8)], False)}, ["y"]), ...])
    chain.kept(room, rows=2)   # so many of the first ones stay open

Calls nothing of Core ML. What is counted are the files of the packages that are open, and the values that pass from one
to the next. What Core ML takes inside a package is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.common.errors import InputError
from edgeprune.common.pieces import Needs
from edgeprune.runtimes.base import Array


@dataclass(frozen=True)
class Package:
    """What a package takes and returns, as its file says; it need not be open."""

    path: Path
    size: int
    """Bytes of its files."""
    inputs: Mapping[str, tuple[Sequence[tuple[int, ...]], bool]]
    """By name, the shapes that it takes and whether the values are integers."""
    outputs: Sequence[str]

    def feed(self, state: Mapping[str, Any]) -> dict[str, Array]:
        """Return the inputs out of all values, in 4 bytes a number, as Core ML takes them."""
        kinds: dict[str, Any] = {
            name: np.int32 if integer else np.float32 for name, (_, integer) in self.inputs.items()
        }
        return {name: np.asarray(state[name], kind) for name, kind in kinds.items()}

    def row_bytes(self) -> dict[str, int]:
        """Return the bytes of each input, of its smallest batch."""
        return {name: 4 * min(map(math.prod, allowed)) for name, (allowed, _) in self.inputs.items()}


class Chain:
    """A network's packages, in the order in which they run.

    Raises:
        InputError: a package reads what neither the network is given nor an earlier package returns.
    """

    def __init__(self, packages: Sequence[Package]) -> None:
        self.packages = packages
        made = set(packages[0].inputs)
        for package in packages:
            if missing := sorted(set(package.inputs) - made):
                raise InputError(
                    f"{package.path}: inputs: found {missing}, expected outputs of the chunks before it, "
                    f"{sorted(made)}; export again"
                )
            made |= set(package.outputs)

    @property
    def returned(self) -> set[str]:
        """The names of what the network returns: outputs that no package reads."""
        read = {name for package in self.packages for name in package.inputs}
        return {name for package in self.packages for name in package.outputs} - read

    def later(self, index: int) -> set[str]:
        """Return the names of the values that are read after the package of this index, or returned."""
        following = self.packages[index + 1 :]
        return {name for package in following for name in package.inputs} | self.returned

    @property
    def passed(self) -> int:
        """The most bytes that one set of inputs has at a time while it goes from package to package."""
        given, most = set(self.packages[0].inputs), 0
        made = set(given)
        sizes = {name: size for package in self.packages for name, size in package.row_bytes().items()}
        for index, package in enumerate(self.packages):
            made |= set(package.outputs)
            alive = given | set(package.inputs) | (made & self.later(index))
            most = max(most, sum(sizes.get(name, 0) for name in alive))
        return most

    def needs(self) -> Needs:
        """Return what the network takes besides what Core ML takes inside a package."""
        sizes = [package.size for package in self.packages]
        return Needs(sum(sizes) + self.passed, max(sizes) + self.passed)

    def at_once(self, room: int, rows: int) -> int:
        """Return how many of `rows` sets of inputs may go together through the packages; at least one."""
        largest = max(package.size for package in self.packages)
        while rows > 1 and largest + rows * self.passed > room:
            rows = (rows + 1) // 2
        return rows

    def kept(self, room: int, rows: int) -> int:
        """Return how many of the first packages stay open while `rows` sets of inputs go through the others in turn."""
        sizes = [package.size for package in self.packages]
        room -= rows * self.passed
        for count in range(len(sizes), 0, -1):
            if sum(sizes[:count]) + max(sizes[count:], default=0) <= room:
                return count
        return 0
