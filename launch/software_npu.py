"""`backend.software=true`: the command starts again with the stand-ins for CANN, before torch is imported."""

import os
import sys

from octofold.backends.config import BackendConfig
from octofold.backends.software_npu.activate import environment, is_active
from octofold.backends.software_npu.build import build


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
