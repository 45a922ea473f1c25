"""Training a teacher: it resumes exactly, its text is the pipeline's, and its pipeline runs in edgeprune."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from tiny import config_of

from edgeprune.artefact.loading import load
from edgeprune.artefact.teachers import TEACHERS, teacher
from edgeprune.common.errors import InputError
from edgeprune.common.splits import Split
from edgeprune.demo.train.__main__ import wait
from edgeprune.demo.train.flux import Flux
from edgeprune.demo.train.matching import load_average, train_transformer
from edgeprune.demo.train.networks import Networks
from edgeprune.demo.train.recipes import RECIPES
from edgeprune.demo.train.saving import save_pipeline
from edgeprune.demo.train.scenes import make_latents
from edgeprune.demo.train.sd3 import Sd3
from edgeprune.demo.train.vae import make_vae, train_vae
from edgeprune.experiments import teachers as experiments
from edgeprune.families import family_of_model
from edgeprune.planning.make import make_plan
from edgeprune.sampling.denoising import generate
from edgeprune.sampling.generation import Generation
from edgeprune.shapes import PLAIN, RICH, world_of

CAPTIONS = ["two red circles", "the word SUN in red above the word SKY in blue"]
MAKERS = {
    "sd3": lambda folder: Sd3(folder, RICH.grammar, tokens=22, blocks=2, patch=2),
    "flux": lambda folder: Flux(folder, RICH.grammar, tokens=22, joint=1, single=1),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizers are made once."""
    return tmp_path_factory.mktemp("words")


def trained(folder: Path, make: Callable[[Path], Networks], words: Path, steps: list[int]) -> Networks:
    """Train in as many runs as there are numbers of steps, each of which goes on with the one before."""
    latents = torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    folder.mkdir(exist_ok=True)
    for count in steps:
        torch.manual_seed(0)
        networks = make(words)
        train_transformer(folder, networks, latents, CAPTIONS * 4, steps=count, seed=0, batch=2, peak=1e-3)
    return networks


@pytest.mark.parametrize("kind", MAKERS)
def test_text_is_that_of_the_pipeline(kind: str, words: Path) -> None:
    networks = MAKERS[kind](words)
    pipe = networks.pipeline(make_vae(128).eval())
    family = family_of_model(pipe.transformer)
    networks.modules.eval()
    with torch.no_grad():
        ours = networks.encode(networks.modules, networks.ids(["", *CAPTIONS]))
        theirs = family.encode(pipe, ["", *CAPTIONS], 0 if kind == "sd3" else 22)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", MAKERS)
def test_training_ends_in_a_folder_that_edgeprune_draws_with(kind: str, tmp_path: Path, words: Path) -> None:
    networks = trained(tmp_path / "work", MAKERS[kind], words, [4])
    again = MAKERS[kind](words)
    load_average(tmp_path / "work", again)
    assert all(map(torch.equal, again.modules.state_dict().values(), networks.modules.state_dict().values()))
    generation = Generation(2, 2.0, 128, 128, 0 if kind == "sd3" else 22)
    save_pipeline(networks.pipeline(make_vae(128)), tmp_path / "out", generation, RICH)
    assert world_of(tmp_path / "out") is RICH
    pipe = load(tmp_path / "out")
    images = generate(pipe, CAPTIONS, [1, 2], Generation.load(tmp_path / "out"))
    assert images.shape == (2, 128, 128, 3)
    assert pipe.tokenizer(CAPTIONS[1]).input_ids == networks.ids([CAPTIONS[1]])[0, 0].tolist()[:13]


def test_a_resumed_training_is_the_uninterrupted_one(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last quarter of FLUX.1's learns guidance from the average, which must resume too."""
    monkeypatch.setattr("edgeprune.demo.train.matching.CHECKPOINT_STEPS", 3)
    whole = trained(tmp_path / "whole", MAKERS["flux"], words, [4]).modules.state_dict()

    def stop(self: object, step: int, loss: float) -> None:
        if step == 4 and not stopped:
            stopped.append(step)
            raise KeyboardInterrupt

    stopped: list[int] = []
    monkeypatch.setattr("edgeprune.demo.train.loop.ProgressLine.__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", MAKERS["flux"], words, [4])
    parts = trained(tmp_path / "parts", MAKERS["flux"], words, [4]).modules.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_guidance_is_learned_from_the_average_in_the_last_quarter_only(
    tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = __import__("edgeprune.demo.train.matching", fromlist=["_guided"])._guided

    def guided(*args: torch.Tensor) -> torch.Tensor:
        asked.append(args[-1])
        return real(*args)

    monkeypatch.setattr("edgeprune.demo.train.matching._guided", guided)
    trained(tmp_path / "work", MAKERS["flux"], words, [8])
    assert len(asked) == 2 and all(len(scale) == 1 and scale.min() >= 1 and scale.max() <= 4 for scale in asked)


def test_vae_and_latents_are_made_once(tmp_path: Path) -> None:
    def make() -> tuple[torch.Tensor, list[str]]:
        vae = train_vae(tmp_path, PLAIN, (Split.TRAINING,), steps=2, seed=0, count=20, rate=1e-3)
        return make_latents(tmp_path, vae, PLAIN, (Split.TRAINING,), count=6, seed=2)

    latents, captions = make()
    assert latents.shape == (6, 8, 8, 8) and len(captions) == 6
    assert abs(latents.float().mean()) < 0.5 and 0.5 < latents.float().std() < 2
    written = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    assert make()[1] == captions and (tmp_path / "latents.safetensors").stat().st_mtime_ns == written


def test_a_second_training_waits_for_the_scenes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited, code = [], f"from edgeprune.common.lock import *; a = hold(Path({str(tmp_path)!r}) / LOCK, Path()); "
    with subprocess.Popen(
        [sys.executable, "-c", code + "print(1, flush=True); input()"], stdin=PIPE, stdout=PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"

        def sleep(_: float) -> None:
            waited.append(1)
            if len(waited) == 2:
                other.communicate(b"\n")

        monkeypatch.setattr("time.sleep", sleep)
        held = wait(tmp_path)
    assert held and len(waited) == 2 and capsys.readouterr().out.count("waiting for another training") == 1


@pytest.mark.parametrize("name", ["rich-sd3", "rich-flux"])
def test_the_rich_teachers_are_of_the_agreed_size_and_see_the_training_split_alone(name: str, words: Path) -> None:
    recipe = RECIPES[name]
    with torch.device("meta"):
        networks = recipe.networks(words, recipe.world.grammar)
    assert 10e6 <= sum(p.numel() for p in networks.modules.parameters()) <= 12e6
    assert recipe.splits == (Split.TRAINING,) and recipe.world.size == recipe.generation.height
    # What the experiments remove from it is there.
    transformer, chosen = networks.modules["transformer"], experiments.TEACHERS[name]
    config, family = config_of(transformer), family_of_model(transformer)
    assert (chosen.world, chosen.width) == (recipe.world, family.width(config))
    assert chosen.guided == family.guided(config, recipe.generation.guidance_scale)
    for removed in (*({"blocks": blocks} for blocks in chosen.blocks), {"components": chosen.components}):
        plan = make_plan(family, config, None, method="manual", **removed)
        assert plan.after.parameters < plan.before.parameters


def test_a_missing_teacher_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(TEACHERS) == set(RECIPES) and teacher("shapes").is_dir()
    monkeypatch.setitem(TEACHERS, "rich-sd3", tmp_path)
    with pytest.raises(InputError, match="make assets ONLY=rich-sd3"):
        teacher("rich-sd3")
    with pytest.raises(InputError, match="expected one of shapes"):
        teacher("rich-sd4")
