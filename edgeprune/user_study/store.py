"""Raters and their answers in SQLite; an answer counts once it is on disk.

The trials of a rater are stored with the rater, so later changes of the code never change what an answer is about. The
first answer to a trial stands: sending another one changes nothing. The database holds no names or addresses of raters.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeprune.common.errors import InputError
from edgeprune.common.files import parse_json
from edgeprune.user_study.design import Trial

FILE = "answers.sqlite"
_TABLES = """
CREATE TABLE IF NOT EXISTS raters (
  number INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, joined TEXT NOT NULL, trials TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
  rater INTEGER NOT NULL REFERENCES raters, trial INTEGER NOT NULL,
  quality INTEGER NOT NULL, alignment INTEGER NOT NULL,
  seconds REAL NOT NULL, at TEXT NOT NULL, PRIMARY KEY (rater, trial));
"""


@dataclass(frozen=True)
class Rater:
    """One rater: a number and the trials, in order."""

    number: int
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Answer:
    """A rater's answer to one trial."""

    rater: int
    trial: int
    quality: int
    alignment: int
    seconds: float
    """Time from showing the image to the answer, as the browser measured it."""
    at: str
    """Time of storing, UTC, ISO 8601."""


class Store:
    """The database of one study's folder; its methods may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Open the database, or make it.

        Raises:
            InputError: its file is something else, or cannot be written.
        """
        path = folder / FILE
        try:
            # Keep SQLite's defaults: one file, a journal next to it, and commits that wait for the disk.
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.executescript(_TABLES)
        except sqlite3.Error as error:
            raise InputError(f"{path}: not usable as the database of answers ({error})") from error
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def join(self, plan: Callable[[int], list[Trial]]) -> str:
        """Add a rater, whose trials are `plan(number)`; return a new secret token."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")  # so that no two raters get one number
            try:
                (number,) = self._connection.execute("SELECT COALESCE(MAX(number) + 1, 0) FROM raters").fetchone()
                rows = json.dumps([(t.prompt, t.shown, t.asked) for t in plan(number)])
                self._connection.execute("INSERT INTO raters VALUES (?, ?, ?, ?)", (number, token, _now(), rows))
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
        return token

    def rater(self, token: str) -> Rater | None:
        """Return the rater with this token."""
        rows = self._rows("SELECT number, trials FROM raters WHERE token = ?", token)
        return _rater(*rows[0]) if rows else None

    def answered(self, rater: Rater) -> list[int]:
        """Return the indices of the trials that have an answer."""
        return [row[0] for row in self._rows("SELECT trial FROM answers WHERE rater = ? ORDER BY trial", rater.number)]

    def answer(self, rater: Rater, trial: int, quality: int, alignment: int, seconds: float) -> None:
        """Store an answer unless the trial has one; it is on disk when this returns."""
        row = (rater.number, trial, quality, alignment, seconds, _now())
        with self._lock:
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)

    def raters(self) -> list[Rater]:
        """Return all raters in order of arrival."""
        return [_rater(*row) for row in self._rows("SELECT number, trials FROM raters ORDER BY number")]

    def answers(self) -> list[Answer]:
        """Return all answers by rater and trial."""
        columns = [field.name for field in fields(Answer)]
        rows = self._rows("SELECT * FROM answers ORDER BY rater, trial")
        return [Answer(**dict(zip(columns, row, strict=True))) for row in rows]

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()


def _rater(number: int, trials: str) -> Rater:
    return Rater(
        number=number,
        trials=tuple(
            Trial(prompt=prompt, shown=tuple(shown), asked=asked) for prompt, shown, asked in parse_json(trials)
        ),
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
