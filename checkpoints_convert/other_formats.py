"""Weight formats that are not supported, and the error message for each."""

from __future__ import annotations

from pathlib import Path

_ADVICE = {
    ".gguf": "GGUF is not read; take the model's safetensors",
    ".bin": "PyTorch pickles are not read; save the model as safetensors",
    ".pt": "PyTorch pickles are not read; save the model as safetensors",
    ".pth": "PyTorch pickles are not read; save the model as safetensors",
    ".ckpt": "PyTorch pickles are not read; save the model as safetensors",
    ".h5": "TensorFlow weights are not read; take the model's safetensors",
    ".msgpack": "Flax weights are not read; take the model's safetensors",
    ".onnx": "ONNX is not read; take the model's safetensors",
    ".distcp": "files of a torch_dist checkpoint without its .metadata",
    ".safetensors": "safetensors files without model.safetensors.index.json, which says which tensor is where",
}
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")  # what trainers leave beside weights


def found_instead(path: Path) -> str:
    """The end of an error message: which weights lie in a folder (or are this file) and cannot be used. "" when there are none.

    Args:
        path: a folder without weights that are read, or a file.
    """
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in files if file.suffix.lower() in _ADVICE and file.name not in _NO_WEIGHTS]
    if not found:
        return ""
    kind = found[0].suffix.lower()
    alike = [file for file in found if file.suffix.lower() == kind]
    others = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
    return f"; {alike[0].name}{others}: {_ADVICE[kind]}"
