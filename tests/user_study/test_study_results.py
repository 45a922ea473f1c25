"""The user study: what the answers amount to, in Python and on the command line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from studies import SCRIPT, VARIANTS, answer_all, image_folders, tiny_study

from edgeprune.common.errors import InputError
from edgeprune.user_study import design
from edgeprune.user_study.design import trials
from edgeprune.user_study.store import Store


def results_of(folder: Path) -> tuple[Any, Any]:
    pytest.importorskip("scipy")
    from edgeprune.user_study import results

    given = results.gather(design.read(folder), folder)
    return given, results.summarise(given)


def test_mos_with_known_answers(tmp_path: Path) -> None:
    folder = tiny_study(tmp_path)

    def reply(rater: int, trial: design.Trial) -> tuple[int, int]:
        if trial.asked is not None:
            return (trial.asked, trial.asked) if rater < 8 else (trial.asked, 6 - trial.asked or 1)
        if rater >= 8:
            return 1, 1  # would lower every score if it counted
        return 5 - trial.shown[0] - (rater + trial.prompt) % 2, 3

    answer_all(folder, 9, reply)
    _, summary = results_of(folder)
    assert summary["raters"] == {"answered": 9, "finished": 9, "missed_a_check": 1, "counted": 8}
    rows = {(row["variant"], row["question"]): row for row in summary["rows"]}
    assert [rows[v, "quality"]["mos"][0] for v in VARIANTS] == pytest.approx([4.5, 3.5, 2.5])
    assert rows["ours", "quality"]["drop"] == pytest.approx([1, 1, 1])  # paired: what raters share cancels
    assert rows["ours", "quality"]["relative_drop"][0] == pytest.approx(1 / 4.5)
    assert rows["original", "quality"]["drop"] is None and rows["ours", "quality"]["answers"] == 32
    assert rows["koala", "quality"]["p_raters"] == pytest.approx(2 * 2 / 2**8)  # Holm over two
    assert rows["koala", "quality"]["p_prompts"] == pytest.approx(2 * 2 / 2**4)
    assert rows["ours", "alignment"]["drop"] == [0, 0, 0] and rows["ours", "alignment"]["p_raters"] == 1
    low, high = rows["original", "quality"]["mos"][1:]
    assert low <= 4.5 <= high
    assert summary["krippendorff_alpha"]["alignment"] is None  # nothing varies
    assert 0.5 < summary["krippendorff_alpha"]["quality"] < 1


def test_pairs_with_known_answers(tmp_path: Path) -> None:
    folder = tiny_study(tmp_path, mode="pairs", variants=("original", "ours"), prompts=6)

    def reply(rater: int, trial: design.Trial) -> tuple[int, int]:
        if trial.asked is not None:
            return trial.asked, trial.asked
        to_ours = 1 if trial.shown[1] == 1 else -1
        return to_ours if trial.prompt < 3 else -to_ours if trial.prompt == 3 else 0, -to_ours

    answer_all(folder, 6, reply)
    _, summary = results_of(folder)
    quality, alignment = summary["rows"]
    assert (quality["variant"], quality["over"]) == ("ours", "original")
    assert quality["preferred"][0] == pytest.approx((3 + 0.5 * 2) / 6)  # three won, one lost, two ties
    assert alignment["preferred"] == [0, 0, 0]
    assert alignment["p_raters"] == alignment["p_prompts"] == 2 / 2**6


def test_results_before_there_are_any(tmp_path: Path) -> None:
    folder = tiny_study(tmp_path, checks=1)
    with pytest.raises(InputError, match="begin with: edgeprune study serve"):
        results_of(folder)
    Store(folder).close()
    with pytest.raises(InputError, match="nobody has answered yet"):
        results_of(folder)
    answer_all(folder, 1, lambda rater, trial: (1, 5))
    with pytest.raises(InputError, match="all 1 raters who answered missed an attention check"):
        results_of(folder)


def test_a_rater_who_stopped_counts_with_what_is_there(tmp_path: Path) -> None:
    folder = tiny_study(tmp_path, per_rater=3, checks=0)
    study, store = design.read(folder), Store(folder)
    rater = store.rater(store.join(lambda n: trials(study, n)))
    assert rater is not None
    store.answer(rater, 0, 4, 4, 1.0)
    store.close()
    _, summary = results_of(folder)
    assert summary["raters"] == {"answered": 1, "finished": 0, "missed_a_check": 0, "counted": 1}
    assert sorted(row["mos"] is None for row in summary["rows"]) == [False] * 2 + [True] * 4
    assert [row["mos"] for row in summary["rows"] if row["mos"]] == [[4, None, None]] * 2  # no interval of one answer
    from edgeprune.user_study import results

    assert "4.00 (n = 1)" in results._text("mos", summary["rows"][0]["mos"] or [4.0, None, None])
    results.plot(summary)
    json.dumps(summary, allow_nan=False)


def test_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from edgeprune.user_study import results

    folder = tiny_study(tmp_path)
    answer_all(folder, 3, lambda rater, trial: (trial.asked or 3 + rater % 2, trial.asked or 2 + trial.prompt % 3))
    given, summary = results_of(folder)
    written = {path.name: path for path in results.write(given, summary, folder / "results")}
    assert sorted(written) == ["answers.csv", "results.csv", "results.json", "results.png", "results.svg"]
    assert json.loads(written["results.json"].read_text()) == summary
    with written["answers.csv"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 14 and {row["variant"] for row in rows} == set(VARIANTS)
    assert SCRIPT in {row["prompt"] for row in rows} and {row["counted"] for row in rows} == {"0", "1"}
    with written["results.csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["mos_low"]) for row in table] == [row["mos"][1] for row in summary["rows"]]
    with Image.open(written["results.png"]) as image:
        assert image.width > 800


# ------------------------------------------------------------------------------------------- command line


def run(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgeprune.cli", "study", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_command_of_the_docs_makes_a_study(tmp_path: Path) -> None:
    image_folders(tmp_path / "images")
    names = [f"{name}=images/{name}" for name in VARIANTS]
    found = run("new", "taste", "--variants", *names, "--prompts", "images/prompts.txt", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["variants"] == list(VARIANTS)
    assert "original: original" in found.stderr and "next: edgeprune study serve taste" in found.stderr
    again = run("new", "taste", "--variants", *names, "--prompts", "images/prompts.txt", cwd=tmp_path)
    assert again.returncode == 2 and again.stderr == "error: taste: exists already; a new study needs a new folder\n"
    refused = run("serve", "taste", "--host", "0.0.0.0", cwd=tmp_path)
    assert refused.returncode == 2 and "add --token" in refused.stderr
    assert not (tmp_path / "taste" / "answers.sqlite").exists()


def test_results_on_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tiny_study(tmp_path)
    answer_all(folder, 2, lambda rater, trial: (trial.asked or 4, trial.asked or 3))
    found = run("results", "study", "--json", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout.splitlines()[-1])["raters"]["counted"] == 2
    assert "4.00 [4.00, 4.00]" in found.stdout and (folder / "results" / "results.svg").is_file()
