"""The OpenVINO folder, unchanged, in OpenVINO GenAI's Text2ImagePipeline: SD3 with and without T5, and FLUX.

From the same noise every pixel to 1 of 255: GenAI rounds down where we round to the nearest. Its C++ and JavaScript
interfaces are not run here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from drawing import PROMPT, SEED, STEPS
from numpy.typing import NDArray
from PIL import Image

from edgeprune import runtimes, targets
from edgeprune.common.files import sha256_file
from edgeprune.runtimes.base import initial_latents
from edgeprune.sampling.generation import Generation

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # vendors' deprecations

PROMPTS = [PROMPT, "", "Two red circles!", "a 🐱, ÉCOLE 日本", "a red circle above a blue square and " * 40]
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_NUM_THREADS": 1}


def exported(source: Path) -> Path:
    from edgeprune.export.to_openvino import export

    out = source.with_name(f"{source.name}-openvino")
    record = export(source, out, device=targets.load("cpu-x86"))
    assert not [name for name, said in record["tokenizers"].items() if "missing" in said]
    return out


def hashes(folder: Path) -> dict[Path, str]:
    return {path: sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def drawn(folder: Path, prompts: Sequence[str], scale: float) -> list[NDArray[np.int64]]:
    """Draw in GenAI, with one pipeline for all prompts, from the noise that our runtimes start with."""
    import openvino
    import openvino_genai

    from edgeprune.runtimes.base import read_settings

    settings = read_settings(folder)
    made = settings.generation
    noise = initial_latents(settings, [SEED], made.height, made.width)
    scheduler = folder / "scheduler" / "openvino_genai.json"

    class Noise(openvino_genai.Generator):  # type: ignore[misc]
        def randn_tensor(self, shape: Any) -> Any:
            assert tuple(shape) == noise.shape
            return openvino.Tensor(noise.copy())

    before = hashes(folder)
    pipe = openvino_genai.Text2ImagePipeline(folder, "CPU", **EXACT)
    if scheduler.exists():
        pipe.set_scheduler(openvino_genai.Scheduler.from_config(scheduler))
    images = []
    for prompt in prompts:
        image = pipe.generate(
            prompt, generator=Noise(), num_inference_steps=STEPS, guidance_scale=scale, height=made.height,
            width=made.width, max_sequence_length=made.max_sequence_length,
        )  # fmt: skip
        images.append(np.array(image.data[0], int))
    assert hashes(folder) == before
    return images


def check(folder: Path, *, scale: float = 3.0) -> None:
    """Compare GenAI's images of all PROMPTS with our runtime's."""
    with runtimes.load(folder, "openvino", threads=1) as model:
        ours = [np.asarray(model.generate(p, seed=SEED, steps=STEPS, guidance_scale=scale)[0], int) for p in PROMPTS]
    for prompt, image, reference in zip(PROMPTS, drawn(folder, PROMPTS, scale), ours, strict=True):
        assert reference.std() > 5 and np.abs(image - reference).max() <= 1, prompt
    assert np.abs(ours[0] - ours[-1]).mean() > 1.5  # another prompt is another image


def test_draws_what_our_runtime_draws(component_wise: Path) -> None:
    """The built-in model, pruned and in INT4. For an absent T5, GenAI adds as many zero tokens as a CLIP has tokens,
    whatever generation.json says; the model was made for none, which changes its image a little.
    """
    folder = exported(component_wise)
    made = Generation.load(folder)
    (as_made,) = drawn(folder, [PROMPT], made.guidance_scale)
    with runtimes.load(folder, "openvino", threads=1) as model:
        reference = np.asarray(model.generate(PROMPT, seed=SEED, steps=STEPS)[0], int)
    assert as_made.std() > 5 and 0 < np.abs(as_made - reference).mean() < 12

    dataclasses.replace(made, max_sequence_length=16).save(folder)
    check(folder, scale=made.guidance_scale)


def test_sd3_with_a_t5(tmp_path: Path) -> None:
    tiny.tiny_pipeline(tmp_path / "source", t5=True, num_layers=1)
    check(exported(tmp_path / "source"))


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_flux(guidance: bool, tmp_path: Path) -> None:
    """GenAI 2026.4 shifts dev's noise levels as FLUX.2's, unless it gets the export's second scheduler."""
    tiny.tiny_flux_pipeline(tmp_path / "source", guidance_embeds=guidance)
    check(exported(tmp_path / "source"), scale=3.0 if guidance else 0.0)


def test_the_page_and_a_folder_without_tokenizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of docs/openvino.md; then what GenAI says without the files."""
    tiny.tiny_flux_pipeline(tmp_path / "source", num_layers=1, num_single_layers=1)
    folder = exported(tmp_path / "source").rename(tmp_path / "small-ov")
    page = (Path(__file__).parents[2] / "docs" / "openvino.md").read_text("utf-8")
    create, schedule = [
        code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "openvino_genai" in code
    ]
    monkeypatch.chdir(tmp_path)
    exec(create.replace("image = ", f"{schedule}image = "), {})
    with Image.open("out.png") as image:
        assert image.size == (64, 64)
    (folder / "tokenizer_2" / "openvino_tokenizer.xml").unlink()
    with pytest.raises(RuntimeError, match="openvino_tokenizer.xml"):
        drawn(folder, [PROMPT], 3.0)
