"""The base model of a small run: its recipe, its seeded random weights, and the supervised loss and rate that train it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from megatron_minpro.config import RunConfig, load_config
from megatron_minpro.loop.learning_rate import base_model_rate
from megatron_minpro.run import base_model
from parallel.sequence_shard import SequenceShard
from parallel.token_sequence import TokenSequence

REPOSITORY = Path(__file__).resolve().parents[3]


def tiny(folder: Path, *overrides: str) -> RunConfig:
    return load_config(REPOSITORY / "configs/tiny_moe_cpu.yaml", [f"model.path={folder}", *overrides])


def write(config: RunConfig) -> Path:
    folder = Path(config.model.path)
    base_model.write_initial_model(config.model, config.prompts, folder)
    return folder


# -- initial weights ----------------------------------------------------------------------------------------------------


def test_the_initial_model_is_one_that_transformers_runs(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write(tiny(tmp_path / "model", "model.warm_up.architecture.rope_theta=100.0"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"
    config = model.config
    found = (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_experts,
        config.num_experts_per_tok,
        config.head_dim,
        config.vocab_size,
    )
    assert found == (2, 64, 8, 2, 16, 24)
    assert config.rope_parameters["rope_theta"] == 100.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.eos_token_id == config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("1 + 2 = 3 ;", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    assert (folder / base_model.RECIPE_FILE).is_file()


def test_norms_are_one_and_matrices_have_the_initializers_spread(tmp_path: Path) -> None:
    weights = load_file(write(tiny(tmp_path / "model", "model.warm_up.architecture.initializer_range=0.12")) / "model.safetensors")
    norms = {name for name in weights if name.endswith("norm.weight")}
    assert len(norms) == 2 * 4 + 1
    assert all((weights[name] == 1).all() for name in norms)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    matrices = torch.cat([weights[name].flatten() for name in weights.keys() - norms])
    assert matrices.std() == pytest.approx(0.12, rel=0.02)
    assert abs(matrices.mean()) < 0.002


def test_equal_seeds_give_equal_files_and_other_seeds_other_weights(tmp_path: Path) -> None:
    first, again = write(tiny(tmp_path / "first")), write(tiny(tmp_path / "again"))
    other = write(tiny(tmp_path / "other", "model.warm_up.seed=1"))
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_a_dense_model_can_be_made_too(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fields = "hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8"
    more = "max_position_embeddings: 128, rope_theta: 100.0, rms_norm_eps: 1.0e-6, tie_word_embeddings: true"
    source = (REPOSITORY / "configs/tiny_moe_cpu.yaml").read_text()
    start, end = source.index("    architecture:"), source.index("    tokenizer: {name")
    path = tmp_path / "dense.yaml"
    path.write_text(source[:start] + f"    architecture: {{model_type: qwen3, {fields}, {more}}}\n" + source[end:])
    config = load_config(path, [f"model.path={tmp_path / 'model'}", "model.dtype=bfloat16", "rollout.dtype=bfloat16"])
    model = AutoModelForCausalLM.from_pretrained(write(config))
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert (model.dtype, model.config.tie_word_embeddings) == (torch.bfloat16, True)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path / "model", "model.warm_up.architecture.vocab_size=16")
    with pytest.raises(ValueError, match=r"^model\.warm_up\.architecture\.vocab_size: 16, the tokenizer has 24 tokens$"):
        write(config)
    assert not (tmp_path / "model").exists()


# -- recipe -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "is_another_recipe"),
    [
        ("seed=9", False),
        ("staleness=0", False),
        ("prompts.max_prompt_tokens=40", False),
        ("model.warm_up.seed=9", True),
        ("model.warm_up.num_steps=10", True),
        ("model.warm_up.examples.easy_error=0.5", True),
        ("model.warm_up.architecture.num_experts=4", True),
        ("model.dtype=bfloat16", True),
        ("prompts.options.num_operations=5", True),
    ],
)
def test_a_model_folder_of_another_recipe_is_refused(tmp_path: Path, override: str, is_another_recipe: bool) -> None:
    folder = tmp_path / "model"
    made = tiny(folder)
    folder.mkdir()
    (folder / base_model.RECIPE_FILE).write_text(base_model.recipe(made.model, made.prompts))
    asked = tiny(folder, override, "behaviour_logprobs=engine")  # so that the two dtypes may differ
    if not is_another_recipe:
        base_model.check_recipe(asked.model, asked.prompts)
        return
    with pytest.raises(ValueError, match=r"^model\.path: .*/model was made by another recipe \(.* there, .* here\); expected another"):
        base_model.check_recipe(asked.model, asked.prompts)


def test_a_folder_without_a_recipe_was_not_made_here_and_is_taken_as_it_is(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    base_model.check_recipe(config.model, config.prompts)


def test_random_weights_do_not_depend_on_the_task(tmp_path: Path) -> None:
    few, many = (tiny(tmp_path, "model.warm_up.num_steps=0", f"prompts.options.size={size}") for size in (100, 1000))
    assert base_model.recipe(few.model, few.prompts) == base_model.recipe(many.model, many.prompts)


# -- supervised learning ------------------------------------------------------------------------------------------------


def test_the_loss_shares_of_micro_batches_add_up_to_torchs_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 1, 7)
    logits = torch.randn(sum(lengths), 11, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (sum(lengths),), generator=generator)
    mask = torch.rand(sum(lengths), generator=generator) < 0.6
    count = int(mask.sum())
    logprobs = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    logprobs = torch.where(mask, logprobs, torch.tensor(float("nan")))  # what is not trained is not looked at
    total = torch.zeros(())
    for part, kept, shard in zip(logprobs.split([6, 7]), mask.split([6, 7]), ((5, 1), (7,)), strict=True):
        loss, metrics = base_model.cross_entropy(
            logprobs_T=part,
            entropy_T=torch.zeros(len(part)),
            loss_mask_T=kept,
            streams={},
            shard=SequenceShard.whole(shard),
            global_tokens=count,
            global_sequences=3,
        )
        assert metrics == {}
        total = total + loss
    expected = F.cross_entropy(logits.detach()[mask], labels[mask])
    assert float(total.detach()) == pytest.approx(float(expected), rel=1e-6)


class Learner:
    """Stands in for the actor: keeps what it is trained on."""

    def __init__(self) -> None:
        self.batches: list[list[TokenSequence]] = []
        self.rates: list[float] = []

    def update(self, batch: Sequence[TokenSequence], loss_fn: Callable[..., Any], *, learning_rate: float) -> SimpleNamespace:
        assert loss_fn is base_model.cross_entropy
        self.batches.append(list(batch))
        self.rates.append(learning_rate)
        return SimpleNamespace(loss=float(len(self.batches)))


def test_the_warm_up_trains_new_worked_examples_every_step(tmp_path: Path, chain_tokenizer: Any) -> None:
    noise = [f"model.warm_up.examples.{name}=0" for name in ("easy_error", "hard_error", "lazy", "garble")]
    config = tiny(tmp_path, "model.warm_up.num_steps=3", "model.warm_up.batch_size=4", "model.warm_up.learning_rate=0.5", *noise)
    learner, reports = Learner(), []
    assert config.model.warm_up is not None
    base_model.warm_up_actor(
        learner,  # type: ignore[arg-type]
        config.model.warm_up,
        config.prompts,
        chain_tokenizer,
        report=lambda step, loss: reports.append((step, loss)),
    )
    assert reports == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert learner.rates == [base_model_rate(config.model.warm_up, step) for step in range(3)]
    texts = []
    for batch in learner.batches:
        assert len(batch) == 4
        for sequence in batch:
            trained = sequence.token_ids[1:][sequence.loss_mask]
            assert int(trained[-1]) == chain_tokenizer.eos_token_id
            prompt = sequence.token_ids[: len(sequence.token_ids) - len(trained)]
            words = chain_tokenizer.decode(trained[:-1]).split()
            # Without noise every written step is right: "a op b = c ;".
            assert len(words) == 6 * 6
            for a, operation, b, equals, c, end in zip(*[iter(words)] * 6, strict=True):
                value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation] % 10
                assert (equals, end, int(c)) == ("=", ";", value)
            texts.append(chain_tokenizer.decode(prompt))
    assert len(set(texts)) == len(texts) == 12


def test_examples_that_do_not_fit_the_prompts_are_refused(tmp_path: Path, chain_tokenizer: Any) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "1 + 1 =", "answer": "2"}) + "\n")
    overrides = [f"prompts.source={path}", "prompts.options={}", "prompts.question_field=question", "prompts.answer_field=answer"]
    config = tiny(tmp_path, "model.warm_up.num_steps=7", *overrides)
    assert config.model.warm_up is not None
    with pytest.raises(ValueError, match=r"^model\.warm_up\.examples\.name = .*: writes solutions of .* chains; .* found questions$"):
        base_model.warm_up_actor(Learner(), config.model.warm_up, config.prompts, chain_tokenizer, report=lambda *_: None)  # type: ignore[arg-type]


OWN_EXAMPLES = """
def pairs(prompts, seed, *, shout=False):
    for a, b in [("1 + 2 :", "= 3 ;"), ("2 + 2 :", "= 4 ;")]:
        yield a, b + (" ;" if shout else "")

def none(prompts, seed):
    return []
"""


def test_examples_of_the_users_own_are_learnt_over_and_over(
    tmp_path: Path, chain_tokenizer: Any, users_module: Callable[[str], str]
) -> None:
    module = users_module(OWN_EXAMPLES)
    steps = ["model.warm_up.num_steps=2", "model.warm_up.batch_size=3"]
    config = tiny(tmp_path, *steps, f"model.warm_up.examples={{name: {module}:pairs, shout: true}}")
    assert config.model.warm_up is not None
    learner = Learner()
    base_model.warm_up_actor(learner, config.model.warm_up, config.prompts, chain_tokenizer, report=lambda *_: None)  # type: ignore[arg-type]
    texts = [
        chain_tokenizer.decode(sequence.token_ids[1:][sequence.loss_mask], skip_special_tokens=True)
        for batch in learner.batches
        for sequence in batch
    ]
    assert texts == ["= 3 ; ;", "= 4 ; ;"] * 3
    empty = tiny(tmp_path, *steps, f"model.warm_up.examples={{name: {module}:none}}").model.warm_up
    assert empty is not None
    with pytest.raises(ValueError, match="gave no examples"):
        base_model.warm_up_actor(Learner(), empty, config.prompts, chain_tokenizer, report=lambda *_: None)  # type: ignore[arg-type]


def test_a_tokenizer_of_the_users_own_is_written_by_a_plug_in(tmp_path: Path, users_module: Callable[[str], str]) -> None:
    module = users_module(
        "from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer\n"
        "def write(folder, *, digits):\n    build_tokenizer(folder, modulus=digits)\n"
    )
    model = tiny(tmp_path / "absent", f"model.warm_up.tokenizer={{name: {module}:write, digits: 3}}").model
    with base_model.tokenizer_of(model) as tokenizer:
        assert "2" in tokenizer.get_vocab() and "3" not in tokenizer.get_vocab()
