"""A record and the options that are made of it say the same."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from megatron_minpro import cli
from megatron_minpro.commands.parameters import takes
from megatron_minpro.option import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    tp: Annotated[int, Option("ranks of a server", minimum=1)] = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    config: Annotated[Path, Option("a file", argument=True)]
    inner: Inner = field(default_factory=Inner)
    verbose: Annotated[bool, Option("say more")] = False
    endpoint: Annotated[tuple[str, ...], Option("a URL")] = ()
    sizes: Annotated[tuple[int, ...], Option("1,2", given=str, read=lambda text: tuple(map(int, text.split(","))))] = (7,)


def call(*arguments: str) -> tuple[list[Outer], str]:
    seen: list[Outer] = []
    app = typer.Typer()

    @app.command()
    @takes(Outer)
    def command(options: Outer) -> None:
        """Try it."""
        seen.append(options)

    return seen, CliRunner().invoke(app, list(arguments)).output


def test_defaults_are_the_records() -> None:
    assert call("x")[0] == [Outer(config=Path("x"))]


def test_every_field_arrives_with_its_type() -> None:
    arguments = ["x", "--tp", "2", "--verbose", "--endpoint", "a", "--endpoint", "b", "--sizes", "1,2"]
    [options] = call(*arguments)[0]
    assert options == Outer(config=Path("x"), inner=Inner(tp=2), verbose=True, endpoint=("a", "b"), sizes=(1, 2))


def test_a_number_below_the_minimum_is_refused() -> None:
    seen, said = call("x", "--tp", "0")
    assert seen == [] and "greater than or equal to 1" in said


def test_help_comes_from_the_fields() -> None:
    said = call("--help")[1]
    assert "ranks of a server" in said and "say more" in said and "Try it." in said and "--no-verbose" not in said


@pytest.mark.parametrize("command", [[], ["train"], ["convert"], ["convert", "verify"]])
def test_h_is_help_for_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command, "-h"]) == 0
    short = capsys.readouterr().out
    assert cli.run([*command, "--help"]) == 0
    assert capsys.readouterr().out == short


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"{version('megatron-minpro')}\n"


def test_a_shell_completes_commands() -> None:
    environment = {**os.environ, "_MINPRO_COMPLETE": "complete_bash", "COMP_WORDS": "minpro ev", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "megatron_minpro.cli"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.split() == ["evaluate"]
