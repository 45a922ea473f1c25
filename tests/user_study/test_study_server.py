"""The user study without a browser: what the server shows, stores and refuses."""

from __future__ import annotations

import io
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from studies import get, join, post, request, served, tiny_study

from edgeprune.common.errors import InputError
from edgeprune.user_study.server import StudyServer

ANSWER = {"quality": 4, "alignment": 2, "seconds": 1.5}


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
        other = sqlite3.connect(folder / "answers.sqlite")  # as if the server were killed now
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
def test_a_body_that_is_not_an_object_is_refused(body: bytes, open_study: Any) -> None:
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
