"""The Tokens tab's data: recorded responses of a run, packed for the page."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from megatron_minpro.objectives.cut import Cut
from megatron_minpro.report.page.colour_limits import colour_limits
from megatron_minpro.report.page.packed import pack, pack_indices
from megatron_minpro.report.page.pieces import PieceTable, find_tokenizer
from megatron_minpro.report.page.rounded import rounded
from megatron_minpro.report.page.token_budget import Chosen, choose, page_characters
from megatron_minpro.report.page.visible_text import visible
from megatron_minpro.tracking.json_lines import read_json_lines
from megatron_minpro.tracking.rollout_log import ROLLOUTS_FOLDER
from megatron_minpro.tracking.token_records import CUT_NOT_TOLD, TOKENS_FOLDER, RecordedResponse, TokenRecords, read_token_records

_LONGEST_TEXT = 400  # characters of an answer


@dataclass(frozen=True, slots=True, kw_only=True)
class _Response:
    """One response and its part of the file's streams."""

    file: int  # place in the page's list of files
    number: int  # in its group, from 1
    record: RecordedResponse
    streams: Mapping[str, np.ndarray]  # token_ids, loss_mask [L]; the others [R]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenData:
    """What the page takes and what it has to say about the rest."""

    content: Mapping[str, Any] | None  # None: there is nothing to show
    notes: Sequence[str]


def token_data(run_dir: Path, *, tokenizer_folders: Sequence[Path], budget: int) -> TokenData:
    """Read RUN/tokens.

    Args:
        run_dir: of the run.
        tokenizer_folders: in which its tokenizer may lie, the best first.
        budget: characters of the page.
    """
    notes: list[str] = []
    paths = sorted((run_dir / TOKENS_FOLDER).glob("step_*.safetensors"))
    if not paths:
        return TokenData(content=None, notes=[f"{TOKENS_FOLDER}/: no token was recorded (tracking.token_groups says how many groups are)"])
    by_step = _by_step(paths, notes)
    chosen = choose({step: [size for _, sizes in files for size in sizes] for step, files in by_step.items()}, budget=budget)
    files, responses = _read(by_step, chosen, notes)
    if not responses:
        return TokenData(content=None, notes=[*notes, f"{TOKENS_FOLDER}/: no response fits into the page"])
    notes += _left_out(by_step, chosen)
    table = PieceTable(_tokenizer(tokenizer_folders, notes))
    indices = [table.indices(response.streams["token_ids"]) for response in responses]
    judged = _judged(run_dir, files, responses)
    packed = [
        {**_packed(response, pieces, table_size=len(table)), **judged.get(response.record.sample_id, {})}
        for response, pieces in zip(responses, indices, strict=True)
    ]
    content = {
        "pieces": table.listed(),
        "wide": len(table) > 1 << 16,
        "files": [_file(file) for file in files],
        "responses": packed,
        "limits": colour_limits([(response.streams, response.record.advantage) for response in responses]),
    }
    return TokenData(content=content, notes=notes)


def _by_step(paths: Sequence[Path], notes: list[str]) -> dict[int, list[tuple[Path, list[int]]]]:
    """Global step -> its files, each with the size that its responses would take in the page."""
    found: defaultdict[int, list[tuple[Path, list[int]]]] = defaultdict(list)
    damaged = []
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:  # the head of the file alone
                record = json.loads(file.metadata()["record"])
            sizes = [
                page_characters(num_tokens=int(one["num_tokens"]), num_response_tokens=int(one["num_response_tokens"]))
                for one in record["responses"]
            ]
            found[int(record["global_step"])].append((path, sizes))
        except (KeyError, TypeError, ValueError, OSError, SafetensorError):
            damaged.append(path)
    if damaged:
        notes.append(f"{TOKENS_FOLDER}/{damaged[0].name}: cannot be read as token records; {len(damaged)} such files are left out")
    return dict(found)


def _read(
    by_step: Mapping[int, Sequence[tuple[Path, list[int]]]], chosen: Chosen, notes: list[str]
) -> tuple[list[TokenRecords], list[_Response]]:
    files: list[TokenRecords] = []
    responses: list[_Response] = []
    for step in chosen.steps:
        wanted = chosen.responses[step]
        for path, sizes in by_step[step]:
            take, wanted = min(wanted, len(sizes)), max(0, wanted - len(sizes))
            if not take:
                continue
            try:
                records = read_token_records(path)
            except ValueError as error:
                notes.append(" ".join(str(error).split()))
                continue
            responses += list(_split(records, file=len(files)))[:take]
            files.append(records)
    return files, responses


def _split(records: TokenRecords, *, file: int) -> Iterator[_Response]:
    token, trained = 0, 0
    seen: Counter[int] = Counter()
    for record in records.responses:
        seen[record.group] += 1
        ends = {True: token + record.num_tokens, False: trained + record.num_response_tokens}
        yield _Response(
            file=file,
            number=seen[record.group],
            record=record,
            streams={
                name: stream[token : ends[True]] if name in ("token_ids", "loss_mask") else stream[trained : ends[False]]
                for name, stream in records.streams.items()
            },
        )
        token, trained = ends[True], ends[False]


def _left_out(by_step: Mapping[int, Sequence[tuple[Path, list[int]]]], chosen: Chosen) -> list[str]:
    total = sum(len(sizes) for files in by_step.values() for _, sizes in files)
    taken = sum(chosen.responses.values())
    if taken == total:
        return []
    said = f"{taken:,} of {total:,} recorded responses are in this page, of {len(chosen.responses)} of {len(by_step)} steps"
    return [f"{said}; the others are in {TOKENS_FOLDER}/ and would make it too large"]


def _tokenizer(folders: Sequence[Path], notes: list[str]) -> Any:
    try:
        found = find_tokenizer(folders)
    except ValueError as error:
        notes.append(f"{error}; tokens are shown by their ids")
        return None
    if found is None:
        notes.append("no tokenizer.json in the run's policy/ nor in model.path; tokens are shown by their ids")
    return found


def _judged(run_dir: Path, files: Sequence[TokenRecords], responses: Sequence[_Response]) -> dict[str, dict[str, str]]:
    """sample_id -> the label, the answer that was found and the grader's error, from the files of sampled responses."""
    wanted = {response.record.sample_id for response in responses}
    found: dict[str, dict[str, str]] = {}
    for step in sorted({files[response.file].sampled_at_step for response in responses}):
        try:
            for _, line in read_json_lines(run_dir / ROLLOUTS_FOLDER / f"step_{step:06d}.jsonl"):
                if line.get("sample_id") in wanted:
                    names = (name for name in ("answer", "extracted", "error") if line.get(name) is not None)
                    found[line["sample_id"]] = {name: visible(str(line[name]), limit=_LONGEST_TEXT) for name in names}
        except ValueError:
            continue  # the texts beside a response are a help; a damaged file of them is said by `minpro` elsewhere
    return found


def _file(records: TokenRecords) -> dict[str, Any]:
    return {
        "step": records.global_step,
        "update": records.update,
        "version": records.policy_version,
        "sampled_step": records.sampled_at_step,
        "sampled_version": records.sampled_version,
        "lag": records.lag,
        "objective": visible(records.objective),
    }


def _packed(response: _Response, pieces: np.ndarray, *, table_size: int) -> dict[str, Any]:
    record, streams = response.record, response.streams
    same = np.array_equal(streams["engine_logprobs"], streams["behaviour_logprobs"])
    return {
        "file": response.file,
        "group": record.group,
        "number": response.number,
        "id": visible(record.sample_id),
        "reward": rounded(record.reward),
        "correct": record.correct,
        "advantage": rounded(record.advantage),
        "finish": visible(record.finish_reason),
        "spans": [list(span) for span in record.version_spans],
        "tokens": record.num_tokens,
        "trained": record.num_response_tokens,
        "pieces": pack_indices(pieces, table_size=table_size),
        "mask": _run_lengths(streams["loss_mask"]),
        "engine": None if same else pack(streams["engine_logprobs"]),
        **{name: pack(streams[name]) for name in ("behaviour_logprobs", "logprobs", "cumulative", "weights", "entropy")},
        "prefix_min": _changes(streams["prefix_min"]),
        "cut": pack(streams["cut"]) if streams["cut"].any() else None,
        "lowest": rounded(float(streams["prefix_min"].min(initial=0.0))),
        "held": int(np.isin(streams["cut"], (Cut.HELD_LOW, Cut.HELD_HIGH)).sum()),
        "zeroed": int(((streams["cut"] >= Cut.BELOW) & (streams["cut"] != CUT_NOT_TOLD)).sum()),
    }


def _run_lengths(mask: np.ndarray) -> list[int]:
    """Lengths of the stretches of equal values, beginning with one of zeros, which may have length 0."""
    padded = np.concatenate([[0], mask, [1 - mask[-1]]]) if len(mask) else np.array([0, 1])
    edges = np.flatnonzero(np.diff(padded))
    return np.diff(np.concatenate([[0], edges])).tolist()


def _changes(values: np.ndarray) -> list[list[float | None]]:
    """[place, value] wherever the value differs from the one before: a prefix minimum changes rarely. The digits give the float32 back.

    null stands for a value that the objective does not say.
    """
    before = np.concatenate([[0.0], values[:-1]])
    changed = (values != before) & ~(np.isnan(values) & np.isnan(before))
    changed[:1] = True
    return [[int(place), None if np.isnan(values[place]) else float(f"{values[place]:.9g}")] for place in np.flatnonzero(changed)]
