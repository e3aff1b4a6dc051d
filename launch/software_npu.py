"""`backend.software=true`: the command starts again with the stand-ins for CANN, before torch is imported."""

import os
import sys
from collections.abc import Sequence

from octofold.backends.config import BackendConfig
from octofold.backends.errors import UserError
from octofold.backends.software_npu.activate import environment, is_active
from octofold.backends.software_npu.build import build
from octofold.backends.software_npu.settings import canonical

KEY = "backend.software"
BACKEND = "backend=ascend"
"""What may stand beside it on a command line."""


def enter_if_named(argv: Sequence[str]) -> list[str]:
    """For verbs that compose no job: enter if the arguments ask for it; the arguments without that.

    Raises:
        UserError: see `enter_if_asked`; or the key is given something that is neither true nor false.
    """
    words = [text for text in argv if text.startswith(f"{KEY}=")]
    if not words or not _is_true(words[-1]):
        return list(argv)
    enter_if_asked(BackendConfig(name="ascend", software=True))
    return [text for text in argv if text != BACKEND and text not in words]


def _is_true(word: str) -> bool:
    """What the verbs that compose a job would make of KEY=…."""
    # Here, since the doctor looks at this file where nothing is installed.
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import BooleanNode, ValidationError

    try:
        return bool(BooleanNode(OverridesParser.create().parse_override(word).value(), is_optional=False)._value())
    except (HydraException, ValidationError):
        rule = "true or false"
        raise UserError(f"{word}\n  rule:   {rule}\n  remedy: {KEY}=true, or leave it out") from None


def enter_if_asked(config: BackendConfig) -> None:
    """Replace this process by itself on the software NPU, unless it is there or nobody asked. Its ranks inherit that.

    Raises:
        UserError: the software NPU cannot be built here, or the environment tells it what cannot be.
    """
    if not config.software or is_active():
        return
    # Before a build that takes a minute.
    canonical(os.environ)
    variables = environment(build(), os.environ)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **variables})
