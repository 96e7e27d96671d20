"""Grades on disk, and the thread that grades responses while they arrive."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from megatron_minpro.evaluation.grading import Grade, Grader
from megatron_minpro.evaluation.problems import Problem
from megatron_minpro.evaluation.responses import Key, Response, read_responses
from megatron_minpro.tracking.json_lines import JsonLines, read_json_lines

_BATCH = 128  # responses read and graded at once
_POLL_S = 0.1


def read_grades(path: Path) -> Iterator[Grade]:
    """The grades in a file, one at a time. Raises ValueError naming the file for a line that is none."""
    for offset, record in read_json_lines(path):
        try:
            yield Grade(**record)
        except TypeError as error:
            raise ValueError(f"{path}: the line before byte {offset} is not a grade: {error}") from error


class GradeFile:
    """Grades the responses of one benchmark that have no grade yet, in the order in which they lie in their file."""

    def __init__(self, problems: Sequence[Problem], *, responses: Path, grades: Path) -> None:
        """Opens or makes the file of grades. Raises ValueError when it holds a sample twice."""
        self._problems: Mapping[str, Problem] = {problem.problem_id: problem for problem in problems}
        self._responses, self._offset = responses, 0
        self._lines = JsonLines(grades)
        self.torn_lines = self._lines.torn_lines
        self._graded: set[Key] = set()
        for grade in read_grades(grades):
            if (grade.problem_id, grade.sample) in self._graded:
                raise ValueError(f"{grades}: sample {grade.sample} of problem {grade.problem_id} is graded twice")
            self._graded.add((grade.problem_id, grade.sample))

    def __len__(self) -> int:
        return len(self._graded)

    def grade_some(self, grader: Grader) -> bool:
        """Grade the next few responses; False when there was none to read. Raises ValueError for a response to an unknown problem."""
        read = list(islice(read_responses(self._responses, start=self._offset), _BATCH))
        new: list[Response] = [response for _, response in read if response.key not in self._graded]
        for response in new:
            if response.problem_id not in self._problems:
                raise ValueError(f"{self._responses}: answers a problem {response.problem_id} that is not in the benchmark")
        for grade in grader.grade([self._problems[response.problem_id] for response in new], new):
            self._lines.append(asdict(grade))
            self._graded.add((grade.problem_id, grade.sample))
        if read:
            self._offset = read[-1][0]
        return bool(read)

    def close(self) -> None:
        self._lines.close()


class GradingThread:
    """Grades several files of responses while they grow. `finish` waits for the last one; leaving the block early stops at once."""

    def __init__(self, files: Sequence[GradeFile], grader: Grader, *, on_progress: Callable[[int], None]) -> None:
        """on_progress(grades so far) is called from the thread."""
        self._files, self._grader, self._on_progress = files, grader, on_progress
        self._all_there, self._stop = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="grading", daemon=True)

    def __enter__(self) -> GradingThread:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._all_there.set()
        self._thread.join()

    def check(self) -> None:
        """Raises what stopped the grading, if anything did: sampling on would be in vain."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Every response is written: grade the rest and return. Raises what stopped the grading."""
        self._all_there.set()
        while self._thread.is_alive():  # in steps, so that Ctrl-C is heard
            self._thread.join(timeout=0.5)
        self.check()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                last_pass = self._all_there.is_set()  # before reading: what was written until then is read in this pass
                read = [file.grade_some(self._grader) for file in self._files]
                self._on_progress(sum(len(file) for file in self._files))
                if not any(read):
                    if last_pass:
                        return
                    self._all_there.wait(_POLL_S)
        except BaseException as failure:
            self._failure = failure
