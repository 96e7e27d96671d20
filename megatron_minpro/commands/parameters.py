"""From a record to a command's parameters and back: each field is said once, with its type, default and help."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from megatron_minpro.option import Option

R = TypeVar("R")

CONFIG = Option("the run's YAML file, or the name of a shipped one, such as tiny_moe_cpu", argument=True)
OVERRIDES = Option("override settings of the file, as in rollout.group_size=4", argument=True, metavar="[key=value]...")
Config = Annotated[Path, CONFIG]
Overrides = Annotated[tuple[str, ...], OVERRIDES]
AsJson = Annotated[bool, Option("print JSON for programs", flags=("--json",))]


def takes(record: type[R]) -> Callable[[Callable[[R], None]], Callable[..., None]]:
    """Decorate `run(options: record)`: typer then sees one parameter for every field, those of records inside it included."""

    def decorate(run: Callable[[R], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            run(_build(record, given))

        # typer reads the parameters, their types and the help from here.
        command.__signature__ = inspect.Signature(list(_parameters(record)))  # type: ignore[attr-defined]
        command.__doc__, command.__name__ = run.__doc__, run.__name__
        return command

    return decorate


def _described(record: type[Any]) -> Iterator[tuple[Field[Any], Any, Option | None]]:
    """Every field with its type and its Option; None for a record inside the record."""
    hints = typing.get_type_hints(record, include_extras=True)
    for field in fields(record):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield field, hint, None
            continue
        value_type, option = typing.get_args(hint)
        assert isinstance(option, Option), f"{record.__name__}.{field.name} has no Option"
        yield field, value_type, option


def _parameters(record: type[Any]) -> Iterator[inspect.Parameter]:
    for field, value_type, option in _described(record):
        if option is None:
            yield from _parameters(value_type)
            continue
        required = field.default is MISSING and field.default_factory is MISSING
        default = inspect.Parameter.empty if required else _shown_default(field, option)
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[_given_type(value_type, option), _typer_parameter(field.name, value_type, option)],
        )


def _shown_default(field: Field[Any], option: Option) -> Any:
    """None where the field's default is not written as the option is: a tuple, or what `read` makes."""
    return None if option.read is not None or field.default is MISSING or isinstance(field.default, tuple) else field.default


def _given_type(value_type: Any, option: Option) -> Any:
    if option.given is not None:
        return option.given | None
    if _is_list(value_type):
        return list[typing.get_args(value_type)[0]] | None  # type: ignore[misc]
    return value_type


def _is_list(value_type: Any) -> bool:
    return typing.get_origin(value_type) is tuple and typing.get_args(value_type)[-1] is ...


def _typer_parameter(name: str, value_type: Any, option: Option) -> Any:
    if option.argument:
        return typer.Argument(help=option.help, metavar=option.metavar)
    switch = (f"--{name.replace('_', '-')}",) if value_type is bool else ()  # without typer's --no-... beside it
    return typer.Option(*(option.flags or switch), help=option.help, metavar=option.metavar, min=option.minimum, envvar=option.variable)


def _build(record: type[R], given: dict[str, Any]) -> R:
    """Raises ValueError where a field's `read` does."""
    values: dict[str, Any] = {}
    for field, value_type, option in _described(record):
        if option is None:
            values[field.name] = _build(value_type, given)
            continue
        value = given[field.name]
        if value is None and _shown_default(field, option) is None:
            continue  # the field's own default
        if option.read is not None:
            value = option.read(value)
        values[field.name] = tuple(value) if _is_list(value_type) and option.read is None else value
    return record(**values)
