"""What a job script settles before it starts anything: python -m megatron_minpro.run.job_config CONFIG [key=value ...]

Resolves the configuration, checks whatever can be checked without a GPU, and writes it into the run folder that it names
(output_dir/name), unless that folder holds another run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.cluster.checks import check_model, check_settings
from megatron_minpro.config import dump_config, load_config
from megatron_minpro.run.run_folder import CONFIG_FILE
from megatron_minpro.run.run_state import latest_checkpoint, refuse_unusable


def settle(path: Path, overrides: list[str]) -> Path:
    """The run folder, with its config.yaml. Raises ValueError for settings that cannot work, and for a folder with another run."""
    config = load_config(path, overrides)
    check_model(config)
    check_settings(config)
    checkpoint = latest_checkpoint(config.run_dir / "checkpoints")
    if checkpoint is not None:
        refuse_unusable(checkpoint, config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(config.run_dir / CONFIG_FILE, dump_config(config))
    return config.run_dir


def main(arguments: list[str]) -> int:
    """Exit code 2 and one line on stderr when the configuration cannot be used."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m megatron_minpro.run.job_config CONFIG [key=value ...]")
        return 0 if arguments else 2
    try:
        settle(Path(arguments[0]), arguments[1:])
    except ValueError as error:
        print(f"minpro: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
