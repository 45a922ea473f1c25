"""The fixtures of the stages' tests: a report is made of the artefact that they compress."""

from stage_fixtures import artefact, copy, source  # noqa: F401
