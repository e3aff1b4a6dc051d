"""`backend.software=true`: the command starts again with the stand-ins for CANN, before torch is imported."""

import os
import sys
from collections.abc import Sequence

from octofold.backends.config import BackendConfig
from octofold.backends.software_npu.activate import environment, is_active
from octofold.backends.software_npu.build import build

WORDS = ("backend=ascend", "backend.software=true")
"""What asks for it on a command line."""


def enter_if_named(argv: Sequence[str]) -> list[str]:
    """For verbs that compose no job: enter if the arguments ask for it; the arguments without that.

    Raises:
        UserError: see `enter_if_asked`.
    """
    if WORDS[1] not in argv:
        return list(argv)
    enter_if_asked(BackendConfig(name="ascend", software=True))
    return [text for text in argv if text not in WORDS]


def enter_if_asked(config: BackendConfig) -> None:
    """Replace this process by itself on the software NPU, unless it is there or nobody asked. Its ranks inherit that.

    Raises:
        UserError: the software NPU cannot be built here.
    """
    if not config.software or is_active():
        return
    variables = environment(build(), os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **variables})
