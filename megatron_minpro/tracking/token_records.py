"""RUN_DIR/tokens/step_000012_update_0003.safetensors: what the objective saw of single tokens in one mini-batch.

`tracking.token_groups` groups of every batch are recorded. A response is trained once, so it stands in one file. About 34 bytes a token.
Tensors of a file, all its responses end to end; L tokens, of which R were trained:

token_ids [L] int32, loss_mask [L] uint8
engine_logprobs, behaviour_logprobs [R]   of the server and of pi_old, when the token was sampled
logprobs [R]                              under the weights that met the mini-batch
prefix_min [R]                            log of the smallest ratio among earlier trained tokens, 0 where there is none
cumulative [R]                            log of the product of the ratios up to and with the token
weights [R]                               of the policy gradient: d loss / d logprobs = -weights * advantage / divisor
entropy [R]                               nats, of the distribution that logprobs belong to
cut [R] uint8                             objectives/cut.py

An objective of a user may not say prefix_min, cumulative and cut: they are NaN and CUT_NOT_TOLD then.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from checkpoints_convert.atomic_files import write_atomically

TOKENS_FOLDER = "tokens"
CUT_NOT_TOLD = 255
_FORMAT = 1
SEQUENCE_DTYPES = {"token_ids": np.int32, "loss_mask": np.uint8}
SEEN_DTYPES: Mapping[str, Any] = {
    **dict.fromkeys(("logprobs", "prefix_min", "cumulative", "weights", "entropy"), np.float32),
    "cut": np.uint8,
}
TRAINED_DTYPES = {"engine_logprobs": np.float32, "behaviour_logprobs": np.float32, **SEEN_DTYPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedResponse:
    """One response of a file."""

    sample_id: str
    group: int  # of the batch
    num_tokens: int
    num_response_tokens: int  # those that are trained
    advantage: float
    reward: float
    correct: bool
    finish_reason: str
    version_spans: tuple[tuple[int, int, int], ...]  # policy version, first and last + 1 of the response tokens


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class TokenRecords:
    """The content of one file."""

    global_step: int
    update: int  # number of the mini-batch in its step, from 0
    policy_version: int  # of the weights that met it
    sampled_at_step: int
    sampled_version: int
    lag: int  # updates between these two versions
    objective: str
    responses: tuple[RecordedResponse, ...]
    streams: Mapping[str, np.ndarray]  # those named above

    def __post_init__(self) -> None:
        num_tokens = sum(response.num_tokens for response in self.responses)
        num_trained = sum(response.num_response_tokens for response in self.responses)
        for dtypes, length in ((SEQUENCE_DTYPES, num_tokens), (TRAINED_DTYPES, num_trained)):
            for name, dtype in dtypes.items():
                found = self.streams.get(name)
                if found is None or found.dtype != dtype or found.shape != (length,):
                    said = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                    raise ValueError(f"{name} is {said}, expected {np.dtype(dtype)} [{length}]")


def token_file(run_dir: Path, *, global_step: int, update: int) -> Path:
    """Where the records of a mini-batch lie. Names are in the order of training."""
    return run_dir / TOKENS_FOLDER / f"step_{global_step:06d}_update_{update:04d}.safetensors"


def write_token_records(run_dir: Path, records: TokenRecords) -> Path:
    """Write the file, whole or not at all."""
    path = token_file(run_dir, global_step=records.global_step, update=records.update)
    path.parent.mkdir(exist_ok=True)
    record = {one.name: getattr(records, one.name) for one in fields(TokenRecords) if one.name not in ("responses", "streams")}
    record |= {"format": _FORMAT, "responses": [asdict(response) for response in records.responses]}
    write_atomically(path, save(dict(records.streams), metadata={"record": json.dumps(record)}), durable=False)
    return path


def read_token_records(path: Path) -> TokenRecords:
    """Raises ValueError naming the file where it is none of this format."""
    try:
        with safe_open(path, framework="numpy") as file:
            record = json.loads((file.metadata() or {})["record"])
            streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if record.pop("format") != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        responses = [
            RecordedResponse(**{**response, "version_spans": tuple(map(tuple, response["version_spans"]))})
            for response in record.pop("responses")
        ]
        return TokenRecords(**record, responses=tuple(responses), streams=streams)
    except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise ValueError(f"{path}: expected token records as this program writes them ({error})") from error


def forget_token_records(run_dir: Path, *, global_step: int, update: int) -> None:
    """Delete the files of this mini-batch and of all that come after it."""
    first = token_file(run_dir, global_step=global_step, update=update).name
    for path in (run_dir / TOKENS_FOLDER).glob("step_*.safetensors"):
        if path.name >= first:
            path.unlink()
