"""The fixtures that tests of the API share with those of the stages."""

from stage_fixtures import artefact, copy, source  # noqa: F401
