from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from megatron_minpro.objectives.idle_clip import idle_clip
from megatron_minpro.tracking.console import Console, MetricsTail
from megatron_minpro.tracking.metrics_file import MetricsFile
from megatron_minpro.tracking.progress import DONE, WAIT, Progress, write_progress

STEP = {
    "reward/trained": 0.3125,
    "prefix_min/mean": 0.875,
    "clip/hard": 0.01,
    "clip/soft": 0.02,
    "policy/entropy": 0.5,
    "batch/lag_min": 32,
    "batch/lag_max": 47,
    "throughput/tokens_per_second": 1234.5,
    "time/sample": 2.0,
    "time/update": 1.0,
    "time/step": 3.0,
}


def plain() -> tuple[RichConsole, io.StringIO]:
    out = io.StringIO()
    return RichConsole(file=out, force_terminal=False, width=60), out


def lines_of(out: io.StringIO) -> list[str]:
    """The plain lines behind the time of day, which each of them must have."""
    found = []
    for line in out.getvalue().splitlines():
        stamp, _, rest = line.partition("  ")
        age_s = time.time() - time.mktime(time.strptime(stamp, "%Y-%m-%d %H:%M:%S"))
        assert 0 <= age_s < 100
        found.append(rest)
    return found


def test_without_a_terminal_every_step_is_one_plain_line(tmp_path: Path) -> None:
    rich, out = plain()
    with MetricsFile(tmp_path) as file, Console(tmp_path, num_global_steps=40, name="run", out=rich) as console:
        console.refresh()
        file.log(0, {"reward/trained": 0.25, "total/batches_trained": 0, "time/step": 1.0})
        file.log(1, {**STEP, "total/batches_trained": 1})
        console.refresh()
        console.refresh()
    assert lines_of(out) == [
        "step 0  trained 0/40  reward 0.250  prefix min -  clipped -  entropy -  tokens/s -  lag -  0:40 left",
        "step 1  trained 1/40  reward 0.312  prefix min 0.875  clipped 3.00%  entropy 0.500  tokens/s 1,234  lag 32-47  "
        "sample 2.0s  update 1.0s  1:18 left",
    ]


def test_without_a_terminal_a_phase_outside_the_steps_is_told_once(tmp_path: Path) -> None:
    rich, out = plain()
    with Console(tmp_path, num_global_steps=2, name="run", out=rich) as console:
        for phase in ("base model", "base model", "starting servers", "sample", "update"):
            write_progress(tmp_path, Progress(phase=phase, global_step=0))
            console.refresh()
    assert lines_of(out) == ["run: base model", "run: starting servers"]


def test_a_step_shows_the_idle_shares_of_trainer_and_servers(tmp_path: Path) -> None:
    rich, out = plain()
    idle = {"time/wait": 1.5, "time/idle_servers": 0.5, "time/step": 2.0, "time/tail": 9.0}
    with MetricsFile(tmp_path) as file, Console(tmp_path, num_global_steps=2, name="run", out=rich):
        file.log(1, {**STEP, **idle, "total/batches_trained": 1})
    assert out.getvalue().endswith("lag 32-47  sample 2.0s  update 1.0s  idle: trainer 75%, servers 25%  0:02 left\n")


def test_two_activities_at_once_are_both_shown(tmp_path: Path) -> None:
    rich, out = plain()
    shown = io.StringIO()
    terminal = RichConsole(file=shown, force_terminal=True, width=140)
    with Console(tmp_path, num_global_steps=2, name="run", out=rich) as console:
        for phase in ("update", WAIT, "sync"):
            write_progress(tmp_path, Progress(phase=phase, global_step=0, beside="evaluation step_000002"))
            console.refresh()
    assert lines_of(out) == ["run: evaluation step_000002"]
    write_progress(tmp_path, Progress(phase="update", global_step=0, beside="sample"))
    with Console(tmp_path, num_global_steps=2, name="run", out=terminal):
        pass
    assert "sample and update" in shown.getvalue()
    assert Progress(phase=WAIT, global_step=0, beside="sample").activities == ("sample",)


def test_a_resumed_run_does_not_repeat_earlier_lines(tmp_path: Path) -> None:
    rich, out = plain()
    with MetricsFile(tmp_path) as file:
        for step in range(4):
            file.log(step, {**STEP, "total/batches_trained": step + 1})
    with Console(tmp_path, num_global_steps=3, name="run", resumed_from=1, out=rich) as console:
        console.refresh()
        assert lines_of(out) == [], "steps 2 and 3 are done again"
        with MetricsFile(tmp_path) as file:
            file.truncate_after(1)
            console.refresh()
            file.log(2, {**STEP, "total/batches_trained": 3})
    assert [line.split("  ")[:2] for line in lines_of(out)] == [["step 2", "trained 3/3"]]


def test_ratios_of_one_at_a_lag_are_warned_of_once_over_attempts(tmp_path: Path) -> None:
    for resumed_from, told in ((None, ["warning: global step 0"]), (0, ["warning: global step 1"]), (2, [])):
        rich, out = plain()
        with (
            Console(tmp_path, num_global_steps=3, name="run", resumed_from=resumed_from, alarms=(idle_clip,), out=rich) as console,
            MetricsFile(tmp_path) as file,
        ):
            kept = -1 if resumed_from is None else resumed_from
            file.truncate_after(kept)
            console.refresh()
            for step in range(kept + 1, 3):
                file.log(step, {**STEP, "ratio/unit": 1.0})
        assert [line[:22] for line in out.getvalue().splitlines() if "every ratio is 1" in line] == told


def test_on_a_terminal_the_numbers_the_bar_and_the_time_left_are_shown(tmp_path: Path) -> None:
    out = io.StringIO()
    rich = RichConsole(file=out, force_terminal=True, width=140)
    with MetricsFile(tmp_path) as file:
        file.log(0, {**STEP, "total/batches_trained": 10})
    write_progress(tmp_path, Progress(phase="update", global_step=10))
    with Console(tmp_path, num_global_steps=40, name="tiny", out=rich) as console:
        console.log("a line that stays")
    shown = out.getvalue()
    for text in ("tiny", "10/40", "1:30 left", "update", "0.312", "32-47", "0.875", "3.00%", "1,234", "sample 2.0s", "a line that stays"):
        assert text in shown


def test_a_phase_before_the_first_step_shows_its_seconds_and_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000, 2000, 7))
    monkeypatch.setattr("megatron_minpro.tracking.console.time.monotonic", lambda: next(clock))
    out, (rich, lines) = io.StringIO(), plain()
    with Console(tmp_path, num_global_steps=1, name="t", out=RichConsole(file=out, force_terminal=True, width=140)) as console:
        write_progress(tmp_path, Progress(phase="building the model", global_step=0))
        console.remark("0 of 2 servers answer")
        console.refresh()
        assert "building the model, 0:14; 0 of 2 servers answer" in out.getvalue(), "7 s a reading: one for the whole run, one for this"
        write_progress(tmp_path, Progress(phase="update", global_step=0, beside="sample"))
        console.remark("")
        console.refresh()
        assert "\x1b[35msample and update\x1b[0m" in out.getvalue(), "a step has its times in its line"
    with Console(tmp_path, num_global_steps=1, name="t", out=rich) as console:
        for text in ("0 of 2 servers answer", "0 of 2 servers answer", "1 of 2 servers answer", ""):
            console.remark(text)
    assert lines_of(lines) == ["t: 0 of 2 servers answer", "t: 1 of 2 servers answer"]


@pytest.mark.parametrize("width", [50, 80, 120])
def test_no_word_is_broken_on_a_narrow_terminal(width: int, tmp_path: Path) -> None:
    out = io.StringIO()
    with MetricsFile(tmp_path) as file:
        file.log(0, {**STEP, "time/idle_servers": 0.5, "time/wait": 1.0, "total/batches_trained": 10})
    write_progress(tmp_path, Progress(phase="base model", global_step=0, detail="step 1200 of 1600, loss 0.123"))
    rich = RichConsole(file=out, force_terminal=True, color_system=None, width=width)
    with Console(tmp_path, num_global_steps=40, name="a_rather_long_name_of_a_run", out=rich) as console:
        console.refresh()
        frame = last_frame(out).removeprefix("\x1b[2K")  # clears the line
    assert max(map(len, frame.splitlines())) <= width
    words = (
        "a_rather_long_name_of_a_run: base 1200 0.123, 10/40 gone, left reward prefix min clipped entropy tokens/s lag 32-47 sample servers"
    )
    assert set(words.split()) <= set(frame.split()) and "…" not in frame


def last_frame(out: io.StringIO) -> str:
    """What a terminal shows in the end: the lines after the last time that the cursor went up."""
    return out.getvalue().rpartition("\x1b[1A")[2]


def plain_text(frame: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", frame)


def test_the_last_frame_of_a_complete_run_shows_no_phase_as_still_going_on(tmp_path: Path) -> None:
    out = io.StringIO()
    with Console(tmp_path, num_global_steps=1, name="t", out=RichConsole(file=out, force_terminal=True, width=140)) as console:
        write_progress(tmp_path, Progress(phase="export", global_step=1))
        console.refresh()
        write_progress(tmp_path, Progress(phase=DONE, global_step=1))
    assert "t: done" in plain_text(last_frame(out)) and "export" not in last_frame(out) and "left" not in last_frame(out)


def test_the_last_frame_of_a_run_that_ended_well_is_done_whatever_was_told(tmp_path: Path) -> None:
    out = io.StringIO()
    with Console(tmp_path, num_global_steps=1, name="t", out=RichConsole(file=out, force_terminal=True, width=140)) as console:
        write_progress(tmp_path, Progress(phase="base model", global_step=0, detail="step 20 of 20"))
        console.remark("1 of 2 servers answer")
        console.refresh()
    assert "t: base model step 20 of 20: done" in plain_text(last_frame(out)) and "servers" not in last_frame(out)


def test_the_last_frame_of_a_failed_run_says_what_it_was_doing(tmp_path: Path) -> None:
    out = io.StringIO()
    with (
        pytest.raises(RuntimeError),
        Console(tmp_path, num_global_steps=1, name="t", out=RichConsole(file=out, force_terminal=True, width=140)),
    ):
        write_progress(tmp_path, Progress(phase="update", global_step=1))
        raise RuntimeError
    assert "ended while: update" in last_frame(out)


def test_a_long_phase_is_named_with_its_time_and_the_place_of_the_logs(tmp_path: Path) -> None:
    old = {"phase": "starting servers and ranks", "global_step": 0, "detail": "", "updated_at": time.time() - 132}
    (tmp_path / "progress.json").write_text(json.dumps(old))
    out = io.StringIO()
    with Console(tmp_path, num_global_steps=1, name="t", out=RichConsole(file=out, force_terminal=True, width=300)) as console:
        console.refresh()
    assert "starting servers and ranks since 2:12; logs are in" in out.getvalue()


def test_a_terminal_breaks_lines_between_words(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(tmp_path, num_global_steps=1, name="t", out=RichConsole(file=out, force_terminal=True, width=20))
    console.log("responses sampled, trained, dropped")
    assert [line.strip() for line in out.getvalue().splitlines()] == ["responses sampled,", "trained, dropped"]


def test_the_tail_waits_for_complete_lines_and_notices_a_rewritten_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(tmp_path)
    assert tail.new_lines() == []
    path.write_text('{"global_step": 0}\n{"global_step": 1')
    assert tail.new_lines() == [{"global_step": 0}]
    path.write_text('{"global_step": 0}\n{"global_step": 1}\n')
    assert tail.new_lines() == [{"global_step": 1}]
    path.write_text('{"global_step": 0}\n')
    assert tail.new_lines() == [{"global_step": 0}]
