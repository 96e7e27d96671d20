"""Stands in for SGLang in one benchmark: answers its HTTP calls after recorded response times and computes nothing.

python stand_in_server.py MODEL_FOLDER TRACE NUM_SERVERS: prints the endpoints as a JSON list, then serves until it is ended. The j-th
response that server i is asked for takes the time of line j * NUM_SERVERS + i of the trace. A call with several responses is answered
when the slowest of them is done, as SGLang does.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from checkpoints_convert.safetensors_io import SafetensorsReader
from rollout.weights.checksums import server_parameter


def read_trace(path: Path) -> list[float]:
    """Seconds of the responses, in order."""
    return [float(line) for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


class StandIn:
    """One server."""

    def __init__(self, seconds: list[float], parameters: list[str]) -> None:
        self._seconds = seconds  # of its responses
        self._parameters = parameters
        self._asked = 0
        self._version = "0"
        self._lock = threading.Lock()
        self._under_way: list[str] = []  # versions of the calls under way
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def answer(self, path: str, body: dict[str, Any] | None) -> Any:
        """What SGLang would answer."""
        if path == "/generate":
            assert body is not None
            return self._generate(body)
        if path == "/weights_checker":
            return {"ranks": [{"checksums": dict.fromkeys(self._parameters, "")}]}
        if path == "/update_weight_version":
            assert body is not None
            self._version = body["new_version"]
        return {"success": True, "weight_version": self._version}

    def _generate(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        count = len(body["input_ids"])
        with self._lock:
            if any(version != self._version for version in self._under_way):
                raise RuntimeError(f"a server with version {self._version} still answers calls of {self._under_way}")
            version, first = self._version, self._asked
            self._asked += count
            self._under_way.append(version)
        time.sleep(max(self._seconds[first : first + count]))
        with self._lock:
            self._under_way.remove(version)
        meta = {
            "finish_reason": {"type": "length"},
            "output_token_logprobs": [[-1.0, 5, None]],
            "weight_versions": [{"version": version, "start": 0, "end": 1}],
        }
        return [{"output_ids": [5], "meta_info": meta}] * count

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(None)

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _reply(self, body: dict[str, Any] | None) -> None:
                content = json.dumps(stand_in.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def main(model_folder: str, trace: str, num_servers: str) -> None:
    with SafetensorsReader(Path(model_folder)) as reader:
        parameters = sorted({server_parameter(name)[0] for name in reader.names})
    seconds, count = read_trace(Path(trace)), int(num_servers)
    servers = [StandIn(seconds[index::count], parameters) for index in range(count)]
    print(json.dumps([server.endpoint for server in servers]), flush=True)
    sys.stdin.read()  # the benchmark closes it


if __name__ == "__main__":
    main(*sys.argv[1:])
