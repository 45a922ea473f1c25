"""Options and arguments that take one of some names, and the names that they take.

A `choice` lists its names in the help, completes them in the shell, and refuses any other name. The names come from the
registries, which are imported only when a command parses its options or shows its own help, so that `edgeprune --help`
stays fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand

from edgeprune.cli import screen


class Names(str):
    """The placeholder of a choice's value in the help, and how to look up the names that it stands for."""

    names: Callable[[], Iterable[str]]


class Verb(TyperCommand):
    """A command that looks up the names of its choices when it shows its help, and at the end says what it took."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; say what it took, unless that is little."""
        began = time.monotonic()
        result = super().invoke(ctx)
        from edgeprune.cli import usage  # only now, since it costs the start of every command

        if (seconds := time.monotonic() - began) > usage.WORTH_SAYING_S:
            screen.say(usage.taken(seconds))
        return result

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help: `[a | b]` in place of an option's placeholder, the names after an argument's help."""
        for param in self.params:
            placeholder: Any = param.metavar
            if isinstance(placeholder, Names):
                names = list(placeholder.names())
                if isinstance(param, TyperArgument):
                    param.metavar = str(placeholder)
                    param.help = f"{param.help} One of {', '.join(names)}."
                else:
                    param.metavar = f"[{' | '.join(names)}]"
        super().format_help(ctx, formatter)


def _chosen(
    names: Callable[[], Iterable[str]],
    convert: Callable[[str], Any],
    metavar: str,
    kwargs: dict[str, Any],
    refused: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the keyword arguments of a `typer.Option` or `typer.Argument` that takes one of these names.

    Args:
        refused: why a name that one might expect is not among them.
    """

    def parse(value: Any) -> Any:
        allowed = list(names())
        if reason := (refused or {}).get(str(value)):
            raise typer.BadParameter(f"{str(value)!r} is not one of {', '.join(allowed)}: {reason}.")
        if str(value) not in allowed:
            raise typer.BadParameter(f"{str(value)!r} is not one of {', '.join(allowed)}.")
        return convert(str(value))

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    placeholder = Names(metavar)
    placeholder.names = names
    return {"parser": parse, "autocompletion": complete, "metavar": placeholder, **kwargs}


def choice(
    *flags: str,
    names: Callable[[], Iterable[str]],
    convert: Callable[[str], Any] = str,
    refused: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Any:
    """Return a `typer.Option` for one of some names; `kwargs` are the Option's own, such as `help`."""
    return typer.Option(*flags, **_chosen(names, convert, "NAME", kwargs, refused))


def choice_argument(*, names: Callable[[], Iterable[str]], metavar: str, **kwargs: Any) -> Any:
    """Return a `typer.Argument` for one of some names."""
    return typer.Argument(**_chosen(names, str, metavar, kwargs))


def methods() -> Iterable[str]:
    """Return the names of `--method`, baselines included."""
    from edgeprune.planning.options import METHODS

    return METHODS


def image_metrics() -> Iterable[str]:
    """Return the metrics that score images."""
    from edgeprune.metrics import KNOWN

    return KNOWN


def analysis_metrics() -> Iterable[str]:
    """Return the metrics that `analyze` can ask: those of images, and the velocity."""
    from edgeprune.metrics import KNOWN, VELOCITY

    return (VELOCITY, *KNOWN)


def solvers() -> Iterable[str]:
    """Return the names of `--solver`."""
    from edgeprune.sampling.solvers import SOLVERS

    return SOLVERS


def runtimes() -> Iterable[str]:
    """Return the names of the runtimes."""
    from edgeprune.runtimes import RUNTIMES

    return RUNTIMES


def devices() -> Iterable[str]:
    """Return the names of the known devices."""
    from edgeprune import targets

    return targets.names()


def group_sizes() -> Iterable[str]:
    """Return the INT4 group sizes that some known device takes, rising."""
    from edgeprune import targets

    return map(str, sorted({size for name in targets.names() for size in targets.load(name).int4_group_sizes}))
