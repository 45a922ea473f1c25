"""Plots of reports: which figures are drawn, reproducible bytes, intervals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from edgeprune.analysis.contribution import ContributionReport, groups
from edgeprune.analysis.plots import figures, save
from edgeprune.families import family_of

DATA = Path(__file__).parents[1] / "samples"
CONFIGS = json.loads((DATA / "transformer_configs.json").read_text())


def report(name: str, *, joint: bool, **overrides: object) -> ContributionReport:
    config = CONFIGS[name] | overrides
    found = groups(family_of(config), config, joint=joint)
    scores = {g: [-0.01 * (i % 40), -0.02 * (i % 40)] for i, g in enumerate(found)}
    count = family_of(config).block_count(config)
    return ContributionReport("", "x", count, "velocity", ["a", "b"], [0.0, 0.0], scores)


@pytest.mark.parametrize(("name", "panels", "together"), [("sd3.5-medium", 7, 6), ("flux.1-dev", 6, 8)])
def test_a_panel_for_each_kind_of_part(name: str, panels: int, together: int) -> None:
    drawn = figures(report(name, joint=True), removed=((3, None),))
    assert list(drawn) == ["contributions", "joint"]
    first, second = (draw() for draw in drawn.values())
    assert (len(first.axes), len(second.axes)) == (panels, together)
    blocks = first.axes[0].containers
    assert len(blocks) == 2, "bars and their intervals"
    hatched = [i for i, bar in enumerate(first.axes[0].patches) if bar.get_hatch()]
    assert hatched == [3]
    assert list(figures(report(name, joint=False))) == ["contributions"]


def test_same_bytes_whatever_the_user_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = report("sd3.5-large", joint=True, num_layers=2)
    first = save(made, tmp_path / "a")
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    second = save(made, tmp_path / "b")
    assert [p.name for p in first] == ["contributions.svg", "contributions.png", "joint.svg", "joint.png"]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    with Image.open(first[1]) as image:
        assert image.width > 600


def test_a_published_summary_has_no_intervals(tmp_path: Path) -> None:
    scores = ContributionReport.load(DATA / "sd35_large_turbo_blocks_hpsv2.json")
    assert [p.suffix for p in save(scores, tmp_path)] == [".svg", ".png"]
    (figure,) = (draw() for draw in figures(scores).values())
    assert len(figure.axes[0].containers) == 1 and "interval" not in figure.get_suptitle()


def test_one_prompt_has_no_intervals() -> None:
    made = report("sd3.5-medium", joint=False)
    one = dataclasses.replace(made, prompts=["a"], untouched=[0.0], scores={g: s[:1] for g, s in made.scores.items()})
    assert {c.half_width for c in one.contributions().values()} == {None}
    (figure,) = (draw() for draw in figures(one).values())
    assert len(figure.axes[0].containers) == 1 and "interval" not in figure.get_suptitle()
