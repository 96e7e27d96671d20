"""The processes of this node that try what the run will do: one for each GPU, in the environment of the node's role."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from megatron_minpro.cluster.installation import Installation, Role, probe_command
from megatron_minpro.cluster.nodes import stages
from megatron_minpro.cluster.nodes.membership import NodeRole
from rollout.exec_with_parent import with_parent
from rollout.trial.events import Event, Plan, Stage

_POLL_S = 0.05
_INSTALLED: dict[NodeRole, Role] = {"trainer": "trainer", "server": "servers"}


class NodeTrial:
    """Started at once; the members then compute, each on its device. Leaving it as a context manager ends them."""

    def __init__(self, *, python: Path, environment: Mapping[str, str], role: NodeRole, members: int, import_engine: bool) -> None:
        """
        Args:
            python: of the environment that the role's processes have.
            environment: their variables.
            role: trainer or server.
            members: how many; number i computes on device i.
            import_engine: see whether SGLang or TransformerEngine imports.
        """
        self._role = role
        self._members = members
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed on leaving
        self._lines: list[str] = []
        probe = probe_command(_INSTALLED[role], import_engine=import_engine)
        self._process = subprocess.Popen(
            with_parent([str(python), "-m", "rollout.trial.program", role, str(members), *probe]),
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the program, whose children are the members."""
        return self._process.pid

    def __enter__(self) -> NodeTrial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()  # its members end with it
        self._process.wait()
        self._errors.close()

    @property
    def installation(self) -> Installation | None:
        """What the environment says of itself; None until it does."""
        for line in self._lines:
            if line.startswith('{"description"'):
                values = json.loads(line)["description"]
                return Installation.from_json({"role": _INSTALLED[self._role], **values})
        return None

    def wait_for_devices(self, until: float) -> None:
        """Until every member has computed and the environment is described, the program has ended, or `until` (time.monotonic)."""
        self._wait(lambda: self.installation is not None and len(self._over("device")) == self._members, until)

    @property
    def devices(self) -> int:
        """CUDA devices of this node."""
        return max((event.devices for event in self._events()), default=0)

    def device_faults(self) -> list[str]:
        """Why members could not compute, or the program ended."""
        if self._process.poll() is not None and self.installation is None:
            return [self._end()]
        return self._faults({member: ["device"] for member in range(self._members)}, label=lambda member: f"GPU {member}")

    def take_part(self, plan: Plan, until: float) -> list[str]:
        """All stages of the plan. Why they failed, or were not done by `until`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(plan.to_line())
            self._process.stdin.flush()
        except BrokenPipeError:
            return [self._end()]
        self._wait(lambda: self._exit_code is not None, until)
        if self._process.poll() is not None:
            self._reader.join(max(0.0, min(1.0, until - time.monotonic())))
        kind = "rank" if self._role == "trainer" else "server GPU"
        wanted = {member: self._stages(plan, plan.first + member) for member in range(plan.members)}
        return self._faults(wanted, label=lambda member: f"{kind} {plan.first + member}")

    def _stages(self, plan: Plan, number: int) -> list[Stage]:
        if self._role == "server":
            return ["weight broadcast"]
        wanted: list[Stage] = ["sum over gloo"]
        if plan.backend == "nccl":
            wanted.append("sum over NCCL")
        if number == 0 and plan.receivers:
            wanted.append("weight broadcast")
        return wanted

    def _faults(self, wanted: Mapping[int, Sequence[Stage]], *, label: Callable[[int], str]) -> list[str]:
        ended = self._end() if self._exit_code not in (None, 0) else None
        return stages.faults(self._events(), wanted=wanted, label=label, program_ended=ended)

    def _events(self) -> list[Event]:
        return [event for line in list(self._lines) if (event := Event.from_line(line)) is not None]

    def _over(self, stage: Stage) -> set[int]:
        return {event.member for event in self._events() if event.stage == stage and event.state != "began"}

    def _end(self) -> str:
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        reason = (words or ["no message"])[-1][:300]
        return f"the Python of its {self._role} environment ended with exit code {self._exit_code}: {reason}"

    @property
    def _exit_code(self) -> int | None:
        """Of the program, which stays after its members have ended, and says how; None before."""
        over = next((line for line in list(self._lines) if line.startswith('{"over"')), None)
        return self._process.poll() if over is None else int(json.loads(over)["over"])

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)

    def _wait(self, done: Callable[[], bool], until: float) -> None:
        while not done() and self._process.poll() is None and time.monotonic() < until:
            time.sleep(_POLL_S)
