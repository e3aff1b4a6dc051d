"""Tab completion: Hydra's own shell functions and queries, with the verb in front of the overrides."""

import contextlib
import io
import os
from collections.abc import Sequence

SHELLS = ("bash", "fish", "zsh")


def complete(request: str, verbs: Sequence[str]) -> None:
    """Answer `-sc install=SHELL`, `uninstall=SHELL` and `query=SHELL`, the protocol of Hydra's shell functions.

    Args:
        request: such as "query=bash"; a query reads the line typed so far from COMP_LINE (and COMP_POINT).
        verbs: what may follow `octofold`.

    Raises:
        UserError: a request of another form.
    """
    from octofold.backends.errors import UserError

    action, _, shell = request.partition("=")
    if action not in ("install", "uninstall", "query") or shell not in SHELLS:
        remedy = f'eval "$(octofold -sc install=SHELL)" with one of: {", ".join(SHELLS)}'
        raise UserError(f"-sc {request}\n  rule:   install, uninstall or query, and a shell\n  remedy: {remedy}")
    if action != "query":
        print(_hydra_says(request), end="")
        return
    line = os.environ.get("COMP_LINE", "")
    line = line[: int(os.environ.get("COMP_POINT") or len(line))]
    program, *words = line.split(maxsplit=2)
    verb = words[0] if words else ""
    if len(words) < 2 and not line.endswith(" "):
        print("\n".join(name for name in verbs if name.startswith(verb)) if line != program else "")
    elif not words:
        print("\n".join(verbs))
    elif verb == "train":
        *before, word = line.split(" ")
        # Hydra splits the line at every space; what stands in quotes would not parse.
        plain = [text for text in before[2:] if "=" in text and not {"'", '"'} & set(text)]
        os.environ["COMP_LINE"] = " ".join(["octofold", *plain, word])
        # Hydra's own settings cannot be changed here.
        print("\n".join(choice for choice in _hydra_says(request).split() if not choice.startswith("hydra")))


def _hydra_says(request: str) -> str:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from octofold.launch.compose import CONFIG_NAME, hydra_session

    said = io.StringIO()
    # A half-typed line need not parse; the shell then has nothing to offer, and no place to show a message.
    ignored = contextlib.suppress(HydraException, OmegaConfBaseException)
    with ignored, contextlib.redirect_stdout(said), hydra_session() as session:
        session.shell_completion(CONFIG_NAME, [request])
    return said.getvalue()
