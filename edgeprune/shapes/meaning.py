"""What a caption asks for, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, repr=False)
class Thing:
    """One object of a scene; the renderer chooses the colours and the size that are None."""

    shape: str
    """The name of a shape, a character or a word."""
    colour: str | None = None
    size: str | None = None
    """`small`, `large` or None."""
    texture: str | None = None
    """`striped`, `dotted`, `checked`, or None for one plain colour."""
    second: str | None = None
    """The other colour of a texture."""

    def __repr__(self) -> str:
        """Name the fields that are set. A meaning's split depends on this text: see `Meaning.key`."""
        more = "".join(f", {name}={value!r}" for name in ("texture", "second") if (value := getattr(self, name)))
        return f"Thing(shape={self.shape!r}, colour={self.colour!r}, size={self.size!r}{more})"


@dataclass(frozen=True)
class Meaning:
    """What a prompt asks for."""

    task: str
    things: tuple[Thing, ...]
    relation: str | None = None
    """Where things[0] is relative to things[1], from RELATIONS."""
    place: str | None = None
    """Where the only object is, from PLACES."""

    @property
    def key(self) -> str:
        """Return the same text for every phrasing of a scene ("A above B" equals "B below A")."""
        things, relation = self.things, self.relation
        if relation in ("to the right of", "below"):
            things = things[::-1]
            relation = {"to the right of": "to the left of", "below": "above"}[relation]
        elif relation is None:
            things = tuple(sorted(things, key=repr))
        return repr((things, relation, self.place))


@dataclass(frozen=True)
class Prompt:
    """A caption and what it means."""

    text: str
    meaning: Meaning


PLACES = ("top left", "top right", "bottom left", "bottom right", "middle")
RELATIONS = ("to the left of", "to the right of", "above", "below")
