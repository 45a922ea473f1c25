"""The user study in a real browser (Debian's chromium, headless): run with `make check-browser`.

The database decides, so every walk ends by reading it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from studies import SCRIPT, served, tiny_study

from edgeprune.user_study.server import StudyServer

pytestmark = pytest.mark.browser
SHOWN = "#images:not(.wait) img"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        # Without a path, playwright takes the browser that `playwright install chromium` installed.
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@contextmanager
def rater(browser: Any, server: StudyServer, **options: Any) -> Iterator[Any]:
    """Open the study's first page in a new browser profile; errors on the page fail the test."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(server.address)
    try:
        yield page
        # The browser itself reports connections that the test took away.
        assert [c for c in complaints if "ERR_INTERNET_DISCONNECTED" not in c and "ERR_CONNECTION" not in c] == []
    finally:
        context.close()


def begin(page: Any) -> None:
    page.click("#start")
    page.wait_for_selector(SHOWN)


def answer(page: Any, *, keys: str = "34") -> None:
    """Answer one trial by keyboard, an attention check as it asks."""
    page.wait_for_selector(SHOWN)
    if page.locator("#text.asked").count():
        digit = page.inner_text("#text").split("“")[1][0]
        keys = digit * 2
    for key in keys:
        page.keyboard.press(key)
    page.keyboard.press("Enter")


def count(page: Any) -> str:
    return str(page.inner_text("#count"))


def wait_for_end(page: Any, trials: int) -> None:
    page.wait_for_selector(f"#end-what:has-text('All {trials} answers are stored')")


def stored(server: StudyServer) -> list[tuple[int, int]]:
    return [(a.rater, a.trial) for a in server.store.answers()]


@pytest.fixture()
def server(tmp_path: Path) -> Iterator[StudyServer]:
    """Three variants of two prompts, one attention check: seven trials."""
    with served(tiny_study(tmp_path, prompts=2, size=300, checks=1)) as running:
        yield running


def test_a_rater_finishes_by_keyboard(browser: Any, server: StudyServer) -> None:
    with rater(browser, server) as page:
        begin(page)
        for number in range(1, 8):
            assert count(page) == f"{number} of 7"
            answer(page)
        wait_for_end(page, 7)
    answers = server.store.answers()
    assert len(answers) == 7
    (who,) = server.store.raters()
    for given in answers:
        asked = who.trials[given.trial].asked
        assert (given.quality, given.alignment) == ((asked, asked) if asked else (3, 4))
        assert 0 < given.seconds < 20


@pytest.mark.parametrize("mode", ["mos", "pairs"])
def test_a_rater_finishes_by_touch_on_a_phone(mode: str, browser: Any, tmp_path: Path) -> None:
    with (
        served(tiny_study(tmp_path, prompts=2, size=300, checks=0, mode=mode)) as server,
        rater(browser, server, **PHONE) as page,
    ):
        page.tap("#start")
        for _ in range(6):
            page.wait_for_selector(SHOWN)
            assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
            for name in ("quality", "alignment"):
                page.tap(f"label:has(input[name={name}][value='1'])")
            box = page.locator("label:has(input)").first.bounding_box()
            assert box["width"] >= 44 and box["height"] >= 44  # a finger's width
            page.tap("#next")
        wait_for_end(page, 6)
        assert {(a.quality, a.alignment) for a in server.store.answers()} == {(1, 1)}


def test_pairs_by_arrows(browser: Any, tmp_path: Path) -> None:
    with served(tiny_study(tmp_path, prompts=1, size=300, checks=0, mode="pairs")) as server:
        with rater(browser, server) as page:
            begin(page)
            for keys in (("ArrowLeft", "ArrowRight"), ("ArrowDown", "ArrowLeft"), ("3", "1")):
                page.wait_for_selector(SHOWN)
                for key in (*keys, "Enter"):
                    page.keyboard.press(key)
            wait_for_end(page, 3)
        assert [(a.quality, a.alignment) for a in server.store.answers()] == [(-1, 1), (0, -1), (1, -1)]


def test_a_reload_in_the_middle_continues(browser: Any, server: StudyServer) -> None:
    with rater(browser, server) as page:
        begin(page)
        for _ in range(3):
            answer(page)
        page.wait_for_selector("#saved:has-text('Saved')")
        text = page.inner_text("#text")
        page.reload()
        page.wait_for_selector(SHOWN)
        assert count(page) == "4 of 7" and page.inner_text("#text") == text
        # Also from the study's own link: this browser knows its rater.
        page.goto(server.address)
        page.click("#go-on")
        page.wait_for_selector(SHOWN)
        assert count(page) == "4 of 7"
        for _ in range(4):
            answer(page)
        wait_for_end(page, 7)
    assert stored(server) == [(0, trial) for trial in range(7)]
    assert len(server.store.raters()) == 1


def test_a_double_click_answers_once(browser: Any, server: StudyServer) -> None:
    with rater(browser, server) as page:
        page.dblclick("#start")
        for number in range(1, 4):
            page.wait_for_selector(SHOWN)
            assert count(page) == f"{number} of 7"
            page.dblclick("label:has(input[name=quality][value='5'])")
            page.dblclick("label:has(input[name=alignment][value='1'])")
            page.dblclick("#next")
        page.wait_for_selector(SHOWN)
        for key in ("2", "2", "Enter", "Enter", "Enter"):
            page.keyboard.press(key)
        page.wait_for_selector(SHOWN)
        page.keyboard.press("2")  # one question alone does not answer the trial
        page.keyboard.press("Enter")
        assert count(page) == "5 of 7"
        page.wait_for_selector("#saved:has-text('Saved')")
    assert stored(server) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert len(server.store.raters()) == 1


def test_backspace_takes_back_and_zoom_opens_and_closes(browser: Any, server: StudyServer) -> None:
    with rater(browser, server) as page:
        begin(page)
        for key in ("1", "Backspace", "5", "4", "z"):
            page.keyboard.press(key)
        assert page.locator("#zoom").is_visible()
        page.keyboard.press("1")  # does not answer while it is open
        page.click("#zoom")
        page.click("#images button")
        page.click("#zoom")
        page.keyboard.press("Enter")  # though the focus is on the image again
        page.wait_for_selector("#saved:has-text('Saved')")
    (first,) = server.store.answers()
    assert (first.quality, first.alignment) == (5, 4)


def test_answers_given_without_a_connection_are_kept_and_sent(browser: Any, server: StudyServer) -> None:
    with rater(browser, server) as page:
        begin(page)
        answer(page)
        page.wait_for_selector("#saved:has-text('Saved')")
        page.wait_for_load_state("networkidle")  # the next image is there
        page.context.set_offline(True)
        answer(page)
        page.wait_for_selector("#saved.bad")
        assert stored(server) == [(0, 0)]
        page.context.set_offline(False)
        page.wait_for_selector(SHOWN)
        for _ in range(5):
            answer(page)
        wait_for_end(page, 7)
    assert stored(server) == [(0, trial) for trial in range(7)]


def test_an_answer_outlives_a_closed_page(browser: Any, server: StudyServer) -> None:
    with rater(browser, server) as page:
        begin(page)
        page.route("**/answers", lambda route: route.abort("connectionfailed"))
        answer(page)
        page.wait_for_selector("#saved.bad")
        other = page.context.new_page()
        link = page.url
        page.close(run_before_unload=False)
        assert stored(server) == []
        other.goto(link)
        other.wait_for_selector(SHOWN)
        other.wait_for_selector("#saved:has-text('Saved')")
        assert count(other) == "2 of 7"
    assert stored(server) == [(0, 0)]


def test_a_reply_that_was_lost_does_not_answer_twice(browser: Any, server: StudyServer) -> None:
    """The server has the answer but the page does not know, so it sends the answer again."""
    lost: Counter[str] = Counter()

    def lose(route: Any) -> None:
        lost["all"] += 1
        if lost["all"] == 1:
            route.fetch()
            route.abort("connectionfailed")
        else:
            route.continue_()

    with rater(browser, server) as page:
        begin(page)
        page.route("**/answers", lose)
        answer(page)
        page.wait_for_selector("#saved:has-text('Saved')")
        assert lost["all"] == 2 and count(page) == "2 of 7"
    assert stored(server) == [(0, 0)]


@contextmanager
def command(folder: Path, port: int) -> Iterator[str]:
    """Run `edgeprune study serve` in a new process, kill it at the end; yields its address."""
    arguments = ["-m", "edgeprune.cli", "study", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        yield process.stderr.readline().split()[-1]
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def test_a_server_that_is_killed_and_started_again_loses_nothing(browser: Any, tmp_path: Path) -> None:
    folder = tiny_study(tmp_path, prompts=2, size=300, checks=1)
    page = browser.new_context().new_page()
    with command(folder, 0) as address:
        page.goto(address)
        begin(page)
        answer(page)
        page.wait_for_selector("#saved:has-text('Saved')")
        page.wait_for_load_state("networkidle")
    answer(page)
    page.wait_for_selector("#saved.bad")
    with command(folder, int(address.rstrip("/").rpartition(":")[2])):
        for _ in range(5):
            answer(page)
        wait_for_end(page, 7)
    page.context.close()
    with served(folder) as server:
        assert stored(server) == [(0, trial) for trial in range(7)]


def test_ten_raters_at_once(browser: Any, server: StudyServer) -> None:
    contexts = [browser.new_context() for _ in range(10)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(server.address)
    for page in pages:
        page.click("#start")
    for _ in range(7):  # all of them at the same trial, in turns
        for page in pages:
            answer(page)
    for page in pages:
        wait_for_end(page, 7)
    for context in contexts:
        context.close()
    assert sorted(stored(server)) == [(who, trial) for who in range(10) for trial in range(7)]
    shown = Counter((t.prompt, t.shown) for who in server.store.raters() for t in who.trials if t.asked is None)
    assert set(shown.values()) == {10}


def test_a_prompt_with_a_script_is_text(browser: Any, server: StudyServer) -> None:
    seen = set()
    with rater(browser, server) as page:
        begin(page)
        for _ in range(7):
            page.wait_for_selector(SHOWN)
            seen.add(page.inner_text("#text"))
            assert page.title() == "Image study" and page.locator("#text *").count() == 0
            answer(page)
        wait_for_end(page, 7)
    assert SCRIPT in seen


def test_nothing_on_the_page_names_a_variant_or_comes_from_elsewhere(browser: Any, server: StudyServer) -> None:
    urls: list[str] = []
    with rater(browser, server) as page:
        page.on("request", lambda request: urls.append(request.url))
        page.reload()
        begin(page)
        for _ in range(7):
            page.wait_for_selector(SHOWN)
            content = page.content()
            assert not any(name in content for name in server.study.variants)
            answer(page)
        wait_for_end(page, 7)
    own = server.address.rstrip("/")
    assert urls and all(url.startswith(own) for url in urls)
    assert not any(name in url for name in server.study.variants for url in urls)


def test_two_people_on_one_computer(browser: Any, server: StudyServer) -> None:
    with rater(browser, server) as page:
        begin(page)
        answer(page)
        page.wait_for_selector("#saved:has-text('Saved')")
        page.goto(server.address)
        page.wait_for_selector("#go-on:visible")
        begin(page)
        assert count(page) == "1 of 7"
        answer(page)
        page.wait_for_selector("#saved:has-text('Saved')")
    assert stored(server) == [(0, 0), (1, 0)]


def test_only_the_complete_link_opens_a_study_with_a_token(browser: Any, tmp_path: Path) -> None:
    folder = tiny_study(tmp_path, prompts=1, size=300, checks=0)
    with served(folder, host="0.0.0.0", token="long-secret") as server:
        port = server.server_address[1]
        page = browser.new_context().new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#begin-error:has-text('complete link')")
        assert not page.locator("#start").is_visible()
        page.goto(f"http://127.0.0.1:{port}/?token=long-secret")
        begin(page)
        for _ in range(3):
            answer(page)
        wait_for_end(page, 3)
        page.context.close()


def test_an_unknown_link_is_reported(browser: Any, server: StudyServer) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{server.address}r/nobody")
    page.wait_for_selector("#end-what:has-text('does not know this link')")
    page.context.close()
