"""`python -m edgeprune.experiments.full_size [ROW]`; see `__init__.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.common.tables import markdown_table
from edgeprune.experiments.full_size import forecast, results
from edgeprune.experiments.full_size.recording import Recorder
from edgeprune.experiments.full_size.rows import rows
from edgeprune.experiments.full_size.rows.row import Row
from edgeprune.experiments.pages import insert

FULL, RESULTS = Path("build/full-size"), Path("docs/full-size.json")


def main(
    row: Annotated[str | None, typer.Argument(help="Row to measure; without one, list all.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to work in; models stay there for other rows.")] = FULL,
    page: Annotated[
        Path | None, typer.Option("--write", help="Write the tables of all results into this page.")
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Forget what the row's interrupted measurement has so far.")] = False,
) -> None:
    """Measure a row, merge it into docs/full-size.json, and write its tables into a page if one is given."""
    out.mkdir(parents=True, exist_ok=True)
    if row is not None:
        measure(row, out, fresh=fresh)
    elif page is None:
        print(listing(out))
    if page is not None:
        insert(page, results.markdown(results.load(RESULTS)))


def listing(out: Path) -> str:
    """Return a table of the rows with their forecasts."""
    speeds = forecast.Speeds.measure(out)
    lines = []
    for row in rows().values():
        expected = expected_seconds(row, speeds)
        note = "too long" if expected > forecast.MOST_SECONDS else ""
        needs = ", ".join(n for n in row.needs if not is_made(n, out))
        lines.append((row.name, f"{expected / 60:.0f} min", f"{row.disk_bytes / 1e9:.0f} GB", needs or note, row.what))
    return markdown_table(("ROW", "time", "writes", "first", "what"), lines)


def expected_seconds(row: Row, speeds: forecast.Speeds) -> float:
    """Return a forecast, or what the row took on this processor before if that is less: it may not have been alone."""
    measured = results.measured_seconds(RESULTS, row.name)
    expected = forecast.seconds(row.work, speeds)
    return expected if measured is None else min(expected, measured)


def is_made(name: str, out: Path) -> bool:
    """Return whether the model that a row makes is complete."""
    model = rows()[name].model
    return model is None or ((out / model / "model_index.json").is_file() and (out / model / "transformer").is_dir())


def measure(name: str, out: Path, *, fresh: bool) -> None:
    """Measure a row, and merge its results.

    Raises:
        SystemExit: there is no such row, it is refused, a model is missing, or a command failed.
    """
    known = rows()
    if name not in known:
        raise SystemExit(f"ROW={name}: expected one of {', '.join(known)}")
    row, recorder = known[name], Recorder(out, name)
    if fresh:
        recorder.forget()
        recorder = Recorder(out, name)
    if missing := [need for need in row.needs if not is_made(need, out)]:
        raise SystemExit(f"{name}: needs a model that is not in {out}; first: make bench-full ROW={missing[0]}")
    expected = expected_seconds(row, forecast.Speeds.measure(out))
    print(f"{name}: forecast {expected / 60:.0f} minutes, writes {row.disk_bytes / 1e9:.1f} GB", flush=True)
    begun = bool(recorder.stages)  # its files are on the disk already
    if why := forecast.refusal(name, expected, 0 if begun else row.disk_bytes, out):
        raise SystemExit(why)
    row.measure(recorder)
    results.merge(RESULTS, name, recorder.stages)
    recorder.forget()
    print(f"{name}: in {RESULTS}")


if __name__ == "__main__":
    typer.run(main)
