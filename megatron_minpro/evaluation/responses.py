"""Kept responses: one JSON line per sample and benchmark, from which everything else can be computed again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_minpro.tracking.json_lines import JsonLines, read_json_lines

Key = tuple[str, int]  # problem_id, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One sampled response."""

    problem_id: str
    sample: int  # 0, 1, ... within its problem
    text: str
    finish_reason: str  # stop | length, or what else an endpoint says: content_filter, tool_calls ...
    num_tokens: int
    without_content: bool = False  # the endpoint gave no content; `text` is the reasoning that its parser took apart, or nothing

    @property
    def key(self) -> Key:
        return self.problem_id, self.sample


def read_responses(path: Path, *, start: int = 0) -> Iterator[tuple[int, Response]]:
    """(offset behind it, response) from byte `start` on, one at a time. Raises ValueError naming the file for a line that is none."""
    for offset, record in read_json_lines(path, start=start):
        try:
            yield offset, Response(**record)
        except TypeError as error:
            raise ValueError(f"{path}: the line before byte {offset} is not a response: {error}") from error


class ResponseStore:
    """The responses of one benchmark. Knows which samples it holds; the texts stay on disk."""

    def __init__(self, path: Path) -> None:
        """Opens or makes the file. Raises ValueError when a sample is in it twice."""
        self._lines = JsonLines(path)
        self.path = path
        self.torn_lines = self._lines.torn_lines
        self._kept: set[Key] = set()
        for _, response in read_responses(path):
            self._note(response)

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def append(self, response: Response) -> None:
        """Keep one response; it is safe from a kill of this process when this returns. Raises ValueError for a sample already kept."""
        self._note(response)
        self._lines.append(asdict(response))

    def close(self) -> None:
        self._lines.close()

    def _note(self, response: Response) -> None:
        if response.key in self._kept:
            raise ValueError(f"{self.path}: sample {response.sample} of problem {response.problem_id} is there twice")
        self._kept.add(response.key)
