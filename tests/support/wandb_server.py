"""A local server that speaks as much of W&B's protocol as the tests need.

It stores what clients send and returns it. So it shows the data that is sent and that clients understand, never what
the real server accepts or draws. The protocol is not public: clients of other versions may need other operations.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from support.wandb_backend import WandbBackend

VERSIONS = {"wandb": "0.31.0", "wandb-workspaces": "0.4.13"}
KEY = "k" * 40
_AUTHORIZATION = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()


def _other_versions() -> str:
    """Return a description of installed versions that differ from those that this file was written for."""
    found = []
    for name, wanted in VERSIONS.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "none"
        found += [f"{name} {installed} instead of {wanted}"] * (installed != wanted)
    return ", ".join(found)


needs_pinned_wandb = pytest.mark.skipif(
    bool(_other_versions()),
    reason=f"the test server answers one version of W&B's protocol; here is {_other_versions()}",
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = WandbBackend(f"http://127.0.0.1:{self.server_address[1]}")

    def handle_error(self, *_: Any) -> None:
        """Ignore connections that clients drop."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        body = self._body()
        if self.headers["Authorization"] != _AUTHORIZATION:
            self._reply(b"{}", 401)
        elif self.path == "/graphql":
            self._reply(json.dumps(self.server.backend.answer(json.loads(body))).encode())
        elif self.path.endswith("/file_stream"):
            _, _, entity, project, run, _ = self.path.split("/")
            self.server.backend.stream((entity, project, run), json.loads(body))
            self._reply(b"{}")
        else:  # status reports of the client
            self._reply(b"{}")

    def do_PUT(self) -> None:
        self.server.backend.put(self.path, self._body())
        self._reply(b"")

    def do_GET(self) -> None:
        try:
            self._reply(self.server.backend.get(self.path))
        except (KeyError, StopIteration):
            self._reply(b"", 404)

    def log_message(self, *_: Any) -> None:
        """Suppress the server's log."""

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers["Content-Length"] or 0))
        return gzip.decompress(raw) if self.headers["Content-Encoding"] == "gzip" else raw

    def _reply(self, data: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serve() -> Iterator[WandbBackend]:
    """Run a server, with W&B pointed to it and an account there; return its backend."""
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    before = dict(os.environ)
    os.environ.update(WANDB_BASE_URL=server.backend.url, WANDB_API_KEY=KEY, WANDB_ERROR_REPORTING="false")
    try:
        yield server.backend
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.shutdown()
        server.server_close()
        thread.join()
