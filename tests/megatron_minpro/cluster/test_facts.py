"""Files that a run needs of a machine."""

from __future__ import annotations

from pathlib import Path

from megatron_minpro.cluster.paths import missing_paths
from megatron_minpro.config import load_config

REPOSITORY = Path(__file__).resolve().parents[3]


def test_missing_files_are_named_by_their_key(tmp_path: Path) -> None:
    config = load_config(
        REPOSITORY / "configs/qwen3_30b_a3b.yaml",
        [f"output_dir={tmp_path}", f"model.path={tmp_path}", f"prompts.source={tmp_path / 'p.parquet'}", "rollout.api_key_path=key"],
    )
    assert [line.split(":")[0] for line in missing_paths(config)] == ["prompts.source", "evaluation.prompts.source", "rollout.api_key_path"]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Permissions stop nobody who is root: a file of a kernel that refuses every read stands for one."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").symlink_to("/proc/self/mem")
    settings = [f"output_dir={tmp_path}", f"model.path={tmp_path / 'model'}"]
    config = load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [*settings, "model.warm_up=null"])
    assert missing_paths(config) == [f"model.path: {tmp_path / 'model'} cannot be read (Input/output error)"]
