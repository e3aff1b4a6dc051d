"""Architectures by name. Dotted names, imported on use."""

from octofold.backends.dotted import is_dotted, load_dotted
from octofold.backends.errors import ConfigError, unknown_name_error
from octofold.train.models.decoder import Decoder

ARCHITECTURES = {"deepseek": "octofold.train.models.decoder:Decoder"}


def load_architecture(name: str) -> type[Decoder]:
    """The class of that name, or a user's own as package.module:Class.

    Raises:
        ConfigError: there is none, or it is no decoder.
    """
    if name not in ARCHITECTURES and not is_dotted(name):
        raise unknown_name_error("model.architecture", name, list(ARCHITECTURES))
    architecture = load_dotted(ARCHITECTURES.get(name, name), "model.architecture")
    if not (isinstance(architecture, type) and issubclass(architecture, Decoder)):
        rule = "an architecture is a class derived from octofold.train.models.decoder.Decoder"
        raise ConfigError("model.architecture", name, rule, "model.architecture=deepseek")
    return architecture
