from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_minpro.batch.conversation import Conversation, Turn
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.data.sources import load_prompts
from megatron_minpro.rewards.answers import as_integer, last_answer_line, last_boxed
from megatron_minpro.rewards.grader_pool import GraderPool, Verdict
from megatron_minpro.rewards.math_verify import MathVerifyReward
from megatron_minpro.rewards.overlong import OverlongShaping
from megatron_minpro.rewards.registry import make_reward
from megatron_minpro.rewards.reward import RewardResult

FINAL_STEP = "megatron_minpro.tasks.arithmetic_chains.reward:final_step"

# sympy would compute this power exactly: hours, and more memory than there is. Kept in C code, so no Python signal handler runs.
HANGS = "9^{9^{9^{9}}}"


def prompt(answer: str, text: str = "What is asked?") -> Prompt:
    return Prompt(prompt_id="p", text=text, token_ids=(1,), answer=answer, source="test")


@pytest.fixture(scope="module")
def dapo() -> Iterator[MathVerifyReward]:
    reward = MathVerifyReward(style="dapo", timeout_s=20)
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def boxed() -> Iterator[MathVerifyReward]:
    reward = MathVerifyReward(style="boxed", timeout_s=20)
    yield reward
    reward.close()


def judged(reward: Any, prompts: list[Prompt], texts: list[str], finish_reasons: list[str] | None = None) -> list[RewardResult]:
    """Judgements of one answer to each prompt; the answers stopped by themselves unless told otherwise."""
    reasons = ["stop"] * len(texts) if finish_reasons is None else finish_reasons
    return reward.score(
        [
            Conversation.of_text(prompt, text, finish_reason=reason, num_response_tokens=len(text))
            for prompt, text, reason in zip(prompts, texts, reasons, strict=True)
        ]
    )


def is_correct(reward: Any, answer: str, response: str, finish_reason: str = "stop") -> bool:
    (result,) = judged(reward, [prompt(answer)], [response], [finish_reason])
    assert result.error is None
    assert result.reward == float(result.correct)
    return result.correct


# ---------------------------------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("So it is 5.\nAnswer: 34", "34"),
        ("Answer: 1\nno, wait\nAnswer: 2\nthat is it", "2"),
        ("**Answer:** 7", "7"),
        ("**Answer: 7**", "7"),
        ("answer : $\\frac{1}{2}$\r\n", "$\\frac{1}{2}$"),
        ("Answer:\n34", "34"),
        ("Answer: 34\nAnswer:", "34"),
        ("Answer: the Answer: 5", "5"),
        ("the answer is 34", None),
        ("Answer:", None),
        ("", None),
    ],
)
def test_the_last_answer_line_counts(response: str, expected: str | None) -> None:
    assert last_answer_line(response, truncated=False) == expected


def test_an_answer_cut_by_the_length_limit_is_none() -> None:
    assert last_answer_line("Answer: 12", truncated=True) is None  # might have become 123
    assert last_answer_line("Answer: 12\nBecause", truncated=True) == "12"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("\\boxed{5}", "5"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{ \\sqrt{x^{2}} }", "\\sqrt{x^{2}}"),
        ("\\boxed{\\left\\{1,2\\right.}", "\\left\\{1,2\\right."),  # the escaped brace is text
        ("\\boxed{3} and \\boxed{4", "3"),  # the last one never closes
        ("\\boxed {7}", "7"),
        ("\\boxed{", None),
        ("\\boxed{\\", None),
        ("boxed{5}", None),
        ("no box", None),
    ],
)
def test_the_last_balanced_box_counts(response: str, expected: str | None) -> None:
    assert last_boxed(response) == expected


@given(st.recursive(st.text("ab1 ", max_size=3), lambda inner: st.tuples(inner, inner).map(lambda pair: f"{pair[0]}{{{pair[1]}}}")))
def test_any_balanced_content_comes_out_of_its_box(content: str) -> None:
    assert last_boxed(f"\\boxed{{0}} so \\boxed{{{content}}} and done {{}}") == content.strip()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("025", 25),
        ("27.0", 27),
        ("27.", 27),
        ("-3", -3),
        ("\u22123", -3),
        ("+3", 3),
        ("$12$", 12),
        ("\\boxed{12}", 12),
        ("1,234,567", 1234567),
        ("1{,}234", 1234),
        ("10\\,080", 10080),
        ("12345678901234567890123", 12345678901234567890123),
        ("27.5", None),
        ("1,23", None),
        ("2^3", None),
        ("12 apples", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_integers_are_read_exactly(text: str, expected: int | None) -> None:
    assert as_integer(text) == expected


@given(st.integers())
def test_every_printed_integer_is_read_back(number: int) -> None:
    assert as_integer(str(number)) == as_integer(f" ${number:,}.0$ ") == number


# ---------------------------------------------------------------------------------------------------------------- math-verify


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("025", "25"),
        ("25", "025"),
        ("27.0", "27"),
        ("12345678901234567890123", "12,345,678,901,234,567,890,123"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{1}{2}", "1/2"),
        ("8", "2^3"),
        ("90^\\circ", "90"),
        ("(1, 2)", "\\left(1,2\\right)"),
        ("[0,1)", "[0, 1)"),
        ("$69$,$84$", "84, 69"),
        ("x=5", "5"),
        ("\\text{Evelyn}", "\\text{Evelyn}"),
        ("1000000000000000000000001", "10^{24}+1"),
    ],
)
def test_equal_answers_are_correct(dapo: MathVerifyReward, boxed: MathVerifyReward, label: str, answer: str) -> None:
    assert is_correct(dapo, label, f"We find it.\nAnswer: {answer}")
    assert is_correct(boxed, label, f"We find \\boxed{{{answer}}}.")


@pytest.mark.parametrize(
    ("label", "answer"),
    [
        ("25", "52"),
        ("12345678901234567890123", "12345678901234567890124"),  # equal as floats
        ("12345678901234567890123", "1.2345678901234567890124e22"),
        ("1000000000000000000000001", "10^{24}"),
        ("10000000000000000", "10^{16}+0.1"),  # math-verify alone rounds this to equal
        ("\\frac{1}{2}", "0.51"),
        ("(1, 2)", "(2, 1)"),
        ("[0,1)", "[0,1]"),
        ("$69$,$84$", "69"),
        ("12", "12, 13"),
        ("\\text{Evelyn}", "\\text{Briana}"),
        ("7", "$Answer"),
    ],
)
def test_unequal_answers_are_wrong(dapo: MathVerifyReward, boxed: MathVerifyReward, label: str, answer: str) -> None:
    assert not is_correct(dapo, label, f"We find it.\nAnswer: {answer}")
    assert not is_correct(boxed, label, f"We find \\boxed{{{answer}}}.")


def test_an_answer_line_in_the_question_is_not_the_response(dapo: MathVerifyReward) -> None:
    question = "Fill in the blank. Answer: 7\n" + 'Remember to put your answer on its own line after "Answer:".'
    results = judged(dapo, [prompt("7", question)] * 2, ["I do not know.", "Answer: 7"], ["stop", "stop"])
    assert [result.correct for result in results] == [False, True]
    assert results[0].extracted is None


def test_the_two_styles_do_not_accept_each_other(dapo: MathVerifyReward, boxed: MathVerifyReward) -> None:
    assert not is_correct(dapo, "7", "\\boxed{7}")
    assert not is_correct(boxed, "7", "Answer: 7")
    assert is_correct(dapo, "7", "Answer: \\boxed{7}")


def test_a_truncated_answer_line_is_wrong(dapo: MathVerifyReward) -> None:
    assert not is_correct(dapo, "12", "Answer: 12", "length")
    assert is_correct(dapo, "12", "Answer: 12", "stop")


def test_results_come_back_in_order_with_several_workers() -> None:
    reward = make_reward("math_verify", style="boxed", timeout_s=20, workers=2)
    labels = [f"\\frac{{{number}}}{{7}}" for number in range(1, 41)]
    responses = [f"\\boxed{{{number if number % 3 else number + 1}/7}}" for number in range(1, 41)]
    results = judged(reward, [prompt(label) for label in labels], responses, ["stop"] * 40)
    reward.close()
    assert [result.correct for result in results] == [number % 3 != 0 for number in range(1, 41)]


def test_a_hang_costs_its_limit_and_the_next_answer_is_graded() -> None:
    reward = make_reward("math_verify", style="boxed", timeout_s=2)
    judged(reward, [prompt("\\pi")], ["\\boxed{\\pi}"], ["stop"])  # the worker is up
    start = time.monotonic()
    responses = [f"\\boxed{{{HANGS}}}", "\\boxed{2/4}"]
    hung, fine = judged(reward, [prompt("7"), prompt("\\frac12")], responses, ["stop", "stop"])
    seconds = time.monotonic() - start
    reward.close()
    assert hung == RewardResult(reward=0.0, correct=False, extracted=HANGS, error="timeout")
    assert fine.correct
    assert reward.error_counts == {"timeout": 1}
    assert 2.0 <= seconds < 30.0  # the limit, and starting another worker on a busy machine


def test_bombs_in_a_row_cost_their_time_limits_alone() -> None:
    with GraderPool(workers=1, timeout_s=1, memory_mb=4096) as pool:
        pool.compare([("\\pi", "\\pi")])
        start = time.monotonic()
        verdicts = pool.compare([("7", HANGS)] * 3 + [("\\frac{\\pi}{2}", "\\pi/2")])
        seconds = time.monotonic() - start
    assert [verdict.error for verdict in verdicts] == ["timeout"] * 3 + [None] and verdicts[-1].equal
    assert 3.0 <= seconds < 3.0 + 3.0  # a worker that had to import sympy again would cost 2 s and more, three times


def test_a_worker_killed_while_grading_is_a_counted_crash_and_is_replaced() -> None:
    with GraderPool(workers=1, timeout_s=60, memory_mb=4096) as pool:
        assert pool.compare([("\\pi", "\\pi")]) == [Verdict(equal=True, error=None)]
        (pid,) = pool.worker_pids()
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        verdicts = pool.compare([("7", HANGS), ("\\frac12", "0.5")])
        assert verdicts == [Verdict(equal=None, error="crash"), Verdict(equal=True, error=None)]
        assert pool.worker_pids() != [pid]


def test_a_worker_killed_while_idle_is_replaced_without_blaming_an_answer() -> None:
    with GraderPool(workers=1, timeout_s=60, memory_mb=4096) as pool:
        pool.compare([("\\pi", "\\pi")])
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        assert pool.compare([("\\frac12", "0.5")]) == [Verdict(equal=True, error=None)]


def test_a_label_that_is_no_mathematics_is_an_error_not_a_verdict(boxed: MathVerifyReward) -> None:
    (result,) = judged(boxed, [prompt("$")], ["\\boxed{x}"], ["stop"])
    assert not result.correct
    assert result.error is not None and result.error.startswith("ValueError")


def test_closing_leaves_no_worker_behind() -> None:
    pool = GraderPool(workers=2, timeout_s=20, memory_mb=4096)
    pool.compare([("\\pi", "\\pi")] * 8)
    pids = pool.worker_pids()
    pool.close()
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_busy_worker_does_not_outlive_a_parent_that_was_killed() -> None:
    program = (
        "from megatron_minpro.rewards.grader_pool import GraderPool\n"
        "pool = GraderPool(workers=1, timeout_s=1.5, memory_mb=4096)\n"
        "pool.compare([('\\\\pi', '\\\\pi')])\n"
        "print(*pool.worker_pids(), flush=True)\n"
        f"pool.compare([('7', '{HANGS}')])\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)  # the worker is busy by now
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 15  # its own alarm rings 4 s after the request
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the worker is still running"
        time.sleep(0.05)


def test_the_real_labels_equal_themselves_and_rarely_their_neighbours(assets: Path, chain_tokenizer: Any) -> None:
    reward = make_reward("math_verify", style="boxed", timeout_s=20, workers=2)
    for name in ("aime24", "amc23", "math500", "minerva_math", "olympiadbench"):
        source, _ = load_prompts(
            tokenizer=chain_tokenizer, source=str(assets / f"data/eval/{name}/test.jsonl"), preset=name, max_prompt_tokens=10_000
        )
        prompts = [source[index] for index in range(0, len(source), 8)]
        answers = [item.answer for item in prompts]
        same = judged(reward, prompts, [f"\\boxed{{{answer}}}" for answer in answers], ["stop"] * len(prompts))
        shifted = judged(reward, prompts, [f"\\boxed{{{answer}}}" for answer in answers[1:] + answers[:1]], ["stop"] * len(prompts))
        assert all(result.correct for result in same), name
        equal_texts = sum(here == there for here, there in zip(answers, answers[1:] + answers[:1], strict=True))
        assert sum(result.correct for result in shifted) <= equal_texts + 1, name
    assert reward.error_counts == {}
    reward.close()


# ---------------------------------------------------------------------------------------------------------------- final step


# ---------------------------------------------------------------------------------------------------------------- length, own function


def test_overlong_shaping_is_eq_13_of_dapo() -> None:
    reward = make_reward(FINAL_STEP, overlong={"max_tokens": 100, "buffer_tokens": 20, "factor": 0.5})
    lengths = [10, 80, 85, 90, 100, 120]
    results = reward.score(
        [Conversation.of_text(prompt("4"), "= 4 ;", finish_reason="stop", num_response_tokens=length) for length in lengths]
    )
    assert [result.reward for result in results] == pytest.approx([1.0, 1.0, 0.875, 0.75, 0.5, 0.5])
    assert all(result.correct for result in results)


def test_overlong_options_are_checked() -> None:
    with pytest.raises(ValueError, match="buffer_tokens = 0"):
        OverlongShaping(make_reward(FINAL_STEP), max_tokens=10, buffer_tokens=0)
    with pytest.raises(ValueError, match=r"^reward\.name = .*buffer_tokens = 11, expected 1 to max_tokens = 10"):
        make_reward(FINAL_STEP, overlong={"max_tokens": 10, "buffer_tokens": 11})


def test_a_function_of_the_users_own_is_a_reward(users_module: Callable[[str], str]) -> None:
    name = users_module(
        "def shorter(prompt, conversation, *, scale):\n"
        "    return scale / len(conversation.response) if conversation.response else 0\n"
        "def broken(prompt, conversation):\n"
        "    return 'good'\n"
        "NOT_A_FUNCTION = 3\n"
    )
    results = judged(make_reward(f"{name}:shorter", scale=2), [prompt("4")] * 2, ["abcd", ""])
    assert [(result.reward, result.correct) for result in results] == [(0.5, True), (0.0, False)]
    with pytest.raises(ValueError, match="needs the option scale"):
        make_reward(f"{name}:shorter")
    with pytest.raises(ValueError, match="did you mean 'scale'"):
        make_reward(f"{name}:shorter", scales=2)
    with pytest.raises(ValueError, match="NOT_A_FUNCTION is a int, expected a function"):
        make_reward(f"{name}:NOT_A_FUNCTION")
    with pytest.raises(ValueError, match="there is no module no_such_module"):
        make_reward("no_such_module:f")
    with pytest.raises(ValueError, match="returned 'good'"):
        judged(make_reward(f"{name}:broken"), [prompt("4")], ["x"])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("math_verifi", {}, "did you mean 'math_verify'"),
        ("math_verify", {}, "needs the option style"),
        ("math_verify", {"stile": "dapo"}, "did you mean 'style'"),
        ("math_verify", {"style": "both"}, "reward.style = 'both'"),
        ("math_verify", {"style": "dapo", "timeout_s": 0}, "timeout_s must be positive"),
        ("math_verify", {"style": "dapo", "workers": 0}, "workers must be at least 1"),
        ("math_verify", {"style": "dapo", "memory_mb": 1}, "memory_mb must be at least 512"),
        (FINAL_STEP, {"style": "dapo"}, r"reward\.style = 'dapo': .*final_step has no such option; known: none"),
    ],
)
def test_unknown_names_and_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_reward(name, **options)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ("0.5", 0.5),
        ("True", 1.0),
        ("np.float32(0.25)", 0.25),
        ("np.int64(2)", 2.0),
        ("np.array(0.5)", 0.5),
        ("torch.tensor(0.75)", 0.75),
        ("RewardResult(reward=np.float32(0.5), correct=np.bool_(True), extracted=None, error=None)", 0.5),
    ],
)
def test_numbers_of_numpy_and_torch_are_numbers(users_module: Callable[[str], str], returned: str, expected: float) -> None:
    imports = "import numpy as np, torch\nfrom megatron_minpro.rewards.reward import RewardResult\n"
    name = users_module(f"{imports}def reward(prompt, conversation):\n    return {returned}\n")
    [result] = judged(make_reward(f"{name}:reward"), [prompt("4")], ["x"])
    assert (result.reward, type(result.reward), result.correct, type(result.correct)) == (expected, float, True, bool)


@pytest.mark.parametrize("returned", ["'1'", "None", "float('nan')", "np.float32('inf')", "torch.ones(1)", "np.zeros((1, 1))", "[1]"])
def test_what_is_no_finite_number_is_refused(users_module: Callable[[str], str], returned: str) -> None:
    name = users_module(f"import numpy as np, torch\ndef reward(prompt, conversation):\n    return {returned}\n")
    with pytest.raises(ValueError, match="for p, expected a finite number or a RewardResult"):
        judged(make_reward(f"{name}:reward"), [prompt("4")], ["x"])


def test_a_coroutine_judges_up_to_its_limit_at_once(users_module: Callable[[str], str]) -> None:
    name = users_module(
        "import asyncio\n"
        "running, most = 0, []\n"
        "async def reward(prompt, conversation):\n"
        "    global running\n"
        "    running += 1\n"
        "    most.append(running)\n"
        "    await asyncio.sleep(0.01)\n"
        "    running -= 1\n"
        "    return int(conversation.response) / 10\n"
    )
    results = judged(make_reward(f"{name}:reward", concurrency=3), [prompt("4")] * 9, [str(n) for n in range(9)])
    assert [result.reward for result in results] == [n / 10 for n in range(9)]
    assert max(sys.modules[name].most) == 3


def test_a_reward_reads_the_row_and_every_turn(users_module: Callable[[str], str]) -> None:
    name = users_module(
        "def reward(prompt, conversation):\n"
        "    said = [(turn.author, turn.text) for turn in conversation.turns]\n"
        "    return sum(case in conversation.response for case in prompt.answer) + prompt.row['bonus'] + len(said)\n"
    )
    asked = Prompt(prompt_id="p", text="?", token_ids=(1,), answer=["a", "b"], source="test", row={"bonus": 10})
    turns = (Turn(author="model", text="a b"), Turn(author="environment", text="no"), Turn(author="model", text="b"))
    conversation = Conversation(prompt=asked, turns=turns, text="a b no b", finish_reason="stop", num_response_tokens=3, generations=())
    assert make_reward(f"{name}:reward").score([conversation])[0].reward == 1 + 10 + 3


def test_math_verify_wants_a_label_that_is_text(boxed: MathVerifyReward) -> None:
    with pytest.raises(ValueError, match=r"^reward math_verify: the answer of p is a list, expected text$"):
        judged(boxed, [Prompt(prompt_id="p", text="?", token_ids=(1,), answer=["4"], source="test")], ["\\boxed{4}"])


def test_a_reward_that_raises_stop_iteration_ends_with_its_name(users_module: Callable[[str], str]) -> None:
    name = users_module("def reward(prompt, conversation):\n    return next(iter(()))\n")
    with pytest.raises(RuntimeError, match=rf"^reward {name}:reward: raised StopIteration for "):
        judged(make_reward(f"{name}:reward"), [prompt("4")], ["x"])


def test_an_answer_in_the_worker_does_not_hold_up_the_next_one(boxed: MathVerifyReward) -> None:
    said = [
        Conversation.of_text(prompt(label), f"\\boxed{{{answer}}}", finish_reason="stop", num_response_tokens=3)
        for label, answer in (("\\frac12", "2/4"), ("7", "07"))
    ]

    async def judge() -> tuple[bool, list[RewardResult]]:
        in_the_worker = asyncio.create_task(boxed.judge(said[0]))
        await asyncio.sleep(0)  # it has been asked
        by_digits = await boxed.judge(said[1])
        return in_the_worker.done(), [await in_the_worker, by_digits]

    done, results = asyncio.run(judge())
    assert not done and [result.correct for result in results] == [True, True]
    assert results == boxed.score(said)
