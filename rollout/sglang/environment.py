"""The server environment: its Python, and the variables a process that is started in it gets."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from rollout import nccl_variables

_ROLLOUT = Path(__file__).resolve().parents[1]
_REQUIREMENTS = _ROLLOUT / "requirements_cpu.txt"

# A launcher's variables must not reach a server: SGLang builds process groups of its own from the same names.
_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
_LAUNCHER_PREFIXES = ("TORCHELASTIC_", "GROUP_WORLD", "ROLE_")


def default_server_python() -> Path:
    """The Python of the server environment: MINPRO_SERVER_PYTHON, or .venv-sglang/bin/python beside the packages.

    Raises ValueError when there is none.
    """
    named = os.environ.get("MINPRO_SERVER_PYTHON")
    python = Path(named) if named is not None else _ROLLOUT.parent / ".venv-sglang" / "bin" / "python"
    if shutil.which(python) is None:
        source = "MINPRO_SERVER_PYTHON" if named is not None else "the default"
        raise ValueError(
            f"server environment: {python} ({source}) is not an executable; make it with `make setup`, or set MINPRO_SERVER_PYTHON to the "
            f"Python of an environment with SGLang (for CPUs: {_REQUIREMENTS})"
        )
    return python


def link_packages(folder: Path) -> Path:
    """A new folder in `folder` that shows the server environment our `rollout` package and nothing that is installed beside it.

    Beside an installed `rollout` lie the trainer's own torch and transformers, which a server must not import.
    """
    packages = folder / "packages"
    packages.mkdir()
    (packages / "rollout").symlink_to(_ROLLOUT, target_is_directory=True)
    return packages


def tool_variables(python: Path, *, device: str) -> dict[str, str]:
    """What SGLang needs to compile kernels at start: `ninja` on PATH, a CUDA toolkit, caches on this node's own disk.

    Values that the user has set stay. The toolkit is the one of the environment's own packages, if there is one; else SGLang looks on PATH
    and in /usr/local/cuda. The caches do not lie in the home folder, which nodes may share: all servers would compile into it at once.

    Raises:
        ValueError: the cache folder in the temporary folder is another user's. What lies there is loaded as code.
    """
    programs = Path(shutil.which(python) or python).absolute().parent
    variables = {"PATH": os.pathsep.join(each for each in (str(programs), os.environ.get("PATH", os.defpath)) if each)}
    toolkits = sorted(programs.parent.glob("lib/python3.*/site-packages/nvidia/cu[0-9]*/bin/nvcc"))
    if device == "cuda" and toolkits and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        variables["CUDA_HOME"] = str(toolkits[-1].parents[1])
    cache = os.environ.get("SGLANG_CACHE_DIR") or str(_node_cache() / "sglang")
    variables["SGLANG_CACHE_DIR"] = cache
    variables["SGLANG_JIT_CACHE_DIR"] = os.environ.get("SGLANG_JIT_CACHE_DIR") or os.path.join(cache, "jit")
    return variables


def _node_cache() -> Path:
    """A folder of this user's in the temporary folder (TMPDIR), which stays for later jobs."""
    folder = Path(tempfile.gettempdir()) / f"minpro_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(f"{folder}: others may write there, expected a folder of this user's alone; remove it, or set SGLANG_CACHE_DIR")
    return folder


def server_environment(python: Path, *, device: str, num_threads: int, packages: Path) -> dict[str, str]:
    """The environment of a server process: this process's without a launcher's variables, offline, with `rollout` importable.

    Args:
        python: of the server environment.
        device: cpu or cuda.
        num_threads: torch threads on the CPU.
        packages: the folder that `link_packages` made. Nothing else is searched before the server environment's own packages, the
            working folder included.
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    environment.pop("PYTHONHOME", None)
    environment.pop("VIRTUAL_ENV", None)
    environment.update(
        tool_variables(python, device=device),
        PYTHONPATH=str(packages),
        PYTHONSAFEPATH="1",
        PYTHONUNBUFFERED="1",
        HF_HUB_OFFLINE="1",  # the model is a local folder: nothing is looked up
        TRANSFORMERS_OFFLINE="1",
        # /health then answers at once; being able to generate is checked by the pool, with a generation.
        SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION="0",
        # Log-probs are those of the distribution that is drawn from, at its temperature.
        SGLANG_RETURN_ORIGINAL_LOGPROB="0",
        # SGLang's processes change their titles; setproctitle must not write over the environment, by which they are found (reaper.py).
        SPT_NOENV="1",
    )
    if device == "cpu":
        environment.update(
            SGLANG_USE_CPU_ENGINE="1",
            CUDA_VISIBLE_DEVICES="",
            OMP_NUM_THREADS=str(num_threads),
            MKL_NUM_THREADS=str(num_threads),
        )
    else:
        environment.pop("SGLANG_USE_CPU_ENGINE", None)
        nccl_variables.agree(environment)
    return environment
