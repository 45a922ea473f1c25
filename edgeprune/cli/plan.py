"""`edgeprune plan`: which blocks and components to remove, and how a plan is shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeprune import api
from edgeprune.api.folders import check_begun, check_prompts, world_given
from edgeprune.cli import limits, options, screen
from edgeprune.common.errors import InputError

if TYPE_CHECKING:
    from edgeprune.planning.fit import Fit
    from edgeprune.planning.plan import PrunePlan

EPILOG = "Example: edgeprune plan --config transformer/config.json --scores scores.json --keep 0.79"


def plan(
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="DIR", help="Artefact folder that was analyzed. Give either this or --config."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A transformer's config.json: plan without weights."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Contribution scores.", show_default="analysis.json of the folder"),
    ] = None,
    fresh: options.Fresh = False,
    as_json: options.AsJson = False,
    keep: options.Keep = None,
    max_size: options.MaxSize = None,
    fit: options.FitTo = None,
    method: options.Method = None,
    modulation_rank: options.ModulationRank = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", rich_help_panel=options.METHOD,
            help="Text file with one prompt per line, on which --modulation-rank is measured.",
            show_default="those given to `analyze`, else captions for calibration",
        ),
    ] = None,
    protect_first: options.ProtectFirst = None,
    protect_last: options.ProtectLast = None,
    keep_components: options.KeepComponents = "",
    stand_in: options.StandIn = None,
    threshold: options.Threshold = None,
    blocks: options.Blocks = "",
    components: options.Components = "",
    group_size: options.GroupSize = 64,
    device: limits.Device = "auto",
    memory: limits.Memory = None,
    yes: limits.Yes = False,
    longest: limits.LongestTime = None,
) -> None:  # fmt: skip
    """Choose which parts to remove, and show what stays: plan.json."""
    if (out is None) == (config is None):
        raise InputError("plan: give exactly one of -o (a folder) and --config (a transformer's config.json)")
    if fit and config is not None:
        raise InputError("--fit counts a pipeline's files: give -o (a folder), not --config")
    check_prompts(prompts)
    chosen: dict[str, Any] = {
        "method": method, "keep": keep, "max_size": max_size, "fit": fit, "protect_first": protect_first,
        "protect_last": protect_last, "threshold": threshold, "blocks": blocks, "components": components,
        "group_size": group_size, "modulation_rank": modulation_rank, "prompts": prompts,
        "keep_components": keep_components, "stand_in": stand_in,
    }  # fmt: skip
    if out is None:
        from edgeprune.common.files import read_json
        from edgeprune.families import family_of
        from edgeprune.planning.budget import resident_bytes
        from edgeprune.planning.options import DEFAULT
        from edgeprune.planning.removable import Removable

        assert config is not None
        plan_options, content = options.plan_options(DEFAULT, **chosen), read_json(config)
        made = api.plan_of_config(config, plan_options, scores=scores)
        removable = Removable.shown(family_of(content, str(config)), content, plan_options)
        resident = resident_bytes(family_of(content, str(config)), content, made, plan_options.group_size)
        screen.table(plan_rows(made, made.modulation_rank, removable, plan_options.stand_in, resident))
        return screen.print_json(made.to_json()) if as_json else None
    check_begun(out)
    compute = limits.compute_options(device, memory, yes=yes, longest=longest)
    start = options.plan_options(api.preset("default", world=world_given(out)).plan, **chosen)
    with screen.bars() as progress:
        done = api.plan(out, start, scores=scores, compute=compute, fresh=fresh, progress=progress)
    screen.table(
        [
            *fit_rows(done.fit),
            *plan_rows(
                done.plan,
                done.options.modulation_rank,
                done.removable,
                done.options.stand_in,
                done.resident_bytes,
            ),
        ]
    )
    screen.say(f"next: edgeprune prune -o {screen.quoted(out)}")
    if as_json:
        screen.print_json(done.to_json())


def fit_rows(fit: Fit | None) -> list[tuple[str, str]]:
    """Return rows that show what a device's memory leaves for the transformer; none without a device.

    Stages are in memory one after the other where memory is short, so those before and after are not subtracted.
    """
    if fit is None:
        return []
    rows = [
        (f"memory of {fit.target}", fit.memory_bytes),
        ("before: the largest text encoder", fit.text_encoder_bytes),
        ("after: VAE decoder, estimated", fit.vae_decoder_bytes),
        ("- the transformer's activations, estimated", fit.activations_bytes),
        ("= for the transformer", fit.transformer_bytes),
    ]
    return [(name, f"{value / 1e9:,.3f} GB") for name, value in rows]


def plan_rows(
    plan: PrunePlan,
    asked_rank: int | str | None,
    removable: str = "",
    stand_in: int | str | None = None,
    resident_bytes: int | None = None,
) -> list[tuple[str, str]]:
    """Return rows that show what a plan removes and what stays.

    Args:
        plan: the plan.
        asked_rank: the modulation rank that was asked for; None where no model was there to measure it on.
        removable: which blocks could go, see `Removable.shown`; empty to leave that out.
        stand_in: what was asked for, see `PlanOptions`.
        resident_bytes: see `resident_bytes` in planning/budget.py; None to leave that out.
    """
    removed = ", ".join(map(str, plan.blocks)) or "none"
    parts = ", ".join(f"{b}:{c}" for b, c in plan.components)
    rank = _rank_shown(plan, asked_rank)
    before, after = plan.before, plan.after
    share = after.parameters / before.parameters
    return [
        ("blocks removed", f"{removed} (of {plan.num_blocks})"),
        *([("blocks that may go", removable)] if removable else []),
        *([("components removed", parts)] if parts else []),
        *([("modulation rank", rank)] if rank else []),
        *([("stand-ins", _stand_ins_shown(plan))] if plan.stand_ins or stand_in is not None else []),
        ("parameters", f"{before.parameters / 1e6:,.1f} M -> {after.parameters / 1e6:,.1f} M ({share:.1%})"),
        ("bf16", f"{before.bf16_bytes / 1e6:,.1f} MB -> {after.bf16_bytes / 1e6:,.1f} MB"),
        ("INT4 file", f"{after.int4_bytes / 1e6:,.1f} MB ({after.int4_bytes / before.bf16_bytes:.1%} of bf16)"),
        *(
            [("INT4 in memory", f"{resident_bytes / 1e6:,.1f} MB in each step; the modulation runs before the first")]
            if resident_bytes is not None
            else []
        ),
    ]


def _stand_ins_shown(plan: PrunePlan) -> str:
    """Return which removed runs have stand-ins."""
    if not plan.stand_ins:
        return "none: no block that stays follows a removed one"
    before = ", ".join(str(plan.kept[new]) for new in plan.stand_ins)
    return f"rank {plan.stand_in_rank}, before block{'s' * (len(plan.stand_ins) > 1)} {before}"


def _rank_shown(plan: PrunePlan, asked: int | str | None) -> str:
    """Return what to say about the modulation's rank; empty where there is nothing to say."""
    from edgeprune.planning.options import MODULATION_BELOW

    share = plan.after.parameters / plan.before.parameters
    if plan.modulation_rank is not None:
        return str(plan.modulation_rank)
    if asked == "auto":
        return "full: auto found no smaller rank that works for prompts it has not seen; give more --prompts"
    if asked is None and plan.method != "manual" and share < MODULATION_BELOW:
        return "full; --modulation-rank auto kept more in so small a file (docs/modulation.md)"
    return ""
