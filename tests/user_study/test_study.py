"""The user study without a browser: who sees what, what is stored, what the server refuses, what the answers say."""

from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from studies import SCRIPT, VARIANTS, get, image_folders, join, post, request, served, tiny_study

from edgeprune.common.errors import InputError
from edgeprune.user_study import design
from edgeprune.user_study.design import Study, trials, williams
from edgeprune.user_study.make import make
from edgeprune.user_study.server import StudyServer
from edgeprune.user_study.store import Store

ANSWER = {"quality": 4, "alignment": 2, "seconds": 1.5}


def study_of(mode: str, variants: int, prompts: int, per_rater: int, checks: int = 0) -> Study:
    names = tuple(f"v{i}" for i in range(variants))
    texts = tuple(map(str, range(prompts)))
    return Study("0" * 16, "t", mode, 0, names, texts, texts, per_rater, checks)


# ------------------------------------------------------------------------------------------- design


@pytest.mark.parametrize("count", range(1, 8))
def test_in_a_williams_square_all_places_and_all_neighbours_are_equally_frequent(count: int) -> None:
    rows = williams(count)
    assert all(sorted(row) == list(range(count)) for row in rows)
    places = Counter((place, value) for row in rows for place, value in enumerate(row))
    follows = Counter(pair for row in rows for pair in itertools.pairwise(row))
    assert len(set(places.values())) == 1
    assert len(follows) == count * (count - 1) and len(set(follows.values())) <= 1


@pytest.mark.parametrize(
    ("mode", "variants", "prompts", "per_rater"),
    [
        ("mos", 3, 4, 12),
        ("mos", 3, 7, 5),
        ("mos", 2, 6, 6),
        ("pairs", 2, 6, 4),
        ("pairs", 3, 4, 12),
        ("pairs", 3, 5, 4),
    ],
)
def test_every_cell_is_shown_equally_often(mode: str, variants: int, prompts: int, per_rater: int) -> None:
    study = study_of(mode, variants, prompts, per_rater)
    cells = prompts * len(design.conditions(mode, variants))
    seen: Counter[Any] = Counter()
    sides: Counter[Any] = Counter()
    for rater in range(4 * cells):
        mine = trials(study, rater)
        assert len(mine) == per_rater
        assert len({(t.prompt, frozenset(t.shown)) for t in mine}) == per_rater  # nothing twice
        seen.update((t.prompt, frozenset(t.shown)) for t in mine)
        sides.update((t.prompt, t.shown) for t in mine)
        own = Counter(frozenset(t.shown) for t in mine)
        assert max(own.values()) - min(own[frozenset(c)] for c in design.conditions(mode, variants)) <= 2
        assert max(seen.values()) - (min(seen.values()) if len(seen) == cells else 0) <= 1
    assert len(seen) == cells and len(set(seen.values())) == 1
    assert len(sides) == cells * (2 if mode == "pairs" else 1)
    assert len(set(sides.values())) == 1  # left as often as right, for every prompt and pair


def test_order_is_balanced_random_and_repeatable() -> None:
    study = study_of("mos", 4, 8, 32)
    places: Counter[Any] = Counter()
    first = Counter(
        (place, t.shown[0]) for r in range(4) for place, t in enumerate(trials(study_of("mos", 4, 8, 4), r))
    )
    assert len(first) == 16  # in the first four trials as well
    again = 0
    for rater in range(10 * len(williams(4))):
        mine = trials(study, rater)
        places.update((place % 4, t.shown[0]) for place, t in enumerate(mine))
        again += sum(a.prompt == b.prompt for a, b in itertools.pairwise(mine))
        assert mine == trials(study, rater)
    assert len(set(places.values())) == 1
    assert again <= 0.01 * 40 * 31  # only at a rater's end, where nothing else may be left; by chance it were 10 %
    assert [t.prompt for t in trials(study, 0)] != [t.prompt for t in trials(study, 4)]


@pytest.mark.parametrize("mode", design.MODES)
def test_checks_come_in_every_part_but_never_first(mode: str) -> None:
    asked = set()
    for rater in range(40):
        mine = trials(study_of(mode, 3, 8, 24, checks=3), rater)
        places = [i for i, t in enumerate(mine) if t.asked is not None]
        assert len(mine) == 27 and len(places) == 3 and 0 < places[0] < 10 < places[2]
        asked |= {t.asked for t in mine}
    assert asked == {None, *design.SCALE[mode]} - {0}


# ------------------------------------------------------------------------------------------- make


def test_a_study_keeps_pixels_and_nothing_else_of_a_file(tmp_path: Path) -> None:
    folders = image_folders(tmp_path / "in")
    note = PngInfo()
    note.add_text("model", "ours")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folders["ours"] / "000.png", pnginfo=note, icc_profile=b"ours")
    Image.new("RGB", (8, 8), (7, 7, 7)).save(folders["ours"] / "001.webp", lossless=True)
    (folders["ours"] / "001.png").unlink()
    made = make(tmp_path / "study", folders, prompts=tmp_path / "in" / "prompts.txt", title="T", seed=3)
    assert design.read(tmp_path / "study") == made
    assert made.prompts[0] == SCRIPT and made.files == ("000", "001", "002", "003") and made.per_rater == 12
    for prompt, colour in ((0, (1, 2, 3)), (1, (7, 7, 7))):
        path = tmp_path / "study" / made.image(1, prompt)
        with Image.open(path) as image:
            assert image.format == "PNG" and image.info == {} and image.getpixel((0, 0)) == colour
    assert not list(tmp_path.glob("*.tmp"))


def test_prompts_of_an_imagefolder(tmp_path: Path) -> None:
    folders = image_folders(tmp_path / "in", prompts=2)
    lines = [{"file_name": "001.png", "text": "second"}, {"file_name": "000.png", "text": "first"}]
    (folders["original"] / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert make(tmp_path / "study", folders).prompts == ("first", "second")


def link_out(root: Path) -> None:
    (root / "ours" / "000.png").unlink()
    (root / "ours" / "000.png").symlink_to(root / "koala" / "000.png")


def metadata(name: str, text: Any = "x") -> Any:
    return lambda root: (root / "prompts.jsonl").write_text(json.dumps({"file_name": name, "text": text}) + "\n")


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (lambda root: (root / "ours" / "001.png").unlink(), {}, "ours: no image named 001; expected equal names"),
        (lambda root: (root / "original" / "001.png").unlink(), {}, "original: no image named 001"),
        (lambda root: Image.new("RGB", (9, 8)).save(root / "ours" / "001.png"), {}, "9x8"),
        (lambda root: (root / "ours" / "001.png").write_bytes(b"no"), {}, "001.png: not a readable image"),
        (lambda root: Image.new("L", (8, 8)).save(root / "ours" / "001.jpg"), {}, "one image of a name"),
        (lambda root: shutil.rmtree(root / "ours"), {}, "ours: no such folder"),
        (link_out, {}, "000.png: leads out of the folder"),
        (lambda root: (root / "prompts.txt").write_text("one\n\n"), {}, "found 1 prompts, expected 4"),
        (lambda root: (root / "prompts.txt").write_bytes(b"\xff"), {}, "prompts.txt: not readable"),
        (metadata("../ours/000.png"), {"prompts": "prompts.jsonl"}, "prompts.jsonl:1: file_name: '../ours/000.png'"),
        (metadata("/etc/passwd"), {"prompts": "prompts.jsonl"}, "file_name: '/etc/passwd' leads out"),
        (metadata("000.png"), {"prompts": "prompts.jsonl"}, "no line for the image 001"),
        (metadata("000.png", 7), {"prompts": "prompts.jsonl"}, "text: found 7"),
        (lambda root: None, {"prompts": None}, "metadata.jsonl: no such file; give --prompts"),
        (lambda root: None, {"mode": "stars"}, "--mode: found 'stars', expected mos or pairs"),
        (lambda root: None, {"per_rater": 13}, "--per-rater: found 13, expected 1 to 12"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    spoil: Any, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    root = tmp_path / "in"
    folders = image_folders(root)
    spoil(root)
    options = {"prompts": "prompts.txt", **options}
    prompts = options.pop("prompts")
    with pytest.raises(InputError) as caught:
        make(tmp_path / "study", folders, prompts=root / prompts if prompts else None, **options)
    assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["..", "a/b", "/abs", "", "a b", "$x$", "x" * 41])
def test_names_of_variants_cannot_lead_anywhere(name: str, tmp_path: Path) -> None:
    folders = image_folders(tmp_path / "in")
    with pytest.raises(InputError, match="variant"):
        make(tmp_path / "study", {"original": folders["original"], name: folders["ours"]})


# ------------------------------------------------------------------------------------------- server


def test_a_rater_goes_through_a_study(tmp_path: Path) -> None:
    with served(tiny_study(tmp_path, checks=1)) as server:
        assert get(server, "/api/study")["trials"] == 13
        token = join(server)
        state = get(server, f"/api/r/{token}")
        assert len(state["trials"]) == 13 and state["answered"] == []
        for trial in range(13):
            status, headers, body = request(server, "GET", f"/api/r/{token}/image/{trial}/0")
            assert (status, headers["content-type"], body[:4]) == (200, "image/png", b"\x89PNG")
            answered = post(server, f"/api/r/{token}/answers", {"trial": trial, **ANSWER})["answered"]
            assert answered == list(range(trial + 1))


def test_an_image_is_the_trials_variant_of_its_prompt(tmp_path: Path) -> None:
    with served(tiny_study(tmp_path, mode="pairs")) as server:
        token = join(server)
        rater = server.store.rater(token)
        assert rater is not None
        for index, trial in enumerate(rater.trials):
            for side, variant in enumerate(trial.shown):
                _, _, body = request(server, "GET", f"/api/r/{token}/image/{index}/{side}")
                with Image.open(io.BytesIO(body)) as image:
                    assert image.getpixel((0, 0)) == (40 * variant, 20 * trial.prompt, 99)
        assert request(server, "GET", f"/api/r/{token}/image/0/2")[0] == 404


def test_no_reply_names_a_variant_a_file_or_another_host(tmp_path: Path) -> None:
    names = ("teacherXL", "prunedXL", "rivalXL")
    with served(tiny_study(tmp_path, variants=names)) as server:
        token = join(server)
        paths = ["/", f"/r/{token}", "/page.js", "/page.css", "/page.svg", "/api/study", f"/api/r/{token}"]
        for path in [*paths, f"/api/r/{token}/image/0/0", f"/api/r/{token}/image/1/0"]:
            status, headers, body = request(server, "GET", path)
            assert status == 200
            told = str(headers).encode() + body
            assert not any(name.encode() in told for name in [*names, "000.png", "images/"]), path
            assert "image" in path or b"://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
            assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
            assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
            assert "set-cookie" not in headers


def test_the_first_answer_stands_however_often_it_is_sent(tmp_path: Path) -> None:
    with served(tiny_study(tmp_path)) as server:
        token = join(server)
        answers = [{"trial": 0, **ANSWER, "quality": 1 + i % 5} for i in range(20)]
        post(server, f"/api/r/{token}/answers", answers[0])
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda answer: post(server, f"/api/r/{token}/answers", answer), answers))
        assert [a.quality for a in server.store.answers()] == [1]


def test_an_answer_is_on_disk_before_the_reply_and_outlives_the_server(tmp_path: Path) -> None:
    folder = tiny_study(tmp_path)
    with served(folder) as server:
        token = join(server)
        before = get(server, f"/api/r/{token}")
        post(server, f"/api/r/{token}/answers", {"trial": 3, **ANSWER})
        other = sqlite3.connect(folder / "answers.sqlite")  # as if this one were killed now
        assert other.execute("SELECT rater, trial, quality, alignment, seconds FROM answers").fetchall() == [
            (0, 3, 4, 2, 1.5)
        ]
        other.close()
    with served(folder) as server:
        after = get(server, f"/api/r/{token}")
        assert after == {**before, "answered": [3]}
        join(server)
        assert [r.number for r in server.store.raters()] == [0, 1]


def test_ten_raters_at_once(tmp_path: Path) -> None:
    def rate(server: StudyServer) -> str:
        token = join(server)
        for trial in range(5):
            assert request(server, "GET", f"/api/r/{token}/image/{trial}/0")[0] == 200
            post(server, f"/api/r/{token}/answers", {"trial": trial, **ANSWER})
        return token

    with served(tiny_study(tmp_path, per_rater=4, checks=1)) as server, ThreadPoolExecutor(10) as pool:
        tokens = list(pool.map(rate, [server] * 10))
        assert len(set(tokens)) == 10
        assert sorted(r.number for r in server.store.raters()) == list(range(10))
        assert len(server.store.answers()) == 50


TRAVERSALS = [
    "/../study.json",
    "/..%2fstudy.json",
    "/study.json",
    "/answers.sqlite",
    "/page.py",
    "/page.html/../../server.py",
    "//etc/passwd",
    "/etc/passwd",
    "/images/original/0000.png",
    "/api/r/{token}/image/../../study.json",
    "/api/r/{token}/image/..%2f..%2fstudy.json/0",
    "/api/r/{token}/image//etc/passwd/0",
    "/api/r/{token}/image/0/original",
    "/api/r/{token}/image/99/0",
    "/api/r/{token}/image/-1/0",
    "/api/r/{token}/image/0/1",
    "/api/r/nobody/image/0/0",
    "/api/r/../image/0/0",
    "//[",
]


@pytest.fixture(scope="module")
def open_study(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with served(tiny_study(tmp_path_factory.mktemp("open"))) as server:
        yield server, join(server)


@pytest.mark.parametrize("path", TRAVERSALS)
def test_nothing_but_the_study_can_be_asked_for(path: str, open_study: Any) -> None:
    server, token = open_study
    status, _, body = request(server, "GET", path.format(token=token))
    assert status in (400, 404) and json.loads(body).keys() == {"error"}


@pytest.mark.parametrize("target", ["outside.png", "/etc/passwd"])
def test_a_link_that_leads_out_of_the_study_is_refused(target: str, tmp_path: Path) -> None:
    folder = tiny_study(tmp_path, variants=("original", "ours"))
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    linked = folder / "images" / "ours" / "0000.png"

    def link() -> None:
        linked.unlink()
        linked.symlink_to(tmp_path / target)

    with served(folder) as server:
        token = join(server)
        link()  # while it runs
        rater = server.store.rater(token)
        assert rater is not None
        statuses = {
            (t.prompt, t.shown): request(server, "GET", f"/api/r/{token}/image/{i}/0")[0]
            for i, t in enumerate(rater.trials)
        }
        assert statuses.pop((0, (1,))) == 404 and set(statuses.values()) == {200}
    with pytest.raises(InputError, match="leads out of the study's folder"):
        StudyServer(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("variants", ["original", "../../etc"]),
        ("variants", ["original", "/etc"]),
        ("variants", ["original", "original"]),
        ("variants", "original"),
        ("mode", "stars"),
        ("prompts", [7]),
        ("files", []),
        ("per_rater", 0),
        ("checks", True),
        ("id", "../x"),
    ],
)
def test_a_study_file_that_was_changed_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    path = tiny_study(tmp_path) / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(InputError, match=name.rstrip("s")):
        StudyServer(path.parent)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"quality": 6}, 400),
        ({"quality": 0}, 400),
        ({"quality": True}, 400),
        ({"quality": "4"}, 400),
        ({"quality": None}, 400),
        ({"alignment": 2.0}, 400),
        ({"trial": "0"}, 400),
        ({"trial": 14}, 404),
        ({"trial": -1}, 404),
        ({"seconds": -1}, 400),
        ({"seconds": float("nan")}, 400),
        ({"seconds": 1e9}, 400),
        ({"seconds": None}, 400),
        ({"seconds": "x" * 5000}, 413),
    ],
)
def test_an_answer_off_the_scale_is_refused(change: dict[str, Any], status: int, open_study: Any) -> None:
    server, token = open_study
    found, _, body = request(server, "POST", f"/api/r/{token}/answers", {"trial": 0, **ANSWER, **change})
    assert found == status and "error" in json.loads(body)
    assert server.store.answers() == []


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 3000, b"\xff"])
def test_a_body_that_is_no_object_is_refused(body: bytes, open_study: Any) -> None:
    server, token = open_study
    assert request(server, "POST", f"/api/r/{token}/answers", body)[0] == 400


def test_another_sites_page_can_neither_send_nor_read(open_study: Any) -> None:
    server, token = open_study
    plain = {"Content-Type": "text/plain"}
    assert request(server, "POST", "/api/raters", {}, plain)[0] == 415
    assert request(server, "GET", "/", headers={"Host": "rebound.example"})[0] == 403
    assert request(server, "GET", f"/api/r/{token}", headers={"Host": "rebound.example:80"})[0] == 403
    assert request(server, "GET", "/", headers={"Host": "localhost:1"})[0] == 200
    assert request(server, "GET", "/", headers={"Host": "[::1]:1"})[0] == 200


def test_what_cannot_be_stored_is_an_error_so_that_the_page_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(tiny_study(tmp_path)) as server:
        token = join(server)
        server.store._connection.execute("PRAGMA query_only = 1")
        assert request(server, "POST", f"/api/r/{token}/answers", {"trial": 0, **ANSWER})[0] == 500
        assert "answers.sqlite" in capsys.readouterr().err
        server.store._connection.execute("PRAGMA query_only = 0")
        post(server, f"/api/r/{token}/answers", {"trial": 0, **ANSWER})


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.invalid", ""])
def test_another_address_needs_a_token(host: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="add --token"):
        StudyServer(tiny_study(tmp_path), host=host)


def test_with_a_token_only_its_link_opens(tmp_path: Path) -> None:
    folder = tiny_study(tmp_path)
    with pytest.raises(InputError, match="8 or more"):
        StudyServer(folder, host="0.0.0.0", token="short")
    with served(folder, host="0.0.0.0", token="long-secret") as server:
        assert server.address.endswith("/?token=long-secret")
        for query in ("", "?token=", "?token=wrong-secret", "?token=%ff", "?other=long-secret"):
            assert request(server, "GET", f"/api/study{query}")[0] == 403
            assert request(server, "POST", f"/api/raters{query}", {})[0] == 403
        assert server.store.raters() == []
        token = post(server, "/api/raters?token=long-secret", {})["rater"]
        assert get(server, f"/api/r/{token}")["answered"] == []  # a rater's own link is a secret too
        assert request(server, "GET", "/", headers={"Host": "study.example"})[0] == 200


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    folder = tiny_study(tmp_path)
    with served(folder) as server, pytest.raises(InputError, match="cannot listen there"):
        StudyServer(folder, port=server.server_address[1])


# ------------------------------------------------------------------------------------------- results


def test_krippendorffs_own_example() -> None:
    """Krippendorff 2011, section C: four observers, twelve units, missing values; interval alpha 0.849."""
    pytest.importorskip("scipy")
    from edgeprune.user_study.statistics import Ratings, alpha

    lines = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
    cells = [(float(v), r, u) for r, line in enumerate(lines) for u, v in enumerate(line.split()) if v != "."]
    value, rater, unit = (np.asarray(column) for column in zip(*cells, strict=True))
    found = alpha(Ratings(value, rater, unit, np.zeros(len(value), int), 1))
    assert found == pytest.approx(0.849, abs=5e-4)
    same = Ratings(np.full(4, 3.0), np.arange(4), np.zeros(4, int), np.zeros(4, int), 1)
    assert alpha(same) is None


def test_paired_test_and_holm() -> None:
    pytest.importorskip("scipy")
    from edgeprune.user_study.statistics import holm, paired_test

    assert paired_test(np.ones(5)) == 2 / 2**5  # all signs alike: two of 32
    assert paired_test(np.array([1.0, -1.0, np.nan])) == 1
    assert paired_test(np.array([1.0, np.nan])) is None
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])


def test_the_interval_covers_the_truth_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ratings with effects of raters, prompts and both, a mean of 3: about 95 of 100 intervals have it."""
    pytest.importorskip("scipy")
    from edgeprune.user_study import statistics

    rng, inside = np.random.default_rng(1), 0
    rater, prompt = (grid.ravel() for grid in np.indices((15, 20)))
    zero = np.zeros(len(rater), int)
    monkeypatch.setattr(statistics, "DRAWS", 200)
    for _ in range(40):
        effects = rng.normal(0, 0.5, 15)[rater] + rng.normal(0, 0.5, 20)[prompt] + rng.normal(0, 0.7, len(rater))
        ratings = statistics.Ratings(3 + effects, rater, prompt, zero, 1)
        low, high = statistics.interval(statistics.bootstrap(ratings))
        inside += bool(low[0] <= 3 <= high[0])
    assert inside >= 33  # of 40; below it by chance once in a thousand times


def answer_all(folder: Path, raters: int, reply: Any) -> None:
    """Raters who answer every trial by `reply(rater, trial)`: quality, alignment."""
    study, store = design.read(folder), Store(folder)
    store._connection.execute("PRAGMA synchronous = OFF")  # hundreds of waits for the disk
    for number in range(raters):
        rater = store.rater(store.join(lambda n: trials(study, n)))
        assert rater is not None
        for index, trial in enumerate(rater.trials):
            quality, alignment = reply(number, trial)
            store.answer(rater, index, quality, alignment, 2.0)
    store.close()


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
            return 1, 1  # would pull all down, were it counted
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
    assert again.returncode == 2 and again.stderr == "error: taste: is there already; a new study needs a new folder\n"
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
