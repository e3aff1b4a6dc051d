"""The batch script of a job: #SBATCH lines, which Slurm reads, and the rest, which bash reads. Both are quoted here."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD = """\
told=
step=
# Slurm's warning before the time limit (--signal). The agents hear of it from srun, save and end.
trap 'told=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1
# scancel tells the agents, too: wait for them to save.
trap : TERM
"""
BODY = """\
srun {srun} "${{command[@]}}" &
step=$!
[ -z "$told" ] || kill -USR1 "$step"
# A signal ends `wait`, not srun.
while wait "$step"; status=$?; kill -0 "$step" 2>/dev/null; do :; done
"""
REQUEUE = """\
# Back into the queue after a warning or a preemption, unless the user has to mend something (2), or Slurm is ending
# the job by itself. A job that was done by then finds so, and ends.
id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
id=${id:-$SLURM_JOB_ID}
case $(squeue --noheader --jobs="$id" --Format=PreemptTime:40) in [0-9]*) told=yes ;; esac
if [ -n "$told" ] && [ "$status" != 2 ] && [ "$(squeue --noheader --jobs="$id" --format=%T)" = RUNNING ]; then
  echo "octofold: job $id waits in the queue again, to go on from its newest checkpoint" >&2
  scontrol requeue "$id" || { echo "octofold: Slurm refuses; submit the job again" >&2; status=1; }
fi
"""


@dataclass(frozen=True)
class Script:
    """What one batch script runs."""

    directives: Mapping[str, str | None]
    """Options of sbatch; None: without a value."""
    srun: Sequence[str]
    """Options of srun."""
    commands: Sequence[Sequence[str]]
    """What each node runs, as argv. Several: one for each task of an array."""
    setup: str | None
    requeue: bool


def text(script: Script) -> str:
    """The script, ready for sbatch."""
    lines = ["#!/bin/bash", *(directive(name, value) for name, value in script.directives.items()), ""]
    lines += ["# Written by `octofold launch`. One agent a node starts the node's ranks.", "", HEAD.rstrip()]
    if script.setup is not None:
        lines += [f". {shlex.quote(str(Path(script.setup).expanduser().absolute()))} || exit 2"]
    lines += _command(script.commands)
    lines.append(BODY.format(srun=shlex.join(script.srun)) + (REQUEUE if script.requeue else "") + 'exit "$status"')
    return "\n".join(lines) + "\n"


def _command(commands: Sequence[Sequence[str]]) -> list[str]:
    if len(commands) == 1:
        return [f"command=({shlex.join(commands[0])})"]
    cases = [f"  {task}) command=({shlex.join(command)}) ;;" for task, command in enumerate(commands)]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]


def directive(name: str, value: str | None) -> str:
    r"""One #SBATCH line.

    sbatch splits it by rules of its own, which no shell sees: in double quotes only \" and \\ mean something else, and
    the line's end ends the value. Values must hold no line break (`check_text`).
    """
    if value is None:
        return f"#SBATCH --{name}"
    escaped = value.replace("\\", r"\\").replace('"', r"\"")
    return f'#SBATCH --{name}="{escaped}"'


def output_pattern(folder: str, name: str) -> str:
    """`--output`: a file in `folder`, where `name` may hold Slurm's %j, %A and %a and the folder's own % are kept."""
    return f"{folder.replace('%', '%%')}/{name}"
