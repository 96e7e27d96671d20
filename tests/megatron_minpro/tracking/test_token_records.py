"""Files of what the objective saw of single tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_minpro.tracking.token_records import (
    SEQUENCE_DTYPES,
    TRAINED_DTYPES,
    RecordedResponse,
    TokenRecords,
    forget_token_records,
    read_token_records,
    token_file,
    write_token_records,
)

Change = Callable[[TokenRecords], TokenRecords]


def records(global_step: int = 12, update: int = 3) -> TokenRecords:
    """Two responses: 3 of 5 and 1 of 2 tokens are trained."""
    response = RecordedResponse(
        sample_id="step10-0",
        group=0,
        num_tokens=5,
        num_response_tokens=3,
        advantage=-0.1,
        reward=0.25,
        correct=False,
        finish_reason="length",
        version_spans=((160, 0, 3),),
    )
    return TokenRecords(
        global_step=global_step,
        update=update,
        policy_version=195,
        sampled_at_step=10,
        sampled_version=160,
        lag=35,
        objective="minpro",
        responses=(response, replace(response, sample_id="step10-1", num_tokens=2, num_response_tokens=1, version_spans=((160, 0, 1),))),
        streams={
            **{name: np.arange(7).astype(dtype) for name, dtype in SEQUENCE_DTYPES.items()},
            **{name: np.array([0.1, -2.0, 3e-7, 4]).astype(dtype) for name, dtype in TRAINED_DTYPES.items()},
        },
    )


def test_a_file_gives_back_every_bit(tmp_path: Path) -> None:
    path = write_token_records(tmp_path, records())
    assert path == tmp_path / "tokens/step_000012_update_0003.safetensors"
    found, expected = read_token_records(path), records()
    for one in fields(TokenRecords):
        assert one.name == "streams" or getattr(found, one.name) == getattr(expected, one.name)
    assert found.streams.keys() == expected.streams.keys()
    for name, values in expected.streams.items():
        np.testing.assert_array_equal(found.streams[name], values, strict=True)


def test_streams_of_another_length_or_type_are_refused() -> None:
    whole = records()
    with pytest.raises(ValueError, match=r"weights is float32 \[3\], expected float32 \[4\]"):
        replace(whole, streams={**whole.streams, "weights": whole.streams["weights"][:3]})
    with pytest.raises(ValueError, match=r"cut is float32 \[4\], expected uint8 \[4\]"):
        replace(whole, streams={**whole.streams, "cut": whole.streams["weights"]})
    with pytest.raises(ValueError, match=r"entropy is missing, expected float32 \[4\]"):
        replace(whole, streams={name: values for name, values in whole.streams.items() if name != "entropy"})


def test_a_damaged_or_foreign_file_is_named(tmp_path: Path) -> None:
    path = write_token_records(tmp_path, records())
    whole = path.read_bytes()
    for content in (
        whole[: len(whole) // 2],
        b"",
        whole.replace(b'"format\\": 1', b'"format\\": 2'),
        whole.replace(b"num_tokens", b"num_tokenz"),
    ):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}: expected token records"):
            read_token_records(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"{path}: expected token records"):
        read_token_records(path)


def test_a_resumed_run_forgets_what_comes_later(tmp_path: Path) -> None:
    for step, update in ((9, 15), (10, 2), (10, 3), (11, 0)):
        write_token_records(tmp_path, records(step, update))
    forget_token_records(tmp_path, global_step=10, update=3)
    left = {token_file(tmp_path, global_step=9, update=15), token_file(tmp_path, global_step=10, update=2)}
    assert set((tmp_path / "tokens").iterdir()) == left
    forget_token_records(tmp_path / "new", global_step=0, update=0)
    assert not (tmp_path / "new").exists()
