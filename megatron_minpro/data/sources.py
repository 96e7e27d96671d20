"""Loading prompts: JSON lines, parquet, a Hugging Face dataset, or a plug-in, package.module:function."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_minpro.batch.prompt import Message, Prompt
from megatron_minpro.data.prompts import PromptList, PromptReport, PromptSource, encode_conversations
from megatron_minpro.data.rows import is_source_of_rows, read_rows, source_name
from megatron_minpro.data.wrappers import BARE, WRAPPERS, unwrap
from megatron_minpro.registry import PlugInError, PlugIns, nearest
from megatron_minpro.rewards.answers import as_integer, last_boxed

_EXACT_INTEGERS = 2**53  # floats from here on skip integers

# Where the answer stands inside the answer field.
ANSWER_FORMATS: dict[str, Callable[[str], str | None]] = {
    "plain": lambda text: text,
    "after_hashes": lambda text: text.rpartition("####")[2].replace(",", "") if "####" in text else None,  # GSM8K; thousands commas
    "boxed": last_boxed,  # the label is the box of a worked solution
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """How a well-known data set is laid out."""

    question_field: str
    answer_field: str
    answer_format: str
    wrapper: str


PRESETS = {
    "dapo": Preset(question_field="prompt.0.content", answer_field="reward_model.ground_truth", answer_format="plain", wrapper="dapo"),
    "gsm8k": Preset(question_field="question", answer_field="answer", answer_format="after_hashes", wrapper="boxed"),
    "amc23": Preset(question_field="problem", answer_field="answer", answer_format="plain", wrapper="boxed"),
    "aime24": Preset(question_field="problem", answer_field="answer", answer_format="plain", wrapper="boxed"),
    "aime25": Preset(question_field="problem", answer_field="answer", answer_format="plain", wrapper="boxed"),
    "math500": Preset(question_field="problem", answer_field="answer", answer_format="plain", wrapper="boxed"),
    "olympiadbench": Preset(question_field="question", answer_field="final_answer.0", answer_format="plain", wrapper="boxed"),
    "minerva_math": Preset(question_field="problem", answer_field="solution", answer_format="boxed", wrapper="boxed"),
}

# Called as plug_in(tokenizer, **options); gives a PromptSource.
PROMPT_SOURCES = PlugIns(setting="prompts.source", options="prompts.options", known={})


def load_prompts(
    *,
    tokenizer: Any,
    source: str,
    max_prompt_tokens: int,
    options: Mapping[str, Any] | None = None,
    preset: str | None = None,
    question_field: str | None = None,
    answer_field: str | None = None,
    answer_format: str | None = None,
    wrapper: str | None = None,
) -> tuple[PromptSource, PromptReport]:
    """Read a prompt source, clean it, apply the chat template.

    A question that comes with a wrapper around it is unwrapped before the wrapper is put around it. Rows with the same question
    (differences of white space ignored) and the same answer become one prompt. Rows with the same question and different answers are
    all dropped: it is unknown which label is right. The order of the source is kept.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        source: package.module:function, a .jsonl, .jsonl.gz, .json or .parquet file, or a Hugging Face dataset ("owner/name").
        max_prompt_tokens: longer prompts (template included) are dropped and counted; from a plug-in they are an error.
        options: the plug-in's options; for a Hugging Face dataset `split` (required), `name`, `revision`.
        preset: a key of PRESETS, the layout of a well-known data set; the four arguments below override its values.
        question_field, answer_field: dotted paths into a row, numbers index lists ("prompt.0.content").
        answer_format: a key of ANSWER_FORMATS; "plain" when neither it nor a preset is given.
        wrapper: a key of WRAPPERS, or a text that contains {question} once; None without a preset sends the bare question.

    Returns:
        The prompts, and what became of the rows.

    Raises:
        ValueError: something is missing or malformed, naming source, row and field; or no prompt is left.
    """
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens must be at least 1, got {max_prompt_tokens}")
    options = {} if options is None else dict(options)
    layout = {
        "preset": preset,
        "question_field": question_field,
        "answer_field": answer_field,
        "answer_format": answer_format,
        "wrapper": wrapper,
    }
    check_prompts(section="prompts", source=source, options=options, max_prompt_tokens=max_prompt_tokens, **layout)
    if PROMPT_SOURCES.names(source):
        return _of_plug_in(tokenizer, source, options, max_prompt_tokens)
    question_field, answer_field, answer_format, wrapper = _layout(**layout)
    rows = read_rows(source, options)
    return _build(
        rows,
        tokenizer=tokenizer,
        source=source,
        question_field=question_field,
        answer_field=answer_field,
        answer_format=answer_format,
        wrapper=wrapper,
        max_prompt_tokens=max_prompt_tokens,
    )


def count_questions(*, source: str, options: Mapping[str, Any], max_prompt_tokens: int, **layout: str | None) -> int:
    """The prompts that load_prompts would find in a file if none were too long; no tokenizer is needed. Arguments and errors as there."""
    del max_prompt_tokens  # needs a tokenizer
    question_field, answer_field, answer_format, wrapper = _layout(**layout)
    rows = read_rows(source, dict(options))
    found = _clean(rows, question_field=question_field, answer_field=answer_field, answer_format=answer_format, wrapper=wrapper)
    return len(found.agreed)


def read_field(row: Mapping[str, Any], path: str, *, where: str) -> Any:
    """The value at a dotted path. Raises ValueError with `where`, the path and the fields that are there instead."""
    value: Any = row
    for step, key in enumerate(path.split(".")):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
            continue
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
            continue
        parent = ".".join(path.split(".")[:step])
        holder = f"under {parent!r}" if parent else "in the row"
        if isinstance(value, Mapping):
            found = f"fields present {holder}: {', '.join(map(str, value))}"
        elif isinstance(value, list):
            found = f"{parent!r} is a list of {len(value)}"
        else:
            found = f"{parent!r} is a {type(value).__name__}, not an object"
        raise ValueError(f"{where}: field {path!r} is missing ({key!r} not found); {found}")
    return value


def check_prompts(*, section: str, source: str, options: Mapping[str, Any], max_prompt_tokens: int, **layout: str | None) -> None:
    """What can be known of a prompt source without reading it.

    Args:
        section: the section of the configuration that holds these settings, such as evaluation.prompts.
        source, options, max_prompt_tokens, layout: as in load_prompts.

    Raises:
        PlugInError: a plug-in cannot be used with these options, or a key or name of the layout is not known.
    """
    del max_prompt_tokens  # depends on the prompts
    plug_ins = replace(PROMPT_SOURCES, setting=f"{section}.source", options=f"{section}.options")
    if plug_ins.names(source):
        plug_ins.find(source, options, passed=1)
        for key, value in layout.items():
            if value is not None:
                raise PlugInError(f"{section}.{key}", value, f"the plug-in {source} makes its prompts itself; remove it")
        return
    for key, known in (("preset", PRESETS), ("answer_format", ANSWER_FORMATS)):
        value = layout[key]
        if value is not None and value not in known:
            raise PlugInError(f"{section}.{key}", value, f"unknown; {nearest(value, known)}")
    wrapper = layout["wrapper"]
    if wrapper is not None and wrapper not in WRAPPERS and wrapper.count("{question}") != 1:
        raise PlugInError(f"{section}.wrapper", wrapper, f"expected {', '.join(WRAPPERS)} or a text that contains {{question}} once")
    for key in ("question_field", "answer_field"):
        if layout["preset"] is None and not layout[key]:
            raise PlugInError(f"{section}.{key}", layout[key], f"needed to read {source} (or a preset: {', '.join(PRESETS)})")
    if not is_source_of_rows(source):
        reason = "not a .jsonl, .jsonl.gz, .json or .parquet file, not a Hugging Face dataset (owner/name), not package.module:function"
        raise PlugInError(f"{section}.source", source, reason)


def _of_plug_in(tokenizer: Any, source: str, options: dict[str, Any], max_prompt_tokens: int) -> tuple[PromptSource, PromptReport]:
    prompts = PROMPT_SOURCES.find(source, options, passed=1)(tokenizer, **options)
    if not isinstance(prompts, PromptSource) or not len(prompts):
        raise PROMPT_SOURCES.refused(source, TypeError(f"gave a {type(prompts).__name__}, expected a PromptSource with prompts"))
    # A source that computes its prompts on demand may have millions: its first stands for all.
    for prompt in prompts.prompts if isinstance(prompts, PromptList) else [prompts[0]]:
        length = len(prompt.token_ids)
        if length > max_prompt_tokens:
            raise ValueError(f"prompts.max_prompt_tokens = {max_prompt_tokens}: prompt {prompt.prompt_id} of {source} has {length} tokens")
    report = PromptReport(
        source=prompts.name,
        rows=len(prompts),
        empty=0,
        wrapped=0,
        duplicate_rows=0,
        conflicting=0,
        too_long=0,
        max_prompt_tokens=max_prompt_tokens,
        kept=len(prompts),
    )
    return prompts, report


def _layout(
    preset: str | None, question_field: str | None, answer_field: str | None, answer_format: str | None, wrapper: str | None
) -> tuple[str, str, str, str]:
    """Question field, answer field, answer format and wrapper text of a layout that check_prompts accepts, all filled in."""
    if preset is not None:
        known = PRESETS[preset]
        question_field = known.question_field if question_field is None else question_field
        answer_field = known.answer_field if answer_field is None else answer_field
        answer_format = known.answer_format if answer_format is None else answer_format
        wrapper = known.wrapper if wrapper is None else wrapper
    assert question_field and answer_field
    return question_field, answer_field, answer_format or "plain", BARE if wrapper is None else WRAPPERS.get(wrapper, wrapper)


def field_text(value: Any, path: str, *, where: str) -> str:
    """A question or an answer as text; null becomes "". Integral floats lose their ".0" (AMC23 stores 27.0 for 27).

    Args:
        value: what stands in the row.
        path: the field, for the error.
        where: source and row, for the error.

    Raises:
        ValueError: neither text nor a finite number, or a number with more digits than its storage holds. JSON readers take NaN and
            Infinity for numbers; such labels would grade every response wrong.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return _whole_text(value, path, where=where).strip()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: field {path!r} is a {type(value).__name__}, expected text or a number")
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"{where}: field {path!r} is {value}, expected text or a finite number")
    if abs(value) >= _EXACT_INTEGERS:
        raise ValueError(f"{where}: field {path!r} is {value!r}, a float that does not hold all its digits; expected it as text")
    return str(int(value)) if value.is_integer() else repr(value)


def _build(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    tokenizer: Any,
    source: str,
    question_field: str,
    answer_field: str,
    answer_format: str,
    wrapper: str,
    max_prompt_tokens: int,
) -> tuple[PromptList, PromptReport]:
    name = source_name(source)
    found = _clean(rows, question_field=question_field, answer_field=answer_field, answer_format=answer_format, wrapper=wrapper)
    agreed = found.agreed
    texts = [wrapper.replace("{question}", question.text) for question, _ in agreed]
    conversations = [[*question.preceding, {"role": "user", "content": text}] for (question, _), text in zip(agreed, texts, strict=True)]
    token_ids = encode_conversations(tokenizer, conversations)
    prompts = tuple(
        Prompt(
            prompt_id=f"{name}-{question.digest}",
            text=text,
            token_ids=ids,
            answer=answer,
            source=name,
            preceding=question.preceding,
            row=question.row,
        )
        for (question, answer), text, ids in zip(agreed, texts, token_ids, strict=True)
        if len(ids) <= max_prompt_tokens
    )
    report = PromptReport(
        source=source,
        rows=found.rows,
        empty=found.empty,
        wrapped=found.wrapped,
        duplicate_rows=found.rows - found.empty - found.distinct,
        conflicting=found.distinct - len(agreed),
        too_long=len(agreed) - len(prompts),
        max_prompt_tokens=max_prompt_tokens,
        kept=len(prompts),
    )
    if not prompts:
        raise ValueError(f"no prompt is left of {report.summary()}")
    return PromptList(name=name, prompts=prompts), report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Questions:
    """agreed: one label each. distinct: questions, those that rows label differently included. empty, wrapped: of the rows."""

    agreed: list[tuple[_Question, Any]]
    rows: int
    empty: int
    wrapped: int
    distinct: int


def _clean(
    source_rows: Iterable[tuple[str, Mapping[str, Any]]], *, question_field: str, answer_field: str, answer_format: str, wrapper: str
) -> _Questions:
    num_rows = empty = wrapped = 0
    first: dict[str, _Question] = {}
    labels: dict[str, dict[int | str, Any]] = {}  # question -> distinct labels (integers compared as integers) -> their first spelling
    for where, row in source_rows:
        num_rows += 1
        given = field_text(read_field(row, question_field, where=where), question_field, where=where)
        answer = _answer(read_field(row, answer_field, where=where), answer_field, answer_format, where=where)
        text = given if wrapper == BARE else unwrap(given, wrapper)
        wrapped += text != given
        if not text or not answer:
            empty += 1
            continue
        question = _Question(text, preceding_messages(row, question_field, where=where), row)
        first.setdefault(question.key, question)
        labels.setdefault(question.key, {}).setdefault(_comparable(answer), answer)
    agreed = [(first[key], next(iter(answers.values()))) for key, answers in labels.items() if len(answers) == 1]
    return _Questions(agreed=agreed, rows=num_rows, empty=empty, wrapped=wrapped, distinct=len(labels))


@dataclass(frozen=True, slots=True)
class _Question:
    text: str  # without wrapper
    preceding: tuple[Message, ...]
    row: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Equal for questions that differ in white space only. The same question after another system message is another one."""
        return " ".join(self.text.split()) + (json.dumps(self.preceding) if self.preceding else "")

    @property
    def digest(self) -> str:
        content = self.text + (json.dumps(self.preceding) if self.preceding else "")
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def preceding_messages(row: Mapping[str, Any], question_field: str, *, where: str) -> tuple[Message, ...]:
    """The messages that stand before the question in its conversation, such as a system message; () when there are none.

    Args:
        row: the data row.
        question_field: such as messages.1.content: then messages.0 precedes it. Any other field has no conversation around it.
        where: source and row, for the error.

    Raises:
        ValueError: a preceding message lacks its role or its text.
    """
    parts = re.fullmatch(r"(?P<messages>.+)\.(?P<index>[0-9]+)\.content", question_field)
    if parts is None:
        return ()
    found = []
    for index in range(int(parts["index"])):
        place = f"{parts['messages']}.{index}"
        message = {key: read_field(row, f"{place}.{key}", where=where) for key in ("role", "content")}
        for key, value in message.items():
            if not isinstance(value, str):
                raise ValueError(f"{where}: field '{place}.{key}' is a {type(value).__name__}, expected text")
            _whole_text(value, f"{place}.{key}", where=where)
        found.append(message)
    return tuple(found)


def _whole_text(text: str, path: str, *, where: str) -> str:
    """The text, which must be one that UTF-8 can hold: half of a surrogate pair, as in JSON's "\\ud83d", is no character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise ValueError(f"{where}: field {path!r} holds {half} alone at character {error.start}, half of a surrogate pair") from error
    return text


def _answer(stored: Any, answer_field: str, answer_format: str, *, where: str) -> Any:
    """The label in the answer field: text, or a list or an object as it stands there. Falsy where there is none."""
    if answer_format == "plain" and isinstance(stored, list | Mapping):
        return stored
    text = field_text(stored, answer_field, where=where)
    answer = ANSWER_FORMATS[answer_format](text) if text else ""
    if answer is None:
        raise ValueError(f"{where}: field {answer_field!r} holds no answer in the format {answer_format!r}: {text[-60:]!r}")
    return answer.strip()


def _comparable(answer: Any) -> int | str:
    """Equal for labels that say the same."""
    if not isinstance(answer, str):
        return json.dumps(answer, sort_keys=True, default=str)
    number = as_integer(answer)
    return answer if number is None else number
