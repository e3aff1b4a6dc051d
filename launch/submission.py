"""What `octofold launch` hands to an engine: files, commands and the variables set, to be shown or carried out."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octofold.backends.errors import ConfigError

HERE = (sys.executable, "-P", "-m", "octofold.launch.cli")
"""The `octofold` of this interpreter, whatever PATH says."""


@dataclass(frozen=True)
class Setting:
    """A variable that a launcher sets for the ranks."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Submission:
    """A job as its engine takes it."""

    files: dict[str, str]
    """Name inside RUN_DIR/launch -> text, which ends in a newline."""
    commands: tuple[tuple[str, ...], ...]
    """Arguments of what is run here, one after the other; files by absolute paths."""
    settings: tuple[Setting, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines for the user."""

    def shown(self, folder: Path) -> str:
        """All of it, as text for the console.

        Args:
            folder: where the files are to lie.
        """
        parts = [f"# {_on_a_line(str(folder / name))}\n{text}" for name, text in self.files.items()]
        if self.settings:
            told = [(f"{setting.name}={_on_a_line(setting.value)}", setting.why) for setting in self.settings]
            width = max(len(shown) for shown, _ in told)
            lines = [f"#   {shown:{width}}  {why}" for shown, why in told]
            parts.append("\n".join(["# set for the ranks, where the user has not", *lines, ""]))
        parts.append("".join(f"{shlex.join(command)}\n" for command in self.commands))
        parts += [f"# {_on_a_line(note)}\n" for note in self.notes]
        return "\n".join(part for part in parts if part)

    def write(self, folder: Path) -> None:
        """Write the files.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in self.files.items():
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            rule = f"what is submitted is kept there: {error.strerror}"
            raise ConfigError("run_dir", str(folder), rule, "free space, permissions, or another run_dir") from error


def _on_a_line(text: str) -> str:
    """A text that ends no comment."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def node_command(program: Sequence[str], overrides: Sequence[str], added: Sequence[str]) -> list[str]:
    """The command of one node: the agent of its ranks.

    Args:
        program: that is `octofold` there.
        overrides: the user's, as typed, flags such as --config-dir included.
        added: further ones, which come later and so count.
    """
    return [*program, "train", *overrides, *added, "launch.name=torchrun", "launch.dry_run=false"]


def run_commands(commands: Sequence[Sequence[str]]) -> int:
    """Run them until one fails; returns its exit status, or 0.

    Raises:
        ConfigError: a program is not here.
    """
    for command in commands:
        try:
            status = subprocess.run(list(command), check=False).returncode
        except FileNotFoundError as error:
            rule = "the engine's own tools submit the job"
            raise ConfigError("launch", command[0], rule, "install it here, or take launch.dry_run=true") from error
        if status:
            return status
    return 0
