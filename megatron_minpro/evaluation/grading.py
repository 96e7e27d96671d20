"""Grades of kept responses: by math-verify and by plain text and digits, side by side."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_minpro.batch.conversation import Conversation
from megatron_minpro.batch.prompt import Prompt
from megatron_minpro.evaluation.problems import Problem
from megatron_minpro.evaluation.responses import Response
from megatron_minpro.rewards.answers import AnswerStyle, Tolerance, compare_plainly, extract_answer
from megatron_minpro.rewards.grader_pool import GraderPool, Verdict
from megatron_minpro.rewards.registry import make_reward
from megatron_minpro.rewards.reward import Reward

_REMEMBERED_PAIRS = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The judgement of one response."""

    problem_id: str
    sample: int
    correct: bool
    extracted: str | None  # the answer found in the response; None when there is none
    plain: bool | None  # what text and digits alone say; None: undecided, or no answer
    math_verify: bool | None  # None: not asked, or it failed
    error: str | None  # why math-verify failed: "timeout", "crash", an exception


class Grader(Protocol):
    """Judges responses. Close it at the end: it may own processes."""

    def grade(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[Grade]:
        """One grade per response, in order; problems[i] is what responses[i] answers."""
        ...

    def close(self) -> None: ...


class MathGrader:
    """Asks both graders about every answer. What text and digits decide counts (they are exact), the rest is math-verify's.

    math-verify runs in worker processes, each answer under a time limit. An answer that it fails on is wrong unless digits decide.
    Repeated answers to a problem are asked once.
    """

    def __init__(self, *, style: AnswerStyle, timeout_s: float, workers: int, memory_mb: int = 4096) -> None:
        self._style = style
        self._pool = GraderPool(workers=workers, timeout_s=timeout_s, memory_mb=memory_mb)
        self._known: OrderedDict[tuple[str, str, Tolerance], Verdict] = OrderedDict()

    def grade(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[Grade]:
        answers = [
            extract_answer(response.text, style=self._style, truncated=response.finish_reason != "stop", label=problem.label)
            for problem, response in zip(problems, responses, strict=True)
        ]
        asked = [
            (problem.label, answer, problem.tolerance) for problem, answer in zip(problems, answers, strict=True) if answer is not None
        ]
        verdicts = iter(self._ask(asked))
        grades = []
        for problem, response, answer in zip(problems, responses, answers, strict=True):
            plain, verdict = None, Verdict(equal=None, error=None)
            if answer is not None:
                plain, verdict = compare_plainly(problem.label, answer, tolerance=problem.tolerance), next(verdicts)
            grades.append(
                Grade(
                    problem_id=response.problem_id,
                    sample=response.sample,
                    correct=plain if plain is not None else verdict.equal is True,
                    extracted=answer,
                    plain=plain,
                    math_verify=verdict.equal,
                    error=verdict.error,
                )
            )
        return grades

    def close(self) -> None:
        self._pool.close()

    def _ask(self, questions: Sequence[tuple[str, str, Tolerance]]) -> list[Verdict]:
        new = list(dict.fromkeys(question for question in questions if question not in self._known))
        verdicts = self._pool.compare(
            [(label, answer) for label, answer, _ in new],
            tolerances=[tolerance for _, _, tolerance in new],
        )
        fresh = dict(zip(new, verdicts, strict=True))
        answers = [fresh[question] if question in fresh else self._known[question] for question in questions]
        for question, verdict in fresh.items():
            if verdict.error is None:  # a crash may have been an accident
                self._known[question] = verdict
        while len(self._known) > _REMEMBERED_PAIRS:
            self._known.popitem(last=False)
        return answers


class RewardGrader:
    """Grades with a reward of training: package.module:function, or a name of rewards.registry.REWARDS."""

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    def grade(self, problems: Sequence[Problem], responses: Sequence[Response]) -> list[Grade]:
        results = self._reward.score([_conversation(problem, response) for problem, response in zip(problems, responses, strict=True)])
        return [
            Grade(
                problem_id=response.problem_id,
                sample=response.sample,
                correct=result.correct,
                extracted=result.extracted,
                plain=None,
                math_verify=None,
                error=result.error,
            )
            for response, result in zip(responses, results, strict=True)
        ]

    def close(self) -> None:
        self._reward.close()


def _conversation(problem: Problem, response: Response) -> Conversation:
    prompt = Prompt(
        prompt_id=problem.problem_id,
        text=problem.question,
        token_ids=(),
        answer=problem.label,
        source="evaluation",
        preceding=problem.preceding,
    )
    return Conversation.of_text(prompt, response.text, finish_reason=response.finish_reason, num_response_tokens=response.num_tokens)


def make_grader(name: str, *, style: str, timeout_s: float, workers: int) -> Grader:
    """math_verify, or a reward of training by name. Raises ValueError for an unknown one, and for a style that math_verify cannot read."""
    if name != "math_verify":
        return RewardGrader(make_reward(name))
    styles: dict[str, AnswerStyle] = {"dapo": "dapo", "boxed": "boxed"}
    if style not in styles:
        raise ValueError(
            f"--style {style} says nowhere where the answer stands, which math_verify must know; choose a style or another --grader"
        )
    return MathGrader(style=styles[style], timeout_s=timeout_s, workers=workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disagreement:
    """Samples of one problem with one answer, on which math-verify and the plain rule differ."""

    benchmark: str
    problem_id: str
    label: str
    answer: str
    plain: bool  # undecided counts as unequal, as a grader by text alone would have it
    math_verify: str  # equal | unequal | timeout | crash | ...
    counted_as: str  # correct | wrong
    samples: int


def disagreements(benchmark: str, problems: Mapping[str, Problem], grades: Iterable[Grade]) -> list[Disagreement]:
    """One row per distinct answer, most frequent first; nothing for answers that math-verify was not asked about."""
    counts: Counter[tuple[str, str, bool, str, bool]] = Counter()
    for grade in grades:
        if grade.extracted is None or (grade.math_verify is None and grade.error is None):
            continue
        plain = grade.plain is True
        if grade.math_verify is not None and grade.math_verify == plain:
            continue
        said = grade.error if grade.error is not None else "equal" if grade.math_verify else "unequal"
        counts[grade.problem_id, grade.extracted, plain, said, grade.correct] += 1
    return [
        Disagreement(
            benchmark=benchmark,
            problem_id=problem_id,
            label=problems[problem_id].label,
            answer=answer,
            plain=plain,
            math_verify=said,
            counted_as="correct" if correct else "wrong",
            samples=samples,
        )
        for (problem_id, answer, plain, said, correct), samples in counts.most_common()
    ]
