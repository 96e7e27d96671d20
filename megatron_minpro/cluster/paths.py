"""Files and folders that a run reads and writes, as this machine finds them. Read without torch: every node of a job looks at them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_minpro.config import RunConfig
from megatron_minpro.data.rows import is_file


def check_output_folder(config: RunConfig) -> None:
    """A run folder that cannot be made or written to."""
    existing = next(path for path in (config.run_dir, *config.run_dir.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir: {existing} is a file; expected a folder, or a name that is free")
    try:
        with tempfile.TemporaryFile(dir=existing):  # root may write where the permissions say otherwise, and not everywhere they allow it
            pass
    except OSError as error:
        raise ValueError(f"output_dir: {config.run_dir} cannot be written to ({error.strerror}); expected another output_dir") from error


def key_files(config: RunConfig) -> dict[str, str]:
    """Setting -> file, for the keys that requests must carry."""
    paths = {"rollout.api_key_path": config.rollout.api_key_path, "rollout.admin_key_path": config.rollout.admin_key_path}
    return {name: path for name, path in paths.items() if path is not None}


def missing_paths(config: RunConfig) -> list[str]:
    """`key: path` for every file or folder that the run needs and this machine does not have, cannot read, or may not write to."""
    needed = [("model.path", config.model.path)] if config.model.warm_up is None else []
    needed += [(f"{section}.source", prompts.source) for section, prompts in config.prompt_sections.items() if is_file(prompts.source)]
    needed += list(key_files(config).items())
    absent = [f"{name}: {path} {fault}" for name, path in needed if (fault := _cannot_be_read(Path(path))) is not None]
    try:
        check_output_folder(config)
    except ValueError as error:
        absent.append(str(error))
    return absent


def _cannot_be_read(path: Path) -> str | None:
    """Why not, of a file or of one of a folder's files; a byte of each is read."""
    if not path.exists():
        return "does not exist"
    try:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if not file.is_dir():
                with file.open("rb") as opened:
                    opened.read(1)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None
