"""YAML text to plain values and back, without YAML 1.1's surprises.

PyYAML reads `1e-6` as a string, `no` as False, `1:30` as 90 and takes the last of two equal keys in silence. Here numbers, booleans and
null are those of YAML 1.2's core schema, a repeated key is an error, and every key remembers its line so that an error can point at it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
    ("tag:yaml.org,2002:merge", r"^<<$", ["<"]),
)


class YamlError(ValueError):
    """The text is not YAML, or holds a key twice; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML copies it per class

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(node.value)  # base 10 always: YAML 1.1 reads 010 as 8

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(node.value.replace(".inf", "inf").replace(".Inf", "inf").replace(".INF", "inf").lower().replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the strings that _Loader would otherwise read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML copies it per class

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
for _tag, _pattern, _first in _CORE_SCHEMA:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)


def parse_yaml(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """Read one YAML document; returns the value and the line (from 1) of every key in it.

    Raises YamlError for anything that is not one YAML document, for a repeated key and for a key that is no string.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[KeyPath, int] = {}
        _collect_lines(node, (), lines)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(" ".join(str(error.problem or error.context).split()), 1 if mark is None else mark.line + 1) from None
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split()), 1) from None
    finally:
        loader.dispose()


def _collect_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[Hashable] = set()
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                raise YamlError(f"the key {getattr(key_node, 'value', '?')!r} is not a string", line)
            if key_node.value in seen:
                raise YamlError(f"the key {'.'.join(map(str, (*path, key_node.value)))} appears twice", line)
            seen.add(key_node.value)
            lines[(*path, key_node.value)] = line
            _collect_lines(value_node, (*path, key_node.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect_lines(child, (*path, index), lines)


def render_yaml(value: Any) -> str:
    """Write plain values (mappings, lists, strings, numbers, booleans, None) so that parse_yaml gives back equal ones, keys in order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)
