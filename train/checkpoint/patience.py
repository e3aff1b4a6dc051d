"""Reading from disks and stores that fail for a moment: a few more tries before a failure counts. Torch-free."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WAITS_S = (0.5, 2.0, 8.0)
"""Before each further try."""
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What is not there. Waiting does not mend it."""


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, which may be called several times.

    Raises:
        OSError: it failed each time, or in a way that waiting does not mend.
    """
    for wait_s in WAITS_S:
        try:
            return read()
        except (*GONE, PermissionError):
            raise
        except OSError:
            time.sleep(wait_s)
    return read()
