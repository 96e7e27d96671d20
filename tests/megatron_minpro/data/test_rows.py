"""Files in every spelling that people use, and what is refused with which words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_minpro.data.rows import read_rows, source_name

ROWS = [{"question": "1 + 1", "answer": 2}, {"question": "日本", "answer": "x"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS, indent=1).encode()


FILES = {
    "data.jsonl": LINES,
    "DATA.JSONL": LINES,
    "data.ndjson": LINES,
    "data.json": LIST,
    "lines.json": LINES,
    "bom.json": b"\xef\xbb\xbf" + LIST,
    "data.jsonl.gz": gzip.compress(LINES),
    "Data.JSON.GZ": gzip.compress(LIST),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("folder", ["", "data/"])
def test_a_relative_file_is_read(name: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path(folder + name).write_bytes(FILES[name])
    assert [row for _, row in read_rows(folder + name, {})] == ROWS
    assert source_name(folder + name).lower() in ("data", "lines", "bom")


def test_parquet_in_capitals_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": "1 + 1", "answer": "2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "A.PARQUET")
    assert [row for _, row in read_rows(str(tmp_path / "A.PARQUET"), {})] == rows


@pytest.mark.parametrize(
    ("source", "make", "words"),
    [
        (
            "data/data.csv",
            None,
            r"prompts\.source = 'data/data\.csv': \.csv is not read; expected a \.jsonl, \.jsonl\.gz, ",
        ),
        ("data/data.jsonl", None, r"prompts\.source = 'data/data\.jsonl': no such file"),
        ("data/rows", lambda path: path.write_text("x"), r"no file ending is not read; expected a \.jsonl"),
        ("./data", lambda path: path.mkdir(), r"'\./data': is a folder; expected a \.jsonl"),
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES)[:-9]), r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.jsonl.gz", lambda path: path.write_bytes(LINES), r"a\.jsonl\.gz: not a whole gzip file"),
        ("a.json", lambda path: path.write_text("[1]"), r"a\.json: item 0 is a int, expected a JSON object"),
        ("a.json", lambda path: path.write_text("[{"), r"a\.json: not JSON: "),
        ("words", None, r"neither a \.jsonl, \.jsonl\.gz, \.json or \.parquet file nor a Hugging Face data set \(owner/name\)"),
    ],
)
def test_what_cannot_be_read_is_named(
    source: str, make: Callable[[Path], None] | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if make is not None:
        Path(source).parent.mkdir(parents=True, exist_ok=True)
        make(Path(source))
    with pytest.raises(ValueError, match=words):
        list(read_rows(source, {}))


def test_the_key_that_named_the_source_stands_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"^--benchmarks = 'absent\.jsonl': no such file"):
        list(read_rows("absent.jsonl", {}, key="--benchmarks"))
