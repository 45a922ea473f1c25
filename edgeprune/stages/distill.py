"""The stage `distill`: train the pruned transformer against the original; the result replaces `transformer/`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeprune.artefact.loading import load_transformer
from edgeprune.artefact.surgery import build, prune_state
from edgeprune.common import processes
from edgeprune.common.errors import InputError
from edgeprune.common.files import digest
from edgeprune.common.progress import Progress, silent
from edgeprune.common.tensors import Tensors
from edgeprune.data.cache import Index, is_cache, made_by, open_pairs
from edgeprune.data.encode import make_cache
from edgeprune.data.pairs import Pairs
from edgeprune.data.settings import CacheOptions, settings_of, source_digest
from edgeprune.planning.plan import PrunePlan
from edgeprune.sampling.prompts import PROMPTS
from edgeprune.stages.costs import sample
from edgeprune.stages.options import DataOptions
from edgeprune.stages.prune import mean_and_basis
from edgeprune.stages.weights import by_block, half, original_weights, write_half
from edgeprune.stages.workspace import Workspace
from edgeprune.training.distill import distill
from edgeprune.training.rank_memory import ProcessLayout, forecast_rank
from edgeprune.training.recipe import HERE, DistillOptions, Placement
from edgeprune.training.teaching import lower


def run(
    ws: Workspace,
    options: DistillOptions,
    data: DataOptions,
    progress: Progress = silent,
    *,
    placement: Placement = HERE,
) -> bool:
    """Train the pruned transformer and write the averaged weights to `transformer/`; return whether the stage ran.

    Runs in one process or in several, see processes.py.

    Raises:
        InputError: nothing is pruned yet, scores are missing, or an option or the data is not usable.
        StaleStageError: see `Workspace.stage`.
        EdgepruneError: the loss is not finite; the last good state stays on disk.
    """
    ws.need("prune", "distill")
    options.check()
    plan = ws.plan()
    source = data.source or ("shapes" if ws.builtin else str(PROMPTS))
    if options.sensitivity != "off" and ws.report() is None:
        raise InputError(
            f"--sensitivity {options.sensitivity} needs contribution scores; run `edgeprune analyze`, or use off"
        )
    encoded = is_cache(source)
    if encoded:
        with processes.main_first():
            check_cache(ws, Path(source), progress)
    identity = [source_digest(source), None if encoded else data.samples, asdict(ws.generation)]

    def train(key: str) -> dict[str, Any]:
        folder = Path(source) if encoded else ws.cache / f"data-{digest([identity, ws.weights_hash])[:12]}"
        with processes.main_first():
            if not encoded:
                _encode(ws, folder, CacheOptions(source, data.samples), progress)
            pairs = _open(ws, folder, progress)
            mean, basis = mean_and_basis(ws, plan, ws.manifest.stages["prune"]["inputs"])
        pruned = prune_state(ws.family, ws.config, plan, original_weights(ws).__getitem__, mean, basis)
        student = build(ws.family, ws.config, plan, {n: t.float() for n, t in pruned.items()})
        state, losses = distill(
            ws.family,
            _teacher(ws, options.teacher_precision),
            student,
            plan,
            ws.report(),
            pairs,
            options,
            ws.out / "cache" / "distill.safetensors",
            inputs_digest=key,
            placement=placement,
            guidance=ws.generation.guidance_scale,
            progress=lambda done, total, loss: progress("distill", done, total, f"loss {loss:.4f}"),
        )
        if processes.is_main():
            _write(ws, plan, state, key, progress)
        return {"first_loss": sum(losses[:10]) / len(losses[:10]), "last_loss": sum(losses[-10:]) / len(losses[-10:])}

    return ws.stage("distill", {"options": options.to_json(), "data": identity}, train)


def check_cache(ws: Workspace, folder: Path, progress: Progress = silent) -> None:
    """Refuse a cache that other encoders than this model's made. Their files are hashed once, and not loaded.

    Raises:
        InputError: the cache was made by other encoders, or with other settings.
    """
    index = Index.load(folder)
    with ws.hashes() as sha256:
        drawn = "transformer" in index.settings
        absent = index.check_made_by(made_by(ws.source, ws.generation, drawn=drawn, sha256=sha256), folder)
    if absent:
        progress(
            f"distill: {folder} records its encoders; the weights of {', '.join(absent)} are missing here, so they "
            "were not compared"
        )


def _encode(ws: Workspace, folder: Path, options: CacheOptions, progress: Progress) -> None:
    """Make the folder's own cache, or what is missing of it."""
    with ws.hashes() as sha256:
        settings = settings_of(ws.source, ws.generation, options, sha256)
    make_cache(
        lambda: ws.pipe, ws.source, folder, settings, ws.generation, options,
        progress=lambda done, total, note: progress("distill: latents", done, total, note),
    )  # fmt: skip


def _open(ws: Workspace, folder: Path, progress: Progress) -> Pairs:
    """Open a cache, and verify its files."""
    with ws.hashes() as sha256:
        return open_pairs(
            folder, ws.family, ws.config, sha256=sha256,
            progress=lambda done, total: progress("distill: checking", done, total, ""),
        )  # fmt: skip


def _teacher(ws: Workspace, precision: str) -> Any:
    """Return the original transformer: a copy of its own where training changes its precision or shards it."""
    if precision == "float32" and processes.count() == 1:
        return ws.teacher
    ws.original.release()  # encoding is done
    teacher = load_transformer(ws.source, quantized=False)
    lower(ws.family, teacher, precision)
    return teacher


def _write(ws: Workspace, plan: PrunePlan, state: Tensors, key: str, progress: Progress) -> None:
    halves = {n: half(t) for n, t in state.items()}
    blocks = by_block(ws, {n: 2 * t.numel() for n, t in halves.items()}, plan)
    write_half(ws, plan, blocks, lambda index: {n: halves[n] for n in blocks[index]}, key, progress)


def forecast(ws: Workspace, options: DistillOptions, placement: Placement, config: Path | None) -> dict[str, int]:
    """Forecast the memory of `distill`: bytes that one process holds, see rank_memory.py.

    Args:
        ws: the workspace.
        options: of the training.
        placement: where it runs.
        config: a file of accelerate's settings; None for one process.

    Raises:
        InputError: there is no plan yet, or an option or the settings are not usable.
    """
    options.check()
    layout = ProcessLayout.of_launch_file(config) if config else ProcessLayout()
    one = sample(ws.family, ws.config, ws.source, ws.generation)
    return forecast_rank(ws.family, ws.config, ws.plan(), ws.report(), options, placement, layout, one)
