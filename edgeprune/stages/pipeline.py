# TEMP facade
"""Old names of the stages, until their importers name the new modules."""

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.common.progress import Progress, silent
from edgeprune.planning.plan import PlanOptions, plan_for
from edgeprune.stages.analyze import analysis_groups, analysis_prompts
from edgeprune.stages.analyze import run as run_analyze
from edgeprune.stages.compress import as_published, compress, preset, rehearse
from edgeprune.stages.distill import run as run_distill
from edgeprune.stages.modulation import MODULATION, modulation_mean
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions, QuantizeOptions
from edgeprune.stages.original import load_encoders
from edgeprune.stages.plan import (
    CAPTIONS,
    block_magnitudes,
    budget_for,
    calibration_inputs,
    calibration_prompts,
    measured_for,
)
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.workspace import STAGES, Workspace
from edgeprune.training.recipe import DistillOptions

__all__ = [
    "CAPTIONS",
    "MODULATION",
    "STAGES",
    "AnalyzeOptions",
    "CompressOptions",
    "ContributionReport",
    "DataOptions",
    "DistillOptions",
    "PlanOptions",
    "Progress",
    "QuantizeOptions",
    "Workspace",
    "analysis_groups",
    "analysis_prompts",
    "as_published",
    "block_magnitudes",
    "budget_for",
    "calibration_inputs",
    "calibration_prompts",
    "compress",
    "load_encoders",
    "measured_for",
    "modulation_mean",
    "plan_for",
    "preset",
    "rehearse",
    "run_analyze",
    "run_distill",
    "run_plan",
    "run_prune",
    "run_quantize",
    "silent",
]
