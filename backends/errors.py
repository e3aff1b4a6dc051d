"""Errors for the person at the keyboard: they name the offender, the rule and the remedy, and need no traceback."""

import math


class UserError(ValueError):
    """Something the user can mend: a config value, a file, the environment. The command line prints it and exits 2."""

    status = 2
    """Exit status. 1 where the same may go well later, so that starting again is worth it."""


class ConfigError(UserError):
    """A configuration value, or a combination of values, that cannot work."""

    def __init__(self, key: str, value: object, rule: str, remedy: str) -> None:
        """
        Args:
            key: the offending key or keys, such as ``parallel.expert``.
            value: the value found, or a text that gives all values involved.
            rule: what must hold.
            remedy: what to write instead.
        """
        self.key, self.value, self.rule, self.remedy = key, value, rule, remedy
        shown = value if isinstance(value, str) and "=" in value else f"{key}={value}"
        super().__init__(f"{shown}\n  rule:   {rule}\n  remedy: {remedy}")


def check_finite(key: str, value: float, *, least: float) -> None:
    """Raise `ConfigError` unless `value` is a finite number of at least `least`."""
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(key, value, f"a finite number, at least {least:g}", f"{key}={max(least, 1.0):g}")


def unknown_name_error(key: str, value: str, known: list[str]) -> ConfigError:
    """A ConfigError for a value outside a closed set, suggesting the nearest member."""
    import difflib

    near = difflib.get_close_matches(value, known, n=1)
    hint = f"{key}={near[0]}" if near else f"one of: {', '.join(known)}"
    return ConfigError(key, value, f"{key} is one of: {', '.join(known)}", hint)
