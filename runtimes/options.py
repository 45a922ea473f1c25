"""Options of a runtime as the user types them: `--option NAME=VALUE` of `generate`, `bench` and `score`.

A runtime's options are the keyword arguments of its `open_backend`, and their types say how a value is read. Options
that have a flag of their own are not among them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.runtimes import prepare

_FLAGS = {"memory": "--memory", "keep_embeddings": "--keep-embeddings"}
_FLAGS_OF_TORCH = {"device": "--device", "variant": "--variant"}
_BOOLS = {"true": True, "false": False}
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def by_runtime(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the options of `runtimes.load` by runtime; each option goes to every runtime that has it.

    Args:
        given: values by option; text is read as the type that the runtime takes.
        names: the runtimes that will run.

    Raises:
        InputError: none of them has an option of this name, it has a flag of its own, or a value is of another type.
        MissingExtraError: a package of a runtime is not installed.
    """
    out: dict[str, dict[str, Any]] = {name: {} for name in names}
    kinds = {name: _kinds(name) for name in out} if given else {}
    for option, value in given.items():
        having = [name for name in kinds if option in kinds[name]]
        if not having:
            if flag := _FLAGS.get(option) or (_FLAGS_OF_TORCH.get(option) if "eager" in kinds else None):
                raise InputError(f"--option {option}: has a flag of its own, {flag}")
            lists = "; ".join(f"{name} has {', '.join(own) or 'none'}" for name, own in kinds.items())
            raise InputError(f"--option {option}: unknown here: {lists}")
        for name in having:
            out[name][option] = _read(option, value, kinds[name][option])
    return out


def having(option: str, names: Sequence[str]) -> list[str]:
    """Return those of the runtimes that have an option of this name."""
    return [name for name in dict.fromkeys(names) if option in _kinds(name)]


def _kinds(runtime: str) -> dict[str, type]:
    """Return the type of each of a runtime's own options; a path is text."""
    parameters = list(inspect.signature(prepare(runtime).open_backend).parameters.values())[2:]
    flags = _FLAGS | (_FLAGS_OF_TORCH if runtime == "eager" else {})
    return {p.name: _kind(str(p.annotation)) for p in parameters if p.name not in flags}


def _kind(annotation: str) -> type:
    """Return the type of values, given an annotation such as `str | Path | None`."""
    words = {word.strip() for word in annotation.split("|")}
    return next((kind for kind in (bool, int, float) if kind.__name__ in words), str)


def _read(option: str, value: Any, kind: type) -> Any:
    if not isinstance(value, str) or kind is str:
        return value
    try:
        return _BOOLS[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        raise InputError(f"--option {option}: found {value!r}, expected {_EXPECTED[kind]}") from None
