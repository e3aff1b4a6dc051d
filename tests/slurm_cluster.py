"""A real Slurm on this machine: munge, a controller and four node daemons, as processes of a temporary folder.

It needs root, and Debian's slurmctld, slurmd, slurm-client and munge (22.05). What had to be found out:

* `slurmd -N n2` makes many nodes of one host where every NodeName has the same NodeHostname and a port of its own.
* Nobody but the configuration knows the names n1 to n4; jobs connect to them. So the node daemons see an /etc/hosts
  of their own, in a mount namespace, and jobs inherit it. The machine's own file stays as it is.
* A requeued job waits for as long as credentials are valid, 120 s by default; hence cred_expire (5 is
  the least; `scontrol update JobId=N StartTime=now` helps, too).
* Step daemons and tasks leave the process tree of their slurmd. SLURM_CONF is in their environments, and by that
  (with SLURMD_NODENAME: by node) they are found in /proc and killed.
* ReturnToService=2 brings a node back once its daemon registers again. slurmctld notices a dead daemon after
  SlurmdTimeout, when it next pings: as late as a third of that time after.
* Without accounting there is no `sacct`; a finished job is known to `scontrol show job` for MinJobAge.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv", "unshare")
NODES = {"n1": 2, "n2": 2, "n3": 2, "n4": 1}
"""Each with its CPUs. The partition `uneven` mixes them."""
START_S = 30.0
"""Until all nodes are idle; one second, usually."""
CONFIGURATION = """\
ClusterName=octofold
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=6
KillWait=30
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=main Nodes=n[1-3] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n[1-3] MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF
PartitionName=uneven Nodes=n[3-4] MaxTime=INFINITE PriorityTier=1 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can run here; None where it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    return f"not installed: {', '.join(absent)}" if absent else None


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class SlurmCluster:
    """Its nodes and partitions are those above; see `running`."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: new, and short: a socket lies in it.
        """
        self.folder = folder
        self.environ = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environ if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            if name != "SLURM_CONF":
                del self.environ[name]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def run(self, *command: str, **options: object) -> str:
        """Stdout of a Slurm command that ends well."""
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, timeout=60, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}\n{self.logs()}"
        return str(done.stdout)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells of a job, such as JobState, Restarts, NodeList."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, condition: Callable[[dict[str, str]], bool], within_s: float) -> dict[str, str]:
        """Until the job is as wanted; returns what is told of it then."""
        end_s = time.monotonic() + within_s
        while not condition(told := self.job(number)):
            assert time.monotonic() < end_s, f"after {within_s:g} s: {told}\n{self.logs()}"
            time.sleep(0.2)
        return told

    def logs(self) -> str:
        """The ends of the daemons' logs, for messages."""
        return "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))

    def start(self) -> None:
        """Start everything, and wait until all nodes are idle."""
        self.folder.chmod(0o700)
        (self.folder / "state").mkdir()
        (self.folder / "plugstack.conf").touch()
        hosts = "".join(f"127.0.0.1 {node}\n" for node in NODES)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        controller_port, *ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000"
            for (node, cpus), port in zip(NODES.items(), ports, strict=True)
        )
        text = CONFIGURATION.format(host=host, controller_port=controller_port, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        munge = {"key-file": key, "socket": self.folder / "munge.sock", "pid-file": self.folder / "munge.pid"}
        munge |= {"log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        _until(lambda: (self.folder / "munge.sock").exists(), "munged makes its socket")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        _until(self.idle, "nodes are idle")

    def idle(self) -> bool:
        """Whether every node waits for work."""
        return set(self.run("sinfo", "-h", "-o", "%T").split()) == {"idle"}

    def start_node(self, node: str) -> None:
        """Start a node's daemon."""
        mounted = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
        command = (
            "unshare",
            "--mount",
            "sh",
            "-c",
            mounted,
            "sh",
            str(self.folder / "hosts"),
            "slurmd",
            "-D",
            "-N",
            node,
        )
        self._daemon(*command, SLURMD_NODENAME=node)

    def _daemon(self, *command: str, **environ: str) -> None:
        # Whatever ends the tests ends the daemons, too.
        command = ("setpriv", "--pdeathsig", "KILL", *command)
        with (self.folder / "daemons.log").open("ab") as output:
            environment = self.environ | environ
            daemon = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self._daemons.append(daemon)

    def kill_node(self, node: str) -> None:
        """Kill everything that runs on a node, as a loss of power does."""
        for pid in self._processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_task(self, node: str, number: str) -> None:
        """Kill what srun has started of a job on a node, as the kernel does where memory is out."""
        for pid in self._processes(node, f"SLURM_JOB_ID={number}", "SLURM_STEP_ID=0"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self, node: str | None = None, *variables: str) -> list[int]:
        """Processes of this Slurm, its jobs' too; those of one node, and with these variables."""
        wanted = [f"SLURM_CONF={self.environ['SLURM_CONF']}".encode(), *(text.encode() for text in variables)]
        wanted += [] if node is None else [f"SLURMD_NODENAME={node}".encode()]
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    if set(wanted) <= set((entry / "environ").read_bytes().split(b"\0")):
                        found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """Kill everything."""
        for _ in range(20):
            if not (pids := self._processes()):
                break
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for daemon in self._daemons:
            daemon.wait()


def _until(condition: Callable[[], bool], what: str) -> None:
    end_s = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < end_s, f"not within {START_S:g} s: {what}"
        time.sleep(0.1)


def _free_ports(n: int) -> Sequence[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@contextmanager
def running(folder: Path) -> Iterator[SlurmCluster]:
    """A cluster while the context lasts."""
    cluster = SlurmCluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
