"""The store of responses, on top of a file of JSON lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_minpro.evaluation.responses import Response, ResponseStore, read_responses

REPOSITORY = Path(__file__).resolve().parents[3]


def response(problem: str, sample: int, text: str = "so \\boxed{1}") -> Response:
    return Response(problem_id=problem, sample=sample, text=text, finish_reason="stop", num_tokens=3)


def test_a_line_that_is_no_response_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 0}\n')
    with pytest.raises(ValueError, match="is not a response"):
        list(read_responses(path))


def test_the_store_knows_its_samples_and_refuses_one_twice(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path / "a/responses.jsonl")
    store.append(response("p", 0, "line one\nline two \u2603 \ud800"))  # half a surrogate pair, as broken byte-level tokens decode to
    store.append(response("p", 1))
    with pytest.raises(ValueError, match="sample 1 of problem p is there twice"):
        store.append(response("p", 1))
    store.close()
    again = ResponseStore(store.path)
    assert len(again) == 2 and ("p", 1) in again and ("p", 2) not in again
    assert [kept.text for _, kept in read_responses(store.path)][1] == "so \\boxed{1}"
    line = store.path.read_text().splitlines()[-1]
    store.path.write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match="there twice"):
        ResponseStore(store.path)


def test_every_response_appended_before_kill_9_is_there(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    program = (
        "import sys, os, signal; from pathlib import Path\n"
        "from megatron_minpro.evaluation.responses import Response, ResponseStore\n"
        "store = ResponseStore(Path(sys.argv[1]))\n"
        "for sample in range(500):\n"
        "    store.append(Response(problem_id='p', sample=sample, text='x' * 100, finish_reason='stop', num_tokens=1))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(path)], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    store = ResponseStore(path)
    assert (len(store), store.torn_lines) == (500, 0)
    assert json.loads(path.read_text().splitlines()[-1])["sample"] == 499
