"""How many responses all attempts at a run have sampled: by the count at their arrival, or by the metrics where these know more."""

from __future__ import annotations

from pathlib import Path

from megatron_minpro.tracking.sampled_count import read_sampled, write_sampled

LINES = '{"global_step": 0, "total/rollouts_sampled": 32.0}\n{"global_step": 1, "total/rollouts_sampled": null}\n'


def test_the_larger_of_both_counts_is_what_was_sampled(tmp_path: Path) -> None:
    assert read_sampled(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text(LINES)
    assert read_sampled(tmp_path) == 32  # a run of a version that kept no count
    write_sampled(tmp_path, 64)
    assert read_sampled(tmp_path) == 64
    (tmp_path / "metrics.jsonl").unlink()
    assert read_sampled(tmp_path) == 64
