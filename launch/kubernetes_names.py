"""The texts that Kubernetes takes: names, labels, quantities, paths, and what its `$(VARIABLE)` does to arguments.

The rules are those of apimachinery's validation, which a server applies when a job is created; here they name the key
that the user typed. A text that Kubernetes would change on its way (YAML, `$(…)`) is written so that it arrives.
"""

import hashlib
import re

from octofold.backends.errors import ConfigError

LONGEST_NAME = 40
"""Of a job: its pods' names append -master-0 or -worker-99999, and a service's name has at most 63 characters."""
LABEL = r"[a-z]([a-z0-9-]*[a-z0-9])?"
"""DNS-1035, which services need: a name in it is a label of DNS-1123, too."""
NAME_1123 = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
SUBDOMAIN = rf"{NAME_1123}(\.{NAME_1123})*"
VALUE = r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?"
QUANTITY = r"\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?"
DIGEST = r"sha256:[0-9a-f]{64}"
COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
IMAGE = rf"(?:[A-Za-z0-9.-]+(?::\d+)?/)?{COMPONENT}(?:/{COMPONENT})*(?::\w[\w.-]{{0,127}})?(?:@{DIGEST})?"
RESERVED = ("app.kubernetes.io/name", "app.kubernetes.io/instance", "ring-controller.atlas")
RESERVED_PREFIXES = ("volcano.sh/", "training.kubeflow.org/")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
REPEATED = "letters, digits, '-', '_' and '.', at most 63"


def job_name(given: str | None, run_name: str) -> str:
    """The job's name: the given one, else one made of the run's.

    A name that had to be changed ends in some digits of a checksum, so that two runs do not become one job.
    """
    if given is not None:
        return given
    if re.fullmatch(LABEL, run_name) and len(run_name) <= LONGEST_NAME:
        return run_name
    words = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    short = words[: LONGEST_NAME - 11].strip("-")
    stem = short if short[:1].isalpha() else f"run-{short}".strip("-")
    return f"{stem}-{hashlib.sha256(run_name.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


def escaped(text: str) -> str:
    """An argument, or a variable's value, that arrives as it is: Kubernetes replaces $(NAME), and $$ by $."""
    return text.replace("$", "$$")


def check_label(key: str, text: str, longest: int = LONGEST_NAME) -> None:
    """Raise `ConfigError` for what is no name of a job, or no namespace."""
    pattern = LABEL if key == "name" else NAME_1123
    if not re.fullmatch(pattern, text) or len(text) > longest:
        first = ", a letter first" if key == "name" else ""
        rule = f"lower-case letters, digits and '-' between them{first}, at most {longest}"
        raise _error(key, text, rule, job_name(None, text))


def check_subdomain(key: str, text: str) -> None:
    """Raise `ConfigError` for what can name no object (RFC 1123)."""
    if not re.fullmatch(SUBDOMAIN, text) or len(text) > 253:
        raise _error(key, text, "lower-case letters, digits, '-' and '.' (RFC 1123)", job_name(None, text))


def check_qualified(key: str, text: str) -> None:
    """Raise `ConfigError` for what is no key of a label or annotation: [PREFIX/]NAME."""
    prefix, slash, name = text.rpartition("/")
    good = bool(name) and re.fullmatch(VALUE, name)
    if not good or (slash and (not re.fullmatch(SUBDOMAIN, prefix) or len(prefix) > 253)):
        raise _error(key, text, f"NAME or PREFIX/NAME: {REPEATED}; the prefix a domain", "such as example.com/team")


def check_label_value(key: str, text: str) -> None:
    """Raise `ConfigError` for what is no value of a label."""
    if not re.fullmatch(VALUE, text):
        raise _error(key, text, f"{REPEATED}, a letter or digit first and last", "another value, or an annotation")


def check_free_label(text: str) -> None:
    """Raise `ConfigError` for a label that Octofold or an operator sets."""
    if text in RESERVED or text.startswith(RESERVED_PREFIXES):
        raise _error("labels", text, "a label that Octofold or the operator sets itself", "another label")


def check_resource(key: str, text: str) -> None:
    """Raise `ConfigError` for what is no extended resource: DOMAIN/NAME."""
    if "/" not in text:
        raise _error(key, text, "DOMAIN/NAME, as the node's device plugin calls it", "nvidia.com/gpu")
    check_qualified(key, text)


def check_quantity(key: str, text: str) -> None:
    """Raise `ConfigError` for what is no amount of a resource."""
    if not re.fullmatch(QUANTITY, text, re.ASCII) or not re.search("[1-9]", text):
        raise _error(key, text, "a quantity of Kubernetes above zero", f"{key}=16" if key == "cpu" else f"{key}=64Gi")


def check_path(key: str, text: str) -> None:
    """Raise `ConfigError` for what is no absolute path in a pod."""
    check_text(key, text)
    # A mount path is written PATH:PATH by some runtimes, and .. is refused by Kubernetes.
    if not text.startswith("/") or ":" in text or ".." in text.split("/") or text.strip("/") == "":
        raise _error(key, text, "an absolute path below /, without ':' and '..'", "such as /runs")


def check_text(key: str, text: str) -> None:
    """Raise `ConfigError` for a text that no manifest can carry, or no process."""
    if "\0" in text:
        raise _error(key, text, "no argument or variable holds a NUL character", "leave it out")
    if not text.isascii() and any(0xD800 <= ord(character) <= 0xDFFF for character in text):
        raise _error(key, text, "a manifest is UTF-8", "a text that is")


def check_variable(key: str, text: str) -> None:
    """Raise `ConfigError` for what is no name of an environment variable."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text):
        raise _error(key, text, "names of variables are letters, digits and _", "another name")


def check_image(image: str, allow_tag: bool) -> None:
    """Raise `ConfigError` for what is no image, or one without a digest unless tags are allowed."""
    if not re.fullmatch(IMAGE, image, re.ASCII):
        raise _error("image", image, "REGISTRY/NAME@sha256:DIGEST", "docker buildx imagetools inspect NAME:TAG")
    if not re.search(rf"@{DIGEST}\Z", image) and not allow_tag:
        rule = "an image by its digest: a tag may name another one at the next start, or on the next node"
        remedy = "image=NAME@sha256:… (docker buildx imagetools inspect NAME:TAG), or launch.kubernetes.allow_tag=true"
        raise _error("image", image, rule, remedy)


def secret_reference(variable: str, text: str) -> tuple[str, str]:
    """Secret and key of SECRET/KEY.

    Raises:
        ConfigError: it is something else, which may be the secret itself and so is not shown.
    """
    secret, slash, key = text.partition("/")
    if not slash or not re.fullmatch(SUBDOMAIN, secret) or not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", key):
        rule = "SECRET/KEY: a reference, never the value, which is not shown here"
        raise ConfigError("launch.kubernetes.secrets", f"{variable}: …", rule, f"{{{variable}: my-secret/key}}")
    return secret, key


def toleration(text: str) -> dict[str, str]:
    """A toleration of the pods, from a taint as kubectl writes it.

    Raises:
        ConfigError: it is no taint.
    """
    rest, colon, effect = text.partition(":")
    key, equals, value = rest.partition("=")
    if colon and effect not in EFFECTS:
        raise _error("tolerations", text, f"KEY[=VALUE][:EFFECT], the effect one of {', '.join(EFFECTS)}", f"{rest}")
    check_qualified("tolerations", key)
    check_label_value("tolerations", value)
    bearing = {"key": key, "operator": "Equal", "value": value} if equals else {"key": key, "operator": "Exists"}
    return {**bearing, "effect": effect} if colon else bearing


def _error(key: str, text: str, rule: str, remedy: str) -> ConfigError:
    # On one line, however hostile: a newline in a message would make a second one.
    shown = text if text.isprintable() and text else ascii(text)
    return ConfigError(f"launch.kubernetes.{key}", f"{key}: {shown}" if "=" in shown else shown, rule, remedy)
