"""Token records that no run has made, their numbers from a loop in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_minpro.tracking.token_records import TRAINED_DTYPES, RecordedResponse, TokenRecords, write_token_records

FLOOR = np.log(0.8)  # of these records' weights
PROMPT_TOKENS = 3


@pytest.fixture
def byte_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """Write a tokenizer with one token a byte, id = byte, and these special tokens behind them; says its folder."""

    def write(*special: str, folder: Path | None = None) -> Path:
        folder = tmp_path / "tokenizer" if folder is None else folder
        folder.mkdir(parents=True, exist_ok=True)
        alphabet = _byte_names()
        tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(special))
        tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return write


def _byte_names() -> list[str]:
    """How byte-level vocabularies write each byte: printable ones as they are, the others from U+0100 on (GPT-2's table)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in kept else chr(next(others)) for byte in range(256)]


@pytest.fixture
def record_tokens() -> Callable[..., Path]:
    """Write the records of one mini-batch, one response for each sequence of token ids, the first PROMPT_TOKENS of them the prompt's."""

    def write(
        run_dir: Path,
        sequences: Sequence[Sequence[int]],
        *,
        step: int = 2,
        update: int = 0,
        spread: float = 0.3,
        rewards: Sequence[float] | None = None,
        finish_reasons: Sequence[str] | None = None,
        sample_ids: Sequence[str] | None = None,
        objective: str = "minpro",
    ) -> Path:
        generator = np.random.default_rng([step, update])
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("token_ids", "loss_mask", *TRAINED_DTYPES)}
        responses = []
        for place, sequence in enumerate(sequences):
            reward = float(place % 2) if rewards is None else rewards[place]
            length = len(sequence) - PROMPT_TOKENS
            behaviour = -generator.exponential(0.5, length).astype(np.float32)
            log_ratio = generator.normal(0, spread, length).astype(np.float32)
            seen = _seen(behaviour, (behaviour + log_ratio).astype(np.float32))
            seen["engine_logprobs"] = (behaviour + generator.normal(0, 1e-3, length)).astype(np.float32)
            seen["entropy"] = generator.exponential(0.4, length).astype(np.float32)
            seen["token_ids"] = np.array(sequence, dtype=np.int32)
            seen["loss_mask"] = np.array([0] * PROMPT_TOKENS + [1] * length, dtype=np.uint8)
            for name, values in seen.items():
                parts[name].append(values)
            responses.append(
                RecordedResponse(
                    sample_id=f"{step}-{update}-{place}" if sample_ids is None else sample_ids[place],
                    group=update,
                    num_tokens=len(sequence),
                    num_response_tokens=length,
                    advantage=reward - 0.5,
                    reward=reward,
                    correct=reward > 0,
                    finish_reason="stop" if finish_reasons is None else finish_reasons[place],
                    version_spans=((4, 0, length),),
                )
            )
        records = TokenRecords(
            global_step=step,
            update=update,
            policy_version=16 * step + update,
            sampled_at_step=step - 2,
            sampled_version=4,
            lag=16 * step + update - 4,
            objective=objective,
            responses=tuple(responses),
            streams={name: np.concatenate(values) for name, values in parts.items()},
        )
        return write_token_records(run_dir, records)

    return write


def _seen(behaviour: np.ndarray, logprobs: np.ndarray) -> dict[str, np.ndarray]:
    """What MinPRO with a floor under its weight makes of the log-probs, token by token."""
    prefix_min, cumulative, weights, cut = [], [], [], []
    smallest, product = 0.0, 0.0
    for place, ratio in enumerate(logprobs.astype(np.float64) - behaviour):
        prefix_min.append(smallest)
        product += ratio
        cumulative.append(product)
        weights.append(np.exp(max(ratio + smallest, FLOOR)))
        cut.append(int(ratio + smallest < FLOOR))
        smallest = ratio if place == 0 else min(smallest, ratio)
    found = {"prefix_min": prefix_min, "cumulative": cumulative, "weights": weights}
    arrays = {name: np.array(values, dtype=np.float32) for name, values in found.items()}
    return {"behaviour_logprobs": behaviour, "logprobs": logprobs, **arrays, "cut": np.array(cut, dtype=np.uint8)}


@pytest.fixture
def log_rollouts() -> Callable[..., None]:
    """Write the lines of sampled responses of one step."""

    def write(run_dir: Path, step: int, lines: Sequence[dict[str, object]]) -> None:
        folder = run_dir / "rollouts"
        folder.mkdir(exist_ok=True)
        (folder / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return write
