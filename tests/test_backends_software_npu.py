"""What the software NPU is told by the environment and on the command line, before anything is built."""

from pathlib import Path

import pytest

from octofold.backends.errors import UserError
from octofold.backends.software_npu.activate import environment
from octofold.launch import software_npu


def told(**settings: str) -> dict[str, str]:
    """The variables that C++ reads, by their names without the prefix."""
    given = {f"SOFTWARE_NPU_{name}": text for name, text in settings.items()}
    return {k.removeprefix("SOFTWARE_NPU_"): v for k, v in environment(Path("libraries"), given).items()}


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("", "0"), ("0", "0"), ("false", "0"), ("False", "0"), ("1", "1"), ("true", "1"), ("TRUE", "1")],
)
def test_python_and_cpp_read_the_same_switch(text, canonical):
    found = told(ASYNC=text)
    assert found["ASYNC"] == canonical
    assert found.get("TASK_QUEUE_ENABLE") == (None if canonical == "1" else "0")


def test_what_is_empty_or_not_set_is_as_documented():
    for found in (told(), told(DEVICES="", MEMORY_MB="", DELAY_US=" ", SEED="")):
        assert [found[name] for name in ("DEVICES", "ASYNC", "DELAY_US", "SEED")] == ["8", "0", "0", "0"]
        assert int(found["MEMORY_MB"]) > 0
    assert told(DEVICES="03", MEMORY_MB=" 64 ")["DEVICES"] == "3"
    assert told(MEMORY_MB=" 64 ")["MEMORY_MB"] == "64"


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("DEVICES", "0", "a whole number from 1 to "),
        ("DEVICES", "two", "a whole number from 1 to "),
        ("MEMORY_MB", "4gb", "a whole number from 1 to "),
        ("MEMORY_MB", "0", "a whole number from 1 to "),
        ("DELAY_US", "-1", "a whole number from 0 to "),
        ("SEED", "1.5", "a whole number from 0 to "),
        ("ASYNC", "maybe", "1 [(]true[)] or 0 [(]false[)]"),
    ],
)
def test_other_values_are_refused(name, text, rule):
    with pytest.raises(
        UserError, match=rf"(?s)SOFTWARE_NPU_{name}={text}\n.*rule: +{rule}.*remedy: SOFTWARE_NPU_{name}="
    ):
        told(**{name: text})


@pytest.mark.parametrize(
    ("words", "left"),
    [
        (["backend=ascend", "backend.software=true", "--json"], ["--json"]),
        (["a", "backend.software=True"], ["a"]),
        (["backend.software=1", "backend=ascend"], []),
        (["backend.software=false", "backend.software=TRUE"], []),
        (["backend.software=false"], None),
        (["backend.software=true", "backend.software=False"], None),
        (["--json", "runs"], None),
    ],
)
def test_words_that_ask_for_it_are_read_as_hydra_reads_them(words, left, monkeypatch):
    asked = []
    monkeypatch.setattr(software_npu, "enter_if_asked", asked.append)
    assert software_npu.enter_if_named(words) == (words if left is None else left)
    assert len(asked) == (left is not None)


@pytest.mark.parametrize("word", ["backend.software=maybe", "backend.software=[", "backend.software=3.5"])
def test_another_value_is_refused(word):
    with pytest.raises(UserError, match=r"(?s)backend.software=.*remedy: backend.software=true"):
        software_npu.enter_if_named([word])
