"""configs/README.md: every setting, made from the fields' own types, defaults and descriptions.

python -m megatron_minpro.config.reference
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from checkpoints_convert.atomic_files import write_atomically
from megatron_minpro.config.loading import may_change_on_resume, sections_of
from megatron_minpro.config.run_config import RunConfig
from parallel.shipped import shipped_folder

PAGE = shipped_folder() / "README.md"

_INTRODUCTION = """# Configurations

One YAML file describes one run. `minpro train FILE_OR_NAME key=value ...` reads it; arguments override settings of the file.
This page is made from the code: `python -m megatron_minpro.config.reference`.

| file or folder | content |
|---|---|
{files}
| `objective/` | one file per objective, with its published defaults: `objective=configs/objective/grpo.yaml` from the repository root |
| `study/` | grids of runs: `minpro study lag_sweep_tiny` |
| `hardware/` | GPUs and networks for the planner: `minpro plan qwen3_30b_a3b --hardware h200` |
| `models/` | shapes of published models for the planner |

- A value is YAML: `rollout.group_size=16`, `actor.optimizer.betas=[0.9, 0.95]`, `model.warm_up=null`.
- A section may be the path of a `.yaml` file that holds it. `${{NAME}}` in a text is an environment variable.
- An unknown key is an error. The message names file, line and key, and suggests the nearest known key.
- A setting that changes the result has no default, so the file says everything that was computed. The run folder keeps the whole
  configuration, defaults included, as `config.yaml`.
- Where a setting names code (`name`, `source`, `weight_sync`, ...), it takes a known name or `package.module:function`. The module may
  lie in your working folder. The other keys of the section are the options of that code.
- "resume" marks a setting that may change when a run continues from a checkpoint.

## All settings
"""


def render() -> str:
    """The whole page, Markdown."""
    files = "\n".join(f"| `{path.name}` | {_first_line(path)} |" for path in sorted(shipped_folder().glob("*.yaml")))
    parts = [_INTRODUCTION.format(files=files)]
    for dotted, model in _sections(RunConfig, ""):
        parts.append(f"\n### {dotted or 'The run itself'}\n\n{_summary(model)}\n\n")
        parts.append("| key | type | default | resume | meaning |\n|---|---|---|---|---|\n")
        parts += [_row(f"{dotted}.{name}" if dotted else name, field) for name, field in model.model_fields.items()]
    return "".join(parts)


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for name, field in model.model_fields.items():
        for section in sections_of(field.annotation):
            yield from _sections(section, f"{prefix}.{name}" if prefix else name)


def _row(key: str, field: FieldInfo) -> str:
    default = (
        "" if field.is_required() else "section's own" if sections_of(field.annotation) and field.default is not None else _default(field)
    )
    resume = "resume" if may_change_on_resume(key) else ""
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{key}` | {_type(field)} | {default} | {resume} | {meaning} |\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    plain = [str(item) for item in value] if isinstance(value, tuple) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def _type(field: FieldInfo) -> str:
    limits = [f"{sign} {limit}" for each in field.metadata for sign, limit in _limits(each)]
    return " ".join([_type_name(field.annotation), *limits])


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    arguments = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case types.UnionType | typing.Union:
            return " or ".join(_type_name(argument) for argument in arguments)
        case origin if origin is typing.Annotated:
            return _type_name(arguments[0])
        case origin if origin is Literal:
            return ", ".join(f"`{argument}`" for argument in arguments)
        case origin if origin is tuple or origin is list:
            return "list"
        case origin if origin is dict:
            return "mapping"
    names = {str: "text", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limits(constraint: Any) -> Iterator[tuple[str, Any]]:
    for kind, sign, attribute in ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt")):
        if isinstance(constraint, kind):
            yield sign, getattr(constraint, attribute)


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _first_line(path: Path) -> str:
    line = path.read_text(encoding="utf-8").splitlines()[0]
    return line.removeprefix("#").strip() or path.stem


if __name__ == "__main__":
    write_atomically(PAGE, render(), durable=False)
