"""--fit: the bytes of a pipeline on a device, compared with the loaded networks."""

import dataclasses
from pathlib import Path

import pytest
from diffusers import AutoencoderKL
from tiny import tiny_pipeline
from transformers import CLIPTextModelWithProjection

from edgeprune import targets
from edgeprune.analysis.contribution import ContributionReport, fingerprint
from edgeprune.common.errors import BudgetError, InputError
from edgeprune.common.files import write_json
from edgeprune.planning.fit import STRIP_BYTES, Fit, fit
from edgeprune.planning.options import PlanOptions
from edgeprune.sampling.generation import Generation
from edgeprune.stages.plan import run as run_plan
from edgeprune.stages.workspace import Workspace


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    tiny_pipeline(folder)
    return folder


def test_weights_are_those_of_the_loaded_networks(source: Path) -> None:
    target, generation = targets.load("rtx"), Generation.load(source)
    found = fit(source, target, generation)
    encoders = [CLIPTextModelWithProjection.from_pretrained(source / n) for n in ("text_encoder", "text_encoder_2")]
    decoder = AutoencoderKL.from_pretrained(source / "vae").decoder
    assert found.text_encoder_bytes == 2 * max(sum(p.numel() for p in e.parameters()) for e in encoders)
    (width, *_), weights = decoder.conv_norm_out.weight.shape, sum(p.numel() for p in decoder.parameters())
    images = found.vae_decoder_bytes - 2 * weights
    assert images >= 2 * 6 * width * generation.height * generation.width
    assert found.transformer_bytes == target.memory_bytes - found.activations_bytes


def test_the_largest_stage_counts_not_the_sum(source: Path) -> None:
    target, generation = targets.load("rtx"), Generation.load(source)
    found = fit(source, target, generation)
    others = (found.text_encoder_bytes, found.vae_decoder_bytes)
    just = dataclasses.replace(target, memory_bytes=max(*others, found.activations_bytes) + 1)
    assert fit(source, just, generation).transformer_bytes > 0
    for stage, needed in (("largest text encoder", found.text_encoder_bytes), ("VAE decoder", found.vae_decoder_bytes)):
        if needed == max(others):
            with pytest.raises(BudgetError, match=f"the {stage} takes? .* GB, expected less than its .* GB; use"):
                fit(source, dataclasses.replace(target, memory_bytes=needed), generation)


def test_larger_images_and_wider_numbers_leave_less(source: Path) -> None:
    small, large = Generation(height=64, width=64), Generation(height=2048, width=2048)
    rtx = targets.load("rtx")
    assert fit(source, rtx, large).activations_bytes > fit(source, rtx, small).activations_bytes
    wide = dataclasses.replace(rtx, activations="float32")
    assert fit(source, wide, small).vae_decoder_bytes == 2 * fit(source, rtx, small).vae_decoder_bytes
    assert fit(source, rtx, large).vae_decoder_bytes > 100 * fit(source, rtx, small).vae_decoder_bytes


def test_a_runtime_that_decodes_in_strips_takes_less_for_large_images(source: Path) -> None:
    large, small = Generation(height=2048, width=2048), Generation(height=64, width=64)
    x86 = targets.load("cpu-x86")
    whole = dataclasses.replace(x86, runtimes=("trt",))
    assert fit(source, x86, small) == fit(source, whole, small)
    weights = fit(source, x86, large).vae_decoder_bytes - STRIP_BYTES
    assert 0 < weights < fit(source, whole, small).vae_decoder_bytes
    assert fit(source, whole, large).vae_decoder_bytes > weights + STRIP_BYTES


def test_budget_of_the_plan(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = Workspace(tmp_path / "out", str(source))
    generous = ws.fit("rtx")
    assert generous.transformer_bytes > 0
    with pytest.raises(InputError, match="expected one of"):
        ws.fit("gameboy")
    # A device with room for everything but the whole transformer.
    drops = {((b, c),): [-0.1 * b] for b in range(3) for c in (None, *ws.family.components)}
    report = ContributionReport(fingerprint(ws.config), "sd3", 3, "m", ["p"], [0.0], drops)
    write_json(ws.report_path, report.to_json())
    used = max(generous.activations_bytes, generous.text_encoder_bytes, generous.vae_decoder_bytes)
    room = used + 200_000 - generous.activations_bytes
    tight = dataclasses.replace(targets.load("rtx"), memory_bytes=used + 200_000)
    monkeypatch.setattr(targets, "load", lambda name: tight)
    assert ws.fit("rtx").transformer_bytes == room
    monkeypatch.setattr(targets, "load", lambda name: dataclasses.replace(tight, memory_bytes=used))
    with pytest.raises(BudgetError, match="expected less than its"):
        ws.fit("rtx")
    monkeypatch.setattr(Fit, "transformer_bytes", 200_000)
    monkeypatch.setattr(targets, "load", lambda name: tight)
    run_plan(ws, PlanOptions(fit="rtx", protect_first=0, protect_last=0))
    plan = ws.plan()
    assert plan.blocks and plan.after.int4_bytes <= 200_000 < plan.before.int4_bytes
