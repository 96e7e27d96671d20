from __future__ import annotations

from pathlib import Path

from megatron_minpro.tracking.progress import Progress, read_progress, write_progress


def test_the_latest_progress_is_what_is_read(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    write_progress(tmp_path, Progress(phase="sample", global_step=0))
    write_progress(tmp_path, Progress(phase="update", global_step=3, detail="mini-batch 2 of 16"))
    progress = read_progress(tmp_path)
    assert progress is not None
    assert (progress.phase, progress.global_step, progress.detail) == ("update", 3, "mini-batch 2 of 16")
    assert progress.updated_at > 1.7e9
