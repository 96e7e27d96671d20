"""Which folder holds a checkpoint's tensors, and which its config and tokenizer: for a path inside a run, or any other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from checkpoints_convert.other_formats import found_instead

_RUN_FILE = "run.json"
_ACTOR = "actor"
_POINTER = "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLocation:
    """weights: a folder in either format. model: the folder with config.json and tokenizer, which may be the same."""

    weights: Path
    model: Path


def locate_checkpoint(path: Path, *, config: Path | None = None) -> CheckpointLocation:
    """Resolve a run folder, its `checkpoints`, `checkpoints/latest`, one `step_*` or its `actor`; any other folder is taken as it is.

    config: the folder with config.json, where it is not to be found out: a run's checkpoint remembers the model it started from.
    Raises ValueError, naming the file, for a path that does not exist and a run whose model folder cannot be found.
    """
    weights = weights_folder(path)
    if config is None and weights.name == _ACTOR and (weights.parent / _RUN_FILE).is_file():
        config = _model_folder(weights.parent)
    return CheckpointLocation(weights=weights, model=weights if config is None else config)


def weights_folder(path: Path) -> Path:
    """The folder with the tensors that `locate_checkpoint` finds; which model they belong to is left open."""
    folder = _follow(path)
    return folder / _ACTOR if (folder / _RUN_FILE).is_file() else folder


def trained_model_type(weights: Path) -> str | None:
    """The model type that a run's checkpoint remembers; None for a folder that is no run's."""
    path = weights.parent / _RUN_FILE
    if weights.name != _ACTOR or not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes())["model"]["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: names no model type ({type(error).__name__}: {error}); expected a run's checkpoint") from error


def _follow(path: Path) -> Path:
    """A run folder, its checkpoints folder or the pointer -> the newest checkpoint."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; expected a checkpoint")
    for pointer in (path, path / _POINTER, path / "checkpoints" / _POINTER):
        if pointer.is_file() and pointer.name == _POINTER:
            found = pointer.parent / pointer.read_text().strip()
            if not found.is_dir():
                raise ValueError(f"{pointer}: names {found.name!r}; expected a folder beside it")
            return found
    if not path.is_dir():
        raise ValueError(f"{path}: is a file; expected a checkpoint folder, or a run's {_POINTER}{found_instead(path)}")
    return path


def _model_folder(step: Path) -> Path:
    """The model folder that the run of a checkpoint started from; a relative one is sought from where the run was started, then here."""
    path = step / _RUN_FILE
    try:
        config = json.loads(path.read_bytes())["config"]
        model, output_dir, name = Path(config["model"]["path"]), Path(config["output_dir"]), str(config["name"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: names no model ({type(error).__name__}: {error}); expected a run's checkpoint, or --config") from error
    run_dir = step.resolve().parent.parent
    places = [Path.cwd()]
    own = (output_dir / name).parts
    if run_dir.parts[-len(own) :] == own:
        places.insert(0, Path(*run_dir.parts[: -len(own)]))
    for place in places:
        if (place / model / "config.json").is_file():
            return place / model
    raise ValueError(f"{path}: the run started from {model}, which is not there any more; expected --config with its config and tokenizer")
