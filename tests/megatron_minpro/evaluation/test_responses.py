"""Files of JSON lines that survive a kill, and the store of responses on top of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_minpro.evaluation.json_lines import JsonLines, read_json_lines
from megatron_minpro.evaluation.responses import Response, ResponseStore, read_responses

REPOSITORY = Path(__file__).resolve().parents[3]


def response(problem: str, sample: int, text: str = "so \\boxed{1}") -> Response:
    return Response(problem_id=problem, sample=sample, text=text, finish_reason="stop", num_tokens=3)


@pytest.mark.parametrize("torn", [b"{", b'{"a": 1', b'{"a": 1}', b"x" * 200_000])
def test_a_torn_last_line_is_cut_off_and_counted(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 0}\n' + torn)
    assert [record for _, record in read_json_lines(path)] == [{"a": 0}]
    lines = JsonLines(path)
    assert lines.torn_lines == 1
    lines.append({"a": 1})
    lines.close()
    assert path.read_bytes() == b'{"a": 0}\n{"a": 1}\n'
    again = JsonLines(path)
    assert again.torn_lines == 0
    again.close()


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a"')
    assert JsonLines(path).torn_lines == 1
    assert path.read_bytes() == b""


def test_reading_continues_at_an_offset_and_leaves_a_line_that_is_being_written(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 0}\n{"a": 1}\n{"a":')
    ((first, _), (second, _)) = read_json_lines(path)
    assert (first, second) == (9, 18)
    path.write_bytes(b'{"a": 0}\n{"a": 1}\n{"a": 2}\n')
    assert list(read_json_lines(path, start=second)) == [(27, {"a": 2})]
    assert list(read_json_lines(tmp_path / "absent.jsonl")) == []


def test_a_damaged_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 0}\n{"a"\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"lines\.jsonl: the line at byte 9 is not JSON"):
        list(read_json_lines(path))
    path.write_bytes(b"[]\n")
    with pytest.raises(ValueError, match="byte 0 is a list, expected a JSON object"):
        list(read_json_lines(path))
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
