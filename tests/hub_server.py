"""A hub on this machine: the parts of the hub's HTTP interface that huggingface_hub downloads a model with."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


def commit(ref: str) -> str:
    """Return the commit of a branch or tag."""
    return hashlib.sha1(ref.encode()).hexdigest()


class Hub:
    """Serves one repository, whose branches and tags are folders."""

    def __init__(self, refs: Mapping[str, Path], name: str = "me/m") -> None:
        self.name = name
        self.folders = {name: folder for ref, folder in refs.items() for name in (ref, commit(ref))}
        self.commits = {name: commit(ref) for ref in refs for name in (ref, commit(ref))}
        self.downloaded: list[str] = []
        """Paths of files in the order in which they were downloaded."""
        self.url = ""

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body."""
        match [unquote(part) for part in path.strip("/").split("/")]:
            case ["api", "models", owner, model, *rest] if f"{owner}/{model}" == self.name:
                ref = rest[1] if rest else "main"
                if ref not in self.folders:
                    return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
                listing = self._tree(ref) if rest[:1] == ["tree"] else self._info(ref)
                return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
            case [owner, model, "resolve", ref, *name] if f"{owner}/{model}" == self.name and ref in self.folders:
                file = self.folders[ref] / "/".join(name)
                if not file.is_file():
                    return 404, {"X-Error-Code": "EntryNotFound"}, b""
                content = file.read_bytes()
                if method == "GET":
                    self.downloaded.append("/".join(name))
                etag = hashlib.sha256(content).hexdigest()
                return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": self.commits[ref]}, content
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"

    def _files(self, ref: str) -> dict[str, int]:
        folder = self.folders[ref]
        return {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}

    def _info(self, ref: str) -> dict[str, Any]:
        files = [{"rfilename": name, "size": size, "blobId": "0"} for name, size in self._files(ref).items()]
        return {"id": self.name, "modelId": self.name, "sha": self.commits[ref], "private": False, "siblings": files}

    def _tree(self, ref: str) -> list[dict[str, Any]]:
        return [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in self._files(ref).items()]


@contextmanager
def serving(refs: Mapping[str, Path], name: str = "me/m") -> Iterator[Hub]:
    """Serve the repository while the context lasts, at `Hub.url`."""
    hub = Hub(refs, name)

    class Handler(BaseHTTPRequestHandler):
        def _send(self) -> None:
            status, headers, body = hub.answer(self.command, urlsplit(self.path).path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = _send

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
