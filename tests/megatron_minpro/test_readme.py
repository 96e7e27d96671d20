"""The README's own example works as printed: its YAML, its reward, and the names of its commands and files."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.config import load_config
from megatron_minpro.rewards.registry import make_reward

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", ".venv-sglang", ".venv-trl", "runs", "node_modules", ".pytest_cache"} & set(path.relative_to(ROOT).parts)
)


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_configuration_of_the_example_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_run.yaml").write_text(block("yaml"))
    config = load_config("my_run.yaml", ["objective.name=cispo", "staleness=4", "name=cispo_n4"])
    assert (config.objective.name, config.effective_schedule, config.layout.dp) == ("cispo", "overlapped", 2)


def test_the_reward_of_the_example_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(block("python"))
    prompt = Prompt(prompt_id="q-1", text="What is 6 x 7?", token_ids=(1,), answer="42", source="test")
    conversations = [Conversation.of_text(prompt, text, finish_reason="stop", num_response_tokens=4) for text in ("It is 42.", "It is 41.")]
    reward = make_reward("my_rewards:contains_answer", bonus=0.1)
    assert [result.reward for result in reward.score(conversations)] == [1.1, 0.0]


def test_links_of_all_pages_lead_to_files() -> None:
    assert len(PAGES) >= 9
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"


def test_every_command_that_the_pages_name_exists() -> None:
    named = {
        name for page in PAGES for name in re.findall(r"^(?:\.venv/bin/)?minpro (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    help_text = subprocess.run(
        [sys.executable, "-m", "megatron_minpro.cli", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"^  (\w+)  ", help_text, re.MULTILINE))
    assert {"train", "plan", "evaluate", "convert"} <= named <= known
