"""Compress, export, run and measure from Python: what the command line does, as functions with typed results.

    from edgeprune import api

    api.compress(None, "small")  # the built-in model
    api.export("small", "small-onnx")
    api.generate("small-onnx", "two red circles").image.save("out.png")

Importing this package is cheap: every name is imported at its first use. docs/api.md describes the functions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgeprune.common.extras import needs

if TYPE_CHECKING:
    from edgeprune.api.analyzing import Analyzed, AnalyzeForecast, analyze, forecast_analyze
    from edgeprune.api.benching import bench
    from edgeprune.api.compressing import (
        Compressed,
        CompressForecast,
        ReportFigures,
        ReportQuality,
        compress,
        forecast_compress,
    )
    from edgeprune.api.converting import Conversion, convert, forecast_convert
    from edgeprune.api.distilling import (
        Distilled,
        DistillForecast,
        MadeStates,
        distill,
        forecast_distill,
        make_states,
    )
    from edgeprune.api.drawing import Generated, generate
    from edgeprune.api.exporting import Exported, export
    from edgeprune.api.hub import Pushed, PushForecast, forecast_push, push_to_hub
    from edgeprune.api.loras import AppliedLora, merge_lora, remap_lora
    from edgeprune.api.scoring import Scored, score
    from edgeprune.api.stages import Planned, Pruned, Quantized, plan, plan_of_config, prune, quantize
    from edgeprune.api.tuning import Tuned, TuneForecast, forecast_tune, tune
    from edgeprune.api.verifying import Verified, verify
    from edgeprune.bench.results import BenchResult
    from edgeprune.planning.options import PlanOptions
    from edgeprune.sampling.generation import GenerationOptions
    from edgeprune.stages.compress import preset
    from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions, QuantizeOptions
    from edgeprune.training.recipe import DistillOptions, Placement

__all__ = [
    "AnalyzeForecast",
    "AnalyzeOptions",
    "Analyzed",
    "AppliedLora",
    "BenchResult",
    "CompressForecast",
    "CompressOptions",
    "ComputeOptions",
    "Compressed",
    "Conversion",
    "DataOptions",
    "DistillForecast",
    "DistillOptions",
    "Distilled",
    "Exported",
    "Generated",
    "GenerationOptions",
    "MadeStates",
    "Placement",
    "PlanOptions",
    "Planned",
    "Pruned",
    "PushForecast",
    "Pushed",
    "QuantizeOptions",
    "Quantized",
    "ReportFigures",
    "ReportQuality",
    "Scored",
    "TuneForecast",
    "Tuned",
    "Verified",
    "analyze",
    "bench",
    "compress",
    "convert",
    "distill",
    "export",
    "forecast_analyze",
    "forecast_compress",
    "forecast_convert",
    "forecast_distill",
    "forecast_push",
    "forecast_tune",
    "generate",
    "make_states",
    "merge_lora",
    "plan",
    "plan_of_config",
    "preset",
    "prune",
    "push_to_hub",
    "quantize",
    "remap_lora",
    "score",
    "tune",
    "verify",
]
_MODULES = {
    "api.analyzing": ("AnalyzeForecast", "Analyzed", "analyze", "forecast_analyze"),
    "api.benching": ("bench",),
    "api.compressing": (
        *("CompressForecast", "Compressed", "ReportFigures"),
        *("ReportQuality", "compress", "forecast_compress"),
    ),
    "api.converting": ("Conversion", "convert", "forecast_convert"),
    "api.distilling": ("DistillForecast", "Distilled", "MadeStates", "distill", "forecast_distill", "make_states"),
    "api.drawing": ("Generated", "generate"),
    "api.exporting": ("Exported", "export"),
    "api.hub": ("PushForecast", "Pushed", "forecast_push", "push_to_hub"),
    "api.loras": ("AppliedLora", "merge_lora", "remap_lora"),
    "api.scoring": ("Scored", "score"),
    "api.stages": ("Planned", "Pruned", "Quantized", "plan", "plan_of_config", "prune", "quantize"),
    "api.tuning": ("TuneForecast", "Tuned", "forecast_tune", "tune"),
    "api.verifying": ("Verified", "verify"),
    "bench.results": ("BenchResult",),
    "common.memory": ("ComputeOptions",),
    "planning.options": ("PlanOptions",),
    "sampling.generation": ("GenerationOptions",),
    "stages.compress": ("preset",),
    "stages.options": ("AnalyzeOptions", "CompressOptions", "DataOptions", "QuantizeOptions"),
    "training.recipe": ("DistillOptions", "Placement"),
}
_MODULE_OF = {name: f"edgeprune.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name at its first use (PEP 562).

    Raises:
        MissingExtraError: it needs a package that is not installed.
    """
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs("compress"):  # the option classes import torch
        return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
