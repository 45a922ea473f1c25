"""Every path that --device reaches, on a second device that computes: results are those of the processor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from second_device import MISSING, NAME, SecondDevice, second_device
from tiny import tiny_flux_pipeline, tiny_pipeline

from edgeprune.analysis.contribution import ContributionReport
from edgeprune.artefact.resolve import read_config
from edgeprune.common.memory import ComputeOptions
from edgeprune.common.progress import silent
from edgeprune.planning.options import PlanOptions
from edgeprune.report import steps
from edgeprune.report.measure import measure
from edgeprune.residency.streaming import is_streamed
from edgeprune.runtimes import eager
from edgeprune.runtimes.base import Settings
from edgeprune.sampling.denoising import decode, encode_images
from edgeprune.sampling.generation import Generation
from edgeprune.stages import analyze, plan, prune, quantize
from edgeprune.stages.modulation import MODULATION
from edgeprune.stages.options import AnalyzeOptions, QuantizeOptions
from edgeprune.stages.workspace import Workspace

pytestmark = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")

MEMORY = 100 * 10**9
"""Any given memory means that blocks are read when they run, unless they are kept."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny pipelines with T5."""
    folder = tmp_path_factory.mktemp("sources")
    tiny_pipeline(folder / "sd3", t5=True)
    tiny_flux_pipeline(folder / "flux")
    return {kind: folder / kind for kind in ("sd3", "flux")}


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondDevice]:
    monkeypatch.setattr("edgeprune.residency.compute._here", lambda: {NAME: 1, "cpu": 1})
    monkeypatch.setattr("edgeprune.stages.workspace.evaluation_seconds", lambda *_: 0.0)  # of a GPU's size
    monkeypatch.setattr("edgeprune.residency.running._WORKING_BYTES", 10**12)  # nothing is kept
    monkeypatch.setattr(steps, "LEAST", 1)
    monkeypatch.setattr(steps, "MOST", 1)
    monkeypatch.setattr(quantize, "PROMPTS", 2)
    monkeypatch.setattr("edgeprune.report.measure.images_of", lambda quick: 1)
    with second_device() as device:
        yield device
    assert device.bytes < 10**6, "tensors are left on the device"


def on_both(run: Callable[[Workspace], dict[str, Any]], source: Path, out: Path, device: SecondDevice) -> None:
    """Run on the processor, with whole models, and on the device, with models that are read; compare the results."""
    found = []
    for name in ("cpu", NAME):
        memory = MEMORY if name == NAME else None
        ws = Workspace(out / name, str(source), compute=ComputeOptions(name, memory))
        before = device.operations
        found.append(run(ws))
        assert (device.operations > before) is (name == NAME)
        assert is_streamed(ws.family.blocks(ws.teacher)[0]) is (memory is not None)
    first, other = found
    assert first.keys() == other.keys()
    for key, value in first.items():
        one, two = torch.as_tensor(value), torch.as_tensor(other[key])
        assert one.dtype == two.dtype
        if isinstance(value, np.ndarray):  # images of bytes, which rounding moves by one
            assert (one.int() - two.int()).abs().max() <= 1, key
        else:  # float16 is what is stored; its last bit may differ
            tolerance = 2**-9 if one.dtype == torch.float16 else 1e-5
            torch.testing.assert_close(two, one, rtol=tolerance, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("kind", "estimator"), [("sd3", "gates"), ("sd3", "exhaustive"), ("flux", "gates")])
def test_contributions(
    kind: str, estimator: str, sources: dict[str, Path], tmp_path: Path, second: SecondDevice
) -> None:
    def run(ws: Workspace) -> dict[str, Any]:
        analyze.run(ws, AnalyzeOptions(count=1, estimator=estimator, components=estimator == "gates"))
        report = ContributionReport.load(ws.report_path)
        return {str(parts): scores for parts, scores in report.scores.items()}

    on_both(run, sources[kind], tmp_path, second)


def test_plan_prune_quantize_and_report(sources: dict[str, Path], tmp_path: Path, second: SecondDevice) -> None:
    def run(ws: Workspace) -> dict[str, Any]:
        plan.run(ws, PlanOptions("manual", blocks="1", components="0:norm", modulation_rank=2))
        prune.run(ws)
        quantize.run(ws, QuantizeOptions(calibration="awq"))
        found: dict[str, Any] = load_file(ws.out / MODULATION)
        for path in (ws.out / "transformer_int4").glob("*.safetensors"):
            found |= load_file(path)
        _, images = measure(ws, quick=True, progress=silent)
        return found | images

    on_both(run, sources["sd3"], tmp_path, second)


def test_images_of_the_torch_reference(
    sources: dict[str, Path], tmp_path: Path, second: SecondDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "_pick_device", lambda device: (device, "asked for"))
    found = []
    for device, memory in (("cpu", None), (NAME, None), (NAME, MEMORY)):
        config, family = read_config(sources["sd3"])
        settings = Settings(Generation.load(sources["sd3"]), 8, family, config)
        backend = eager.open_backend(sources["sd3"], settings, device=device, memory=memory)
        text, pooled = backend.encode(["a red circle", "two cats"])
        latents = np.random.default_rng(0).standard_normal((2, 8, 8, 8), dtype=np.float32)
        velocity = backend.step(latents, text, pooled, np.full(2, 0.5, np.float32), 2.0)
        found.append((text, pooled, velocity, backend.decode(latents)))
    for arrays in found[1:]:
        for first, other in zip(found[0], arrays, strict=True):
            np.testing.assert_allclose(other, first, atol=1e-5)


def test_the_vae_in_tiles_and_images_made_of_latents(
    sources: dict[str, Path], tmp_path: Path, second: SecondDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.artefact.staged.vae_activations", lambda *_: 10**15)
    monkeypatch.setattr("edgeprune.artefact.staged._TILE", 4)

    def run(ws: Workspace) -> dict[str, Any]:
        images = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        latents = encode_images(ws.pipe, images)
        assert ws.pipe.vae.use_tiling and latents.device.type == ws.original.compute.device.type
        return {"latents": latents.cpu(), "images": decode(ws.pipe, latents)}

    on_both(run, sources["sd3"], tmp_path, second)
