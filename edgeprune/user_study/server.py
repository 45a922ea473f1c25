"""Serves the page that raters see and its API, on the standard library's threaded server.

A secret token in the address identifies a rater, so a reload, even on another day, continues after the last answer
without a cookie. Images are addressed by rater and trial: no address names a file or a variant. Nothing is encrypted.

    GET  /  /r/TOKEN                    the page: to begin, to continue
    GET  /page.js  /page.css  /page.svg
    GET  /api/study                     title and size of the study
    POST /api/raters                    a new rater
    GET  /api/r/TOKEN                   the trials, and which are answered
    GET  /api/r/TOKEN/image/TRIAL/SIDE  a PNG
    POST /api/r/TOKEN/answers           one answer; sent twice, it counts once
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import re
import socket
import sqlite3
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from edgeprune.common.errors import InputError
from edgeprune.user_study import design
from edgeprune.user_study.design import SCALE, Trial
from edgeprune.user_study.store import FILE, Rater, Store

ASSETS = Path(__file__).parent / "assets"
_PAGE = {
    "page.html": "text/html; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",  # addresses hold the rater's token
    "X-Content-Type-Options": "nosniff",
}
_TOKEN = r"(?P<token>[A-Za-z0-9_-]{1,64})"
_LONGEST_BODY = 4096
_LONGEST_ANSWER_S = 86_400.0


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Refusal(Exception):
    """Answers a request with an error."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class StudyServer(ThreadingHTTPServer):
    """Serves one study's folder. Listens once made; `serve_forever` runs it, `server_close` frees port and database."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        """Open the study and listen.

        Args:
            port: 0 takes a free one.
            token: a secret that the link must contain with which people begin.

        Raises:
            InputError: the study is incomplete, the address is not free, or it is open to other machines without a
                token.
        """
        if not is_loopback(host) and not token:
            raise InputError(f"--host {host}: others could open the study; add --token with a secret of your choice")
        if token is not None and not re.fullmatch(r"[A-Za-z0-9_-]{8,}", token):
            raise InputError("--token: expected 8 or more letters, digits, '-' and '_'")
        self.study, self.token, self.folder = design.read(folder), token, folder.resolve()
        for variant in range(len(self.study.variants)):
            for prompt in range(len(self.study.prompts)):
                self.image(variant, prompt)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"--host {host} --port {port}: cannot listen there ({error})") from error
        self.store = Store(folder)

    @property
    def address(self) -> str:
        """The link with which people begin."""
        host, port = self.server_address[:2]
        query = f"?token={self.token}" if self.token else ""
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/{query}"

    def server_close(self) -> None:
        """Free the port and the database."""
        super().server_close()
        if hasattr(self, "store"):
            self.store.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error, except for a connection that the browser dropped."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def image(self, variant: int, prompt: int) -> Path:
        """Return the path of an image of the study.

        Raises:
            InputError: the image is missing, or a link leads out of the study's folder.
        """
        path = self.folder / self.study.image(variant, prompt)
        if not path.resolve().is_relative_to(self.folder):
            raise InputError(f"{path}: leads out of the study's folder")
        if not path.is_file():
            raise InputError(f"{path}: no such image; the study is incomplete")
        return path


class _Handler(BaseHTTPRequestHandler):
    server: StudyServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edgeprune", ""
    timeout = 60  # seconds that a silent connection is kept
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: addresses hold raters' tokens."""

    def do_GET(self) -> None:
        self._answer(
            {
                r"/(?:r/[^/]+)?": lambda match: self._page("page.html"),
                r"/(?P<name>page\.(?:js|css|svg))": lambda match: self._page(match["name"]),
                r"/api/study": lambda match: self._study(),
                rf"/api/r/{_TOKEN}": lambda match: self._state(self._rater(match)),
                rf"/api/r/{_TOKEN}/image/(?P<trial>\d{{1,6}})/(?P<side>[01])": self._image,
            }
        )

    def do_POST(self) -> None:
        self._answer(
            {
                r"/api/raters": lambda match: self._join(),
                rf"/api/r/{_TOKEN}/answers": lambda match: self._keep(self._rater(match)),
            }
        )

    def _answer(self, routes: dict[str, Any]) -> None:
        try:
            self.body = self._read_body()
            try:
                self.url, host = urlsplit(self.path), urlsplit(f"//{self.headers.get('Host', '')}").hostname
            except ValueError:
                raise Refusal(HTTPStatus.BAD_REQUEST, "This address is not valid.") from None
            # Another site's name may resolve to this machine (DNS rebinding). That site does not know the token.
            if not self.server.token and not is_loopback(host or ""):
                raise Refusal(HTTPStatus.FORBIDDEN, "This study is open on its own machine only.")
            for pattern, reply in routes.items():
                if match := re.fullmatch(pattern, self.url.path, re.ASCII):
                    reply(match)
                    return
            raise Refusal(HTTPStatus.NOT_FOUND, "There is nothing at this address.")
        except Refusal as refusal:
            self._send_json({"error": str(refusal)}, refusal.status)
        except sqlite3.Error as error:  # such as a full disk: the page keeps the answer and sends it again
            print(f"error: {self.server.folder / FILE}: {error}", file=sys.stderr)
            self._send_json({"error": "The answer could not be stored."}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if not (length.isascii() and length.isdecimal() and int(length) <= _LONGEST_BODY):
            self.close_connection = True
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected a body of up to {_LONGEST_BODY} bytes")
        return self.rfile.read(int(length))

    def _json_body(self) -> dict[str, Any]:
        """Return the body as an object; a browser sends no such content type for another site's page."""
        if self.headers.get("Content-Type") != "application/json":
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "expected application/json")
        try:
            data = json.loads(self.body)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        return data

    # ------------------------------------------------------------------------------------------- replies

    def _page(self, name: str) -> None:
        self._send((ASSETS / name).read_bytes(), _PAGE[name])

    def _study(self) -> None:
        self._check_token()
        study = self.server.study
        self._send_json(
            {"id": study.id, "title": study.title, "mode": study.mode, "trials": study.per_rater + study.checks}
        )

    def _join(self) -> None:
        self._check_token()
        self._json_body()
        study = self.server.study
        self._send_json({"rater": self.server.store.join(lambda number: design.trials(study, number))})

    def _state(self, rater: Rater) -> None:
        study = self.server.study
        self._send_json(
            {
                "title": study.title,
                "mode": study.mode,
                "trials": [
                    {
                        "images": len(trial.shown),
                        "text": study.prompts[trial.prompt] if trial.asked is None else None,
                        "asked": trial.asked,
                    }
                    for trial in rater.trials
                ],
                "answered": self.server.store.answered(rater),
            }
        )

    def _image(self, match: re.Match[str]) -> None:
        trial, side = self._trial(self._rater(match), int(match["trial"])), int(match["side"])
        if side >= len(trial.shown):
            raise Refusal(HTTPStatus.NOT_FOUND, "There is no such image.")
        try:
            content = self.server.image(trial.shown[side], trial.prompt).read_bytes()
        except (InputError, OSError):
            raise Refusal(HTTPStatus.NOT_FOUND, "There is no such image.") from None
        self._send(content, "image/png", cache="private, max-age=86400, immutable")

    def _keep(self, rater: Rater) -> None:
        data = self._json_body()
        index, seconds, scale = data.get("trial"), data.get("seconds"), SCALE[self.server.study.mode]
        if type(index) is not int:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"trial: found {index!r}, expected a number")
        self._trial(rater, index)
        for question in design.QUESTIONS:
            value = data.get(question)
            if type(value) is not int or value not in scale:
                raise Refusal(HTTPStatus.BAD_REQUEST, f"{question}: found {value!r}, expected one of {scale}")
        if not isinstance(seconds, (int, float)) or not 0 <= seconds <= _LONGEST_ANSWER_S:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"seconds: found {seconds!r}, expected a number")
        self.server.store.answer(rater, index, data["quality"], data["alignment"], float(seconds))
        self._send_json({"answered": self.server.store.answered(rater)})

    # ------------------------------------------------------------------------------------------- helpers

    def _check_token(self) -> None:
        given = parse_qs(self.url.query).get("token", [""])[0]
        if self.server.token and not hmac.compare_digest(given.encode(), self.server.token.encode()):
            raise Refusal(HTTPStatus.FORBIDDEN, "This study opens only with its complete link, which includes a token.")

    def _rater(self, match: re.Match[str]) -> Rater:
        rater = self.server.store.rater(match["token"])
        if rater is None:
            raise Refusal(HTTPStatus.NOT_FOUND, "This study does not know this link.")
        return rater

    def _trial(self, rater: Rater, index: int) -> Trial:
        if not 0 <= index < len(rater.trials):
            raise Refusal(HTTPStatus.NOT_FOUND, "There is no such trial.")
        return rater.trials[index]

    def _send_json(self, data: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(data).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, cache: str = "no-store") -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Cache-Control": cache}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
