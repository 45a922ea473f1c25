# TEMP facade
"""Old names of the forecasts, until their importers name the new modules."""

from edgeprune.stages.analyze import forecast as forecast_analysis
from edgeprune.stages.compress import forecast
from edgeprune.stages.costs import flops_per_evaluation, matmul_flops_per_s
from edgeprune.stages.distill import forecast as forecast_training

__all__ = ["flops_per_evaluation", "forecast", "forecast_analysis", "forecast_training", "matmul_flops_per_s"]
