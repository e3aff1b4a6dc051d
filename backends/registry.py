"""Backends by name. Dotted names, imported on use."""

from octofold.backends.base import Backend
from octofold.backends.dotted import is_dotted, load_dotted
from octofold.backends.errors import ConfigError, unknown_name_error

BACKENDS = {
    "ascend": "octofold.backends.ascend:AscendBackend",
    "cuda": "octofold.backends.cuda:CudaBackend",
    "cpu": "octofold.backends.cpu:CpuBackend",
}
"""In the order `auto` tries them."""


def load(name: str) -> Backend:
    """The backend of that name (or a user's own, as package.module:Class), available or not.

    Raises:
        ConfigError: no backend has the name.
    """
    if name not in BACKENDS and not is_dotted(name):
        raise unknown_name_error("backend.name", name, ["auto", *BACKENDS])
    backend = load_dotted(BACKENDS.get(name, name), "backend.name")
    if not (isinstance(backend, type) and issubclass(backend, Backend)):
        raise ConfigError(
            "backend.name", name, "a backend is a class derived from octofold.backends.base.Backend", "auto"
        )
    return backend()


def resolve(name: str) -> Backend:
    """The backend to run on: the named one, or the first available for `auto`.

    Raises:
        ConfigError: a named backend that cannot run here, with the reason.
    """
    if name == "auto":
        return next(backend for backend in map(load, BACKENDS) if backend.why_unavailable() is None)
    backend = load(name)
    if reason := backend.why_unavailable():
        raise ConfigError("backend.name", name, f"the named backend must be able to run here: {reason}", "backend=auto")
    return backend
