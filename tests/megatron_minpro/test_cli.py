from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.text import Text

import megatron_minpro.run
from megatron_minpro import cli
from rollout.sglang.environment import default_server_python

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "serve", "doctor", "evaluate", "convert", "plan", "rehearse", "report", "scale", "study", "compare")


class Launcher(ModuleType):
    """Stands in for the launcher, the border to processes: remembers what it was asked."""

    def __init__(self, failure: BaseException | None = None) -> None:
        super().__init__("megatron_minpro.run.launcher")
        self.calls: list[tuple[str, Any, Any]] = []
        self.failure = failure

    class Interrupted(RuntimeError):
        """As the launcher's."""

    def run(self, config: Any, *, resume: str) -> Path:
        self.calls.append(("run", config, resume))
        if self.failure is not None:
            raise self.failure
        return Path("runs")

    def describe(self, config: Any, *, resume: str) -> Text:
        self.calls.append(("describe", config, resume))
        return Text("2 ranks would start")


@pytest.fixture
def use_launcher(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(REPOSITORY)

    def use(launcher: Launcher) -> Launcher:
        monkeypatch.setitem(sys.modules, "megatron_minpro.run.launcher", launcher)
        monkeypatch.setitem(sys.modules, "megatron_minpro.run.dry_run", launcher)
        monkeypatch.setattr(megatron_minpro.run, "launcher", launcher, raising=False)
        monkeypatch.setattr(megatron_minpro.run, "dry_run", launcher, raising=False)
        return launcher

    return use


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Example:\n    minpro {command}" in shown


def test_help_lists_exactly_the_commands_that_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example: minpro train configs/tiny_moe_cpu.yaml" in shown
    listed = [line.split()[0] for line in shown.partition("Commands:")[2].splitlines() if line.strip()]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("group", [[], ["convert"]])
def test_without_a_command_the_help_is_shown(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(group) == 0
    captured = capsys.readouterr()
    assert "Example:" in captured.out and "Commands:" in captured.out
    assert captured.err == ""


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from megatron_minpro import cli; cli.run(['train', '--help']); print(sorted(set(sys.modules) & set(sys.argv[1:])))"
    )
    heavy = ["torch", "transformers", "matplotlib", "megatron", "datasets", "megatron_minpro.config"]
    out = subprocess.run([sys.executable, "-c", program, *heavy], capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "configs/none.yaml"], "configs/none.yaml: cannot be read (No such file or directory)"),
        (["train", "configs/tiny_moe_cpu.yaml", "stalenes=1"], "command line: unknown key stalenes; did you mean staleness?"),
        (["serve", "configs/tiny_moe_cpu.yaml", "rollout.tp=x"], "command line: rollout.tp = 'x': expected a valid integer"),
        (["train", "configs/tiny_moe_cpu.yaml", "--resume", "perhaps"], "'perhaps' is not one of 'auto', 'never', 'must'"),
        (["train", "configs/tiny_moe_cpu.yaml", "--attempt", "7.0"], "--attempt: expected --prepare beside it"),
        (["train", "configs/tiny_moe_cpu.yaml", "--prepare", "--attempt", "7"], "--attempt '7': expected JOB.REQUEUES, as in 4711.0"),
        (["train"], "Missing argument"),
        (["trian"], "No such command 'trian'"),
        (["doctor", "--jsn"], "No such option: --jsn"),
    ],
)
def test_wrong_input_is_exit_code_2_and_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("minpro: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_train_hands_the_resolved_configuration_to_the_launcher(use_launcher: Any) -> None:
    launcher = use_launcher(Launcher())
    assert cli.run(["train", "configs/tiny_moe_cpu.yaml", "seed=7", "--resume", "must", "staleness=4"]) == 0
    [(what, config, resume)] = launcher.calls
    assert (what, config.seed, config.staleness, resume) == ("run", 7, 4, "must")


def test_a_dry_run_describes_and_starts_nothing(use_launcher: Any, capsys: pytest.CaptureFixture[str]) -> None:
    launcher = use_launcher(Launcher())
    assert cli.run(["train", "configs/tiny_moe_cpu.yaml", "--dry-run"]) == 0
    assert [call[0] for call in launcher.calls] == ["describe"]
    assert "2 ranks would start" in capsys.readouterr().out


def test_a_failure_while_running_is_exit_code_1_and_names_the_logs(
    use_launcher: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    use_launcher(Launcher(RuntimeError("rank 1 ended\nwith exit code 9")))
    assert cli.run(["train", "configs/tiny_moe_cpu.yaml", f"output_dir={tmp_path}", "name=broken"]) == 1
    assert capsys.readouterr().err == f"minpro: error: rank 1 ended with exit code 9 (logs: {tmp_path}/broken/logs)\n"
    assert "rank 1 ended" in (tmp_path / "broken/logs/launcher_traceback.txt").read_text()


def test_wrong_input_found_by_the_launcher_is_exit_code_2(use_launcher: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    use_launcher(Launcher(ValueError("model.path: runs/none holds no config.json")))
    assert cli.run(["train", "configs/tiny_moe_cpu.yaml", f"output_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == "minpro: error: model.path: runs/none holds no config.json\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_exit_code_1(use_launcher: Any, capsys: pytest.CaptureFixture[str]) -> None:
    use_launcher(Launcher(KeyboardInterrupt()))
    assert cli.run(["train", "configs/tiny_moe_cpu.yaml"]) == 1
    assert capsys.readouterr().err == "minpro: interrupted\n"


def test_a_run_that_ctrl_c_stopped_says_so_without_calling_it_an_error(use_launcher: Any, capsys: pytest.CaptureFixture[str]) -> None:
    use_launcher(Launcher(Launcher.Interrupted("stopped after 3 trained batches with a checkpoint; the same command continues")))
    assert cli.run(["train", "configs/tiny_moe_cpu.yaml"]) == 1
    assert capsys.readouterr().err == "minpro: stopped after 3 trained batches with a checkpoint; the same command continues\n"


def test_doctor_imports_and_reports_both_environments(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    found = {finding["subject"]: finding for finding in report["findings"]}
    assert found["megatron-core"]["detail"] == "0.16.1"
    assert found["python"]["verdict"] == "ok"
    trainer, servers = report["installations"]["trainer"], report["installations"]["servers"]
    assert trainer["torch"] == {"version": torch.__version__, "error": None}
    assert (servers["engine"], servers["executable"]) == ({"version": "0.5.23", "error": None}, str(default_server_python()))
    assert code == (0 if report["can_train"] else 1)


def test_doctor_fails_without_a_server_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINPRO_SERVER_PYTHON", str(tmp_path / "python"))
    assert cli.run(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "make setup" in captured.out
    assert captured.err == "minpro: error: missing: rollout servers\n"
