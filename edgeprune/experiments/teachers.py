"""Which teacher of shapes world an experiment is about, and what differs between them.

The results of the built-in model are older than the other teachers and keep their names; those of another teacher have
its name added: OUT/rich-sd3, docs/distill-rich-sd3.json, `<!-- measured-rich-sd3 -->`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from edgeprune.artefact.teachers import SHAPES, model_of
from edgeprune.common.errors import InputError
from edgeprune.shapes import PLAIN, RICH, World


@dataclass(frozen=True)
class Teacher:
    """A teacher, and what experiments remove from it."""

    name: str
    world: World
    blocks: tuple[str, str, str]
    """Three blocks, of which two are neighbours; one; and two early ones, where most is lost."""
    components: str
    """Components of other blocks."""
    width: int = 128
    guided: bool = True
    """A step is two evaluations; otherwise the guidance scale is an input."""

    @property
    def model(self) -> str | None:
        """The teacher as `Workspace` takes a model.

        Raises:
            InputError: it is not trained here.
        """
        return model_of(self.name)

    def named(self, name: str) -> str:
        """Return the name of results of this teacher."""
        return name if self.name == SHAPES else f"{name}-{self.name}"

    def folder(self, out: Path) -> Path:
        """Return the folder of this teacher's runs."""
        return out if self.name == SHAPES else out / self.name

    def results(self, file: Path) -> Path:
        """Return the file that keeps this teacher's figures."""
        return file.with_stem(self.named(file.stem))


BUILT_IN = Teacher(SHAPES, PLAIN, ("7,8,11", "11", "5,6"), "7:mlp,8:attn,9:mlp,10:mlp")
TEACHERS = {
    teacher.name: teacher
    for teacher in (
        BUILT_IN,
        # At the depths of the built-in model's, until an analysis of the trained ones says which contribute least.
        Teacher("rich-sd3", RICH, ("9,10,13", "13", "6,7"), "9:mlp,10:attn,11:mlp,12:mlp"),
        Teacher("rich-flux", RICH, ("6,7,9", "9", "4,5"), "6:mlp,7:attn,8:mlp,9:mlp", width=192, guided=False),
    )
}


def teacher_named(name: str) -> Teacher:
    """Return the teacher of this name.

    Raises:
        InputError: there is none.
    """
    if name not in TEACHERS:
        raise InputError(f"--teacher: found {name!r}, expected one of {', '.join(TEACHERS)}")
    return TEACHERS[name]


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--teacher`."""
    parser.add_argument("--teacher", choices=TEACHERS, default=SHAPES, help="default: the built-in model")
