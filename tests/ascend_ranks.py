"""Processes on the software NPU, and what their functions returned. `python ascend_ranks.py MODULE:FUNCTION` is one.

Each process is a fresh interpreter, so that a test can choose the software NPU's environment.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch
import torch.distributed as dist

from octofold.backends.software_npu.activate import environment
from octofold.backends.software_npu.build import build

MARK = "RESULT "
GRACE_S = 20.0
"""After the first failure, for the others to notice it."""


@dataclass(frozen=True)
class Ran:
    """How a process ended."""

    status: int
    value: Any
    """What the function returned, as JSON gives it; None where it did not return."""
    errors: str
    """What the process wrote to stderr."""


def start(name: str, ranks: int = 1, timeout_s: float = 200.0, **settings: str) -> list[Ran]:
    """Call `module:function` on each of `ranks` processes and wait for all.

    Args:
        settings: of the software NPU, where MEMORY_MB="64" is SOFTWARE_NPU_MEMORY_MB=64; or HCCL's and RANK_TABLE_FILE,
            by full name.
    """
    # Here and not on rank 0: a port that is free now may be taken when a process gets to it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = ("HCCL_", "RANK_TABLE_FILE")
    named = {key if key.startswith(own) else f"SOFTWARE_NPU_{key}": value for key, value in settings.items()}
    given = {**os.environ, **named}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    given |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    given |= environment(build(), given)
    processes = []
    with ExitStack() as files:
        streams = [[files.enter_context(TemporaryFile("w+")) for _ in range(2)] for _ in range(ranks)]
        for rank, (output, errors) in enumerate(streams):
            place = {**given, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, __file__, name]
            processes.append(subprocess.Popen(command, env=place, stdout=output, stderr=errors))
        try:
            _wait(processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
        return [_ran(p.wait(), *map(_text, files)) for p, files in zip(processes, streams, strict=True)]


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Until all have ended; after one has failed, not for long."""
    deadline_s = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline_s:
        if any(process.poll() for process in processes):
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        time.sleep(0.05)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def values(name: str, ranks: int = 1, **settings: str) -> list[Any]:
    """What the function returned on each rank; fails where one did not return."""
    ran = start(name, ranks, **settings)
    assert all(one.status == 0 for one in ran), "\n".join(one.errors for one in ran)
    return [one.value for one in ran]


def _ran(status: int, output: str, errors: str) -> Ran:
    lines = [line for line in output.splitlines() if line.startswith(MARK)]
    return Ran(status, json.loads(lines[-1].removeprefix(MARK)) if lines else None, errors)


def main() -> None:
    """One process: the software NPU first, then the function."""
    from octofold.backends.software_npu.activate import activate

    activate()
    torch.set_num_threads(1)
    module, _, name = sys.argv[1].partition(":")
    print(MARK + json.dumps(getattr(import_module(module), name)()), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
