"""Text encoders are read once for all images of a run, before the first is drawn."""

from __future__ import annotations

import gc
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeBackend, fake_runtime
from tiny import tiny_flux_pipeline, tiny_pipeline

from edgeprune import runtimes
from edgeprune.artefact import text_store
from edgeprune.bench import worker
from edgeprune.common import traffic
from edgeprune.families.encoders import text_encoders
from edgeprune.metrics import scoring
from edgeprune.metrics.scoring import Wish
from edgeprune.residency.weights import Weights
from edgeprune.runtimes.base import GROUP
from edgeprune.runtimes.networks import NetworkBackend

PROMPTS = [f"{number} red circles" for number in range(2 * GROUP + 1)]
SEEDS = list(range(len(PROMPTS)))
EVERYTHING = 10**12


@pytest.fixture(scope="module", params=["sd3 with T5", "flux"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("once") / "tiny"
    if request.param == "flux":
        tiny_flux_pipeline(out)
    else:
        tiny_pipeline(out, t5=True)
    return out


@pytest.fixture(autouse=True)
def one_image_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the images are several groups, of GROUP each."""
    monkeypatch.setattr("edgeprune.sampling.generation.TOKENS_AT_ONCE", 64)


@pytest.fixture
def openings(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts how often each tensor of a text encoder is read."""
    seen, real = Counter[str](), Weights.__getitem__

    def counted(self: Weights, name: str) -> torch.Tensor:
        if self.folder.name.startswith("text_encoder"):
            seen[f"{self.folder.name}/{name}"] += 1
        return real(self, name)

    monkeypatch.setattr(Weights, "__getitem__", counted)
    return seen


def test_a_run_reads_each_part_once(folder: Path) -> None:
    """Counted where files are opened: the bytes of encoders and VAE, none of a transformer whose blocks are kept."""
    parts = (*text_encoders(folder), "vae")
    held = {part: sum(map(math.prod, Weights(folder / part).shapes.values())) for part in parts}
    with runtimes.load(folder, "eager", memory=EVERYTHING) as model:
        before = traffic.total()
        images = list(model.draw([*PROMPTS, *PROMPTS[:3]], [*SEEDS, 90, 91, 92], steps=1))
        read = traffic.total().since(before).read_bytes
        assert len(images) == len(PROMPTS) + 3 and read == 2 * sum(held.values())  # of 16 bits


def test_where_the_text_is_kept_changes_no_image(
    folder: Path, tmp_path: Path, openings: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    drawn = []
    for room in (0, EVERYTHING):
        monkeypatch.setattr(text_store, "_IN_MEMORY", room)
        with runtimes.load(folder, "eager", memory=EVERYTHING) as model:
            drawn.append([np.asarray(image) for image in model.draw(PROMPTS, SEEDS, steps=1)])
            kept = len(list(tmp_path.rglob("*.safetensors"))) / len(text_encoders(folder))
            assert kept == (0 if room else len(PROMPTS) + model.settings.family.guided(model.settings.config, 3.0))
            assert set(openings.values()) == {1}
            model.generate(PROMPTS[:2], steps=1)  # they are still there
            assert set(openings.values()) == {1}
            model.generate([*PROMPTS[:2], "another"], steps=1)
            assert set(openings.values()) == {2}
        openings.clear()
        del model
        gc.collect()
        assert not list(tmp_path.iterdir())
    np.testing.assert_array_equal(*drawn)


def test_what_a_run_no_longer_needs_is_forgotten(folder: Path) -> None:
    with runtimes.load(folder, "eager", memory=EVERYTHING) as model:
        texts: Any = model.backend.pipeline.texts  # type: ignore[attr-defined]
        for prompts in (PROMPTS, ["a", "b"]):
            model.backend.encode_ahead(prompts)
            assert len(texts._kept._held) == len(text_encoders(folder)) * len(prompts)


def test_score_and_bench_encode_once(folder: Path, tmp_path: Path, openings: Counter[str]) -> None:
    wanted = [Wish(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    scoring.draw(folder, tmp_path / "images", wanted, steps=1, loading={"memory": EVERYTHING})
    assert set(openings.values()) == {1}
    openings.clear()
    with runtimes.load(folder, "eager", memory=EVERYTHING) as model:
        worker._quality(model, {"prompts": PROMPTS, "seeds": SEEDS, "settings": {"steps": 1}})
    assert set(openings.values()) == {1}


def test_all_prompts_are_encoded_before_the_first_image(tiny_folders: tuple[Path, Path]) -> None:
    model = fake_runtime()
    assert isinstance(model.backend, FakeBackend)
    next(model.draw(["a", *PROMPTS], [0, *SEEDS]))
    assert model.backend.ahead == [["", "a", *PROMPTS]]
    together = [np.asarray(image) for image in model.generate(PROMPTS, seed=SEEDS)]
    np.testing.assert_array_equal(together, [np.asarray(image) for image in model.draw(PROMPTS, SEEDS)])


def test_an_export_in_little_memory_opens_each_encoder_once(
    tiny_folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with runtimes.load(tiny_folders[1], "ort", threads=1) as model:
        expected = [np.asarray(image) for image in model.draw(PROMPTS, SEEDS, steps=1)]
        backend, opened = model.backend, Counter[str]()
        assert isinstance(backend, NetworkBackend)
        backend._close_all()
        backend._in_turn, engine = True, backend._engine

        class Counted:
            def __getattr__(self, name: str) -> Any:
                return getattr(engine, name)

            def open(self, folder: Path, limit: int | None) -> Any:
                opened[folder.name] += 1
                return engine.open(folder, limit)

        backend._engine = Counted()  # type: ignore[assignment]
        found = [np.asarray(image) for image in model.draw(PROMPTS, SEEDS, steps=1)]
        assert opened["text_encoder"] == opened["text_encoder_2"] == 1 and opened["transformer"] == 3
        np.testing.assert_array_equal(found, expected)
    assert not list(tmp_path.iterdir())
