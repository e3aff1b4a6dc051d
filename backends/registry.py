"""Backends by name. Dotted names, imported on use."""

from importlib import import_module

from octofold.backends.base import Backend
from octofold.backends.errors import ConfigError, unknown_name_error

BACKENDS = {
    "cuda": "octofold.backends.cuda:CudaBackend",
    "cpu": "octofold.backends.cpu:CpuBackend",
}
"""In the order `auto` tries them."""


def load(name: str) -> Backend:
    """The backend of that name, available or not.

    Raises:
        ConfigError: no backend has the name.
    """
    if name not in BACKENDS:
        raise unknown_name_error("backend.name", name, ["auto", *BACKENDS])
    module, attribute = BACKENDS[name].split(":")
    backend: Backend = getattr(import_module(module), attribute)()
    return backend


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
