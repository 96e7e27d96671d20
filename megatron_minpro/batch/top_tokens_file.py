"""The sampler's most likely tokens at every token that the model wrote, in one file of the run folder (batch_file.py).

    RUN/top_tokens/step_000012.top    for each response its ids int32 [R, K], then their log-probs fp32 [R, K]

R tokens that the model wrote, K most likely ones of each, most likely first. 8 K bytes a token: 1 KiB with K = 128.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_minpro.batch.batch_file import AppendedFile, mapped
from megatron_minpro.batch.folders import TOP_TOKENS_FOLDER
from parallel.top_tokens import TopTokens

# The probabilities of a row add up to 1 at most. What is above is another distribution, not rounding.
_LARGEST_MASS = 1.001


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTokensFile:
    """Where the rows of a batch lie. Knows the file's name, not its folder: a run folder may be moved."""

    name: str
    top_k: int
    offsets: tuple[int, ...]  # of each response's rows, in bytes
    num_bytes: int  # of the whole file

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TopTokensFile:
        """The counterpart of dataclasses.asdict, after a journey as JSON."""
        return cls(**{**record, "offsets": tuple(record["offsets"])})

    @property
    def path(self) -> str:
        """In the run folder."""
        return f"{TOP_TOKENS_FOLDER}/{self.name}"

    def rows(self, run_dir: Path, num_rows: Sequence[int]) -> list[TopTokens]:
        """Each response's rows, as views of the mapped file: nothing is read yet.

        Args:
            run_dir: holds the folder of the file.
            num_rows: tokens of each response that the model wrote.

        Raises:
            ValueError: the file has another size.
        """
        holds = f"the {self.top_k} most likely tokens of {len(num_rows)} responses"
        bytes_of_file = mapped(run_dir / self.path, self.num_bytes, holds=holds)
        found = []
        for offset, rows in zip(self.offsets, num_rows, strict=True):
            shape, size = (rows, self.top_k), 4 * rows * self.top_k
            ids, logprobs = (bytes_of_file[at : at + size] for at in (offset, offset + size))
            found.append(TopTokens(ids=ids.view(torch.int32).view(shape), logprobs=logprobs.view(torch.float32).view(shape)))
        return found


class TopTokensAppender:
    """Rows of answers in the order in which they arrive, from several threads. The `rollout.records.TopTokenSink` of a batch."""

    def __init__(self, run_dir: Path, *, top_k: int, vocab_size: int, step: int) -> None:
        """Make the file.

        Args:
            run_dir: gets the folder of the file.
            top_k: tokens of a row.
            vocab_size: of the model.
            step: global step that samples the batch.
        """
        self.top_k = top_k
        self._vocab_size = vocab_size
        self._name = f"step_{step:06d}.top"
        self._appended = AppendedFile(run_dir / TOP_TOKENS_FOLDER / self._name)
        self._lock = threading.Lock()  # of the fields below
        self._num_rows = 0
        self._masses: list[float] = []  # of all rows of an answer together
        self._smallest_mass = 1.0

    def keep(self, ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]) -> int:
        """See TopTokenSink. Gives the place of the rows in the file. Raises OSError where the disk is full."""
        if ids.view(np.uint32).max() >= self._vocab_size:  # a negative id is a large one
            raise ValueError(f"top tokens have ids from {ids.min()} to {ids.max()}, expected 0 to {self._vocab_size - 1}")
        mass = np.exp(logprobs, dtype=np.float64).sum(1)
        if not mass.max() <= _LARGEST_MASS:  # also for a NaN
            raise ValueError(f"top tokens have the probability {mass.max():.6g} together, expected at most 1")
        place = self._appended.append(torch.tensor(ids), torch.tensor(logprobs))
        with self._lock:
            self._num_rows += len(mass)
            self._masses.append(float(mass.sum()))
            self._smallest_mass = min(self._smallest_mass, float(mass.min()))
        return place

    def joined(self, answers: Sequence[tuple[int, int]]) -> int:
        """The place of one response's rows, from place and number of rows of each of its answers."""
        if len(answers) == 1:
            return answers[0][0]
        parts = {
            dtype: [self._appended.read(place + second * 4 * rows * self.top_k, (rows, self.top_k), dtype) for place, rows in answers]
            for second, dtype in ((0, torch.int32), (1, torch.float32))
        }
        return self._appended.append(*(torch.cat(part) for part in parts.values()))

    def metrics(self) -> dict[str, float]:
        """How much probability the rows hold. The order in which answers arrived does not count, to the last bit."""
        return {"centering/top_mass": math.fsum(self._masses) / self._num_rows, "centering/top_mass_min": self._smallest_mass}

    def close(self, offsets: Sequence[int]) -> TopTokensFile:
        """The complete file; from now on nothing is written into it. offsets: of the batch's responses."""
        return TopTokensFile(name=self._name, top_k=self.top_k, offsets=tuple(offsets), num_bytes=self._appended.close())
