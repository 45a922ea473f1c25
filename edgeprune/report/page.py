"""Writes a report as a page (`report.html`) and as a model card (`README.md`).

The page escapes all text and loads nothing from elsewhere.
"""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from edgeprune.analysis.plots import figures, svg
from edgeprune.artefact import card as card_text
from edgeprune.artefact import licensing
from edgeprune.artefact.manifest import INT4
from edgeprune.bench.tables import baseline_text, measure_rows
from edgeprune.common.files import write_text
from edgeprune.common.tables import NOT_MEASURED, interval_text, with_unit
from edgeprune.families.encoders import text_encoders
from edgeprune.planning.plan import PrunePlan
from edgeprune.stages.workspace import ORDER, Workspace
from edgeprune.training.recipe import strengths

CARD = "README.md"
_SHOWN = 14
_SMALL = 256
"""The page shows images up to this size with sharp pixels."""


def write(
    ws: Workspace,
    summary: dict[str, Any],
    rows: Sequence[tuple[str, str]],
    images: Mapping[str, NDArray[Any]],
    bench: dict[str, Any] | None,
) -> None:
    """Write page and card; keep a README.md that edgeprune did not write.

    Args:
        summary: the measurements, see measure.py.
        rows: the results as label and text.
        images: by variant, each (P, H, W, 3).
        bench: the JSON of `edgeprune bench`.
    """
    shared = {
        "name": ws.out.resolve().name,
        "manifest": ws.manifest,
        "plan": ws.plan(),
        "rows": rows,
        "tasks": _tasks(summary),
        "commands": commands(ws),
        "version": ws.manifest.tools.get("edgeprune", ""),
    }
    _write_page(ws, summary, images, bench, shared)
    card = ws.out / CARD
    if not card.exists() or card_text.MARK in card.read_text(encoding="utf-8", errors="replace"):
        _write_card(ws, card, shared)


def _write_page(
    ws: Workspace,
    summary: dict[str, Any],
    images: Mapping[str, NDArray[Any]],
    bench: dict[str, Any] | None,
    shared: dict[str, Any],
) -> None:
    plan, report = ws.plan(), ws.report()
    # One prompt of each task first, so that the page shows all tasks.
    per_task = max(1, len(summary["prompts"]) // len(ws.world.grammar.names)) if ws.world else 1
    order = np.argsort(np.arange(len(summary["prompts"])) % per_task, kind="stable")
    texts, seeds = summary["prompts"], summary["seeds"]
    pairs = [
        {"prompt": texts[i], "seed": seeds[i]} | {name: _png(images[name][i]) for name in images}
        for i in order[:_SHOWN]
    ]
    environment = _environment(autoescape=True)
    environment.filters["size"] = lambda size: with_unit("_bytes", size)
    training = ws.manifest.stages.get("distill")
    page = environment.get_template("report.html.j2").render(
        **shared,
        removed=_removed(plan),
        pairs=pairs,
        small=images["original"].shape[1] <= _SMALL,
        memory=memory(ws, summary),
        grid=grid(ws),
        trained=training is not None,
        plots=[_data_url(draw) for draw in figures(report, tuple(plan.keys)).values()] if report else [],
        prompts=len(report.prompts) if report else 0,
        bench=_bench_rows(bench) if bench else None,
        environment=_machine(ws),
        out=str(ws.out),
    )
    write_text(ws.out / "report.html", page)


def _removed(plan: PrunePlan) -> list[tuple[str, str]]:
    """Return what the plan removed, in the words of `edgeprune plan`."""
    before, after = plan.before.parameters, plan.after.parameters
    blocks = ", ".join(map(str, plan.blocks)) or "none"
    rank = [("modulation rank", str(plan.modulation_rank))] if plan.modulation_rank is not None else []
    return [
        ("blocks removed", f"{blocks} (of {plan.num_blocks})"),
        ("components of other blocks removed", str(len(plan.components))),
        *rank,
        ("parameters", f"{before / 1e6:,.1f} M -> {after / 1e6:,.1f} M ({after / before:.1%})"),
    ]


def _write_card(ws: Workspace, path: Path, shared: dict[str, Any]) -> None:
    license_fields = licensing.usable(ws.manifest.license)
    front = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["edgeprune", "pruned", "int4", ws.family.name],
        **card_text.license_fields(license_fields),
    }
    plan = ws.plan()
    parts = [
        f"{len(plan.blocks)} of {plan.num_blocks} blocks and {len(plan.components)} components of other blocks removed"
    ]
    if plan.modulation_rank is not None:
        parts.append(f"modulation projected onto {plan.modulation_rank} directions")
    license_text = card_text.license_text(license_fields, licensing.files(ws.out))
    changes = card_text.changes(ws.manifest, plan)
    card = _environment(autoescape=False).get_template("model_card.md.j2")
    escaped = {"rows": [(label, _cell(value)) for label, value in shared["rows"]]}
    gone = ", ".join([*parts, "weights in INT4"])
    write_text(
        path,
        card.render(
            **shared | escaped,
            front=card_text.front_matter(front),
            gone=gone,
            pipeline=ws.family.pipeline,
            unguided=ws.training_option("guidance"),
            changes=changes,
            license=license_text,
        ),
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["interval"] = lambda values: interval_text(values, ".2f")
    return environment


# ------------------------------------------------------------------------------------------- contents


def commands(ws: Workspace) -> list[str]:
    """Return the commands that made the folder, in order; a stage that ran from Python has none."""
    lines = [ws.manifest.stages[s].get("command", "") for s in ORDER if s in ws.manifest.stages]
    return [line for line in dict.fromkeys(lines) if line] or ["# made from Python: edgeprune.json has every option"]


def grid(ws: Workspace) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return a cell per block for each component.

    A cell's `state` is `pruned`, `frozen`, `kept` (with its update `strength`, 0..1) or `absent`.
    """
    plan, noops = ws.plan(), ws.family.noops(ws.config)
    training = (ws.manifest.stages.get("distill") or {}).get("options", {}).get("options", {})
    strength = strengths(
        ws.report(), plan, ws.family.components,
        sensitivity=training.get("sensitivity", "off"), freeze_prefix=bool(training.get("freeze_prefix")),
    )  # fmt: skip

    def cell(block: int, component: str) -> dict[str, Any]:
        part = f"{block}:{component}"
        if (block, component) in noops:
            return {"state": "absent"}
        if block in plan.blocks or (block, component) in plan.removed:
            return {"state": "pruned", "title": f"{part}: pruned"}
        value = strength.get((block, component), 1.0)
        if value == 0:
            return {"state": "frozen", "title": f"{part}: frozen"}
        fate = f"trained at {value:.2f} of the learning rate" if training else "kept"
        return {"state": "kept", "strength": value, "title": f"{part}: {fate}"}

    rows = [(c, [cell(b, c) for b in range(plan.num_blocks)]) for c in ws.family.components]
    return [(c, cells) for c, cells in rows if any(one["state"] != "absent" for one in cells)]


def memory(ws: Workspace, summary: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the bytes of every network's weights, original and compressed; shares are of the original's sum."""
    others = {name: _stored(ws.out / name) for name in text_encoders(ws.out)}
    vae = _stored(ws.out / "vae")
    columns = {
        "original": {**others, "transformer": summary["original_bf16_bytes"], "VAE": vae},
        "compressed": {**others, "transformer": _stored(ws.out / INT4), "VAE": vae},
    }
    total = sum(columns["original"].values())
    return [
        (label, [{"name": n, "bytes": b, "text": with_unit("_bytes", b), "share": b / total} for n, b in sizes.items()])
        for label, sizes in columns.items()
    ]


def _stored(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def _tasks(summary: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    quality = summary.get("quality")
    if not quality:
        return []
    first, other = quality["tasks"]["original"], quality["tasks"]["compressed"]
    return [(task, first[task], other[task]) for task in first]


def _machine(ws: Workspace) -> list[tuple[str, str]]:
    tools = ", ".join(f"{name} {version}" for name, version in ws.manifest.tools.items())
    seconds = {s: ws.manifest.stages[s]["seconds"] for s in ORDER if s in ws.manifest.stages}
    scale = ws.training_option("guidance")
    learned = [("guidance", f"the compressed model has learned {scale:g}: its step is one evaluation")] if scale else []
    return [
        ("tools", tools),
        ("page made on", f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores, "
         f"{psutil.virtual_memory().total / 1e9:.0f} GB"),
        ("seconds", ", ".join(f"{s} {t:,.1f}" for s, t in seconds.items())),
        ("images", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in ws.manifest.generation.items())),
        *learned,
    ]  # fmt: skip


def _bench_rows(bench: dict[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a bench's JSON: the measures that at least one variant has."""
    variants, compared = bench["variants"], bench["comparisons"]
    rows = measure_rows(variants, compared.values())
    return {
        "names": [f"{v['name']} ({v['runtime']}, {v['precision']})" for v in variants],
        "ratios": ["ratio"] if len(compared) == 1 else [f"{name}, ratio" for name in compared],
        "rows": [row for row in rows if set(row.values) != {NOT_MEASURED}],
        "machine": bench["machine"],
        "baseline": baseline_text(variants[0], slower) if (slower := bench.get("slower_originals")) else "",
    }


def _png(pixels: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _data_url(draw: Callable[[], Any]) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(draw)).decode()
