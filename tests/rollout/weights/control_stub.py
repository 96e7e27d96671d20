"""The control endpoints of a server, without a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Stub:
    """A server's control endpoints: it reports its weight version and remembers what it was told.

    answers: path -> what happens there: "refuse" (HTTP 400), "hang" (no answer for 30 s), "break off" (the connection ends).
    refused_version: a version it does not take. parameters: the checksums of what it says it has.
    Everything else is done at once.
    """

    def __init__(self, *, parameters: Mapping[str, str] | None = None, **answers: str) -> None:
        self.version = "0"
        self.parameters = dict(parameters or {})
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.answers = answers
        self.refused_version = ""
        self.released = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {"weight_version": stub.version})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                name = self.path.removeprefix("/")
                stub.told.append((name, body))
                if stub.answers.get(name) == "hang":
                    stub.released.wait(30)
                if stub.answers.get(name) == "break off":
                    self.close_connection = True
                    return
                if stub.answers.get(name) == "refuse" or (stub.refused_version and body.get("new_version") == stub.refused_version):
                    self.answer(400, {"success": False, "message": "group is taken"})
                    return
                if name == "update_weight_version":
                    stub.version = body["new_version"]
                self.answer(200, {"ranks": [{"checksums": stub.parameters}]})

            def answer(self, status: int, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def steps(self) -> list[str]:
        return [name for name, _ in self.told]


def serve_stubs() -> Iterator[Callable[..., Stub]]:
    """The body of a fixture: makes stubs, and ends them."""
    made: list[Stub] = []

    def make(**options: Any) -> Stub:
        made.append(Stub(**options))
        return made[-1]

    yield make
    for one in made:
        one.released.set()
        one.server.shutdown()
        one.server.server_close()
