"""The fixtures that tests of the stages share with those of the report."""

from stage_fixtures import artefact, copy, source  # noqa: F401
