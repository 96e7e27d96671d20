"""A throw-away Slurm cluster on this one machine: munged, slurmctld and N slurmd, real programs with fake GPUs.

Needs root and Debian's packages slurmctld, slurmd, slurm-client, munge and iproute2; neither systemd nor cgroups nor a database.

Two kinds. With `namespaces` every node has a network, a host name and a port space of its own, so jobs on several nodes behave as on
several machines; its own name means 127.0.1.1 there, as on Debian. Without, nodes are ports on 127.0.1.x: cheap enough for 64 of them, and
enough for `sbatch --test-only`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "ip", "nsenter", "unshare")
_RUNNING_STATES = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"}
_CONTROLLER_ADDRESS = "10.77.0.254"
_CONTROLLER_PORT = 16817
_START_TIMEOUT_S = 300.0  # 64 daemons on a busy machine
# An /etc/hosts of its own, seen by this process alone; then its host name, where it has one; then the program, under the same pid.
_ENTER = 'mount --make-rprivate /; mount --bind "$1" /etc/hosts; [ -z "$2" ] || hostname "$2"; shift 2; exec "$@"'


def missing_requirement() -> str | None:
    """Why no cluster can be started here; None when one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return None if os.geteuid() == 0 else "not root"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What `scontrol show job` says."""

    job_id: int
    state: str
    exit_code: int
    restarts: int
    fields: Mapping[str, str]

    @property
    def ended(self) -> bool:
        return self.state not in _RUNNING_STATES


class SlurmCluster:
    """Start with `with SlurmCluster(folder, ...) as cluster`; leaving ends every process it started, jobs included.

    root: an absolute folder of at most 60 characters (the munge socket lies in it).
    """

    def __init__(self, root: Path, *, num_nodes: int, gpus_per_node: int, namespaces: bool = True, grace_s: int = 60) -> None:
        self.root = root
        self.num_nodes = num_nodes
        self.gpus_per_node = gpus_per_node
        self.namespaces = namespaces
        self.grace_s = grace_s
        self._prefix = f"mp{os.getpid()}"  # of the network namespaces
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._munged: int | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> SlurmCluster:
        try:
            self._write_files()
            if self.namespaces:
                self._make_networks()
            self._start_munge()
            self._spawn("slurmctld", self._namespace("ctl"), "login", ["slurmctld", "-D"])
            for index in range(self.num_nodes):
                self.start_node(index)
            self._wait_until_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End all jobs and daemons, and remove the networks."""
        if "slurmctld" in self._processes:
            self.client("scancel", "--me")
            with contextlib.suppress(TimeoutError):
                self.until(lambda: not self.client("squeue", "--noheader").stdout.strip(), "jobs to end", timeout_s=60)
        for process in reversed(self._processes.values()):
            process.terminate()
        deadline = time.monotonic() + 10
        for process in self._processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            process.kill()
            process.wait()
        self._processes.clear()
        if self._munged is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._munged, signal.SIGTERM)
            self._munged = None
        if self.namespaces:
            for name in ("ctl", *map(str, range(self.num_nodes))):
                self._kill_in_namespace(name)
                subprocess.run(["ip", "netns", "del", f"{self._prefix}-{name}"], capture_output=True)

    # -- nodes --------------------------------------------------------------------------------------------------------

    def node_name(self, index: int) -> str:
        return f"n{index}"

    def start_node(self, index: int) -> None:
        """Start (again) the daemon of one node."""
        name = self.node_name(index)
        (self.root / "spool" / name).mkdir(parents=True, exist_ok=True)
        self._spawn(f"slurmd-{index}", self._namespace(str(index)), name, ["slurmd", "-D", "-N", name])

    def set_node_down(self, index: int) -> None:
        """The node vanishes in mid-step: its daemon and everything that runs on it are killed, and Slurm is told at once."""
        self._kill_in_namespace(str(index))
        self._processes.pop(f"slurmd-{index}").wait()
        self.run("scontrol", "update", f"NodeName={self.node_name(index)}", "State=DOWN", "Reason=test")

    def bring_node_back(self, index: int) -> None:
        """The node comes back, idle."""
        self.start_node(index)
        self.client("scontrol", "update", f"NodeName={self.node_name(index)}", "State=RESUME")
        self._wait_until_idle()

    def pids_on(self, index: int) -> list[int]:
        """Every process on a node (namespaces only)."""
        found = subprocess.run(["ip", "netns", "pids", f"{self._prefix}-{index}"], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def command(self, *arguments: str) -> list[str]:
        """A client command as it must be started to reach the controller."""
        return [*self._namespace("ctl"), *arguments]

    def client(
        self, *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """A client command (sbatch, scontrol, squeue ...), however it ends."""
        return subprocess.run(
            self.command(*arguments),
            cwd=cwd,
            env={**os.environ, **(environment or {}), "SLURM_CONF": str(self.root / "slurm.conf")},
            capture_output=True,
            text=True,
            timeout=300,
        )

    def run(self, *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Output of a client command. Raises RuntimeError with its last words when it fails."""
        done = self.client(*arguments, cwd=cwd, environment=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments[:3])}: exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None) -> int:
        """sbatch; the job's number."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd, environment=environment).split(";")[0])

    def job(self, job_id: int) -> Job:
        """One job (of an array: its first record)."""
        return self.jobs(job_id)[0]

    def jobs(self, job_id: int) -> list[Job]:
        """All records of a job number: one, or an array's tasks."""
        lines = self.run("scontrol", "show", "job", "-o", str(job_id)).splitlines()
        found = []
        for line in lines:
            fields = dict(re.findall(r"(\w+)=(\S*)", line))
            exit_code = int(fields["ExitCode"].split(":")[0])
            found.append(Job(job_id=job_id, state=fields["JobState"], exit_code=exit_code, restarts=int(fields["Restarts"]), fields=fields))
        return found

    def wait(self, job_id: int, *, timeout_s: float) -> Job:
        """The job's record once it (an array: all of it) has ended. Raises TimeoutError with the queue."""
        self.until(lambda: all(job.ended for job in self.jobs(job_id)), f"job {job_id} to end", timeout_s=timeout_s)
        return self.job(job_id)

    def until(self, condition: Callable[[], object], what: str, *, timeout_s: float) -> None:
        """Poll. Raises TimeoutError saying what did not happen."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                queue = self.client("squeue").stdout + self.client("sinfo").stdout
                raise TimeoutError(f"waited {timeout_s:.0f} s for {what}\n{queue}")
            time.sleep(0.2)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _namespace(self, name: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self._prefix}-{name}"] if self.namespaces else []

    def _kill_in_namespace(self, name: str) -> None:
        """Until nothing is left: what is being forked now is found next time."""
        for _ in range(50):
            found = subprocess.run(["ip", "netns", "pids", f"{self._prefix}-{name}"], capture_output=True, text=True)
            pids = [int(pid) for pid in found.stdout.split()]
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def _spawn(self, name: str, prefix: Sequence[str], host: str, command: Sequence[str]) -> None:
        unshare = ["unshare", "--mount", "--uts"] if self.namespaces else ["unshare", "--mount"]
        host = host if self.namespaces else ""
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*prefix, *unshare, "bash", "-ec", _ENTER, "_", str(self.root / f"hosts-{host}"), host, *command],
                env={**os.environ, "SLURM_CONF": str(self.root / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _start_munge(self) -> None:
        key, run = self.root / "munge.key", self.root / "run"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
        subprocess.run(
            ["munged", "--force", f"--key-file={key}", *(f"--{option}={run / name}" for option, name in files.items())],
            check=True,
            capture_output=True,
            env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"},
        )
        self._munged = int((run / "munged.pid").read_text())

    def _make_networks(self) -> None:
        """One bridge in the controller's namespace, one cable from it to each node's. This machine's own network is not touched."""

        def ip(*arguments: str, inside: str | None = None) -> None:
            where = ["-n", f"{self._prefix}-{inside}"] if inside is not None else []
            subprocess.run(["ip", *where, *arguments], check=True, capture_output=True)

        ip("netns", "add", f"{self._prefix}-ctl")
        for line in ("link add br0 type bridge", f"addr add {_CONTROLLER_ADDRESS}/16 dev br0", "link set br0 up", "link set lo up"):
            ip(*line.split(), inside="ctl")
        for index in range(self.num_nodes):
            node = str(index)
            ip("netns", "add", f"{self._prefix}-{node}")
            ip(*f"link add v{node} type veth peer name eth0 netns {self._prefix}-{node}".split(), inside="ctl")
            ip(*f"link set v{node} master br0 up".split(), inside="ctl")
            for line in (f"addr add {self._address(index)}/16 dev eth0", "link set eth0 up", "link set lo up"):
                ip(*line.split(), inside=node)

    def _address(self, index: int) -> str:
        return f"10.77.1.{index + 1}" if self.namespaces else f"127.0.1.{index + 1}"

    def _write_files(self) -> None:
        for name in ("log", "run", "state", "spool", "dev"):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)
        for index in range(self.gpus_per_node):  # Slurm wants one character device for each GPU
            (self.root / "dev" / f"nvidia{index}").symlink_to("/dev/null")
        host = "login" if self.namespaces else os.uname().nodename
        address = _CONTROLLER_ADDRESS if self.namespaces else "127.0.0.1"
        names = [self.node_name(index) for index in range(self.num_nodes)]
        addresses = {host: address} | {name: self._address(index) for index, name in enumerate(names)}
        for reader in ("", host, *names):  # "": of daemons without a host name of their own
            lines = [f"{'127.0.1.1' if name == reader != host else where} {name}\n" for name, where in addresses.items()]
            (self.root / f"hosts-{reader}").write_text("".join(["127.0.0.1 localhost\n", *lines]))
        nodes = "".join(
            f"NodeName={name} NodeHostname={name if self.namespaces else host} NodeAddr={self._address(index)} "
            f"Port={16818 if self.namespaces else 16830 + index}\n"
            for index, name in enumerate(names)
        )
        numbers = {"gpus": self.gpus_per_node, "grace_s": self.grace_s, "port": _CONTROLLER_PORT}
        (self.root / "slurm.conf").write_text(_SLURM_CONF.format(root=self.root, host=host, address=address, nodes=nodes, **numbers))
        gres = f"AutoDetect=off\nName=gpu Type=h100 File={self.root}/dev/nvidia[0-{self.gpus_per_node - 1}]\n"
        (self.root / "gres.conf").write_text(gres)
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def _wait_until_idle(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        arguments = ("sinfo", "--noheader", "--Node", "--partition=gpu", "--states=idle", "--format=%N")
        while len(self.client(*arguments).stdout.split()) != self.num_nodes:
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "".join(path.read_text(errors="replace")[-1500:] for path in (self.root / "log").iterdir())
                raise RuntimeError(f"the cluster did not come up ({', '.join(dead) or 'nodes are not idle'})\n{logs}")
            time.sleep(0.3)


# SchedulerParameters: nothing waits for more jobs to come, nor for the next look at the queue.
# config_overrides: believe the CPUs and memory written here, whatever this machine has. cred_expire: how long a requeued job waits before
# it may start again. preempt_send_user_signal: a preempted job gets the signal it asked for, then GraceTime.
_SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=5
MinJobAge=86400
ReturnToService=2
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName=DEFAULT Sockets=2 CoresPerSocket=96 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:h100:{gpus} State=UNKNOWN
{nodes}PartitionName=DEFAULT Nodes=ALL MaxTime=7-0 DefaultTime=10 State=UP OverSubscribe=NO
PartitionName=gpu Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""
