"""The table of docs/int4.md on text encoders: what an error of the embedding costs in images of the built-in model.

    python -m edgeprune.experiments.encoders -o build/encoders [--write docs/int4.md]

The built-in model has two CLIPs and no T5. They are rounded by T5's rules, and saved again in floats; other rows add
noise to the embedding. Only the text changes. An interrupted run resumes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from edgeprune import shapes
from edgeprune.artefact.encoder_layers import layers_of
from edgeprune.artefact.loading import load_part
from edgeprune.artefact.resolve import BUILTIN
from edgeprune.artefact.staged import StagedPipeline
from edgeprune.common.files import read_json, write_json
from edgeprune.common.intervals import Interval, mean_interval, paired_drop
from edgeprune.common.splits import Split
from edgeprune.common.tables import interval_text, markdown_table
from edgeprune.experiments.pages import insert
from edgeprune.families.encoders import text_encoders
from edgeprune.metrics.psnr import decibels
from edgeprune.quantization import feedback
from edgeprune.quantization.precision import TEXT_INT4, TEXT_INT4_WO8, TEXT_INT8, Precision, text_precision_of
from edgeprune.quantization.quantize import linear_layers, replace, round_layers, round_to_nearest
from edgeprune.residency.compute import Compute
from edgeprune.sampling.denoising import generate
from edgeprune.sampling.generation import Generation, longest_prompt
from edgeprune.stages.encoders import errors
from edgeprune.stages.original import Original
from edgeprune.stages.prompts import prompts_of

FORMS = (TEXT_INT8, TEXT_INT4_WO8, TEXT_INT4)
NOISE = (0.1, 0.2, 0.4, 0.8)
"""Of the embedding's norm, by token."""
PER_TASK = 24
"""Held-out captions of each task of shapes world: 24 times 7 images a row."""
CALIBRATING = 28
_LAST = "mlp.fc2"
"""What `wo` is in a CLIP."""


class Noisy(StagedPipeline):
    """The built-in pipeline with noise on its text."""

    share = 0.0

    def encode(self, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden (B, M, K) and pooled (B, P) text with noise of `share` of the norm of each row."""
        draw = torch.Generator().manual_seed(0)
        parts = []
        for part in super().encode(prompts, max_sequence_length):
            noise = torch.randn(part.shape, generator=draw)
            parts.append(part + self.share * noise * part.norm(dim=-1, keepdim=True) / part.shape[-1] ** 0.5)
        return parts[0], parts[1]


def precision(name: str, shape: tuple[int, ...], form: str) -> Precision:
    """Return how T5's rule stores a CLIP's linear layer."""
    return text_precision_of(f"encoder.block.0.{'wo' if name == _LAST else name}.weight", shape, form)


def round_clip(folder: Path, kind: str, form: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weights of a CLIP in a form, in floats, by their names in its file."""
    model = load_part(folder, kind)
    run = partial(model, ids)
    for _, layer in layers_of(model, kind):
        linears = linear_layers(layer)
        measure = partial(feedback.second_moments, run=run, calls=1) if form != TEXT_INT8 else None
        rule = {name: precision(name, tuple(linear.weight.shape), form) for name, linear in linears.items()}
        round_layers(layer, rule, measure)
        for name, linear in linears.items():
            packed: Any = layer.get_submodule(name)
            linear.weight = nn.Parameter(packed.weight, requires_grad=False)
            replace(layer, name, linear)
    table = model.get_input_embeddings()
    if form != TEXT_INT8:
        values, scale = round_to_nearest(table.weight.detach(), Precision(8, table.weight.shape[1]))
        table.weight = nn.Parameter(values * scale.float(), requires_grad=False)
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def pipelines(out: Path) -> Iterator[tuple[str, StagedPipeline]]:
    """Yield the original, then what is compared with it, each with a name."""
    original, compute = Original(BUILTIN), Compute()
    yield "original", StagedPipeline(BUILTIN, original.transformer, compute)
    plain = StagedPipeline(BUILTIN, None, compute)
    captions = prompts_of(Split.CALIBRATION, CALIBRATING, shapes)
    for form in FORMS:
        folder = Path(shutil.copytree(BUILTIN, out / form, dirs_exist_ok=True))
        for name, kind in text_encoders(folder).items():
            ids = plain.token_ids(name, captions, longest_prompt(BUILTIN))
            save_file(
                round_clip(BUILTIN / name, kind, form, ids), folder / name / "model.safetensors", {"format": "pt"}
            )
        yield form, StagedPipeline(folder, original.transformer, compute)
    for share in NOISE:
        noisy = Noisy(BUILTIN, original.transformer, compute)
        noisy.share = share
        yield f"noise of {share:g}", noisy


def measure(out: Path, per_task: int = PER_TASK) -> dict[str, Any]:
    """Return the embedding's errors, and by caption the PSNR and whether the image is right, of each pipeline."""
    path, generation = out / "found.json", Generation.load(BUILTIN)
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    prompts = shapes.evaluation_prompts(per_task)
    captions, seeds = [p.text for p in prompts], Split.HELD_OUT.seeds(len(prompts))
    exact: torch.Tensor | None = None
    drawn: NDArray[np.uint8] | None = None
    for name, pipe in pipelines(out):
        hidden, _ = pipe.encode(captions, generation.max_sequence_length)
        exact = hidden if exact is None else exact
        if name in found and drawn is not None:
            continue
        images = generate(pipe, captions, seeds, generation)
        drawn = images if drawn is None else drawn
        off = errors(hidden, exact)
        found[name] = {
            "relative": off.relative,
            "cosine": off.cosine,
            "right": [float(shapes.check(image, p.meaning)) for image, p in zip(images, prompts, strict=True)],
            "decibels": [decibels(a, b) for a, b in zip(drawn, images, strict=True)] if name != "original" else [],
            "tasks": [p.meaning.task for p in prompts],
        }
        write_json(path, found)
        print(name, off.shown(), np.mean(found[name]["right"]), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the rows of `measure` in Markdown."""
    head = (
        "text encoders",
        "error of the embedding",
        "cosine",
        "PSNR to the original's images, dB",
        "score",
        "drop, %",
    )
    first, rows = found["original"], []
    for name, row in found.items():
        drop = paired_drop(first["right"], row["right"], row["tasks"]).relative
        assert drop is not None  # the original has a score above 0
        low, high = (None if value is None else 100 * value for value in drop[1:])
        percent = Interval(100 * drop.mean, low, high)
        original = name == "original"
        rows.append(
            (
                name,
                "" if original else f"{row['relative']:.3f}",
                "" if original else f"{row['cosine']:.4f}",
                "" if original else interval_text(mean_interval(row["decibels"]), ".1f"),
                interval_text(mean_interval(row["right"], row["tasks"]), ".3f"),
                "" if original else interval_text(percent, "+.1f"),
            )
        )
    return markdown_table(head, rows)


def main() -> None:
    """Read the command line, measure, and print or write the table."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.experiments.encoders", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/encoders"))
    parser.add_argument("--write", type=Path, help="a page whose table to replace")
    args = parser.parse_args()
    text = table(measure(args.out))
    if args.write:
        insert(args.write, text, "encoders")
    print(text)


if __name__ == "__main__":
    main()
