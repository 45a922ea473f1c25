"""Grids: what they may contain, what a run keeps, intervals with known answers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from shell import run_here
from teachers import rich_teacher
from tiny import tiny_pipeline
from typer.testing import CliRunner

from edgeprune.artefact.teachers import TEACHERS
from edgeprune.common.errors import InputError
from edgeprune.common.memory import ComputeOptions
from edgeprune.compare import page, run
from edgeprune.compare.grid import GRIDS, Grid, grid_named
from edgeprune.compare.summary import summarise
from edgeprune.metrics.scoring import CAPTIONS
from edgeprune.planning.plan import PrunePlan
from edgeprune.residency.streaming import _STREAM
from edgeprune.shapes import PLAIN, RICH
from edgeprune.stages import workspace
from edgeprune.stages.compress import preset
from edgeprune.stages.options import AnalyzeOptions, CompressOptions, DataOptions
from edgeprune.stages.work import Speeds
from edgeprune.stages.workspace import Workspace

GRID = """
budget = 0.25
reference = "ours"
seeds = 2
[distill]
steps = 2
batch = 2
[[rows]]
name = "koala"
group = "baselines"
plan = { method = "koala", protect_last = 0 }
[[rows]]
name = "ours"
plan = { method = "hpp", protect_first = 0, protect_last = 0 }
[[rows]]
name = "half"
plan = { method = "manual", blocks = "1" }
distill = false
quantize = false
"""
START = CompressOptions(analyze=AnalyzeOptions(count=2, components=False), data=DataOptions("shapes", 8))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.toml")), ids=lambda p: p.stem)
def test_grids_of_the_package(path: Path) -> None:
    grid = Grid.load(grid_named(path.stem), preset("default", world=PLAIN))
    rows = {row.name: row for row in grid.rows}
    assert {"bk-sdm", "koala"} <= rows.keys() and grid.reference in rows
    steps = {row.options.distill.steps for row in grid.rows if row.options.distill}
    assert len(steps) <= 1  # all are trained alike


def test_published_rows_are_what_their_names_say() -> None:
    """`pwp` freezes the prefix, the rest is trained alike; graded updates come with fine-grained removal alone."""
    grid = Grid.load(grid_named("demo"), preset("default", world=PLAIN))
    found = {}
    for row in grid.rows:
        if row.group.startswith("published"):
            training = row.options.distill
            assert training is not None
            found[row.name] = (row.options.plan.method, training.sensitivity, training.freeze_prefix)
    assert found == {
        "hpp": ("hpp", "off", False),
        "hpp-pwp": ("hpp", "off", True),
        "hybrid-pwp": ("hybrid", "off", True),
        "hybrid-pwp-graded": ("hybrid", "graded", True),
    }


def test_rows(tmp_path: Path) -> None:
    koala, ours, half = Grid.load(write(tmp_path / "grid.toml", GRID), START).rows
    assert koala.options.distill is not None and ours.options.distill is not None
    assert (ours.options.distill.sensitivity, ours.options.distill.steps, ours.seeds) == (None, 2, 2)
    assert [row.reads_contributions for row in (koala, ours, half)] == [False, True, False]
    assert half.options.distill is None and not half.quantized and half.seeds == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("budget = 0.25", "budget = 5", "budget: found 5"),
        ("budget = 0.25", "budgets = 0.25", "budget: found"),
        ("steps = 2", "steps = 'many'", "steps: found 'many'"),
        ("steps = 2", "step = 2", "found 'step', expected one of steps"),
        ("batch = 2", "batch = 0", "found 2, 0"),
        ('"koala", protect_last', '"koalas", protect_last', "found 'koalas', expected one of hpp"),
        ('name = "half"', 'name = "../half"', "name: found '../half'"),
        ('name = "half"', 'name = "ours"', "expected one of them, once"),
        ('reference = "ours"', 'reference = "theirs"', "reference: found 'theirs' among koala, ours, half"),
        ("[[rows]]", "[[rows", "not a readable TOML file"),
        ("seeds = 2", "work = 1000", "koala: distill.steps: the grid's work says how many steps it takes; remove one"),
    ],
)
def test_what_a_grid_may_not_contain(old: str, new: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="grid.toml: ") as caught:
        Grid.load(write(tmp_path / "grid.toml", GRID.replace(old, new, 1)), START)
    assert said in str(caught.value)


def test_unknown_preset() -> None:
    with pytest.raises(InputError, match="--preset: found 'x', expected one of demo"):
        grid_named("x")


def test_seeds_that_differ_are_seen(tmp_path: Path) -> None:
    """test_intervals.py checks known answers of the bootstrap itself."""
    grid = Grid.load(write(tmp_path / "grid.toml", GRID), START)
    run = {"blocks": [1], "components": [], "modulation_rank": None, "bytes": 50, "step_ratio": 0.5, "train_s": 1.0}
    scores = {"koala": [0.0, 1.0], "ours": [1.0, 1.0], "half": [0.5]}
    found: dict[str, Any] = {"original": {"scores": [1.0] * 50, "bytes": 100, "seconds": 1.0}}
    for name, values in scores.items():
        found |= {f"{name}/seed-{i}": run | {"scores": [v] * 50, "seconds": 2.0} for i, v in enumerate(values)}
    summary = summarise(found, grid, None)
    koala, ours, half = summary["rows"]
    assert koala["score"] == (0.5, 0, 1) and ours["score"] == (1, 1, 1)
    assert koala["relative_drop"] == (0.5, 0, 1) and koala["lead"] == (0.5, 0, 1) and ours["lead"] is None
    assert half["lead"] == (0.5, 0.5, 0.5) and half["bytes_ratio"] == 0.5 and summary["seconds"] == 11
    assert [row["verdict"] for row in summary["rows"]] == ["undecided", None, "wins"]  # koala's seeds differ
    found["koala/seed-1"] = found["koala/seed-1"] | {"blocks": [0]}
    assert summarise(found, grid, None)["rows"][0]["blocks"] is None


def test_a_row_of_one_seed_neither_wins_nor_loses(tmp_path: Path) -> None:
    text = GRID.replace('group = "baselines"', "seeds = 1")
    grid = Grid.load(write(tmp_path / "grid.toml", text), START)
    run = {"blocks": [1], "components": [], "modulation_rank": None, "bytes": 50, "step_ratio": 0.5, "train_s": 1.0}
    scores = {"koala/seed-0": 0.25, "ours/seed-0": 0.5, "ours/seed-1": 0.5, "half/seed-0": 0.75}
    found: dict[str, Any] = {name: run | {"scores": [value] * 50} for name, value in scores.items()}
    summary = summarise(found | {"original": {"scores": [1.0] * 50, "bytes": 100}}, grid, None)
    koala, ours, half = summary["rows"]
    assert koala["lead"] == (0.25, 0.25, 0.25) and koala["verdict"] == "one seed"
    assert (koala["one_seed"], ours["one_seed"], half["one_seed"]) == (True, False, False)
    assert half["verdict"] == "loses"  # not trained: another seed changes nothing
    shown = page.markdown(summary)
    assert "| koala (1 seed) |" in shown and "| half |" in shown
    assert "\n1 seed: the interval is over prompts only" in shown


def test_a_grid_runs_once_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_pipeline(source)
    grid = Grid.load(write(tmp_path / "grid.toml", GRID), START)
    prompts = ["a red circle", "two blue squares"]

    def compared() -> dict[str, Any]:
        return run.compare(Workspace(out / "original", str(source)), grid, "velocity", prompts, out)

    done: list[str] = []
    real = run._run

    def killed(base: Any, row: Any, *rest: Any) -> dict[str, Any]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(row.name)
        return real(base, row, *rest)

    monkeypatch.setattr(run, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        compared()
    assert done == ["koala", "koala"]
    monkeypatch.setattr(run, "_run", lambda base, row, *rest: done.append(row.name) or real(base, row, *rest))
    summary = compared()
    assert done == ["koala", "koala", "ours", "ours", "half"]
    assert compared() == summary and len(done) == 5

    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["koala"]["bytes_ratio"] < 0.3 and rows["koala"]["blocks"] and rows["koala"]["lead"] is not None
    assert rows["half"]["blocks"] == [1] and rows["half"]["bytes"] > rows["ours"]["bytes"]
    assert summary["original"]["score"][0] == 0 and rows["ours"]["score"][0] < 0
    assert len(list((out / "original" / "cache").glob("data-*"))) == 1  # made once for all rows
    assert not list((out / "koala" / "seed-0" / "cache").glob("data-*"))

    first = page.write(summary, out)
    pictures = [path.read_bytes() for path in first]
    assert [path.read_bytes() for path in page.write(summary, out)] == pictures
    assert "| koala (2 seeds) |" in (out / "compare.md").read_text()


def test_rows_of_equal_work_take_their_own_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_pipeline(source)
    text = GRID.replace("steps = 2\n", "").replace("seeds = 2", "work = 100")
    text = text.replace("protect_first = 0, protect_last = 0", "protect_first = 1, protect_last = 0")
    grid = Grid.load(write(tmp_path / "grid.toml", text), START)
    summary = run.compare(Workspace(out / "original", str(source)), grid, "velocity", ["a red circle"], out)
    assert summary["rows"][2]["steps"] is None
    ((koala,), (ours,)) = (row["steps"] for row in summary["rows"][:2])
    for name, steps, is_frozen in (("koala", koala, False), ("ours", ours, True)):
        plan = PrunePlan.load(out / name / "seed-0" / "plan.json")
        frozen = plan.first_pruned if is_frozen else 0
        assert steps == 100 // (2 * (plan.num_blocks + frozen + 3 * (len(plan.kept) - frozen))) > 0
    assert f"| koala (1 seed, {koala} steps) |" in page.markdown(summary)
    assert page._range([1000, 2000]) == "1,000 to 2,000"
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"^ours: distill\.states: a large model"):
        patch.setattr("edgeprune.stages.tail.is_small", lambda numbers: False)  # its prefix is frozen, koala's is not
        run.forecast_grid(source, grid, 1, "velocity", out)
    few = Grid.load(write(tmp_path / "few.toml", text.replace("work = 100", "work = 5")), START)
    with pytest.raises(InputError, match=r"^koala: work: found 5 evaluations of a block, expected at least "):
        run.forecast_grid(source, few, 1, "velocity", out)


def test_a_grid_of_days_is_refused_before_it_begins(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_pipeline(source)
    head, _, ours, _ = GRID.replace("seeds = 2", "seeds = 1").split("[[rows]]")
    grid = Grid.load(write(tmp_path / "grid.toml", f"{head}[[rows]]{ours}"), START)

    def compared(name: str, options: ComputeOptions) -> list[str]:
        base, lines = Workspace(out / name, str(source), compute=options), list[str]()
        base.speeds = Speeds(100.0)
        run.compare(base, grid, "velocity", ["a", "b"], out / "grid", lambda what, *_: lines.append(what))
        return lines

    with pytest.raises(InputError, match=r"^compare: at least [\w. ]+ here, on cpu; --yes runs it anyway$"):
        compared("a", ComputeOptions("cpu", longest_s=3600))
    with pytest.raises(InputError, match="--memory: found 0.00 GB, expected at least"):
        compared("b", ComputeOptions("cpu", 10**6))
    assert not (out / "grid").exists() and not (out / "a" / "analysis.json").exists()
    (said,) = (line for line in compared("c", ComputeOptions("cpu")) if line.startswith("compare: at least"))
    assert re.search(r" of memory or more, writes 0.0\d GB, \d+ evaluations of the transformer$", said)
    assert not any("at least" in line for line in compared("c", ComputeOptions("cpu", longest_s=1.0)))  # all is done


def test_one_large_model_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--memory`, blocks that the original keeps are released before a compressed model is opened."""
    source, out = tmp_path / "source", tmp_path / "out"
    tiny_pipeline(source)
    only = GRID[: GRID.index("[distill]")].replace('"ours"', '"half"') + GRID[GRID.rindex("[[rows]]") :]
    grid = Grid.load(write(tmp_path / "grid.toml", only), START)
    base = Workspace(out / "original", str(source), compute=ComputeOptions("cpu", 10**11))
    opened, real = list[tuple[Any, bool, bool]](), run.running

    def kept(model: Any) -> bool:
        return any(getattr(block, _STREAM).kept is not None for block in model.transformer_blocks)

    def running(*given: Any, **options: Any) -> Any:
        opened.append((real(*given, **options), kept(base.teacher), any(kept(model) for model, *_ in opened)))
        return opened[-1][0]

    monkeypatch.setattr(run, "running", running)
    run.compare(base, grid, "velocity", ["a", "b"], out)
    assert [(original, other) for _, original, other in opened] == [(False, False)] * 2 and not kept(opened[1][0])
    assert base.pipe.transformer is base.teacher


def test_what_is_linked_is_not_counted_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    tiny_pipeline(source)
    grid = Grid.load(write(tmp_path / "grid.toml", GRID), START)

    def written(linked: bool) -> int:
        monkeypatch.setattr(run, "is_linked", lambda *_: linked)
        return int(run.forecast_grid(source, grid, 2, "velocity", tmp_path / "out")["written_bytes"])

    files = [p for p in source.rglob("*") if p.is_file() and p.parent.name != "transformer"]
    assert written(False) - written(True) == 5 * sum(p.stat().st_size for p in files)


def test_the_command_forecasts_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.cli import app

    tiny_pipeline(tmp_path / "source")
    grid = write(tmp_path / "grid.toml", GRID)
    words = ["compare", str(tmp_path / "source"), "-o", str(tmp_path / "out"), "--grid", str(grid)]
    words += ["--data", "captions", "--prompts", str(write(tmp_path / "prompts.txt", "a lake\na hill\n"))]
    done = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["runs"] == 5 and found["training_steps"] == 8
    # 5 runs and the original, 2 prompts, one of velocity's states at each of 4 steps.
    assert found["score_evaluations"] == 6 * 2 * 4
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, [*words[: words.index("--prompts")], "--dry-run", "--json"])
    assert json.loads(done.stdout.splitlines()[-1])["score_evaluations"] == 6 * CAPTIONS * 4
    done = CliRunner().invoke(app, words[: words.index("--data")])
    assert isinstance(done.exception, InputError) and "no data to distill on; give --data FOLDER" in str(done.exception)
    monkeypatch.setattr(workspace, "least", lambda *_: Speeds(100.0))
    for more, said in (
        ((), r"^compare: at least .* here, on \w+; --yes runs it anyway$"),
        (("--time", "3h", "--device", "cpu"), r"^compare: at least .* here, on cpu; --yes runs it anyway$"),
        (("--memory", "1MB", "--yes"), "^--memory: found 0.00 GB, expected at least"),
        (("--device", "gpu"), "^--device: found 'gpu', expected one of auto"),
    ):
        done = CliRunner().invoke(app, [*words, *more])
        assert isinstance(done.exception, InputError) and re.search(said, str(done.exception)), done.exception


def test_the_command_takes_a_teacher_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its world's captions and checker, also without --data, as the built-in model."""
    words = ["compare", "--grid", str(write(tmp_path / "grid.toml", GRID.replace("seeds = 2", "seeds = 1")))]
    words += ["--per-task", "1", "--json", "--teacher"]
    for kind in ("rich-flux", "rich-sd3"):
        monkeypatch.setitem(TEACHERS, kind, rich_teacher(tmp_path / kind, kind))
        done = run_here(*words, kind, "-o", str(tmp_path / "out"), "--dry-run")
        found = json.loads(done.stdout.splitlines()[-1])
        # 3 runs and the original, 9 tasks, 2 steps with guidance: an input of FLUX, twice the evaluations of SD3.
        assert found["score_evaluations"] == 4 * 9 * 2 * (1 if kind == "rich-flux" else 2)
    done = run_here(*words, "rich-sd3", str(tmp_path / "rich-sd3"))
    assert done.returncode and done.stderr.count("\n") == 1
    assert "--teacher rich-sd3: " in done.stderr and "give a model or --teacher, not both" in done.stderr
    monkeypatch.setitem(TEACHERS, "rich-sd3", tmp_path / "nowhere")
    assert "make assets ONLY=rich-sd3" in run_here(*words, "rich-sd3", "-o", str(tmp_path / "out")).stderr


def test_a_grid_of_another_world(tmp_path: Path) -> None:
    source, out = rich_teacher(tmp_path / "source"), tmp_path / "out"
    text = GRID.replace('"ours"', '"half"', 1)
    grid = Grid.load(
        write(tmp_path / "grid.toml", text[: text.index("[distill]")] + text[text.rindex("[[rows]]") :]), START
    )
    base = Workspace(out / "original", str(source))
    prompts = run.prompts_to_score(base.world, None, 1)
    assert [RICH.grammar.parse(prompt).task for prompt in prompts] == [*RICH.grammar.names]
    summary = run.compare(base, grid, "shapes", prompts, out)
    assert summary["original"]["score"][0] == 0 and summary["rows"][0]["score"][0] == 0  # it is untrained
