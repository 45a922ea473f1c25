"""A report as a page (`report.html`) and as a model card (`README.md`): text escaped, nothing loaded from elsewhere.

What it leaves out: measuring (report.py).
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

from edgeprune import shapes
from edgeprune.analysis.plots import figures, svg
from edgeprune.artefact.checkpoint import INT4
from edgeprune.bench.measure import MEASURES, show
from edgeprune.common.files import write_text
from edgeprune.families.encoders import text_encoders
from edgeprune.planning.plan import PrunePlan
from edgeprune.stages.pipeline import STAGES, Workspace
from edgeprune.training.recipe import strengths

CARD = "README.md"
_OURS = "<!-- Written by edgeprune;"
_SHOWN = 14
_SMALL = 256
"""Images up to this size are shown with sharp pixels."""


def write(
    ws: Workspace,
    summary: dict[str, Any],
    rows: Sequence[tuple[str, str]],
    images: Mapping[str, NDArray[Any]],
    bench: dict[str, Any] | None,
) -> None:
    """Write both; a README.md that somebody else wrote stays as it is.

    Args:
        summary, images: as report.py keeps them; images by variant, (P, H, W, 3).
        rows: the results as short lines.
        bench: JSON of `edgeprune bench`.
    """
    known = {
        "name": ws.out.resolve().name,
        "manifest": ws.manifest,
        "plan": ws.plan(),
        "rows": rows,
        "tasks": _tasks(summary),
        "commands": commands(ws),
        "version": ws.manifest.tools.get("edgeprune", ""),
    }
    _write_page(ws, summary, images, bench, known)
    card = ws.out / CARD
    if not card.exists() or _OURS in card.read_text(encoding="utf-8", errors="replace"):
        _write_card(ws, card, known)


def _write_page(
    ws: Workspace,
    summary: dict[str, Any],
    images: Mapping[str, NDArray[Any]],
    bench: dict[str, Any] | None,
    known: dict[str, Any],
) -> None:
    plan, report = ws.plan(), ws.report()
    # One of each task first, so that the page shows all of them.
    per_task = max(1, len(summary["prompts"]) // len(shapes.TASKS))
    order = np.argsort(np.arange(len(summary["prompts"])) % per_task, kind="stable")
    pairs = [
        {"prompt": summary["prompts"][i], "seed": int(i)} | {name: _png(images[name][i]) for name in images}
        for i in order[:_SHOWN]
    ]
    environment = _environment(autoescape=True)
    environment.filters["size"] = lambda size: show("_bytes", size)
    training = ws.manifest.stages.get("distill")
    page = environment.get_template("report.html.j2").render(
        **known,
        removed=_removed(plan),
        pairs=pairs,
        small=images["original"].shape[1] <= _SMALL,
        memory=memory(ws, summary),
        grid=grid(ws),
        trained=training is not None,
        plots=[_address(draw) for draw in figures(report, tuple(plan.keys)).values()] if report else [],
        prompts=len(report.prompts) if report else 0,
        bench=_bench_rows(bench) if bench else None,
        environment=_machine(ws),
        out=str(ws.out),
    )
    write_text(ws.out / "report.html", page)


def _removed(plan: PrunePlan) -> list[tuple[str, str]]:
    """What the plan took, as `plan` says it."""
    before, after = plan.before.parameters, plan.after.parameters
    blocks = ", ".join(map(str, plan.blocks)) or "none"
    rank = [("modulation rank", str(plan.modulation_rank))] if plan.modulation_rank is not None else []
    return [
        ("blocks removed", f"{blocks} (of {plan.num_blocks})"),
        ("components of others removed", str(len(plan.components))),
        *rank,
        ("parameters", f"{before / 1e6:,.1f} M -> {after / 1e6:,.1f} M ({after / before:.1%})"),
    ]


def _write_card(ws: Workspace, path: Path, known: dict[str, Any]) -> None:
    source = ws.manifest.source
    front: list[tuple[str, Any]] = [
        ("library_name", "diffusers"),
        ("pipeline_tag", "text-to-image"),
        ("tags", ["edgeprune", "pruned", "int4", ws.family.name]),
    ]
    if source.count("/") == 1 and not Path(source).exists():  # a hub id
        front += [("base_model", source), ("base_model_relation", "quantized")]
    plan = ws.plan()
    parts = [f"{len(plan.blocks)} of {plan.num_blocks} blocks and {len(plan.components)} components of others removed"]
    if plan.modulation_rank is not None:
        parts.append(f"modulation projected on {plan.modulation_rank} directions")
    card = _environment(autoescape=False).get_template("model_card.md.j2")
    written = {"rows": [(label, _cell(value)) for label, value in known["rows"]]}
    gone = ", ".join([*parts, "weights in INT4"])
    write_text(path, card.render(**known | written, front=front, gone=gone, pipeline=ws.family.pipeline))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _environment(*, autoescape: bool) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


# ------------------------------------------------------------------------------------------- what is on it


def commands(ws: Workspace) -> list[str]:
    """The commands that made the folder, in order; a stage run from Python has none."""
    found = [ws.manifest.stages[s].get("command", "") for s in STAGES if s in ws.manifest.stages]
    return [line for line in dict.fromkeys(found) if line] or ["# made from Python: edgeprune.json has every option"]


def grid(ws: Workspace) -> list[tuple[str, list[dict[str, Any]]]]:
    """By component, a cell for every block: pruned, frozen, kept (with its update strength, 0..1) or absent."""
    plan, noops = ws.plan(), ws.family.noops(ws.config)
    training = (ws.manifest.stages.get("distill") or {}).get("options", {}).get("options", {})
    strength = strengths(ws.report(), plan, training.get("sensitivity", "off"), ws.family.components)

    def cell(block: int, component: str) -> dict[str, Any]:
        what = f"{block}:{component}"
        if (block, component) in noops:
            return {"state": "absent"}
        if block in plan.blocks or (block, component) in plan.removed:
            return {"state": "pruned", "title": f"{what}: pruned"}
        value = strength.get((block, component), 1.0)
        if training and (value == 0 or (training.get("freeze_prefix") and block < plan.first_pruned)):
            return {"state": "frozen", "title": f"{what}: frozen"}
        said = f"trained at {value:.2f} of the rate" if training else "kept"
        return {"state": "kept", "strength": value, "title": f"{what}: {said}"}

    rows = [(c, [cell(b, c) for b in range(plan.num_blocks)]) for c in ws.family.components]
    return [(c, cells) for c, cells in rows if any(found["state"] != "absent" for found in cells)]


def memory(ws: Workspace, summary: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Bytes of every network's weights, original and compressed; shares are of the original's sum."""
    others = {name: _stored(ws.out / name) for name in text_encoders(ws.out)}
    vae = _stored(ws.out / "vae")
    columns = {
        "original": {**others, "transformer": summary["original_bf16_bytes"], "VAE": vae},
        "compressed": {**others, "transformer": _stored(ws.out / INT4), "VAE": vae},
    }
    whole = sum(columns["original"].values())
    return [
        (label, [{"name": n, "bytes": b, "text": show("_bytes", b), "share": b / whole} for n, b in sizes.items()])
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
    seconds = {s: ws.manifest.stages[s]["seconds"] for s in STAGES if s in ws.manifest.stages}
    return [
        ("tools", tools),
        ("page made on", f"{platform.system()} {platform.machine()}, {psutil.cpu_count()} cores, "
         f"{psutil.virtual_memory().total / 1e9:.0f} GB"),
        ("seconds", ", ".join(f"{s} {t:,.1f}" for s, t in seconds.items())),
        ("images", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in ws.manifest.generation.items())),
    ]  # fmt: skip


def _bench_rows(bench: dict[str, Any]) -> dict[str, Any]:
    """What the page shows of a bench's JSON."""
    variants = bench["variants"]
    compared = bench["comparisons"]
    table = [
        (label, [show(key, v.get(key)) for v in variants], [c.get(f"{stem}_ratio") for c in compared.values()])
        for key, (label, stem) in MEASURES.items()
        if any(v.get(key) is not None for v in variants)
    ]
    return {
        "names": [f"{v['name']} ({v['runtime']}, {v['precision']})" for v in variants],
        "ratios": ["ratio"] if len(compared) == 1 else [f"{name}, ratio" for name in compared],
        "rows": table,
        "machine": bench["machine"],
    }


def _png(pixels: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _address(draw: Callable[[], Any]) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(draw)).decode()
