"""`octofold verify SUBJECT`: which subjects there are, and their keys beside those of `octofold train`. Torch-free."""

import argparse
import os
from dataclasses import dataclass, field
from typing import Any, NoReturn

from octofold.backends.errors import ConfigError, UserError, unknown_name_error

SUBJECTS = ["layout", "precision", "resume"]
LAYOUT_PRECISIONS = ["fp64", "fp32", "fp8"]


@dataclass(frozen=True)
class VerifyConfig:
    """The `verify` keys."""

    steps: int | None = None
    """Steps of each run, and what the learning rate's schedule goes by; null: train.steps, layout: 3, resume: 6."""
    smoothing: float = 0.9
    """precision: weight of the past in the exponential moving average of the losses; 0 does not smooth."""
    bar: float = 0.0025
    """precision: relative error of the smoothed loss that FP8 may have; DeepSeek-V3's is 0.25%."""
    seeds: int = 1
    """The proof is repeated from train.seed, the next, and so on."""
    precision: str = "fp64"
    """layout: fp64 (the proof), fp32 (a smoke test), or fp8 (is the recipe's error that of one rank?)."""
    ranks: int = 8
    """layout, resume: the most ranks on this machine; larger degrees are halved, none that is above 1 below 2."""
    twin: bool = True
    """resume: the job in small; false: its own model, data and batch, on CPU ranks."""
    resume_parallel: dict[str, Any] = field(default_factory=dict)
    """resume: a layout that the run is continued on besides its own, such as {tensor:2,expert:2}; all else is 1."""


@dataclass(frozen=True)
class VerifyJob:
    """The root of the `verify` keys, so that they are written verify.seeds=3."""

    verify: VerifyConfig = field(default_factory=VerifyConfig)


def check(verify: VerifyConfig) -> None:
    """Raise `ConfigError` for settings that nothing can be verified with."""
    if verify.steps is not None and verify.steps < 1:
        raise ConfigError("verify.steps", verify.steps, "at least one step", "verify.steps=600")
    if not 0 <= verify.smoothing <= 0.999:
        rule = "the weight of the past, from 0 to 0.999"
        raise ConfigError("verify.smoothing", verify.smoothing, rule, "verify.smoothing=0.9")
    if not 0 < verify.bar < 1:
        raise ConfigError("verify.bar", verify.bar, "a relative error between 0 and 1", "verify.bar=0.0025")
    if verify.seeds < 1:
        raise ConfigError("verify.seeds", verify.seeds, "at least one seed", "verify.seeds=1")
    _check_layout(verify)


def _check_layout(verify: VerifyConfig) -> None:
    if verify.ranks < 2:
        raise ConfigError("verify.ranks", verify.ranks, "a layout spans at least two ranks", "verify.ranks=8")
    if verify.precision not in LAYOUT_PRECISIONS:
        raise unknown_name_error("verify.precision", verify.precision, LAYOUT_PRECISIONS)


def run(argv: list[str]) -> int:
    """Do what the arguments of `octofold verify` ask; returns the exit status: 0 yes, 1 no, 3 inconclusive.

    Raises:
        UserError: arguments or a configuration that cannot be honoured.
    """
    from octofold.launch.compose import apply, parse
    from octofold.launch.local import join

    if not argv or argv[0] not in SUBJECTS:
        rule = f"what is verified is one of: {', '.join(SUBJECTS)}"
        remedy = "octofold verify layout parallel.expert=2"
        raise UserError(f"verify {argv[0] if argv else ''}\n  rule:   {rule}\n  remedy: {remedy}")
    if join(dict(os.environ)):
        rule = "a verification starts its own ranks, and a launcher has made this process one already"
        raise UserError(f"verify {argv[0]}\n  rule:   {rule}\n  remedy: start it once, with launch.nproc_per_node=N")
    options = _parser().parse_intermixed_args(argv[1:])
    is_ours = [override.key_or_group.split(".")[0] == "verify" for override in parse(options.overrides)]
    ours = [text for text, chosen in zip(options.overrides, is_ours, strict=True) if chosen]
    others = [text for text, chosen in zip(options.overrides, is_ours, strict=True) if not chosen]
    settings = apply(VerifyJob(), parse(ours)).verify
    check(settings)
    if argv[0] == "layout":
        from octofold.launch.verify_layout import verify_layout

        return verify_layout(settings, others, options.config_dir)
    if argv[0] == "resume":
        from octofold.launch.verify_resume import verify_resume

        return verify_resume(settings, others, options.config_dir)
    from octofold.launch.verify_precision import verify_precision

    return verify_precision(settings, others, options.config_dir)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\n  rule:   key=value overrides and --config-dir\n  remedy: octofold verify --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="octofold verify", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    return parser
