"""What a job script settles before it starts anything: `minpro train CONFIG --prepare`."""

from __future__ import annotations

from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.cluster.checks import check_model, check_settings
from megatron_minpro.config import RunConfig, dump_config
from megatron_minpro.run.run_folder import CONFIG_FILE, RESULT_FILE
from megatron_minpro.run.run_state import checkpoint_to_continue, refuse_unusable


def settle(config: RunConfig) -> Path:
    """Check what can be checked without a GPU and write the configuration into the run folder, which is returned.

    Raises:
        ValueError: for settings that cannot work, and for a folder with another run.
    """
    check_model(config)
    check_settings(config)
    checkpoint = checkpoint_to_continue(config.run_dir / "checkpoints", config)
    if checkpoint is not None:
        refuse_unusable(checkpoint, config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / RESULT_FILE).unlink(missing_ok=True)  # of a run that is now prolonged
    write_atomically(config.run_dir / CONFIG_FILE, dump_config(config))
    return config.run_dir
