"""A server that answers /generate as it is told to, without a model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rollout.records import GenerationRequest, SamplingParams

SAMPLING = SamplingParams(max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=20, stop_token_ids=(5, 6), seed=3)
REQUESTS = [GenerationRequest(request_id=f"r{i}", prompt_token_ids=(i, i + 1)) for i in range(6)]

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


def good_answer(prompt: list[int], **meta: Any) -> dict[str, Any]:
    token_ids = [prompt[0], 7]
    return {
        "output_ids": token_ids,
        "meta_info": {
            "finish_reason": {"type": "stop", "matched": 7},
            "output_token_logprobs": [[-0.5, token_ids[0], None], [-0.25, token_ids[1], None]],
            "weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 1, "end": 2}],
            **meta,
        },
    }


def all_good(body: dict[str, Any]) -> tuple[int, Any]:
    return 200, [good_answer(prompt) for prompt in body["input_ids"]]


class Stub:
    """An HTTP server that answers /generate with `answer` and remembers the bodies. version: what /model_info says; None: 503.
    server_info: what /server_info says.

    computes: cleared, nothing that needs the computing process is answered before it is set again.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.version: str | None = None
        self.server_info: dict[str, Any] = {}
        self.unauthorized = False
        self.computes = threading.Event()
        self.computes.set()
        self.active = self.most_active = 0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/server_info":
                    stub.computes.wait(60)
                    self.reply(200, json.dumps(stub.server_info).encode())
                    return
                assert self.path == "/model_info"
                self.reply(
                    401 if stub.unauthorized else 503 if stub.version is None else 200,
                    json.dumps({"weight_version": stub.version}).encode(),
                )

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with stub._lock:
                    stub.bodies.append(body)
                    stub.headers.append({name.lower(): value for name, value in self.headers.items()})
                    stub.active += len(body["input_ids"])
                    stub.most_active = max(stub.most_active, stub.active)
                try:
                    status, answer = stub.answer(body)
                finally:
                    with stub._lock:
                        stub.active -= len(body["input_ids"])
                self.reply(status, answer if isinstance(answer, bytes) else json.dumps(answer).encode())

            def reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def asked(self) -> list[str]:
        return [rid.rsplit("-", 1)[0] for body in self.bodies for rid in body["rid"]]


def answers_of(version: int) -> Answer:
    """Good answers, every token sampled under `version`."""
    spans = {"weight_versions": [{"version": str(version), "start": 0, "end": 2}]}
    return lambda body: (200, [good_answer(prompt, **spans) for prompt in body["input_ids"]])
