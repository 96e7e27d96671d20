"""The `minpro` command. Exit codes: 0 done, 1 failed while running, 2 the input is wrong; a failure is one line on stderr.

Everything heavy is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from megatron_minpro.commands import compare, convert, doctor, evaluate, plan, rehearse, report, scale, serve, study, train
from megatron_minpro.working_folder import without_working_folder

app = typer.Typer(
    name="minpro",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Reinforcement-learning post-training of Mixture-of-Experts language models with MinPRO and its rivals.\n\n"
    "Example: minpro train configs/tiny_moe_cpu.yaml",
)
app.command("train")(train.train)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(convert.app, name="convert")
app.command("plan")(plan.plan)
app.command("rehearse")(rehearse.rehearse)
app.command("scale")(scale.scale)
app.command("study")(study.study)
app.command("report")(report.report)
app.command("compare")(compare.compare)

_TYPER_INTERRUPTED = 130  # typer turns a KeyboardInterrupt into this return value


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("megatron-minpro"))
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script: runs the command and exits with its code."""
    sys.path[:] = without_working_folder(sys.path)
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; says in one line on stderr what went wrong.

    ValueError means that the input is wrong (2); anything else is a failure while running (1).
    """
    try:
        result: Any = typer.main.get_command(app).main(args=arguments, prog_name="minpro", standalone_mode=False)
    except TyperException as error:
        context = getattr(error, "ctx", None)  # of the subcommand, where the error is about one
        command = "minpro" if context is None else context.command_path
        return _fail(f"{error.format_message()} (see {command} --help)", code=2)
    except ValueError as error:
        return _fail(str(error), code=2)
    except Exception as error:
        return _fail(str(error) or type(error).__name__, code=1)
    if result == _TYPER_INTERRUPTED:
        print("minpro: interrupted", file=sys.stderr)  # intended, so no error
        return 1
    return result if isinstance(result, int) else 0


def _fail(message: str, *, code: int) -> int:
    print(f"minpro: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
