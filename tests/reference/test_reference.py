"""References are drawn by their own pipelines, whole or one part at a time, and only from safe folders."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import GENERATION, REFERENCES, tiny_chroma

from edgeprune.common.errors import InputError
from edgeprune.reference import is_reference
from edgeprune.reference.drawing import open_drawer
from edgeprune.reference.pipeline import load
from edgeprune.reference.staged import Turns

LIMIT = 10**12
"""More memory than there is: parts take turns, because a limit was given."""


@pytest.fixture(scope="module")
def chroma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Chroma's; copy before damaging it."""
    folder = tmp_path_factory.mktemp("reference") / "chroma"
    tiny_chroma(folder)
    return folder


def pixels(folder: Path, *seeds: int, **options: Any) -> Any:
    """Draw two prompts in turn, with these seeds."""
    texts = [("two red circles", "a blue square")[i % 2] for i in range(len(seeds))]
    with open_drawer(folder, **options) as drawer:
        return np.stack([np.asarray(image) for image in drawer.draw(texts, seeds)])


@pytest.mark.parametrize("name", REFERENCES)
def test_the_pipelines_own_call_draws(name: str, tmp_path: Path) -> None:
    """Whole and in turns, the image is that of the call that a user of diffusers would write."""
    pipe = REFERENCES[name](tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of diffusers' scheduler about NumPy
        own = pipe("two red circles", generator=torch.Generator().manual_seed(5), **GENERATION).images[0]
    assert np.asarray(own).std() > 10
    if name != "sana-sprint":  # draws 1024x1024, seconds each
        assert (pixels(tmp_path / name, 5)[0] == np.asarray(own)).all()
    assert (pixels(tmp_path / name, 5, memory=LIMIT)[0] == np.asarray(own)).all()


def test_parts_take_turns(chroma: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never are two in memory, and the text encoder is read once for all images."""
    loads = []

    def enter(self: Turns, name: str) -> None:
        before = self._now
        original(self, name)
        inside = [n for n, part in self._parts.items() if not any(p.is_meta for p in part.parameters())]
        assert inside == [name]
        loads.extend([name] if name != before else [])

    original = Turns.enter
    whole = pixels(chroma, 1, 2)
    monkeypatch.setattr(Turns, "enter", enter)
    assert (pixels(chroma, 1, 2, memory=LIMIT) == whole).all()
    assert loads == ["transformer", "vae"] * 2  # the encoder was there first


def test_seeds_and_prompts_matter(chroma: Path) -> None:
    one, other, again = pixels(chroma, 1, 1, 1)
    assert not (one == other).all() and (one == again).all()
    assert not (pixels(chroma, 2) == one).all()


def test_settings(chroma: Path) -> None:
    """What is asked for wins over generation.json."""
    with open_drawer(chroma) as drawer:
        (image,) = drawer.draw(["two red circles"], [1], steps=1, guidance_scale=1.0, height=32, width=48)
    assert image.size == (48, 32)


def test_steps_of_sana_sprint(tmp_path: Path) -> None:
    """Its level between two steps goes with any other number of them."""
    from edgeprune.reference.drawing import settings_of
    from edgeprune.sampling.generation import GenerationOptions

    REFERENCES["sana-sprint"](tmp_path / "sana")
    reference = open_drawer(tmp_path / "sana").reference
    assert "intermediate_timesteps" not in settings_of(reference, GenerationOptions())
    assert settings_of(reference, GenerationOptions(1))["intermediate_timesteps"] is None


def test_families_are_no_references(chroma: Path, tmp_path: Path) -> None:
    from edgeprune.artefact.resolve import BUILTIN

    assert is_reference(chroma) and not is_reference(BUILTIN) and not is_reference(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert not is_reference(tmp_path)


def index(**fields: Any) -> Callable[[Path], object]:
    """Change fields of model_index.json."""

    def change(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def pickled(folder: Path) -> None:
    """Leave a pickle in place of weights."""
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(folder / "vae" / "diffusion_pytorch_model.bin")


def linked(folder: Path) -> None:
    """Let a file lead out of the folder."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def without_a_tensor(folder: Path) -> None:
    """Remove a tensor from the transformer's file."""
    from safetensors.torch import load_file, save_file

    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if n != "proj_out.weight"}, path)


def coded(folder: Path) -> None:
    """Name code in the text encoder's config."""
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "mine.Mine"}}))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "code as a pipeline": (index(_class_name=["pipeline", "Mine"]), "names code of its own"),
    "a custom pipeline": (index(custom_pipeline="mine"), "names code of its own"),
    "code as a part": (index(vae=["mine", "Mine"]), "expected a class of diffusers or transformers"),
    "code of a part": (coded, "auto_map: names code of its own"),
    "a pickle": (pickled, "expected safetensors; pickles are never read"),
    "a link out of it": (linked, "leads out of the folder"),
    "no folder of a part": (lambda folder: shutil.rmtree(folder / "vae"), "vae: no such folder"),
    "no denoiser": (index(transformer=[None, None]), "found neither transformer nor unet"),
    "an unknown pipeline": (index(_class_name="TomorrowPipeline"), "which is no pipeline of diffusers"),
    "a model": (index(_class_name="AutoencoderKL"), "which is no pipeline of diffusers"),
    "an image": (index(_class_name="ChromaImg2ImgPipeline"), "takes image, expected a pipeline that takes a prompt"),
    "a video": (index(_class_name="WanPipeline"), "takes num_frames, expected"),
    "a sound": (index(_class_name="StableAudio3Pipeline"), "takes no height"),
    "more than a prompt": (index(_class_name="StableDiffusionAttendAndExcitePipeline"), "takes token_indices"),
    "unknown settings": (
        lambda f: (f / "generation.json").write_text('{"solver": "euler"}'), "of a reference, expected only"
    ),
    "no steps": (
        lambda f: (f / "generation.json").write_text('{"num_inference_steps": 0}'), "expected a number above 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_refused(how: str, chroma: Path, tmp_path: Path) -> None:
    damage, why = REFUSED[how]
    folder = tmp_path / "chroma"
    shutil.copytree(chroma, folder)
    damage(folder)
    with pytest.raises(InputError, match=why) as caught:
        open_drawer(folder)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_refused(chroma: Path, tmp_path: Path) -> None:
    """diffusers would fill it with random numbers."""
    shutil.copytree(chroma, tmp_path / "chroma")
    without_a_tensor(tmp_path / "chroma")
    drawer = open_drawer(tmp_path / "chroma")
    with pytest.raises(InputError, match="proj_out.weight': found no such tensor"):
        load(drawer.reference, drawer.compute)


def test_a_size_that_it_cannot_draw(chroma: Path) -> None:
    with open_drawer(chroma) as drawer, pytest.raises(InputError, match="cannot draw"):
        list(drawer.draw(["two red circles"], [1], steps=-1))


def test_too_little_memory(chroma: Path) -> None:
    with pytest.raises(InputError, match="a reference's part is read whole"):
        open_drawer(chroma, memory=10**6)
