"""`edgeprune targets`: the devices that edgeprune knows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from edgeprune.cli import choices, options, screen

app = typer.Typer(
    help="List the known devices; `show NAME` explains one.",
    epilog="Example: edgeprune targets  ·  edgeprune targets show rtx",
    invoke_without_command=True,
)


@app.callback()
def targets(context: typer.Context) -> None:
    """List the known devices; `show NAME` explains one."""
    from edgeprune import targets as known

    if context.invoked_subcommand is None:
        screen.table([(name, known.load(name).description) for name in known.names()])
        screen.say("next: edgeprune targets show NAME")


@app.command(cls=choices.Verb, epilog="Example: edgeprune targets show rtx")
def show(
    name: Annotated[str, choices.choice_argument(names=choices.devices, metavar="NAME", help="Name of the device.")],
    as_json: options.AsJson = False,
) -> None:
    """Show everything known about one device."""
    from dataclasses import asdict

    from edgeprune import targets as known

    values = asdict(known.load(name))
    screen.table([_row(key, value) for key, value in values.items()])
    if as_json:
        screen.print_json(values)


def _row(key: str, value: Any) -> tuple[str, str]:
    """Return a readable row for a field of a target."""
    if key.endswith("_bytes"):
        return screen.in_units(key, value)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
