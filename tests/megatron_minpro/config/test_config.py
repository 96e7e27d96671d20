from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_minpro.config import (
    ConfigError,
    RunConfig,
    TrackingConfig,
    dump_config,
    flatten_differences,
    load_config,
    may_change_on_resume,
)
from megatron_minpro.config.settings import escape
from megatron_minpro.config.yaml_text import YamlError, parse_yaml, render_yaml
from megatron_minpro.objectives import OBJECTIVES, make_objective

REPOSITORY = Path(__file__).resolve().parents[3]
TINY = REPOSITORY / "configs/tiny_moe_cpu.yaml"


@pytest.fixture(autouse=True)
def _from_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("MINPRO_ASSETS", "/assets")


def error_of(*overrides: str, path: Path | str = "configs/tiny_moe_cpu.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = TINY.read_text()
    assert text.count(old) == 1
    path = tmp_path / "edited.yaml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_run_loads_and_is_named_after_its_file(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert load_config(path) == config


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/objective").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_objective_loads_into_a_run(path: Path) -> None:
    objective = load_config(TINY, [f"objective={path}", "behaviour_logprobs=engine"]).objective
    assert objective.name == path.stem.removeprefix("centered_")
    assert (objective.score_centering is not None) == path.stem.startswith("centered_")
    # The files say what the signatures' defaults are, which test_every_objective.py compares with the papers.
    assert objective.options.items() <= dict(make_objective(objective.name).options).items()


def test_every_objective_but_the_one_without_a_default_has_a_file() -> None:
    files = {path.stem for path in (REPOSITORY / "configs/objective").glob("*.yaml")}
    assert {stem for stem in files if not stem.startswith("centered_")} == set(OBJECTIVES.known) - {"scaled_cispo"}


def test_production_runs_have_the_settings_of_the_paper() -> None:
    for name, prompts, steps in (("qwen3_30b_a3b", 512, 120), ("qwen3_8b", 512, 120), ("qwen3_14b", 256, 160)):
        config = load_config(f"configs/{name}.yaml")
        assert (config.rollout.prompts_per_step, config.rollout.group_size, config.actor.updates_per_step) == (prompts, 8, 16)
        assert config.sequences_per_mini_batch == prompts // 16 * 8
        assert (config.prompts.max_prompt_tokens, config.rollout.max_new_tokens) == (2048, 20480)
        assert (config.actor.optimizer.learning_rate, config.actor.optimizer.warm_up_steps) == (1e-6, 10)
        assert (config.rollout.temperature, config.rollout.top_p, config.evaluation.top_p) == (1.0, 1.0, 0.7)
        assert (config.staleness, config.num_global_steps, config.checkpoint.every) == (2, steps, 10)
        assert (config.objective.name, config.objective.options) == (
            "minpro",
            {"clip_low": 1.0, "clip_high": 4.0, "aggregation": "token_mean"},
        )


def test_rivals_have_the_clip_widths_of_the_paper() -> None:
    options = {
        name: load_config(TINY, [f"objective=configs/objective/{name}.yaml"]).objective.options
        for name in ("grpo", "gspo", "cispo", "m2po")
    }
    assert (options["grpo"]["clip_low"], options["grpo"]["clip_high"]) == (0.2, 0.28)
    assert options["gspo"] == {"clip_low": 2e-3, "clip_high": 2e-3}
    assert (options["cispo"]["clip_low"], options["cispo"]["clip_high"]) == (1.0, 4.0)
    assert options["m2po"]["budget"] == 0.04


@pytest.mark.parametrize("dtypes", [["rollout.dtype=bfloat16"], ["model.dtype=bfloat16"]])
def test_servers_of_another_dtype_need_their_own_logprobs_or_a_correction(dtypes: list[str]) -> None:
    assert "pi_old is not the policy that sampled; or behaviour_logprobs = 'engine'" in error_of(*dtypes)
    load_config(TINY, [*dtypes, "behaviour_logprobs=engine"])
    load_config(TINY, [*dtypes, "corrections.truncated_is.max_weight=2.0"])
    load_config(TINY, ["model.dtype=bfloat16", "rollout.dtype=bfloat16"])


def test_the_held_out_measurement_can_be_switched_off(tmp_path: Path) -> None:
    config = load_config(TINY, ["evaluation=null"])
    assert config.evaluation is None and list(config.prompt_sections) == ["prompts"]
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


def test_corrections_are_off_unless_given_and_need_the_trainers_log_probs() -> None:
    assert load_config(TINY).corrections.active == [] and load_config(TINY).rollout.dynamic_sampling is None
    given = ["corrections.rejection={level: geometric_mean, low: 0.999, high: 1.001}", "corrections.truncated_is.max_weight=2.0"]
    assert load_config(TINY, given).corrections.active == ["truncated_is", "rejection"]
    assert error_of(*given, "behaviour_logprobs=engine").startswith(
        "command line: behaviour_logprobs = 'engine': expected 'trainer' with corrections.truncated_is"
    )


def test_score_centering_is_off_unless_given_and_needs_engine_log_probs(tmp_path: Path) -> None:
    assert load_config(TINY).objective.score_centering is None
    assert error_of("objective.score_centering.top_k=8") == (
        "configs/tiny_moe_cpu.yaml:9: behaviour_logprobs = 'trainer': expected 'engine' with objective.score_centering, which needs the "
        "distribution that the servers sampled from"
    )
    config = load_config(TINY, ["objective.score_centering={}", "behaviour_logprobs=engine"])
    assert config.objective.score_centering is not None and config.objective.score_centering.top_k == 128
    assert "score_centering" not in config.objective.options  # which are the function's own
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_dumped_configuration_loads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_a_literal_dollar_brace_survives_the_round_trip(tmp_path: Path) -> None:
    config = load_config("configs/tiny_moe_dapo.yaml", ["prompts.wrapper='Solve $${question}$: {question} $x$ $${'"])
    assert config.prompts.wrapper == "Solve ${question}$: {question} $x$ ${"
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("rollout.group_sice=4", "rollout.group_size"),
        ("stalenes=1", "staleness"),
        ("group_size=4", "rollout.group_size"),
        ("actor.optimizer.lr_warm_up_steps=1", "actor.optimizer.warm_up_steps"),
        ("evaluation.prompts.max_prompt_tokenz=3", "evaluation.prompts.max_prompt_tokens"),
        ("model.warm_up.num_step=3", "model.warm_up.num_steps"),
        ("actor.optimizer.lr=3", "actor.optimizer.learning_rate"),
        ("actor.optimizer.wd=3", "actor.optimizer.weight_decay"),
    ],
)
def test_an_unknown_key_is_fatal_and_names_the_nearest_known_one(override: str, nearest: str) -> None:
    key = override.partition("=")[0]
    assert error_of(override) == f"command line: unknown key {key}; did you mean {nearest}?"


def test_a_key_that_is_like_no_other_is_answered_with_those_that_exist() -> None:
    known = ", ".join(TrackingConfig.model_fields)
    assert error_of("tracking.wandb=true") == f"command line: unknown key tracking.wandb; known here: {known}"
    misspelt = error_of("reward.overlong={max_tokens: 9, buffer_tokens: 8, facter: 2.0}")
    assert misspelt == "command line: unknown key reward.overlong.facter; did you mean reward.overlong.factor?"


def test_a_misspelt_key_in_a_file_is_named_with_file_and_line(tmp_path: Path) -> None:
    path = edited(tmp_path, "staleness: 2 ", "stalenes: 2 ")
    line = path.read_text().splitlines().index(next(line for line in path.read_text().splitlines() if line.startswith("stalenes:"))) + 1
    assert error_of(path=path) == f"{path}:{line}: unknown key stalenes; did you mean staleness? (and 1 more: staleness)"


def test_a_missing_key_is_named_with_its_meaning(tmp_path: Path) -> None:
    path = edited(tmp_path, "  group_size: 8\n", "")
    assert f"{path}:" in error_of(path=path)
    assert "missing key rollout.group_size: responses per prompt" in error_of(path=path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("staleness=-1", "command line: staleness = -1: expected greater than or equal to 0"),
        ("rollout.group_size=eight", "command line: rollout.group_size = 'eight': expected a valid integer"),
        ("rollout.group_size='8'", "command line: rollout.group_size = '8': expected a valid integer"),
        ("rollout.group_size=8.0", "command line: rollout.group_size = 8.0: expected a valid integer"),
        ("seed=true", "command line: seed = True: expected a valid integer"),
        ("debug.check_weights=1", "command line: debug.check_weights = 1: expected a valid boolean"),
        ("debug.check_weights=yes", "command line: debug.check_weights = 'yes': expected a valid boolean"),
        ("model.dtype=fp16", "command line: model.dtype = 'fp16': expected 'float32' or 'bfloat16'"),
        ("objective.score_centering.top_k=0", "objective.score_centering.top_k = 0: expected greater than or equal to 1"),
        ("objective.score_centering.topk=8", "unknown key objective.score_centering.topk; did you mean objective.score_centering.top_k?"),
        ("behaviour_logprobs=sampler", "command line: behaviour_logprobs = 'sampler': expected 'trainer' or 'engine'"),
        ("actor.optimizer.learning_rate=.nan", "command line: actor.optimizer.learning_rate = nan: expected a finite number"),
        ("actor.optimizer.learning_rate=0", "command line: actor.optimizer.learning_rate = 0: expected greater than 0"),
        ("actor.optimizer.betas=[0.9, 1.0]", "command line: actor.optimizer.betas = [0.9, 1.0]: expected two numbers in [0, 1)"),
        ("actor.optimizer=3", "command line: actor.optimizer = 3: expected a section, key: value lines"),
        ("objective=grpo", "or the path of a .yaml file with them; did you mean objective.name=grpo?"),
        ("advantages=mean_only", "with them; did you mean advantages.estimator=mean_only?"),
        ("rollout.top_p=0.9", "command line: rollout.top_p = 0.9: expected 1.0"),
        ("rollout.servers=0", "rollout.servers = 0 with 0 endpoints: expected servers >= 1 or endpoints, not both"),
        ("rollout.endpoints=[http://a:1, http://A:1/]", "rollout: endpoints holds 'http://a:1' more than once: expected every server once"),
        ("rollout.endpoints=[http://a:1]", "rollout.servers = 1 with 1 endpoints: expected servers >= 1 or endpoints, not both"),
        ("rollout.host=0.0.0.0", "command line: rollout.host = '0.0.0.0': expected api_key_path and admin_key_path beside it"),
        ("rollout.base_port=65536", "command line: rollout.base_port = 65536: expected less than or equal to 65535"),
        ("rollout.publish=rolling", "command line: rollout.publish = 'rolling': expected 'together' with 1 server"),
        ("rollout.publish=rollin", "command line: rollout.publish = 'rollin': expected 'together' or 'rolling'"),
        ("rollout.requests_per_server=0", "command line: rollout.requests_per_server = 0: expected greater than or equal to 1"),
        ("rollout.prompts_per_step=33", "rollout.prompts_per_step = 33: expected a multiple of actor.updates_per_step = 16"),
        ("actor.updates_per_step=5", "rollout.prompts_per_step = 32: expected a multiple of actor.updates_per_step = 5"),
        ("world_size=3", "world_size=3 is not a multiple of ep*etp*pp"),
        (
            "world_size=32",
            "actor.updates_per_step = 16: a mini-batch of 16 responses leaves some of the 32 data-parallel ranks without one",
        ),
        ("parallel.dp=1", "command line: parallel.dp = 1: expected null or what tp, pp and cp leave of world_size = 2, 2"),
        ("parallel.ep=4", "world_size=2 is not a multiple of ep*etp*pp = 4*1*1 = 4"),
        ("parallel.sequence_parallel=true", "sequence_parallel=true needs tp > 1"),
        ("actor.max_tokens_per_micro_batch=119", "actor.max_tokens_per_micro_batch = 119: expected at least 120, the longest sequence"),
        (
            "corrections={truncated_is: {max_weight: 0.5}}",
            "command line: corrections.truncated_is.max_weight = 0.5: expected greater than or equal to 1",
        ),
        ("corrections.masked_is.low=0.5", "missing key corrections.masked_is.high: largest ratio kept"),
        ("corrections.masked_is={low: 1.5, high: 5.0}", "corrections.masked_is.low = 1.5: expected less than or equal to 1"),
        (
            "corrections.rejection={level: token, low: 0.9, high: 1.1}",
            "corrections.rejection.level = 'token': expected 'geometric_mean' or 'product'",
        ),
        ("rollot.servers=1", "command line: unknown key rollot; did you mean rollout?"),
        (
            "corrections.truncatd_is.max_weight=2.0",
            "command line: unknown key corrections.truncatd_is; did you mean corrections.truncated_is?",
        ),
        ("rollout.dynamic_sampling={equal: reward, max_rounds: 1}", "max_rounds = 1: expected greater than or equal to 2"),
        ("rollout.dynamic_sampling={max_rounds: 4}", "missing key rollout.dynamic_sampling.equal: what makes a group useless"),
        (
            "reward.overlong={max_tokens: 57, buffer_tokens: 8}",
            "command line: reward.overlong.max_tokens = 57: expected at most rollout.max_new_tokens = 56",
        ),
        (
            "reward.overlong={max_tokens: long, buffer_tokens: 8}",
            "command line: reward.overlong.max_tokens = 'long': expected a valid integer",
        ),
        ("model.warm_up.examples=null", "model.warm_up.num_steps = 800: expected 0 without examples"),
        ("model.warm_up.tokenizer.folder=x", "x': expected either a folder or the name of a plug-in"),
        ("model.warm_up.tokenizer={folder: x, modulus: 3}", "model.warm_up.tokenizer.modulus = 3: expected no option beside folder"),
        ("name=a/b", "command line: name = 'a/b': expected match pattern"),
        ("model.path=${MINPRO_NO_SUCH_VARIABLE}/m", "the environment variable MINPRO_NO_SUCH_VARIABLE is not set"),
        ("seed.x=1", "command line: seed.x: seed is a value, not a section"),
        ("seed", "command line: 'seed': expected key=value, as in rollout.group_size=8"),
        ("=1", "command line: '=1': expected key=value, as in rollout.group_size=8"),
        ("rollout..servers=1", "command line: 'rollout..servers=1': expected key=value"),
        ("rollout.endpoints=[1", "command line: rollout.endpoints = '[1': not valid YAML"),
        ("objective=configs/objective/none.yaml", "configs/objective/none.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_a_bad_value_is_one_line_with_source_key_value_and_expectation(override: str, message: str) -> None:
    assert message in error_of(override)


def test_a_bad_value_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = edited(tmp_path, "  group_size: 8\n", "  group_size: eight\n")
    line = path.read_text()[: path.read_text().index("group_size: eight")].count("\n") + 1
    assert error_of(path=path) == f"{path}:{line}: rollout.group_size = 'eight': expected a valid integer"


def test_context_parallel_padding_counts_in_the_micro_batch() -> None:
    layout = ["world_size=2", "parallel={cp: 2}", "prompts.max_prompt_tokens=63", "rollout.max_new_tokens=56"]
    assert "expected at least 120" in error_of(*layout, "actor.max_tokens_per_micro_batch=119")  # 119 tokens, padded to 4 = 2 cp
    assert load_config(TINY, [*layout, "actor.max_tokens_per_micro_batch=120"]).layout.sequence_multiple == 4


def test_all_problems_are_counted_and_a_misspelling_comes_first() -> None:
    assert error_of("seed=x", "staleness=y", "stalenes=2") == (
        "command line: unknown key stalenes; did you mean staleness? (and 2 more: seed, staleness)"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nseed: 1\nname: b\n", ":3: not valid YAML: the key name appears twice"),
        ("rollout:\n  tp: 1\n  tp: 2\n", ":3: not valid YAML: the key rollout.tp appears twice"),
        ("1: a\n", ":1: not valid YAML: the key '1' is not a string"),
        ("name: [a\n", "not valid YAML"),
        ("- a\n", ": expected key: value lines, found list"),
        ("", ": expected key: value lines, found NoneType"),
        ("name: a\n---\nname: b\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert error_of(path=path).startswith(str(path))
    assert message in error_of(path=path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert error_of(path=tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: cannot be read (No such file or directory)"
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert error_of(path=tmp_path / "binary.yaml") == f"{tmp_path / 'binary.yaml'}: expected text in UTF-8"


def test_another_objective_name_drops_the_options_of_the_file() -> None:
    config = load_config(TINY, ["objective.name=grpo"])
    assert (config.objective.name, config.objective.options) == ("grpo", {})


@pytest.mark.parametrize("order", [1, -1])
def test_options_from_the_command_line_stay_with_another_objective_name(order: int) -> None:
    config = load_config(TINY, ["objective.name=grpo", "objective.clip_low=0.1"][::order])
    assert config.objective.options == {"clip_low": 0.1}


def test_the_same_objective_name_keeps_the_options_of_the_file() -> None:
    assert load_config(TINY, ["objective.name=minpro"]) == load_config(TINY)


def test_another_estimator_drops_the_epsilon_of_the_file() -> None:
    assert load_config(TINY, ["advantages.estimator=leave_one_out"]).advantages.options == {}


def test_a_section_is_replaced_by_a_file_and_later_overrides_win(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.yaml"
    file.write_text("every: 7\n")
    defaults = {"every_minutes": None, "keep": 2, "stop_within_s": None}
    assert load_config(TINY, [f"checkpoint={file}"]).checkpoint.model_dump() == {"every": 7, **defaults}
    assert load_config(TINY, [f"checkpoint={file}", "checkpoint.every=3", "checkpoint.every=4"]).checkpoint.every == 4
    assert load_config(TINY, ["checkpoint.every=3", f"checkpoint={file}"]).checkpoint.every == 7


def test_a_section_may_be_named_by_the_file_itself(tmp_path: Path) -> None:
    line = "objective: {name: minpro, clip_low: 1.0, clip_high: 4.0, aggregation: token_mean}"
    path = edited(tmp_path, line, "objective: configs/objective/gspo.yaml")
    assert load_config(path).objective.name == "gspo"
    bad = tmp_path / "bad_objective.yaml"
    bad.write_text("name: gspo\nclip_low: 2.0e-3\nclip_hi: 1.0\n")
    config = load_config(edited(tmp_path, line, f"objective: {bad}"))
    assert config.origins.origin(("objective", "clip_hi"), otherwise="") == f"{bad}:3"


def test_environment_variables_are_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINPRO_ASSETS", "/else/where")
    assert load_config("configs/tiny_moe_dapo.yaml").prompts.source == "/else/where/data/train/dapo_math_17k.parquet"
    monkeypatch.delenv("MINPRO_ASSETS")
    text = error_of(path="configs/tiny_moe_dapo.yaml")
    assert text.startswith("configs/tiny_moe_dapo.yaml:")
    assert (
        "model.warm_up.tokenizer.folder = '${MINPRO_ASSETS}/models/qwen3_30b_a3b': the environment variable MINPRO_ASSETS is not set"
        in text
    )


def test_values_of_overrides_are_yaml() -> None:
    config = load_config(TINY, ["actor.optimizer.learning_rate=1e-6", "rollout.base_port=null", "sglang={a: [1, 2]}", "model.warm_up=null"])
    assert (config.actor.optimizer.learning_rate, config.rollout.base_port, config.sglang) == (1e-6, None, {"a": [1, 2]})
    assert config.model.warm_up is None


def test_a_loaded_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_config(TINY).seed = 1  # type: ignore[misc]


def test_differences_are_named_by_dotted_key_with_both_values() -> None:
    before = load_config(TINY)
    after = load_config(TINY, ["seed=3", "objective.name=cispo", "sglang={a: 1}", "actor.optimizer.betas=[0.9, 0.95]"])
    assert flatten_differences(before, after) == {
        "seed": (0, 3),
        "objective.name": ("minpro", "cispo"),
        "objective.clip_low": (1.0, None),
        "objective.clip_high": (4.0, None),
        "objective.aggregation": ("token_mean", None),
        "actor.optimizer.betas": ([0.9, 0.999], [0.9, 0.95]),
        "sglang.a": (None, 1),
    }
    assert flatten_differences(before, before) == {}


def test_every_key_has_a_description() -> None:
    def undescribed(model: type, prefix: str) -> list[str]:
        names = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            if not field.description:
                names.append(prefix + name)
            if hasattr(field.annotation, "model_fields"):
                names += undescribed(field.annotation, f"{prefix}{name}.")
        return names

    assert undescribed(RunConfig, "") == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.5", 1.5),
        (".5", 0.5),
        ("010", 10),
        ("1:30", "1:30"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("-3", -3),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    read = parse_yaml(f"key: {text}\n")[0]["key"]
    assert (type(read), read) == (type(value), value)


def test_a_merge_key_is_understood_and_an_unknown_tag_refused() -> None:
    assert parse_yaml("a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n")[0]["c"] == {"b": 1, "d": 2}
    with pytest.raises(YamlError):
        parse_yaml("a: !!python/object/apply:os.getcwd []\n")


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")))
    | st.sampled_from(["1e-6", "no", "1:30", "null", "~", "true", "010", "${X}", "$${", "- a", "a: b", "#", " x ", ".5", "+1"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text("abc1~", min_size=1, max_size=3), children, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_rendered_yaml_reads_back_equal(value: object) -> None:
    assert parse_yaml(render_yaml({"key": escape(value)}))[0] == {"key": escape(value)}


def run_python(program: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=REPOSITORY)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(
    "action",
    [
        "from megatron_minpro.config import load_config; load_config('configs/tiny_moe_cpu.yaml')",
        "from megatron_minpro import cli; cli.run(['--help'])",
        "from megatron_minpro import cli; assert cli.run(['plan', 'configs/qwen3_30b_a3b.yaml']) == 0",
    ],
    ids=["load_config", "help", "plan"],
)
def test_torch_and_transformers_are_not_imported_by(action: str) -> None:
    heavy = {"torch", "transformers", "megatron", "sglang", "datasets", "math_verify"}
    assert run_python(f"{action}\nimport sys; print('imported', sorted({heavy} & set(sys.modules)))").endswith("imported []\n")


def test_reading_a_configuration_runs_no_code_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "loud_module.py").write_text("raise SystemExit('the module was imported')\n")
    names = [
        "objective.name",
        "reward.name",
        "advantages.estimator",
        "prompts.source",
        "rollout.weight_sync",
        "model.warm_up.examples.name",
    ]
    program = (
        "import os; from megatron_minpro.config import load_config\n"
        f"os.chdir({str(tmp_path)!r})\n"
        f"config = load_config({str(TINY)!r}, [f'{{name}}=loud_module:f' for name in {names}])\n"
        "print(config.objective.name)"
    )
    assert run_python(program) == "loud_module:f\n"


@pytest.mark.parametrize(
    ("key", "free"),
    [
        ("output_dir", True),
        ("world_size", True),
        ("parallel.tp", True),
        ("checkpoint.every", True),
        ("tracking.log_level", True),
        ("profile.steps", True),
        ("rollout.servers", True),
        ("rollout.endpoints", True),
        ("rollout.weight_sync", True),
        ("actor.recompute", True),
        ("actor.max_tokens_per_micro_batch", True),
        ("debug.check_weights", True),
        ("debug.deterministic", False),
        ("rollout.tp", False),
        ("rollout.group_size", False),
        ("actor.optimizer.learning_rate", False),
        ("actor.logprob_chunk_tokens", False),
        ("staleness", False),
        ("seed", False),
        ("megatron.fp8", False),
    ],
)
def test_only_what_computes_nothing_may_change_on_resume(key: str, free: bool) -> None:
    assert may_change_on_resume(key) is free


def test_every_path_is_absolute_from_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    settings = ["model.path=base", "output_dir=out", "rollout.api_key_path=~/key", "model.warm_up=null", "prompts.options={}"]
    config = load_config("tiny_moe_cpu", [*settings, "prompts.source=rows.jsonl", "evaluation.prompts.source=owner/name"])
    assert (config.model.path, config.run_dir) == (str(tmp_path / "base"), tmp_path / "out/tiny_moe_cpu")
    assert config.rollout.api_key_path == str(Path.home() / "key")
    assert config.prompts.source == str(tmp_path / "rows.jsonl")
    assert config.evaluation is not None and config.evaluation.prompts.source == "owner/name"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "config.yaml").write_text(dump_config(config))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(tmp_path / "config.yaml", []) == config


def test_an_empty_path_is_refused() -> None:
    assert "model.path = '': expected" in error_of('model.path=""')
