"""Score centering in the loop: which of the servers' most likely tokens a batch is trained with, and where they wait."""

from __future__ import annotations

from megatron_minpro.batch.sample import RolloutBatch
from megatron_minpro.loop.training_run import TrainingRun
from parallel.top_tokens import TopTokens


def top_tokens_of(run: TrainingRun, batch: RolloutBatch) -> dict[str, TopTokens | None]:
    """By sample: the rows of the servers' most likely tokens, views of the mapped file; None where scores are not centred."""
    if batch.top_tokens is None:
        return dict.fromkeys(sample.sample_id for sample in batch.samples)
    rows = batch.top_tokens.rows(run.config.run_dir, [sample.num_response_tokens for sample in batch.samples])
    return {sample.sample_id: top for sample, top in zip(batch.samples, rows, strict=True)}


def forget_files(run: TrainingRun, batch: RolloutBatch) -> None:
    """The batch is trained: its files go. A checkpoint that holds the batch has links of its own."""
    if run.driver is not None:
        for path in batch.files:
            (run.config.run_dir / path).unlink()
