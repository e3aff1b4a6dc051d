"""The `octofold` command: finds the verb, and ends every user's mistake with one message and exit status 2.

It imports nothing heavy, so that help comes at once; each verb imports what it needs.
"""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from octofold.backends.errors import UserError
from octofold.launch.usage import (
    DOCTOR_USAGE,
    EXPORT_USAGE,
    IMPORT_USAGE,
    INSPECT_USAGE,
    LAUNCH_USAGE,
    RANK_TABLE_USAGE,
    REPORT_USAGE,
    SAMPLE_USAGE,
    STATUS_USAGE,
    TRACE_USAGE,
    TRAIN_USAGE,
    USAGE,
    VERIFY_SUBJECTS,
    verify_usage,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit status.

    0: fine; 1: the run failed; 2: the user's mistake, told on stderr; 128 + signal: interrupted. `verify` has more.

    Args:
        argv: what follows `octofold`; None: the process's own arguments.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"octofold: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _run(argv: list[str]) -> int:
    if not argv:
        print(USAGE, end="", file=sys.stderr)
        return 2
    verb, rest = argv[0], argv[1:]
    if verb in ("--help", "-h"):
        print(USAGE, end="")
    elif verb == "--version":
        from importlib.metadata import version

        print(f"octofold {version('octofold')}")
    elif verb in ("-sc", "--shell-completion"):
        from octofold.launch.completion import complete

        complete(rest[0] if rest else "", list(VERBS))
    elif verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        remedy = f"octofold {near[0]}" if near else "octofold --help"
        raise UserError(f"{verb}\n  rule:   the verb is one of: {', '.join(VERBS)}\n  remedy: {remedy}")
    elif {"--help", "-h"} & set(rest):
        print(verify_usage(rest[0]) if verb == "verify" and rest[0] in VERIFY_SUBJECTS else VERBS[verb][1], end="")
    else:
        if verb != "doctor":
            # Backends import torch's extensions by themselves, and say what is wrong: torch_npu without CANN ends
            # `import torch`, whatever the verb. The doctor looks at what the user's own programs would find.
            os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        if verb in WITHOUT_JOB:
            from octofold.launch.software_npu import enter_if_named

            rest = enter_if_named(rest)
        return VERBS[verb][0](rest)
    return 0


def _sample(argv: list[str]) -> int:
    if len(argv) < 2:
        raise UserError("sample\n  rule:   it takes a run and a prompt\n  remedy: octofold sample RUN 'PROMPT'")
    from octofold.launch.sample import run

    print(run(argv[0], argv[1], argv[2:]))
    return 0


def _inspect(argv: list[str]) -> int:
    from octofold.launch.inspect import inspect

    return inspect(argv)


def _report(argv: list[str]) -> int:
    if len(argv) != 1:
        raise UserError("report\n  rule:   it takes one run\n  remedy: octofold report RUN")
    from pathlib import Path

    from octofold.launch.report import report

    for path in report(Path(argv[0]).expanduser().absolute()):
        print(path)
    return 0


def _import(argv: list[str]) -> int:
    if not argv or "=" in argv[0]:
        raise UserError("import\n  rule:   it takes a folder, then key=value\n  remedy: octofold import FOLDER")
    from octofold.launch.hf import import_checkpoint

    print(import_checkpoint(argv[0], argv[1:]))
    return 0


def _export(argv: list[str]) -> int:
    if not argv or "=" in argv[0]:
        raise UserError("export\n  rule:   it takes a run, then export.key=value\n  remedy: octofold export RUN")
    from octofold.launch.hf import export_run

    print(export_run(argv[0], argv[1:]))
    return 0


def _verify(argv: list[str]) -> int:
    from octofold.launch.verify import run

    return run(argv)


def _doctor(argv: list[str]) -> int:
    from octofold.launch.doctor import run

    return run(argv)


def _rank_table(argv: list[str]) -> int:
    from octofold.launch.rank_table import run

    return run(argv)


def _trace(argv: list[str]) -> int:
    from octofold.launch.trace import run

    return run(argv)


def _launch(argv: list[str]) -> int:
    from octofold.launch.submit import run

    return run(argv)


def _status(argv: list[str]) -> int:
    from octofold.launch.status import run

    return run(argv)


def _train(argv: list[str]) -> int:
    from octofold.launch.train import run

    return run(argv)


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, TRAIN_USAGE),
    "launch": (_launch, LAUNCH_USAGE),
    "sample": (_sample, SAMPLE_USAGE),
    "status": (_status, STATUS_USAGE),
    "report": (_report, REPORT_USAGE),
    "inspect": (_inspect, INSPECT_USAGE),
    "trace": (_trace, TRACE_USAGE),
    "verify": (_verify, verify_usage(*VERIFY_SUBJECTS)),
    "import": (_import, IMPORT_USAGE),
    "export": (_export, EXPORT_USAGE),
    "doctor": (_doctor, DOCTOR_USAGE),
    "rank-table": (_rank_table, RANK_TABLE_USAGE),
}
WITHOUT_JOB = ("sample", "status", "report", "inspect", "export", "doctor", "rank-table")
"""Verbs that take no keys of a job, but for those that ask for the software NPU."""


if __name__ == "__main__":
    sys.exit(main())
