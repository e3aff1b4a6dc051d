"""Which run owns a place of checkpoints, agreed by all its ranks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from octofold.backends.errors import ConfigError
from octofold.train.checkpoint.claim import claimed
from octofold.train.checkpoint.storage import Ranks
from octofold.train.checkpoint.validity import checkpoints_of, step_folders
from octofold.train.config import CheckpointConfig


@contextmanager
def owned(run_dir: Path, config: CheckpointConfig, *, begins: bool) -> Iterator[None]:
    """The place of a run's checkpoints, for this run alone until the context ends. Collective.

    Args:
        begins: the run does not continue from what is there; then `checkpoint.dir` must hold none of another run.

    Raises:
        UserError: another run owns the place, it cannot be written, or it holds another run's checkpoints.
    """
    checkpoints = checkpoints_of(run_dir, config.dir)
    with ExitStack() as held:

        def take() -> None:
            held.enter_context(claimed(checkpoints))
            if config.dir and begins and (there := step_folders(checkpoints)):
                rule = f"a run that begins needs a place without checkpoints; there is step_{max(there)}"
                raise ConfigError("checkpoint.dir", config.dir, rule, "another place, or resume=RUN")

        Ranks(None).first(take)
        yield
