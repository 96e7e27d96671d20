"""Files of JSON lines that survive a kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_minpro.tracking.json_lines import JsonLines, read_json_lines


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


def test_reading_continues_at_an_offset_and_leaves_an_unfinished_line(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=r"lines\.jsonl:2: expected one JSON object per line"):
        list(read_json_lines(path))
    path.write_bytes(b"[]\n")
    with pytest.raises(ValueError, match=r"lines\.jsonl:1: expected a JSON object, found a list"):
        list(read_json_lines(path))
