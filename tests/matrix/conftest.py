"""What the clients open: the built-in model without half its blocks, and without two more components.

No training and no scores: these tests ask whether folders load and compute, not how good the images are.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from edgeprune.planning.options import PlanOptions
from edgeprune.stages.options import QuantizeOptions
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.prune import run as run_prune
from edgeprune.stages.quantize import run as run_quantize
from edgeprune.stages.workspace import Workspace


def pytest_report_header() -> str:
    names = ("diffusers", "transformers", "torch", "optimum-onnx", "openvino", "openvino-genai")
    found = {d.name.replace("_", "-"): d.version for d in metadata.distributions() if d.name}
    return ", ".join(f"{name} {found[name]}" for name in names if name in found)


def compressed(folder: Path, components: str, *, quantized: bool) -> Path:
    workspace = Workspace(folder, None)
    run_plan(workspace, PlanOptions("manual", blocks="3-8", components=components))
    run_prune(workspace)
    if quantized:
        run_quantize(workspace, QuantizeOptions())
    return folder


@pytest.fixture(scope="session")
def whole_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of a whole-block plan in half precision, which stock diffusers loads."""
    return compressed(tmp_path_factory.mktemp("made") / "blocks", "", quantized=False)


@pytest.fixture(scope="session")
def component_wise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of a component plan with INT4 weights."""
    return compressed(tmp_path_factory.mktemp("made") / "components", "2:mlp,9:context_mlp", quantized=True)


@pytest.fixture(scope="session")
def exported(component_wise: Path) -> Path:
    """Its ONNX folder."""
    from edgeprune.export.to_onnx import export

    export(component_wise, component_wise.with_name("onnx"))
    return component_wise.with_name("onnx")
