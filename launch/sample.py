"""`octofold sample RUN PROMPT`: what the user may set, and the run it reads. Torch-free until the text is made."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from octofold.backends.errors import ConfigError, UserError
from octofold.backends.software_npu.activate import is_active


@dataclass(frozen=True)
class SampleConfig:
    """The `sample` keys."""

    tokens: int = 200
    """Tokens to generate after the prompt."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 50
    """Only the k likeliest tokens are drawn from; 0 draws from all."""
    seed: int = 0


@dataclass(frozen=True)
class SampleJob:
    """The root of the `sample` keys, so that they are written sample.tokens=200."""

    sample: SampleConfig = field(default_factory=SampleConfig)


def check(sample: SampleConfig) -> None:
    """Raise `ConfigError` for settings nothing can be drawn with."""
    if sample.tokens < 1:
        raise ConfigError("sample.tokens", sample.tokens, "at least one token", "sample.tokens=200")
    if not 0 <= sample.temperature < float("inf"):
        raise ConfigError("sample.temperature", sample.temperature, "finite and not negative", "sample.temperature=0.8")
    if sample.top_k < 0:
        raise ConfigError("sample.top_k", sample.top_k, "a number of tokens; 0 means all", "sample.top_k=50")


def run(run_name: str, prompt: str, overrides: list[str]) -> str:
    """The text that a run's newest checkpoint writes after the prompt.

    Raises:
        UserError: a wrong key or value, a folder without a run, or a run without a checkpoint.
    """
    from octofold.launch.compose import apply, parse
    from octofold.launch.run_folder import read_config, saved_checkpoints
    from octofold.launch.software_npu import enter_if_asked

    settings = apply(SampleJob(), parse(overrides)).sample
    check(settings)
    run_dir = Path(run_name).expanduser().absolute()
    config = read_config(run_dir)
    if not saved_checkpoints(run_dir, config.checkpoint.dir):
        rule = "  rule:   a sample is drawn from a checkpoint (checkpoints/step_N)"
        raise UserError(f"{run_dir} holds no checkpoint\n{rule}\n  remedy: train on with resume={run_name}")
    enter_if_asked(config.backend)
    if is_active():
        # The run may have been trained elsewhere.
        config = replace(config, backend=replace(config.backend, name="ascend", software=True))
    from octofold.train.sampling import sample

    return sample(
        config,
        run_dir,
        prompt,
        tokens=settings.tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        seed=settings.seed,
    )
