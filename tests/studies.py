"""Tiny studies, a server on a free port, and raters without a browser: for the tests of `edgeprune.user_study`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from PIL import Image

from edgeprune.user_study import design
from edgeprune.user_study.design import trials
from edgeprune.user_study.make import make
from edgeprune.user_study.server import StudyServer
from edgeprune.user_study.store import Store

SCRIPT = "<script>document.title = 'owned'</script>"
VARIANTS = ("original", "ours", "koala")


def image_folders(root: Path, variants: tuple[str, ...] = VARIANTS, prompts: int = 4, size: int = 8) -> dict[str, Path]:
    """Make folders of images, each of one colour of its own, and `prompts.txt`, whose first prompt is a script."""
    for v, name in enumerate(variants):
        (root / name).mkdir(parents=True)
        for p in range(prompts):
            Image.new("RGB", (size, size), (40 * v, 20 * p, 99)).save(root / name / f"{p:03}.png")
    lines = [SCRIPT, *(f"prompt number {p}" for p in range(1, prompts))]
    (root / "prompts.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return {name: root / name for name in variants}


def tiny_study(
    root: Path, *, variants: tuple[str, ...] = VARIANTS, prompts: int = 4, size: int = 8, **more: Any
) -> Path:
    """Make a study and return its folder."""
    folders = image_folders(root / "images", variants, prompts, size)
    make(root / "study", folders, prompts=root / "images" / "prompts.txt", **more)
    return root / "study"


@contextmanager
def served(folder: Path, **more: Any) -> Iterator[StudyServer]:
    """Run the study's server in a thread."""
    with StudyServer(folder, **more) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def request(
    server: StudyServer, method: str, path: str, data: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Send one request, its path unchanged; return status, headers in lower case, and body."""
    connection = HTTPConnection(*server.server_address[:2])
    body = None if data is None else data if isinstance(data, bytes) else json.dumps(data).encode()
    kind = {} if data is None else {"Content-Type": "application/json"}
    try:
        connection.request(method, path, body, {**kind, **(headers or {})})
        reply = connection.getresponse()
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def get(server: StudyServer, path: str) -> Any:
    """Return the JSON of an address that answers with 200."""
    status, _, body = request(server, "GET", path)
    assert status == 200, (path, body)
    return json.loads(body)


def post(server: StudyServer, path: str, data: Any) -> Any:
    """Send a POST that answers with 200; return its JSON."""
    status, _, body = request(server, "POST", path, data)
    assert status == 200, (path, body)
    return json.loads(body)


def join(server: StudyServer) -> str:
    """Join as a new rater and return the token."""
    return str(post(server, "/api/raters", {})["rater"])


def answer_all(folder: Path, raters: int, reply: Any) -> None:
    """Let raters answer every trial by `reply(rater, trial)`: quality, alignment."""
    study, store = design.read(folder), Store(folder)
    store._connection.execute("PRAGMA synchronous = OFF")  # hundreds of waits for the disk
    for number in range(raters):
        rater = store.rater(store.join(lambda n: trials(study, n)))
        assert rater is not None
        for index, trial in enumerate(rater.trials):
            quality, alignment = reply(number, trial)
            store.answer(rater, index, quality, alignment, 2.0)
    store.close()
