"""A decoder with which one rank comes to grief in one forward pass: for runs in processes of their own.

The environment variable FAULT says how, as JSON: `kind` (kill, stop, sleep, slow, fail), `rank`, `forward` (number,
from 1; of slow the first) and `attempt` (how often the ranks have been started before; null: in every one).
"""

import json
import os
import signal
import time
from typing import Any

from octofold.train.models.decoder import Decoder

NAME = "faulty_models:FaultyDecoder"
SLOW_S = 0.25


def fault(kind: str, *, rank: int, forward: int, attempt: int | None = 0) -> dict[str, str]:
    """The environment of a run with this fault."""
    text = json.dumps({"kind": kind, "rank": rank, "forward": forward, "attempt": attempt})
    return {"FAULT": text, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])}


class FaultyDecoder(Decoder):
    """Computes as `Decoder` does, until the fault."""

    forwards = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See `Decoder.forward`."""
        self.forwards += 1
        said = json.loads(os.environ.get("FAULT", "{}"))
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if said and said["rank"] == int(os.environ["RANK"]) and said["attempt"] in (None, attempt):
            if said["kind"] == "slow" and self.forwards >= said["forward"]:
                time.sleep(SLOW_S)
            elif self.forwards == said["forward"]:
                come_to_grief(said["kind"])
        return super().forward(*args, **kwargs)


def come_to_grief(kind: str) -> None:
    """What the fault does."""
    if kind == "sleep":
        while True:
            time.sleep(1)
    if kind == "fail":
        raise RuntimeError("the fault")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[kind])
