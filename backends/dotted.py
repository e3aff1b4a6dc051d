"""Dotted names: how registries, and a user's own parts, are named and imported on use."""

from importlib import import_module

from octofold.backends.errors import ConfigError


def is_dotted(name: str) -> bool:
    """Whether `name` has the form package.module:attribute."""
    return ":" in name


def load_dotted(name: str, key: str) -> object:
    """The attribute that `package.module:attribute` names.

    Args:
        key: the configuration key that holds the name, for the error.

    Raises:
        ConfigError: the module cannot be found, or has no such attribute.
    """
    module_name, _, attribute = name.partition(":")
    remedy = f"{key}=package.module:attribute, installed or on PYTHONPATH"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(key, name, f"no module named {error.name}", remedy) from None
    if not hasattr(module, attribute):
        raise ConfigError(key, name, f"{module_name} has no {attribute}", remedy)
    return getattr(module, attribute)
