"""The way from the original to the fastest: a row per change, each on top of those before it. Torch-free.

A change takes the row before it and returns its own, or None where the folders do not have it. To show another one, add
it to CHANGES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.artefact.manifest import HALF, INT4
from edgeprune.bench.run import Variant
from edgeprune.common.errors import InputError
from edgeprune.common.extras import TORCH
from edgeprune.runtimes.base import read_settings
from edgeprune.sampling.generation import Generation


@dataclass(frozen=True)
class Way:
    """The folders that a way leads through."""

    artefact: Path | None
    export: Path | None
    runtime: str
    """Of the export."""
    options: Mapping[str, Mapping[str, Any]]
    """Options of each runtime."""

    @property
    def own(self) -> Generation:
        """The settings of the last folder."""
        place = self.export or self.artefact
        assert place is not None
        return Generation.load(place)


def _pruned(way: Way, before: Variant) -> Variant | None:
    if way.artefact is None or not (way.artefact / HALF).is_dir():
        return None
    options = {**way.options[TORCH], "quantized": False}
    return replace(before, name="pruned", folder=way.artefact, runtime=TORCH, options=options)


def _int4(way: Way, before: Variant) -> Variant | None:
    if way.artefact is None or not (way.artefact / INT4).is_dir():
        return None
    return replace(before, name="INT4", folder=way.artefact, runtime=TORCH, options=dict(way.options[TORCH]))


def _export(way: Way, before: Variant) -> Variant | None:
    if way.export is None:
        return None
    options = dict(way.options[way.runtime])
    return replace(before, name=f"export, {way.runtime}", folder=way.export, runtime=way.runtime, options=options)


def _solver(way: Way, before: Variant) -> Variant | None:
    chosen = {"solver": way.own.solver, "steps": way.own.num_inference_steps}
    if chosen.items() <= before.settings.items():
        return None
    name = f"{chosen['solver']}, {chosen['steps']} steps"
    return replace(before, name=name, settings=before.settings | chosen)


def _guidance(way: Way, before: Variant) -> Variant | None:
    low, high = way.own.guidance_range
    if before.settings.get("guidance_range") in (None, (low, high)):
        return None
    name = f"guidance at {low:g} to {high:g}"
    return replace(before, name=name, settings=before.settings | {"guidance_range": (low, high)})


@dataclass(frozen=True)
class Change:
    """A step of the way."""

    what: str
    apply: Callable[[Way, Variant], Variant | None]
    remedy: str
    """How to get it."""


CHANGES = (
    Change("pruned", _pruned, "name an artefact folder with its weights in half precision"),
    Change("INT4", _int4, "name an artefact folder that is quantised"),
    Change("export", _export, "name an export as well"),
    Change("solver", _solver, "edgeprune tune finds one"),
    Change("guidance range", _guidance, "edgeprune tune finds one"),
)


def way(
    source: Path, pairs: Sequence[tuple[Path, str]], options: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[Variant], list[str]]:
    """Return the settings that the original draws with, the rows after it, and a line for each change that is left out.

    Args:
        source: the original.
        pairs: an artefact folder, an export, or both, each with its runtime.
        options: options of each runtime.

    Raises:
        InputError: there are several folders of a kind.
    """
    places: dict[bool, list[tuple[Path, str]]] = {True: [], False: []}
    for folder, runtime in pairs:
        places[runtime == TORCH].append((folder, runtime))
    if max(map(len, places.values())) > 1:
        found = ", ".join(f"{folder} ({runtime})" for folder, runtime in pairs)
        raise InputError(f"--way: found {found}, expected an artefact folder, an export, or one of each")
    artefact = places[True][0][0] if places[True] else None
    export, name = places[False][0] if places[False] else (None, "")
    taken = Way(artefact, export, name, {runtime: dict(options.get(runtime, {})) for runtime in (TORCH, name)})
    settings = read_settings(source)
    own = settings.generation
    drawn: dict[str, Any] = {"solver": own.solver, "steps": own.num_inference_steps}
    if settings.family.guided(settings.config, own.guidance_scale):
        drawn["guidance_range"] = own.guidance_range
    last, rows, missing = Variant("original", source, TORCH, settings=drawn), list[Variant](), list[str]()
    for change in CHANGES:
        if found_row := change.apply(taken, last):
            last = found_row
            rows.append(last)
        else:
            missing.append(f"way: without {change.what}, which the folders do not have; {change.remedy}")
    return drawn, rows, missing
