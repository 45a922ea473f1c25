"""What projecting the modulation costs and saves on the built-in model: python -m edgeprune.experiments.modulation.

Measures into `study.json`, which a killed run goes on from, and writes `tables.md` and `modulation.svg` from it. It is
what docs/modulation.md shows. What it leaves out: other models.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune import shapes
from edgeprune.analysis.contribution import ContributionReport
from edgeprune.artefact import checkpoint
from edgeprune.artefact.surgery import prune
from edgeprune.common.files import read_json, write_json
from edgeprune.metrics.psnr import mean_decibels
from edgeprune.metrics.velocity import VelocityError
from edgeprune.planning.modulation import GRID, Subspace, choose_rank, modulation_inputs, subspace
from edgeprune.planning.plan import PlanOptions, PrunePlan, make_plan, plan_for
from edgeprune.quantization.int4 import round_int4
from edgeprune.quantization.precision import Precision, precision_of
from edgeprune.quantization.quantize import round_to_nearest
from edgeprune.sampling.denoising import (
    Conditioning,
    encode_images,
    encode_prompts,
    generate,
    latent_shape,
    noise,
    sigmas,
    velocity,
)
from edgeprune.stages import pipeline
from edgeprune.stages.pipeline import Workspace

RANKS = (0, 2, 4, 8, 16, 32, 48, 64)
CALIBRATED = (16, 32, 64)
"""Ranks at which the choice of calibration is looked at."""
SEED = 7

Prompts = list[str]


@dataclass(frozen=True)
class Variant:
    """One way to make the model smaller."""

    series: str
    plan: PlanOptions
    distilled: bool = False


def variants() -> dict[str, Variant]:
    """By name, in the order they are measured in; those that take training are last."""
    parts = PlanOptions("hybrid", threshold=0.0, protect_first=0)  # as the built-in model's preset
    whole = PlanOptions("hpp", protect_first=0)
    out = {"int4": Variant("INT4 alone", PlanOptions("hpp", keep=1.0))}

    def add(keep: float) -> None:
        out[f"parts-{keep}"] = Variant("components only", replace(parts, keep=keep))
        out[f"both-{keep}"] = Variant("modulation, then components", replace(parts, keep=keep, modulation_rank=32))

    def project(rank: int) -> None:
        out[f"modulation-{rank}"] = Variant("modulation only", PlanOptions("manual", modulation_rank=rank))

    project(32)
    add(0.65)
    add(0.5)
    project(16)
    out["blocks-0.8"] = Variant("blocks only", replace(whole, keep=0.8))
    out["both-blocks-0.65"] = Variant("modulation, then blocks", replace(whole, keep=0.65, modulation_rank=32))
    project(64)
    add(0.58)
    for name in ("parts-0.5", "both-0.5", "parts-0.65", "both-0.65"):
        out[f"{name}-distilled"] = replace(out[name], distilled=True)
    return out


class Study:
    """The measurements, each made once and kept in `study.json`."""

    def __init__(self, out: Path, *, per_task: int, steps: int) -> None:
        self.out, self.per_task, self.steps = out, per_task, steps
        self.path = out / "study.json"
        self.found: dict[str, Any] = read_json(self.path) if self.path.is_file() else {}
        self.base = Workspace(out / "analysis", None)
        self.pipe, self.family, self.config = self.base.pipe, self.base.family, self.base.config
        self.teacher, self.generation = self.pipe.transformer, self.base.generation

    def once(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of `key`, measured now if it is not known."""
        if key not in self.found:
            print(f"{key} ...", flush=True)
            self.found[key] = measure()
            write_json(self.path, self.found)
        return self.found[key]

    # ------------------------------------------------------------------------------- models

    @functools.cached_property
    def levels(self) -> torch.Tensor:
        """The sampler's noise levels without the last, 0."""
        shape = latent_shape(self.pipe, self.generation)
        return sigmas(self.pipe, self.generation.num_inference_steps, shape)[:-1]

    def inputs(self, prompts: Prompts, levels: torch.Tensor | None = None) -> torch.Tensor:
        """Modulation inputs (prompts, T, D); by default at the levels that `plan` calibrates on."""
        if levels is None:
            levels = torch.cat([self.levels, torch.linspace(0, 1, GRID)])
        pooled = encode_prompts(self.pipe, prompts, self.generation.max_sequence_length).pooled
        return modulation_inputs(self.family, self.teacher, levels * 1000, pooled, self.generation.guidance_scale)

    def captions(self, per_task: int) -> Prompts:
        """Training captions."""
        return [p.text for p in shapes.evaluation_prompts(per_task, held_out=False)]

    @functools.cached_property
    def held_out(self) -> Prompts:
        """Three captions of each task that neither the model nor any calibration has seen."""
        return [p.text for p in shapes.evaluation_prompts(3)]

    @functools.cached_property
    def usual(self) -> Subspace:
        """As `plan` calibrates."""
        return subspace(self.inputs(["", *self.captions(pipeline.CAPTIONS)]).flatten(0, 1))

    def thin(self, rank: int, found: Subspace | None = None) -> Any:
        """The teacher with projected modulation, in float32."""
        found = found or self.usual
        plan = make_plan(self.family, self.config, None, method="manual", modulation_rank=rank)
        return prune(self.family, self.teacher, self.config, plan, found.mean, found.basis(rank))

    # ------------------------------------------------------------------------------- measures

    @functools.cached_property
    def metric(self) -> VelocityError:
        """Against the teacher on its own states, held-out captions."""
        return VelocityError(self.pipe, self.generation, self.held_out)

    def error(self, model: Any, metric: VelocityError | None = None) -> float:
        """Mean relative velocity error."""
        metric = metric or self.metric
        self.pipe.transformer = model
        try:
            return -float(np.mean(metric.score()))
        finally:
            self.pipe.transformer = self.teacher

    def ranks(self) -> dict[str, dict[str, float]]:
        """Error by rank, in float32 and after INT4, and what the basis leaves of held-out inputs."""
        inputs = self.inputs(["", *self.held_out]).flatten(0, 1)
        left = self.usual.residuals(inputs)
        rows: dict[str, dict[str, float]] = {}
        for rank in RANKS:
            model = self.thin(rank)
            rows[str(rank)] = {"float32": self.error(model), "residual": float(left[rank])}
            if rank >= 8:
                rows[str(rank)]["int4"] = self.error(self.rounded(model))
        rows["full"] = {"float32": 0.0, "residual": 0.0}
        rows["full"]["int4"] = self.error(self.rounded(copy.deepcopy(self.teacher)))
        return rows

    def storage(self) -> dict[str, float]:
        """Rank 32 with one thing rounded at a time, all else float32."""
        rows = {"nothing rounded": self.error(self.thin(32))}
        model = self.thin(32)
        integers, scale = round_to_nearest(model.time_text_embed.basis.detach(), Precision(8, self.usual.mean.numel()))
        with torch.no_grad():
            model.time_text_embed.basis.copy_(integers * scale.float())
        rows["basis in 8 bits"] = self.error(model)
        rows["everything in half precision"] = self.error(self.thin(32).half().float())
        for bits, group in ((8, 32), (4, 32), (4, 16)):
            model = self.rounded(self.thin(32), Precision(bits, group))
            rows[f"thin layers in {bits} bits, groups of {group}"] = self.error(model)
        rows["the original's modulation in 4 bits, groups of 64"] = self.error(
            self.rounded(copy.deepcopy(self.teacher), Precision(4, 64))
        )
        return rows

    @torch.no_grad()
    def rounded(self, model: Any, modulation: Precision | None = None) -> Any:
        """Weights rounded in place without data, as `quantize` does: by the rule, or the modulation's alone to this."""
        for name, layer in model.named_modules():
            weight = f"{name}.weight"
            if isinstance(layer, torch.nn.Linear) and (modulation is None or self.family.modulates(weight)):
                precision = modulation or precision_of(self.family, weight, tuple(layer.weight.shape))
                if precision.bits == 4:
                    layer.weight.copy_(round_int4(layer.weight, precision.group_size))
                else:
                    integers, scale = round_to_nearest(layer.weight, precision)
                    groups = integers.view(*scale.shape, -1) * scale.float()[..., None]
                    layer.weight.copy_(groups.view_as(layer.weight))
        return model

    def calibration(self) -> dict[str, dict[str, float]]:
        """Error on held-out captions by what the basis was found on."""
        usual = ["", *self.captions(pipeline.CAPTIONS)]
        choices: dict[str, torch.Tensor] = {
            f"{7 * n} captions": self.inputs(["", *self.captions(n)]) for n in (1, 2, 4, 8, 16, 32)
        }
        choices["112 captions, sampler's timesteps only"] = self.inputs(usual, self.levels)
        choices["112 captions, four timesteps only"] = self.inputs(usual, self.levels[::5])
        choices["112 captions, even grid only"] = self.inputs(usual, torch.linspace(0, 1, GRID))
        choices["112 captions without the empty one"] = self.inputs(usual[1:])
        rows: dict[str, dict[str, float]] = {}
        for name, inputs in choices.items():
            found = subspace(inputs.flatten(0, 1))
            rows[name] = {str(r): self.error(self.thin(r, found)) for r in CALIBRATED if r <= len(found.directions)}
        return rows

    def auto(self) -> dict[str, int | None]:
        """The rank that `auto` takes, by how many captions it sees beside the empty one."""
        width = self.usual.mean.numel()
        return {str(7 * n): choose_rank(self.inputs(["", *self.captions(n)]), width) for n in (1, 2, 4, 8, 16, 32)}

    def seen(self) -> dict[str, dict[str, float]]:
        """Error on captions that the basis was found on, and on held-out ones."""
        other = VelocityError(self.pipe, self.generation, self.captions(3))
        return {str(r): {"seen": self.error(m, other), "held out": self.error(m)} for r, m in self._thins()}

    def _thins(self) -> Iterator[tuple[int, Any]]:
        for rank in CALIBRATED:
            yield rank, self.thin(rank)

    @torch.no_grad()
    def timesteps(self) -> dict[str, dict[str, float]]:
        """Error at single timesteps of scenes between data and noise, prompts held out."""
        texts = self.held_out
        pictures = [p.meaning for p in shapes.evaluation_prompts(3)]
        images = np.stack([shapes.render(m, np.random.default_rng(i)) for i, m in enumerate(pictures)])
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        clean = encode_images(self.pipe, tensor)
        fresh = noise(list(range(len(texts))), tuple(clean.shape[1:]))
        condition = encode_prompts(self.pipe, texts, self.generation.max_sequence_length)
        rows: dict[str, dict[str, float]] = {}
        sampler = subspace(self.inputs(["", *self.captions(pipeline.CAPTIONS)], self.levels).flatten(0, 1))
        models = {"32": self.thin(32), "64": self.thin(64), "32, sampler's timesteps only": self.thin(32, sampler)}
        for t in (1000, 995, 950, 800, 500, 200, 50, 5, 0):
            states = torch.lerp(clean, fresh, t / 1000)
            given = (states, condition, torch.full((len(texts),), t / 1000), self.generation.guidance_scale)
            target = velocity(self.teacher, *given)
            rows[str(t)] = {n: _relative(velocity(m, *given), target) for n, m in models.items()}
        return rows

    @torch.no_grad()
    def guidance(self) -> dict[str, dict[str, float]]:
        """Error of the guided velocity by scale, with and without the empty prompt in the calibration."""
        without = subspace(self.inputs(self.captions(pipeline.CAPTIONS)).flatten(0, 1))
        models = {f"{r}": self.thin(r) for r in (16, 32)}
        models |= {f"{r}, without the empty prompt": self.thin(r, without) for r in (16, 32)}
        m = self.metric
        empty = encode_prompts(self.pipe, [""], self.generation.max_sequence_length)
        free = Conditioning(empty.hidden.expand_as(m.condition.hidden), empty.pooled.expand_as(m.condition.pooled))

        def both(model: Any) -> list[torch.Tensor]:
            return [velocity(model, m.states, c, m.sigmas, m.guidance) for c in (m.condition, free)]

        bound, unbound = both(self.teacher)
        found = {name: both(model) for name, model in models.items()}
        return {
            str(scale): {
                n: _relative(u + scale * (b - u), unbound + scale * (bound - unbound)) for n, (b, u) in found.items()
            }
            for scale in (1, 2, 4, 7)
        }

    # ------------------------------------------------------------------------------- images

    @functools.cached_property
    def scored(self) -> list[shapes.Prompt]:
        """Held-out captions whose images are checked."""
        return shapes.evaluation_prompts(self.per_task)

    def images(self, name: str, model: Any) -> NDArray[np.uint8]:
        """One image of each scored caption, kept on disk."""
        path = self.out / "images" / f"{name}-{self.per_task}.npy"
        if not path.is_file():
            self.pipe.transformer = model
            texts = [p.text for p in self.scored]
            made = generate(self.pipe, texts, list(range(len(texts))), self.generation)
            self.pipe.transformer = self.teacher
            path.parent.mkdir(exist_ok=True)
            np.save(path, made)
        loaded: NDArray[np.uint8] = np.load(path)
        return loaded

    def judged(self, name: str, model: Any) -> dict[str, Any]:
        """Score with its interval, difference to the teacher's in pairs, and PSNR to its images at equal seeds."""
        original, made = self.images("teacher", self.teacher), self.images(name, model)
        first, other = (self._passed(i) for i in (original, made))
        tasks = [p.meaning.task for p in self.scored]
        return {
            "score": shapes.score(other, tasks),
            "lost": int(((first == 1) & (other == 0)).sum()),
            "won": int(((first == 0) & (other == 1)).sum()),
            "psnr_db": mean_decibels(list(original), list(made)),
            "images": len(made),
        }

    def _passed(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        return np.asarray([float(shapes.check(i, p.meaning)) for i, p in zip(images, self.scored, strict=True)])

    def smaller(self, name: str, variant: Variant) -> tuple[PrunePlan, Any]:
        """The plan, and the model that it leaves, rounded to INT4; with the stages of `compress` if it is distilled."""
        if not variant.distilled:
            report = ContributionReport.load(self.base.report_path)
            plan = plan_for(self.family, self.config, report, variant.plan)
            basis = self.usual.basis(plan.modulation_rank) if plan.modulation_rank else None
            model = prune(self.family, self.teacher, self.config, plan, self.usual.mean, basis)
            return plan, self.rounded(model)
        ws = Workspace(self.out / "variants" / name, None)
        options = pipeline.preset("default", builtin=True)
        assert options.distill is not None
        pipeline.run_plan(ws, variant.plan, self.base.report_path)
        pipeline.run_prune(ws)
        self._distil(ws, replace(options.distill, steps=self.steps), replace(options.data, samples=2000))
        pipeline.run_quantize(ws, options.quantize)
        return ws.plan(), checkpoint.load_transformer(ws.out, quantized=True)

    def variant(self, name: str, variant: Variant) -> dict[str, Any]:
        """What is left, and its error."""
        plan, model = self.smaller(name, variant)
        row: dict[str, Any] = {"series": variant.series, "distilled": variant.distilled, "rank": plan.modulation_rank}
        row |= {"blocks": plan.blocks, "components": len(plan.components)}
        row |= {"parameters": plan.after.parameters, "int4_bytes": plan.after.int4_bytes}
        return row | {"error": self.error(model)}

    def drawn(self, name: str, variant: Variant) -> dict[str, Any]:
        """`judged` of a variant."""
        return self.judged(name, self.smaller(name, variant)[1])

    def _distil(self, ws: Workspace, options: Any, data: Any) -> None:
        ws.cache = self.out / "cache"  # the same images for all
        pipeline.run_distill(ws, options, data, _progress)

    def run(self) -> None:
        """Everything that is not known yet."""
        pipeline.run_analyze(self.base, pipeline.AnalyzeOptions(), _progress)
        report = ContributionReport.load(self.base.report_path)
        drops = [c.drop for c in report.contributions().values() if c.component is None]
        self.once("blocks", lambda: {"least": min(drops), "median": float(np.median(drops)), "most": max(drops)})
        self.once("ranks", self.ranks)
        for name, variant in variants().items():
            if not variant.distilled:
                self.once(f"variant {name}", functools.partial(self.variant, name, variant))
        for key in ("calibration", "auto", "storage", "guidance", "timesteps"):
            self.once(key, getattr(self, key))
        self.once("images teacher", lambda: self.judged("teacher", self.teacher))
        self.once("images float32-16", lambda: self.judged("float32-16", self.thin(16)))
        self.once("seen", self.seen)
        for name, variant in variants().items():
            self.once(f"variant {name}", functools.partial(self.variant, name, variant))
            self.once(f"images {name}", functools.partial(self.drawn, name, variant))


def _relative(found: torch.Tensor, target: torch.Tensor) -> float:
    return float((found - target).norm() / target.norm())


def _progress(what: str, done: int, total: int, note: str = "") -> None:
    if done % max(1, total // 10) == 0:
        print(f"  {what} {done}/{total} {note}", flush=True)


# ------------------------------------------------------------------------------------- what is shown


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _grid(found: dict[str, dict[str, float]], corner: str) -> str:
    columns = list(dict.fromkeys(c for row in found.values() for c in row))
    rows = [[name, *(_number(row.get(c)) for c in columns)] for name, row in found.items()]
    return table([corner, *columns], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:d}" if isinstance(value, int) else f"{value:.4f}"


def tables(found: dict[str, Any]) -> str:
    """Everything in Markdown."""
    parts = [
        f"{key}\n\n{_grid(found[key], key)}"
        for key in ("ranks", "calibration", "seen", "timesteps", "guidance")
        if key in found
    ]
    if "auto" in found:
        parts.append(
            table(["captions", *found["auto"]], [["auto", *(str(r or "full") for r in found["auto"].values())]])
        )
    if "storage" in found:
        parts.append(table(["rank 32", "error"], [[n, _number(v)] for n, v in found["storage"].items()]))
    head = ["", "rank", "gone", "INT4", "velocity error", "PSNR", "score, 95 % interval", "lost, won"]
    rows = []
    for name in dict.fromkeys(k.split(" ")[1] for k in found if k.startswith(("variant ", "images "))):
        made, seen = found.get(f"variant {name}", {}), found.get(f"images {name}", {})
        row = [name, str(made.get("rank") or "full"), "", "", _number(made.get("error")), "", "", ""]
        if made:
            row[2] = f"{len(made['blocks'])} blocks, {made['components']} components"
            row[3] = f"{made['int4_bytes'] / 1e6:.2f} MB"
        if seen:
            score, low, high = seen["score"]
            row[5] = f"{seen['psnr_db']:.1f} dB"
            row[6:] = [f"{score:.3f} [{low:.3f}, {high:.3f}]", f"{seen['lost']}, {seen['won']}"]
        rows.append(row)
    parts.append(table(head, rows))
    return "\n\n".join(parts) + "\n"


_STYLES = {
    "INT4 alone": ("#000000", "*"),
    "modulation only": ("#0072b2", "o"),
    "components only": ("#d55e00", "s"),
    "blocks only": ("#cc79a7", "v"),
    "modulation, then components": ("#009e73", "D"),
    "modulation, then blocks": ("#e69f00", "^"),
}
"""Okabe and Ito's colours, and a mark for each."""


def plot(found: dict[str, Any], path: Path) -> None:
    """Error against rank, error against bytes, score against bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    judged = any(f"images {key.removeprefix('variant ')}" in found for key in found if key.startswith("variant "))
    figure = Figure(figsize=(15 if judged else 10.5, 4.2))
    left, middle, *others = figure.subplots(1, 3 if judged else 2)
    rows = {int(r): v for r, v in found["ranks"].items() if r != "full"}
    left.plot(
        [max(r, 1) for r in rows], [v["float32"] for v in rows.values()], "o-", color="#0072b2", label="projected"
    )
    after = {r: v["int4"] for r, v in rows.items() if "int4" in v}
    left.plot(list(after), list(after.values()), "s--", color="#d55e00", label="projected, all weights INT4")
    for label, value, colour, line in (
        ("INT4, nothing projected", found["ranks"]["full"]["int4"], "#000000", ":"),
        ("the least block removed", found["blocks"]["least"], "#cc79a7", "--"),
    ):
        left.axhline(value, color=colour, lw=1, ls=line, label=label)
    left.set(xscale="log", yscale="log", xlabel="rank", ylabel="relative velocity error, held-out prompts")
    left.set_xticks([max(r, 1) for r in rows], [str(r) for r in rows])
    left.minorticks_off()
    left.legend(fontsize=8)
    for name, (colour, mark) in _STYLES.items():
        for distilled in (False, True):
            mine = [
                (made["int4_bytes"] / 1e6, made["error"], found.get(f"images {key.removeprefix('variant ')}"))
                for key, made in found.items()
                if key.startswith("variant ") and (made["series"], made["distilled"]) == (name, distilled)
            ]
            style: dict[str, Any] = {"color": colour, "marker": mark, "ms": 5, "lw": 1, "ls": "-" if distilled else ":"}
            style |= {"mfc": colour if distilled else "white", "label": f"{name}{', distilled' if distilled else ''}"}
            if mine:
                mine.sort(key=lambda m: m[0])
                middle.plot([size for size, *_ in mine], [error for _, error, _ in mine], **style)
            scored = [(size, *seen["score"]) for size, _, seen in mine if seen]
            for right in others if scored else []:
                size, centre, low, high = (np.array(column) for column in zip(*scored, strict=True))
                right.errorbar(size, centre, [centre - low, high - centre], capsize=2, **style)
    middle.set(ylim=(0, None), xlabel="INT4 weights, MB", ylabel="relative velocity error, held-out prompts")
    middle.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # no corner is free of marks
    for right in others:
        right.axhline(found["images teacher"]["score"][0], color="#000000", lw=1, ls=":", label="original")
        right.set(xlabel="INT4 weights, MB", ylabel="score on held-out prompts, 95 % interval")
        right.legend(fontsize=7)
    figure.tight_layout()
    with rc_context({"svg.hashsalt": "modulation"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m edgeprune.experiments.modulation", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, default=Path("build/modulation"))
    parser.add_argument("--per-task", type=int, default=10, help="held-out captions of each of seven tasks")
    parser.add_argument("--steps", type=int, default=200, help="of each distillation")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    study = Study(args.out, per_task=args.per_task, steps=args.steps)
    study.run()
    (args.out / "tables.md").write_text(tables(study.found), encoding="utf-8")
    plot(study.found, args.out / "modulation.svg")
    print(f"wrote {args.out / 'tables.md'} and modulation.svg")


if __name__ == "__main__":
    main()
