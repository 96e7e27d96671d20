"""Fixtures that several folders of tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jaxtyping import config as jaxtyping_config

from tests import shape_checks

shape_checks.install()

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """No shape is checked from outside: for tests of what the code itself says about a wrong one."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder with the real data sets and the real tokenizer, named by MINPRO_ASSETS (default: `shared` beside the checkout).

    Where it is absent the test is skipped; in CI (CI=true) that is a failure, so that nobody believes it ran.
    """
    folder = Path(os.environ.get("MINPRO_ASSETS", REPOSITORY.parent / "shared")).resolve()
    needed = [folder / "data/train/dapo_math_17k.parquet", folder / "models/qwen3_30b_a3b/tokenizer.json"]
    absent = [str(path) for path in needed if not path.is_file()]
    if absent:
        reason = f"no {', '.join(absent)}; MINPRO_ASSETS names the folder that holds data/ and models/"
        if os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def qwen_tokenizer(assets: Path) -> Any:
    """The real Qwen3 tokenizer with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "models/qwen3_30b_a3b")


@pytest.fixture(scope="session")
def chain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of arithmetic_chains: one token per word, unknown words become <|unknown|>."""
    from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer

    return build_tokenizer(tmp_path_factory.mktemp("chain_tokenizer"))


@pytest.fixture
def one_rank_group() -> Iterator[Any]:
    """torch.distributed with this process as its only rank (gloo); the world's group."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
