"""The second step of checking a configuration: names and options lead to something, or one line says where they were written and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_minpro.config import ConfigError, load_config
from megatron_minpro.run.plug_ins import check_plug_ins

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = REPOSITORY / "configs/tiny_moe_cpu.yaml"


def error_of(*overrides: str, path: Path = TINY) -> str:
    with pytest.raises(ConfigError) as caught:
        check_plug_ins(load_config(path, overrides))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plug_ins_of_every_shipped_run_are_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINPRO_ASSETS", "/assets")
    check_plug_ins(load_config(path))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/objective").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_objective_takes_its_options(path: Path) -> None:
    check_plug_ins(load_config(TINY, [f"objective={path}", "behaviour_logprobs=engine"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.name=grop", "command line: objective.name = 'grop': unknown; did you mean 'grpo'?"),
        ("objective.clip_hgh=1", "command line: objective.clip_hgh = 1: minpro has no such option; did you mean 'clip_high'?"),
        ("objective.clip_high=-1", f"{TINY}:12 with the overrides of the command line: objective.name = 'minpro': clip_high must be"),
        ("objective.name=scaled_cispo", "command line: objective.name = 'scaled_cispo': needs the option scale"),
        ("reward.name=math_verifi", "command line: reward.name = 'math_verifi': unknown; did you mean 'math_verify'?"),
        ("reward.style=dapo", "command line: reward.style = 'dapo': megatron_minpro.tasks.arithmetic_chains.reward:final_step has no such"),
        ("advantages.estimator=loo", "command line: advantages.estimator = 'loo': unknown; known: group_normalized, leave_one_out"),
        ("advantages.epsilon=0", "advantages.estimator = 'group_normalized': epsilon must be a finite number above 0"),
        ("prompts.options.modulos=3", "command line: prompts.options.modulos = 3: megatron_minpro.tasks.arithmetic_chains.prompts:Arith"),
        ("evaluation.prompts.source=nowhere:f", "command line: evaluation.prompts.source = 'nowhere:f': there is no module nowhere"),
        ("evaluation.prompts.preset=dapo", "command line: evaluation.prompts.preset = 'dapo': the plug-in "),
        ("rollout.weight_sync=disc", "command line: rollout.weight_sync = 'disc': unknown; did you mean 'disk'?"),
        ("model.warm_up.examples.lazi=0.1", "command line: model.warm_up.examples.lazi = 0.1: "),
        ("model.warm_up.tokenizer.modulos=3", "command line: model.warm_up.tokenizer.modulos = 3: "),
        ("model.warm_up.tokenizer.name=json:nothing", "command line: model.warm_up.tokenizer.name = 'json:nothing': module json ("),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_named_with_its_origin(override: str, message: str) -> None:
    assert error_of(override).startswith(message) or (message.startswith("advantages") and message in error_of(override))


def test_prompts_of_a_file_have_a_known_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINPRO_ASSETS", "/assets")
    dapo = REPOSITORY / "configs/tiny_moe_dapo.yaml"
    assert error_of("prompts.preset=dapoo", path=dapo).startswith("command line: prompts.preset = 'dapoo': unknown; did you mean 'dapo'?")
    wrapper = error_of("prompts.wrapper=foo", path=dapo)
    assert wrapper == "command line: prompts.wrapper = 'foo': expected dapo, boxed or a text that contains {question} once"
    assert "answer_format = 'bocksed': unknown; did you mean 'boxed'?" in error_of("prompts.answer_format=bocksed", path=dapo)


def test_a_plug_in_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "edited.yaml"
    path.write_text(TINY.read_text().replace("name: minpro, clip_low", "name: minpro, clip_lo"))
    line = next(number for number, text in enumerate(path.read_text().splitlines(), start=1) if text.startswith("objective:"))
    assert error_of(path=path) == (
        f"{path}:{line}: objective.clip_lo = 1.0: minpro has no such option; did you mean 'clip_low'? "
        "known: clip_low, clip_high, aggregation, aggregation_length"
    )


MODULE = """
import torch
from megatron_minpro.objectives import ObjectiveOutput

def plain(batch, *, scale):
    weights_T = torch.full_like(batch.logprobs_T, scale).where(batch.loss_mask_T, 0)
    return ObjectiveOutput(loss=-(weights_T * batch.advantages_T * batch.logprobs_T).sum(), weights_T=weights_T, metrics={})

def raw(rewards, group_ids):
    return rewards.float()

def reward(prompt, conversation, *, bonus=0.0):
    return len(response) + bonus

def prompts(tokenizer, *, count):
    raise NotImplementedError

def weights(context):
    raise NotImplementedError

def pairs(prompts, seed):
    return []

def tokenizer(folder):
    raise NotImplementedError
"""

NAMES = {
    "objective": "{{name: {0}:plain, scale: 2.0}}",
    "advantages": "{{estimator: {0}:raw}}",
    "reward": "{{name: {0}:reward, bonus: 1.0}}",
    "prompts": "{{source: {0}:prompts, options: {{count: 3}}, max_prompt_tokens: 9}}",
    "rollout.weight_sync": "{0}:weights",
    "model.warm_up.examples": "{{name: {0}:pairs}}",
    "model.warm_up.tokenizer": "{{name: {0}:tokenizer}}",
}


def test_every_plug_in_may_be_a_module_of_the_working_folder(users_module: Callable[[str], str]) -> None:
    module = users_module(MODULE)
    check_plug_ins(load_config(TINY, [f"{key}={text.format(module)}" for key, text in NAMES.items()]))


@pytest.mark.parametrize("key", NAMES)
def test_every_plug_in_that_is_missing_is_refused(users_module: Callable[[str], str], key: str) -> None:
    module = users_module("")
    assert f"{module}.py) has no " in error_of(f"{key}={NAMES[key].format(module)}")


def test_an_objective_that_cannot_be_centred_is_refused_with_its_line(users_module: Callable[[str], str]) -> None:
    centred = ["objective.score_centering.top_k=8", "behaviour_logprobs=engine"]
    reason = "its scores cannot be centred; expected objective.score_centering = null, or one of minpro, cispo, scaled_cispo, prefix_ratio"
    assert error_of("objective.name=gspo", "objective={name: gspo, score_centering: {top_k: 8}}", centred[1]).startswith(
        f"command line: objective.name = 'gspo': {reason}"
    )
    assert reason in error_of(f"objective={NAMES['objective'].format(users_module(MODULE))}", *centred)
    check_plug_ins(load_config(TINY, centred))


def test_a_rate_that_follows_what_the_objective_does_not_report_is_refused(users_module: Callable[[str], str]) -> None:
    follow = "actor.optimizer.sample_size.level=prefix"
    check_plug_ins(load_config(TINY, [follow]))
    module = users_module(MODULE)
    assert error_of(follow, f"objective={NAMES['objective'].format(module)}") == (
        f"command line: actor.optimizer.sample_size.level = 'prefix': objective {module}:plain reports no effective_sample_size/prefix"
    )
