# TEMP facade
"""Moved to methods/."""

from edgeprune.planning.methods import Baseline as Baseline
from edgeprune.planning.methods import Blocks as Blocks
from edgeprune.planning.methods import baselines as baselines
