from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.data.prompts import PromptCursor, PromptList, encode_prompts
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.data.wrappers import DAPO_WRAPPER
from megatron_minpro.tasks.arithmetic_chains.prompts import ArithmeticChains

CHAINS = "megatron_minpro.tasks.arithmetic_chains.prompts:ArithmeticChains"


def numbered(count: int, name: str = "numbered") -> PromptList:
    return PromptList(
        name=name,
        prompts=tuple(Prompt(prompt_id=f"{name}-{n}", text=str(n), token_ids=(n,), answer=str(n), source=name) for n in range(count)),
    )


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(tokenizer: Any, path: Path, **changes: Any) -> Any:
    options = {"question_field": "question", "answer_field": "answer", "max_prompt_tokens": 1000, **changes}
    return load_prompts(tokenizer=tokenizer, source=str(path), **options)


# ---------------------------------------------------------------------------------------------------------------- cursor


@given(count=st.integers(1, 30), seed=st.integers(0, 5), batches=st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_every_epoch_deals_every_prompt_once_whatever_the_batches(count: int, seed: int, batches: list[int]) -> None:
    cursor = PromptCursor(numbered(count), seed)
    dealt = [prompt.prompt_id for size in batches for prompt in cursor.next(size)]
    assert len(dealt) == sum(batches)
    everything = {f"numbered-{n}" for n in range(count)}
    for start in range(0, len(dealt) - count + 1, count):
        assert set(dealt[start : start + count]) == everything
    last = dealt[len(dealt) // count * count :]
    assert len(set(last)) == len(last)
    assert cursor.epoch == len(dealt) // count


@given(count=st.integers(1, 30), before=st.integers(1, 70), after=st.integers(1, 70))
def test_a_restored_cursor_continues_as_if_nothing_had_happened(count: int, before: int, after: int) -> None:
    cursor = PromptCursor(numbered(count), seed=3)
    cursor.next(before)
    state = json.loads(json.dumps(cursor.state()))  # it must survive a file
    expected = cursor.next(after)
    resumed = PromptCursor(numbered(count), seed=3)
    resumed.load_state(state)
    assert resumed.next(after) == expected
    assert resumed.state() == cursor.state()


def test_a_batch_across_the_epoch_boundary_loses_nothing() -> None:
    cursor = PromptCursor(numbered(10), seed=0)
    cursor.next(7)
    batch = cursor.next(6)  # three of the first epoch, three of the second
    rest = cursor.next(7)
    assert cursor.epoch == 2
    assert len({prompt.prompt_id for prompt in [*batch[3:], *rest]}) == 10


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int) -> list[str]:
        cursor = PromptCursor(numbered(50), seed)
        return [prompt.prompt_id for prompt in cursor.next(100)]

    assert order(0) == order(0)
    assert order(0)[:50] != order(0)[50:]
    assert order(0)[:50] != order(1)[:50]
    assert order(0)[:50] != sorted(order(0)[:50])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed = 4, this run has 3"),
        ({"source": "other"}, "source = 'other'"),
        ({"num_prompts": 9}, "num_prompts = 9, this run has 10"),
        ({"position": 10}, "position 10 lie outside"),
        ({"epoch": -1}, "epoch -1"),
        ({"next_prompt_id": "numbered-99"}, "the prompts have changed"),
        ({"extra": 1}, "has the keys"),
        ({"digests": {}}, "the labels and questions and rows and token_ids of source 'numbered' have changed"),
    ],
)
def test_a_state_of_another_run_is_refused(change: dict[str, Any], message: str) -> None:
    cursor = PromptCursor(numbered(10), seed=3)
    cursor.next(4)
    with pytest.raises(ValueError, match=message):
        cursor.load_state({**cursor.state(), **change})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"answer": "other"}, "the labels of source 'numbered' have changed"),
        ({"text": "other"}, "the questions of source 'numbered' have changed"),
        ({"row": {"tests": ["assert f(1)"]}}, "the rows of source 'numbered' have changed"),
        ({"token_ids": (9, 9)}, "the token_ids of source 'numbered' have changed"),
    ],
)
def test_resume_on_other_rows_of_the_same_number_names_what_changed(change: dict[str, Any], named: str) -> None:
    prompts = numbered(10).prompts
    cursor = PromptCursor(numbered(10), seed=3)
    cursor.next(4)
    state = json.loads(json.dumps(cursor.state()))
    for index in range(10):  # whichever row it is: those dealt already count too
        edited = (*prompts[:index], dataclasses.replace(prompts[index], **change), *prompts[index + 1 :])
        with pytest.raises(ValueError, match=named):
            PromptCursor(PromptList(name="numbered", prompts=edited), seed=3).load_state(state)
    PromptCursor(numbered(10), seed=3).load_state(state)


def test_digests_are_cheap_and_tell_every_option_of_a_generator(chain_tokenizer: Any) -> None:
    options = {"num_operations": 6, "modulus": 10, "size": 100_000, "seed": 1, "split": "train"}
    start = time.process_time()
    first = ArithmeticChains(chain_tokenizer, **options).digests()
    assert time.process_time() - start < 2.0  # without making 100,000 prompts
    assert ArithmeticChains(chain_tokenizer, **options).digests() == first
    for change in ({"num_operations": 5}, {"modulus": 9}, {"size": 99_999}, {"seed": 2}):
        assert ArithmeticChains(chain_tokenizer, **{**options, **change}).digests()["options"] != first["options"]


def test_an_empty_source_and_an_empty_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="'numbered' is empty"):
        PromptCursor(numbered(0), seed=0)
    with pytest.raises(ValueError, match="num_prompts must be at least 1, got 0"):
        PromptCursor(numbered(2), seed=0).next(0)


# ---------------------------------------------------------------------------------------------------------------- cleaning


def test_duplicates_merge_conflicts_go_empty_and_long_rows_are_counted(tmp_path: Path, chain_tokenizer: Any) -> None:
    rows = [
        {"question": "1 + 2", "answer": "3"},
        {"question": " 1 + 2\n", "answer": 3.0},  # the same question and the same number
        {"question": "2 + 2", "answer": "4"},
        {"question": "2 + 2", "answer": "5"},  # who is right?
        {"question": "2 + 2", "answer": "4"},
        {"question": "   ", "answer": "1"},
        {"question": "3 + 3", "answer": None},
        {"question": "1 + 1 + 1 + 1", "answer": "4"},
        {"question": "5 + 5", "answer": 10},
        {"question": "0.5 + 1", "answer": 1.5},
    ]
    source, report = load(chain_tokenizer, write_jsonl(tmp_path / "sums.jsonl", rows), max_prompt_tokens=5)  # two role tokens, three words
    assert [(prompt.text, prompt.answer) for prompt in source.prompts] == [("1 + 2", "3"), ("5 + 5", "10"), ("0.5 + 1", "1.5")]
    counts = (report.rows, report.empty, report.duplicate_rows, report.distinct, report.conflicting, report.too_long, report.kept)
    assert counts == (10, 2, 3, 5, 1, 1, 3)
    assert report.summary() == (
        f"{tmp_path}/sums.jsonl: 3 prompts from 10 rows, 5 distinct questions (3 duplicate rows merged; dropped: 2 empty rows, "
        "1 questions whose rows disagree on the answer, 1 longer than 5 tokens)"
    )


def test_questions_that_differ_by_white_space_are_duplicates(tmp_path: Path, chain_tokenizer: Any) -> None:
    rows = [
        {"question": "1 + 2", "answer": "3"},
        {"question": "1  +\n2", "answer": "3"},
        {"question": "1\u00a0+\t2", "answer": "3"},
        {"question": "2 + 2", "answer": "4"},
        {"question": "2 +  2", "answer": "5"},
        {"question": "12 + 2", "answer": "14"},
    ]
    source, report = load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", rows))
    assert [(prompt.text, prompt.answer) for prompt in source.prompts] == [("1 + 2", "3"), ("12 + 2", "14")]
    assert (report.duplicate_rows, report.conflicting) == (3, 1)


def dapo_row(content: str, label: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}], "reward_model": {"ground_truth": label, "style": "rule-lighteval/MATH_v2"}}


def test_dapos_own_layout_gives_the_prompts_of_the_bare_copy(tmp_path: Path, chain_tokenizer: Any) -> None:
    questions = [(f"What is\n{n} + 1?", str(n + 1)) for n in range(5)]
    wrapped = [dapo_row(DAPO_WRAPPER.replace("{question}", question), label) for question, label in questions] * 100
    bare = [dapo_row(question, label) for question, label in questions]
    read = {"preset": "dapo", "question_field": None, "answer_field": None, "max_prompt_tokens": 1000}
    expected, plain = load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", bare), **read)
    found, report = load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", wrapped), **read)
    assert found.prompts == expected.prompts
    assert (report.rows, report.wrapped, report.duplicate_rows, report.kept, plain.wrapped) == (500, 500, 495, 5, 0)
    assert "(500 rows came with a wrapper, which was taken off; 495 duplicate rows merged;" in report.summary()
    # A wrapper asked for is put around the bare question; none asked for, nothing is taken off.
    boxed, _ = load(chain_tokenizer, tmp_path / "x.jsonl", **read, wrapper="boxed")
    assert boxed[0].text.startswith("What is\n0 + 1?\n\nPlease reason step by step")
    fields = {"question_field": "prompt.0.content", "answer_field": "reward_model.ground_truth"}
    assert load(chain_tokenizer, tmp_path / "x.jsonl", **fields)[0][0].text == DAPO_WRAPPER.replace("{question}", "What is\n0 + 1?")


def test_differently_written_equal_integers_do_not_conflict(tmp_path: Path, chain_tokenizer: Any) -> None:
    rows = [{"question": "1 + 2", "answer": answer} for answer in ("025", "25", "25.0", 25, 25.0)]
    source, report = load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", rows))
    assert (len(source), source[0].answer, report.conflicting) == (1, "025", 0)


def test_a_system_message_in_the_row_is_kept(tmp_path: Path, qwen_tokenizer: Any) -> None:
    def row(system: str) -> dict[str, Any]:
        return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": "1 + 1?"}], "answer": "2"}

    path = write_jsonl(tmp_path / "x.jsonl", [row("Be brief."), row("Be kind.")])
    source, report = load(qwen_tokenizer, path, question_field="messages.1.content")
    assert (report.kept, source[0].prompt_id != source[1].prompt_id) == (2, True), "another system message makes another prompt"
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert qwen_tokenizer.decode(source[0].token_ids) == expected
    assert [message["role"] for message in source[0].messages] == ["system", "user"]
    broken = write_jsonl(tmp_path / "y.jsonl", [{"messages": [{"role": "system"}, {"role": "user", "content": "1?"}], "answer": "1"}])
    with pytest.raises(ValueError, match=r"y\.jsonl: line 1: field 'messages\.0\.content' is missing"):
        load(qwen_tokenizer, broken, question_field="messages.1.content")


def test_an_answer_may_be_a_list_and_all_fields_of_the_row_are_kept(tmp_path: Path, chain_tokenizer: Any) -> None:
    cases = [{"input": "1", "output": "2"}, {"input": "2", "output": "3"}]
    rows = [{"question": "1 + 1", "answer": cases, "difficulty": 3}, {"question": "1 + 2", "answer": []}]
    source, report = load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", rows))
    assert (source[0].answer, source[0].row["difficulty"], report.empty, len(source)) == (cases, 3, 1, 1)
    conflicting = [rows[0], {**rows[0], "answer": cases[:1]}, {"question": "2", "answer": "2"}]
    _, report = load(chain_tokenizer, write_jsonl(tmp_path / "y.jsonl", conflicting))
    assert (report.conflicting, report.kept) == (1, 1)


def test_the_length_limit_is_inclusive_and_counts_the_template(tmp_path: Path, chain_tokenizer: Any) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "1 + 2", "answer": "3"}])
    source, _ = load(chain_tokenizer, path, max_prompt_tokens=5)
    assert len(source[0].token_ids) == 5
    with pytest.raises(ValueError, match=r"no prompt is left of .*1 longer than 4 tokens"):
        load(chain_tokenizer, path, max_prompt_tokens=4)


def test_a_prompt_keeps_its_id_when_rows_move(tmp_path: Path, chain_tokenizer: Any) -> None:
    rows = [{"question": f"{n} + 1", "answer": str(n + 1)} for n in range(5)]
    forwards, _ = load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", rows))
    backwards, _ = load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", rows[::-1]))
    assert [prompt.prompt_id for prompt in forwards.prompts] == [prompt.prompt_id for prompt in backwards.prompts][::-1]
    assert len({prompt.prompt_id for prompt in forwards.prompts}) == 5


# ---------------------------------------------------------------------------------------------------------------- reading


def test_parquet_and_jsonl_give_the_same_prompts(tmp_path: Path, chain_tokenizer: Any) -> None:
    rows = [{"prompt": [{"content": f"{n} + 1", "role": "user"}], "reward_model": {"ground_truth": str(n + 1)}} for n in range(9)]
    fields = {"question_field": "prompt.0.content", "answer_field": "reward_model.ground_truth"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    from_parquet, _ = load(chain_tokenizer, tmp_path / "x.parquet", **fields)
    from_jsonl, _ = load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", rows), **fields)
    assert from_parquet.prompts == from_jsonl.prompts
    assert len(from_parquet) == 9


def test_a_hugging_face_dataset_is_read_by_name(tmp_path: Path, chain_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme/sums").mkdir(parents=True)  # datasets takes a folder of this name for the data set: no network
    write_jsonl(tmp_path / "acme/sums/train.jsonl", [{"question": f"{n} + 1", "answer": n + 1} for n in range(9)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source, report = load(chain_tokenizer, Path("acme/sums"), options={"split": "train"})
    assert (source.name, len(source), report.rows, source[8].answer) == ("acme/sums", 9, 9, "9")
    with pytest.raises(ValueError, match=r"options.split is needed"):
        load(chain_tokenizer, Path("acme/sums"))
    with pytest.raises(ValueError, match="did you mean 'split'"):
        load(chain_tokenizer, Path("acme/sums"), options={"splitt": "train"})
    with pytest.raises(ValueError, match=r"prompts.source = 'acme/sums' with options .*'validation'"):
        load(chain_tokenizer, Path("acme/sums"), options={"split": "validation"})


def test_a_generator_is_a_source_like_any_other(chain_tokenizer: Any) -> None:
    options = {"num_operations": 6, "modulus": 10, "size": 20, "seed": 1, "split": "train"}
    source, report = load_prompts(tokenizer=chain_tokenizer, source=CHAINS, options=options, max_prompt_tokens=16)
    assert len(source) == report.kept == 20
    assert len(PromptCursor(source, seed=0).next(20)) == 20
    with pytest.raises(ValueError, match=r"max_prompt_tokens = 15: prompt chain-.* has 16 tokens"):
        load_prompts(tokenizer=chain_tokenizer, source=CHAINS, options=options, max_prompt_tokens=15)
    with pytest.raises(ValueError, match="did you mean 'modulus'"):
        load_prompts(tokenizer=chain_tokenizer, source=CHAINS, options={"modulo": 10}, max_prompt_tokens=16)
    with pytest.raises(ValueError, match="needs the option size, seed, split"):
        load_prompts(tokenizer=chain_tokenizer, source=CHAINS, options={"num_operations": 6, "modulus": 10}, max_prompt_tokens=16)
    with pytest.raises(ValueError, match=r"^prompts\.wrapper = 'dapo': the plug-in"):
        load_prompts(tokenizer=chain_tokenizer, source=CHAINS, options=options, wrapper="dapo", max_prompt_tokens=16)


def test_wrappers_are_applied_once_and_leave_braces_alone(tmp_path: Path, chain_tokenizer: Any) -> None:
    question = "What is \\frac{1}{2} of {question}?"
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": question, "answer": "3"}])
    assert load(chain_tokenizer, path)[0][0].text == question
    assert load(chain_tokenizer, path, wrapper="Q: {question} A:")[0][0].text == f"Q: {question} A:"
    dapo = load(chain_tokenizer, path, wrapper="dapo")[0][0].text
    assert dapo == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without "
        f"quotes) where $Answer is the answer to the problem.\n\n{question}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )


def test_gsm8k_answers_come_from_behind_the_hashes_without_commas(tmp_path: Path, chain_tokenizer: Any) -> None:
    rows = [{"question": "How many?", "answer": "It is 2*500=<<2*500=1000>>1000.\n#### 1,000"}]
    source, _ = load_prompts(
        tokenizer=chain_tokenizer, source=str(write_jsonl(tmp_path / "x.jsonl", rows)), preset="gsm8k", max_prompt_tokens=99
    )
    assert source[0].answer == "1000"
    assert "<<" not in source[0].text


# ---------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            [{"question": "1", "answer": "1"}, {"problem": "1", "answer": "1"}],
            {},
            r"x\.jsonl: line 2: field 'question' is missing .*fields present in the row: problem, answer$",
        ),
        (
            [{"question": {"txt": "1"}, "answer": "1"}],
            {"question_field": "question.text"},
            r"line 1: field 'question.text' is missing .*fields present under 'question': txt$",
        ),
        ([{"question": ["1"], "answer": "1"}], {"question_field": "question.1"}, r"'question' is a list of 1$"),
        ([{"question": "1", "answer": "1"}], {"question_field": "question.text"}, r"'question' is a str, not an object$"),
        ([{"question": ["1"], "answer": "1"}], {}, r"field 'question' is a list, expected text or a number"),
        ([{"question": "1", "answer": True}], {}, r"field 'answer' is a bool"),
        ([{"question": "1", "answer": math.nan}], {}, r"x\.jsonl: line 1: field 'answer' is nan, expected text or a finite number$"),
        ([{"question": "1", "answer": math.inf}], {}, r"x\.jsonl: line 1: field 'answer' is inf, expected text or a finite number$"),
        ([{"question": -math.inf, "answer": "1"}], {}, r"x\.jsonl: line 1: field 'question' is -inf, expected text or a finite number$"),
        (
            [{"question": "1", "answer": "1"}, {"question": "2 \ud83d", "answer": "1"}],
            {},
            r"x\.jsonl: line 2: field 'question' holds U\+D83D alone at character 2, half of a surrogate pair$",
        ),
        ([{"question": "1", "answer": "\udc00"}], {}, r"x\.jsonl: line 1: field 'answer' holds U\+DC00 alone at character 0"),
        (
            [{"messages": [{"role": "system", "content": "a\udfff"}, {"role": "user", "content": "1"}], "answer": "1"}],
            {"question_field": "messages.1.content"},
            r"x\.jsonl: line 1: field 'messages.0.content' holds U\+DFFF alone at character 1",
        ),
        ([{"question": "1", "answer": 1e23}], {}, r"line 1: field 'answer' is 1e\+23, a float that does not hold all its digits; expected"),
        ([[1]], {}, r"line 1 is a list, expected a JSON object"),
        ([{"question": "1", "answer": "1"}], {"answer_format": "boxed"}, r"holds no answer in the format 'boxed'"),
        ([{"question": "1", "answer": "1"}], {"answer_format": "bocksed"}, r"did you mean 'boxed'"),
        ([{"question": "1", "answer": "1"}], {"preset": "dapo_math"}, r"did you mean 'dapo'"),
        ([{"question": "1", "answer": "1"}], {"wrapper": "dappo"}, r"prompts\.wrapper = 'dappo': expected dapo, boxed or a text"),
        ([{"question": "1", "answer": "1"}], {"answer_field": None}, r"prompts\.answer_field = None: needed to read"),
        ([{"question": "1", "answer": "1"}], {"options": {"split": "train"}}, r"\['split'\] have no meaning for a file"),
        ([{"question": "1", "answer": "1"}], {"max_prompt_tokens": 0}, r"max_prompt_tokens must be at least 1"),
        ([], {}, r"no prompt is left of .*0 prompts from 0 rows"),
    ],
)
def test_bad_rows_and_options_are_one_line_errors(
    tmp_path: Path, chain_tokenizer: Any, rows: list[Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(chain_tokenizer, write_jsonl(tmp_path / "x.jsonl", rows), **changes)
    assert "\n" not in str(caught.value)


def test_unreadable_files_and_unknown_sources_are_named(tmp_path: Path, chain_tokenizer: Any) -> None:
    (tmp_path / "broken.jsonl").write_text('{"question": "1", "answer": "1"}\n{"question": \n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}\n')
    (tmp_path / "broken.parquet").write_text("no parquet")
    for name, message in [
        ("broken.jsonl", r"broken\.jsonl: line 2 is not JSON"),
        ("latin.jsonl", r"latin\.jsonl: line 1 is not JSON"),
        ("broken.parquet", r"broken\.parquet: not a readable parquet file"),
        ("absent.jsonl", r"absent\.jsonl': no such file"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(chain_tokenizer, tmp_path / name)
    with pytest.raises(ValueError, match=r"'arithmetic_chain': not a .jsonl.*, not package.module:function"):
        load(chain_tokenizer, Path("arithmetic_chain"))


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        encode_prompts(tokenizer, ["1"])


def test_special_tokens_come_from_the_template_alone(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    from megatron_minpro.tasks.arithmetic_chains.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(tmp_path)
    # Like Llama's: the tokenizer adds a first token to any text, and so would add it a second time to a rendered template.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", tokenizer.convert_tokens_to_ids("<|system|>"))]
    )
    assert tokenizer.decode(tokenizer("1 + 2")["input_ids"]) == "<|system|> 1 + 2"
    assert tokenizer.decode(encode_prompts(tokenizer, ["1 + 2"])[0]) == "<|user|> 1 + 2 <|assistant|>"


# ---------------------------------------------------------------------------------------------------------------- real data


def test_the_real_dapo_file_is_read_cleaned_and_counted_within_ten_seconds(assets: Path, qwen_tokenizer: Any) -> None:
    path = assets / "data/train/dapo_math_17k.parquet"
    start = time.process_time()
    source, report = load_prompts(tokenizer=qwen_tokenizer, source=str(path), preset="dapo", max_prompt_tokens=1024)
    seconds = time.process_time() - start  # processor time of all threads: other work on the machine does not count
    assert (report.rows, report.duplicate_rows, report.distinct, report.empty, report.conflicting) == (17_917, 729, 17_188, 0, 12)
    assert report.kept == len(source) == 17_188 - 12 - report.too_long
    assert 0 < report.too_long < 20
    assert max(len(prompt.token_ids) for prompt in source.prompts) <= 1024
    assert seconds < 20.0  # two threads of ten seconds; about 5 s are usual

    # Against the rows themselves, by another way of counting.
    rows = pyarrow.parquet.read_table(path).to_pylist()
    labels: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        labels[re.sub(r"\s+", " ", row["prompt"][0]["content"].strip())].add(row["reward_model"]["ground_truth"])
    assert len(labels) == 17_188
    disagreeing = [question for question, answers in labels.items() if len(answers) > 1]
    assert len(disagreeing) == 12
    before, after = DAPO_WRAPPER.split("{question}")
    kept = {re.sub(r"\s+", " ", prompt.text.removeprefix(before).removesuffix(after)): prompt for prompt in source.prompts}
    assert not any(question in kept for question in disagreeing)
    sample = [question for question in list(labels)[::500] if len(labels[question]) == 1]
    assert all(kept[question].answer in labels[question] for question in sample)
    assert max(len(prompt.answer) for prompt in source.prompts) == 23


def test_qwens_template_is_applied_with_its_own_defaults(assets: Path, qwen_tokenizer: Any) -> None:
    (ids,) = encode_prompts(qwen_tokenizer, ["What is 1 + 1?"])
    assert qwen_tokenizer.decode(ids) == "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    conversation = [{"role": "user", "content": "What is 1 + 1?"}]
    assert list(ids) == qwen_tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize(
    ("name", "rows", "example"),
    [
        ("amc23", 40, "27"),
        ("aime24", 30, "025"),
        ("aime25", 30, "70"),
        ("math500", 500, "90^\\circ"),
        ("olympiadbench", 675, "$69$,$84$"),
        ("minerva_math", 272, "4.5e33"),
        ("gsm8k", 1319, "18"),
    ],
)
def test_every_evaluation_set_loads_through_its_preset(assets: Path, chain_tokenizer: Any, name: str, rows: int, example: str) -> None:
    source, report = load_prompts(
        tokenizer=chain_tokenizer, source=str(assets / f"data/eval/{name}/test.jsonl"), preset=name, max_prompt_tokens=10_000
    )
    assert (report.rows, report.kept) == (rows, rows)
    assert example in {source[index].answer for index in range(rows)}
    assert "\\boxed{}" in source[0].text
