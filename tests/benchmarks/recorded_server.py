"""Answers every call of /generate with one recorded body, as long as production's: for the benchmark of the client.

python recorded_server.py NUM_ANSWERS NUM_TOKENS: prints its endpoint, then serves until it is ended.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_VOCABULARY = 151_936


def recorded_body(num_answers: int, num_tokens: int) -> bytes:
    """What SGLang 0.5.23 writes for a call of so many samples: log-probs are float32 numbers with every digit of float64.

    Tokens are as frequent as words are: the r-th most frequent one in proportion to 1 / r (Zipf, 1949).
    """
    drawn = random.Random(0)
    by_rank = drawn.sample(range(_VOCABULARY), _VOCABULARY)
    return json.dumps([_answer(drawn, by_rank, num_tokens) for _ in range(num_answers)], separators=(",", ":")).encode()


def _answer(drawn: random.Random, by_rank: Sequence[int], num_tokens: int) -> dict[str, Any]:
    token_ids = [by_rank[int(_VOCABULARY ** drawn.random()) - 1] for _ in range(num_tokens)]
    logprobs = struct.unpack(f"{num_tokens}f", struct.pack(f"{num_tokens}f", *(-drawn.expovariate(1.5) for _ in range(num_tokens))))
    return {
        "text": "four " * (num_tokens * 4 // 5),
        "output_ids": token_ids,
        "meta_info": {
            "id": "0" * 40,
            "finish_reason": {"type": "length", "length": num_tokens},
            "prompt_tokens": 200,
            "num_retractions": 0,
            "output_token_logprobs": [[logprob, token_id, None] for logprob, token_id in zip(logprobs, token_ids, strict=True)],
            "weight_versions": [{"version": "4", "start": 0, "end": num_tokens}],
            "completion_tokens": num_tokens,
            "e2e_latency": 300.0,
        },
    }


class _Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    body = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


def main(num_answers: str, num_tokens: str) -> None:
    _Server.body = recorded_body(int(num_answers), int(num_tokens))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    sys.stdin.read()  # the benchmark closes it


if __name__ == "__main__":
    main(*sys.argv[1:])
