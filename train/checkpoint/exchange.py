"""Two folders change places in one step, which Python has no function for."""

import ctypes
import errno
import os
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
"""What a kernel, or a file system such as NFS, says that cannot exchange."""


def exchange(a: Path, b: Path) -> None:
    """After it each is what the other was. Where the file system cannot, b is away for a moment.

    Raises:
        OSError: they could not be renamed.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if hasattr(library, "renameat2"):
        done = library.renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)
        if done == 0:
            return
        if (code := ctypes.get_errno()) not in UNABLE:
            raise OSError(code, os.strerror(code), str(a), None, str(b))
    aside = b.with_name(f".{b.name}.removed")
    b.rename(aside)
    a.rename(b)
    aside.rename(a)
