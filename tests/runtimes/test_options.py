"""`--option NAME=VALUE`: text becomes what the runtime's `open_backend` takes; what it does not have is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edgeprune.api.drawing import own_options
from edgeprune.cli.limits import runtime_options
from edgeprune.common.errors import InputError
from edgeprune.runtimes import options


def _open(
    folder: Any, settings: Any, *, threads: int = 0, graph: bool = False, share: float = 0.5, place: str | None = None,
    most: int | None = None, precision: str = "auto", memory: int | None = None,
) -> None:  # fmt: skip
    """The options of a runtime, one of every type."""


def _open_other(folder: Any, settings: Any, *, threads: int = 0, device: str = "auto") -> None:
    """The options of another one, torch."""


@pytest.fixture(autouse=True)
def runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"fast": SimpleNamespace(open_backend=_open), "eager": SimpleNamespace(open_backend=_open_other)}
    monkeypatch.setattr(options, "prepare", known.__getitem__)


def test_values_have_the_types_of_the_runtime() -> None:
    typed = ["threads=4", "graph=true", "share=0.25", "place=a=b", "most=7"]
    found = options.by_runtime(runtime_options(typed), ["fast"])
    assert found == {"fast": {"threads": 4, "graph": True, "share": 0.25, "place": "a=b", "most": 7}}
    assert options.by_runtime({"graph": "false", "threads": 3}, ["fast"])["fast"] == {"graph": False, "threads": 3}
    assert options.by_runtime({}, ["fast", "eager"]) == {"fast": {}, "eager": {}}


def test_an_option_goes_to_every_runtime_that_has_it() -> None:
    found = options.by_runtime({"threads": "2", "graph": "true"}, ["fast", "eager"])
    assert found == {"fast": {"threads": 2, "graph": True}, "eager": {"threads": 2}}


@pytest.mark.parametrize(
    ("given", "names", "says"),
    [
        ("threads=many", ["fast"], "--option threads: found 'many', expected a whole number"),
        ("threads=1.5", ["fast"], "--option threads: found '1.5', expected a whole number"),
        ("graph=1", ["fast"], "--option graph: found '1', expected true or false"),
        ("share=half", ["fast"], "--option share: found 'half', expected a number"),
        (
            "thread=1",
            ["fast"],
            "--option thread: unknown here: fast has threads, graph, share, place, most, precision",
        ),
        ("graph=true", ["eager"], "--option graph: unknown here: eager has threads"),
        ("memory=5", ["fast"], "--option memory: has a flag of its own, --memory"),
        ("device=cpu", ["eager"], "--option device: has a flag of its own, --device"),
        ("device=cpu", ["fast"], "--option device: unknown here: fast has threads"),
    ],
)
def test_what_is_refused(given: str, names: list[str], says: str) -> None:
    with pytest.raises(InputError) as caught:
        options.by_runtime(runtime_options([given]), names)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [["threads"], ["=4"], ["threads="], ["threads=1", "threads=2"]])
def test_the_form_on_the_command_line(text: list[str]) -> None:
    with pytest.raises(InputError, match=r"--option: found '.*', expected NAME=VALUE, once for each name"):
        runtime_options(text)


def test_exact_is_for_runtimes_that_have_a_precision() -> None:
    assert own_options(None, True, ["fast", "eager"]) == {"fast": {"precision": "exact"}, "eager": {}}
    assert own_options({"threads": "1"}, True, ["fast"])["fast"] == {"threads": 1, "precision": "exact"}
    assert own_options(None, False, ["fast"]) == {"fast": {}}
    with pytest.raises(InputError, match="--exact: eager has no other precision to choose; omit --exact"):
        own_options(None, True, ["eager"])
    with pytest.raises(InputError, match="--exact: found with --option precision"):
        own_options({"precision": "int8"}, True, ["fast"])
