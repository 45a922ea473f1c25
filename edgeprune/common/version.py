"""The version of edgeprune that is installed, which artefacts and exports record."""

from importlib.metadata import version

VERSION = version("edgeprune")
