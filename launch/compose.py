"""From overrides to a typed job: Hydra composes, OmegaConf types, and a mistake becomes one message that names its key.

Each override is judged alone before Hydra sees it, so that the message can name what the user typed.
"""

import difflib
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from octofold.backends.errors import ConfigError, UserError, unknown_name_error
from octofold.launch.config import JobConfig
from octofold.launch.run_folder import CONFIG_ERRORS, config_node, schema_node

CONFIG_NAME = "config"
T = TypeVar("T")


@contextmanager
def hydra_session() -> Iterator[Any]:
    """Hydra with our schema and groups; it only composes, so it makes no folder and no log."""
    ConfigStore.instance().store("schema", schema_node(JobConfig))
    with hydra.initialize_config_module("octofold.configs", version_base="1.3", job_name="octofold"):
        yield GlobalHydra.instance().hydra


def compose(texts: Sequence[str], config_dirs: Sequence[str] = ()) -> JobConfig:
    """The job that `key=value` and `group=option` overrides describe, on top of configs/config.yaml.

    Args:
        texts: overrides in Hydra's grammar.
        config_dirs: folders searched for further options of the groups, such as experiment/mine.yaml.

    Raises:
        UserError: an override, or a file in `config_dirs`, that cannot be honoured.
    """
    overrides = parse(texts)
    search = search_path(config_dirs)
    with hydra_session() as session:
        groups = _group_options(session.config_loader, search, {override.key_or_group for override in overrides})
        for override in overrides:
            _check_override(override, groups)
        with _errors_explained():
            node = hydra.compose(CONFIG_NAME, [*texts, *search])
            return typed(node)


def expand(texts: Sequence[str], config_dirs: Sequence[str] = ()) -> list[list[str]]:
    """The jobs of a sweep, as Hydra's basic sweeper lists them: each a list of overrides without a sweep.

    Raises:
        UserError: an override that is not in Hydra's grammar, or a sweep without end (`interval`).
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parse(texts)
    with hydra_session() as session, _errors_explained():
        # With the loader the grammar's glob(...) can look options up.
        overrides = OverridesParser.create(session.config_loader).parse_overrides(list(texts))
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return jobs


def apply(base: T, overrides: Sequence[Override]) -> T:
    """A frozen dataclass instance with value overrides applied, typed as in `compose`; group options are refused.

    Raises:
        ConfigError: an unknown key, a value of another type, or a group's option.
    """
    node = config_node(base)
    sections = [*_sections(type(base)), *(["experiment"] if isinstance(base, JobConfig) else [])]
    for override in overrides:
        if override.key_or_group in sections:
            rule = "only single values can be set here: the groups were chosen when the run began"
            example = next((k for k in keys_of(type(base)) if k.startswith(f"{override.key_or_group}.")), "train.steps")
            raise ConfigError(override.key_or_group, _shown(override), rule, f"single values, such as {example}=VALUE")
        _check_value(override, type(base), [])
        OmegaConf.update(node, override.key_or_group, override.value())
    with _errors_explained():
        return typed(node)


def typed(node: DictConfig) -> Any:
    """The frozen dataclass instance behind a typed node, interpolations resolved."""
    return OmegaConf.to_object(node)


def parse(texts: Sequence[str]) -> list[Override]:
    """Overrides in Hydra's grammar.

    Raises:
        UserError: a text that is no override.
    """
    parser = OverridesParser.create()
    overrides = []
    for text in texts:
        try:
            overrides.append(parser.parse_override(text))
        except HydraException as error:
            raise _syntax_error(text, error) from error
    return overrides


def keys_of(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass schema with its type."""
    keys: dict[str, Any] = {}
    for name, kind in get_type_hints(schema).items():
        keys |= keys_of(kind, f"{prefix}{name}.") if is_dataclass(kind) else {f"{prefix}{name}": kind}  # type: ignore[arg-type]
    return keys


def _sections(schema: type) -> list[str]:
    hints = get_type_hints(schema)
    return [field.name for field in fields(schema) if is_dataclass(hints[field.name])]


def search_path(config_dirs: Sequence[str]) -> list[str]:
    """The override that has Hydra look for group options in further folders; none without folders.

    Raises:
        ConfigError: a folder does not exist.
    """
    folders = [Path(folder).expanduser().absolute() for folder in config_dirs]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("--config-dir", str(folder), "the folder does not exist", "an existing folder")
    urls = ["'" + f"file://{folder}".replace("'", r"\'") + "'" for folder in folders]
    return [f"hydra.searchpath=[{','.join(urls)}]"] if urls else []


def _group_options(loader: Any, search: list[str], wanted: set[str]) -> dict[str, list[str]]:
    """All groups, with the options of those that are wanted: listing them takes 25 ms a group."""

    def options(group: str) -> list[str]:
        return loader.get_group_options(group, ObjectType.CONFIG, CONFIG_NAME, search) if group in wanted else []

    return {group: options(group) for group in loader.list_groups("") if group != "hydra"}


def _check_override(override: Override, groups: dict[str, list[str]]) -> None:
    key = override.key_or_group
    if re.match(r"hydra[./]", key):
        raise ConfigError(key, _shown(override), "Hydra's own settings have no effect here", "leave it out")
    if override.is_sweep_override():
        rule = "several values make several jobs"
        raise ConfigError(key, _shown(override), rule, f"add --multirun, or quote a text: {_quoted(_shown(override))}")
    if key not in groups:
        _check_value(override, JobConfig, list(groups))
        return
    if override.is_add() or override.package:
        raise ConfigError(key, _shown(override), f"the group {key} is there already", f"{key}={_value(override)}")
    value = override.value()
    for option in value if isinstance(value, list) else [value]:
        if isinstance(option, dict):
            example = next(k for k in keys_of(JobConfig) if k.startswith(f"{key}."))
            rule = f"{key} is a group, whose options are: {', '.join(groups[key])}"
            raise ConfigError(key, _shown(override), rule, f"{key}={groups[key][0]}, or single values: {example}=VALUE")
        # An option in a subfolder is Hydra's to find.
        if option is not None and not override.is_delete() and "/" not in str(option) and option not in groups[key]:
            raise unknown_name_error(key, str(option), groups[key])


def _check_value(override: Override, schema: type, groups: list[str]) -> None:
    """Raise ConfigError unless the override sets a key of the schema to a value of its type."""
    key, keys = override.key_or_group, keys_of(schema)
    if key not in keys:
        near = nearest(key, [*keys, *groups] if "." not in key else list(keys))
        remedy = f"{near}={_value(override)}" if near else _key_overview(keys)
        raise ConfigError(key, _shown(override), f"there is no key {key}", remedy)
    if override.is_delete():
        rule = "every key has a value; none can be removed"
        raise UserError(f"{_shown(override)}\n  rule:   {rule}\n  remedy: {key}=VALUE")
    if override.is_add() and not override.is_force_add():
        raise ConfigError(key, _shown(override), f"the key {key} is there already", f"{key}={_value(override)}")
    value = override.value()
    if isinstance(value, str) and "${" in value:
        return  # Known only when everything is composed.
    node = _trial_node(schema)
    default = OmegaConf.select(node, key)
    if OmegaConf.is_config(default):
        default = OmegaConf.to_container(default)
    example = f"{key}={'null' if default is None else str(default).lower()}"
    if value == "???":
        raise ConfigError(key, _shown(override), f"a value is missing; {key} is {_described(keys[key])}", example)
    try:
        OmegaConf.update(node, key, value)
    except OmegaConfBaseException as error:
        raise ConfigError(key, _shown(override), f"{key} is {_described(keys[key])}", example) from error
    finally:
        OmegaConf.update(node, key, default, merge=False)
    if isinstance(value, float) and value != value:
        raise ConfigError(key, _shown(override), f"{key} is {_described(keys[key])}; nan is none", example)


@cache
def _trial_node(schema: type) -> DictConfig:
    """The node on which values are tried and taken back: making one takes 40 ms, and 200 overrides may come."""
    return schema_node(schema)


def _described(kind: Any) -> str:
    if get_origin(kind) is list:
        return "a list such as [a,b]"
    if get_origin(kind) is dict:
        return "a mapping such as {a:1,b:2}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return " or ".join(words[part] for part in get_args(kind) or (kind,))


def nearest(key: str, known: Sequence[str]) -> str | None:
    """The known key most like one that does not exist; the last part counts by itself too, so `lr` finds `optim.lr`."""

    def likeness(candidate: str) -> float:
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(difflib.SequenceMatcher(None, key, candidate).ratio(), 0.99 * last)

    best = max(known, key=lambda candidate: (likeness(candidate), -len(candidate)))
    return best if likeness(best) >= 0.65 else None


def _key_overview(keys: dict[str, Any]) -> str:
    starts = sorted({f"{key.partition('.')[0]}." if "." in key else key for key in keys})
    return f"keys start with one of: {' '.join(starts)}; --cfg job shows all"


def _shown(override: Override) -> str:
    return override.input_line or ""


def _value(override: Override) -> str:
    return "VALUE" if override.is_delete() else override.get_value_element_as_str()


def literal_override(key: str, value: str) -> str:
    """The override that gives a key a text as it is, whatever Hydra's grammar or OmegaConf would make of it."""
    # OmegaConf sees ${ as an interpolation, unless a backslash stands before it, and halves those before that.
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    # In Hydra's quotes a backslash counts only before a quote, or at the end.
    value = re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ("\\" if found[2] else "") + found[2], value)
    return f'{key}="{value}"'


def _quoted(text: str) -> str:
    key, _, value = text.partition("=")
    escaped = value.replace('"', r"\"")
    return shlex.quote(f'{key}="{escaped}"')


def _syntax_error(text: str, error: HydraException) -> UserError:
    if "=" not in text:
        near = nearest(text, list(keys_of(JobConfig)))
        rule, remedy = (
            "an override is written key=value",
            f"{near or 'experiment'}={'VALUE' if near else text or 'NAME'}",
        )
    else:
        reason = next(line for line in str(error).splitlines() if not line.startswith("Error parsing"))
        rule = f"it does not follow Hydra's grammar ({reason})"
        remedy = f"quote the value for Hydra, then for the shell: {_quoted(text)}"
    return UserError(f"{text or chr(39) * 2}\n  rule:   {rule}\n  remedy: {remedy}")


@contextmanager
def _errors_explained() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise while they compose into a UserError with the nearest key as remedy."""
    try:
        yield
    except (HydraException, *CONFIG_ERRORS) as error:
        text = "\n".join(filter(None, [str(error), str(error.__cause__ or "")]))
        lines = [line.strip() for line in text.partition("Config search path")[0].splitlines() if line.strip()]
        found = re.search(r"full_key: (\S+)", text)
        near = nearest(found[1], keys := list(keys_of(JobConfig))) if found else None
        remedy = f"{found[1]}=VALUE" if found and found[1] in keys else f"write {near}" if near else "mend that place"
        reasons = [line for line in lines if not re.match(r"(full_key|reference_type|object_type)\b", line)]
        rule = " ".join(reasons) or type(error).__name__
        head = found[1] if found else "the configuration"
        raise UserError(f"{head} cannot be composed\n  rule:   {rule}\n  remedy: {remedy}") from error
