"""docs/layouts.md is what its generator writes: pairs of degrees are proved, and every rule that refuses has a line."""

import pytest
from layout_refusals import ELSEWHERE, ON_RANKS, REFUSED, VERIFY_REFUSED, broken_rule, refusal, rules
from layouts_page import DEGREES, PAGE, page

LISTED = [*REFUSED, *VERIFY_REFUSED]


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "python tests/layouts_page.py"


def test_every_pair_is_proved_or_refused():
    rows = [line for line in page().splitlines() if line.startswith(tuple(f"| `{name}` | " for name in DEGREES))]
    assert sum("proved" in row for row in rows) >= 5
    assert not [row for row in rows if "not proved" in row]


@pytest.mark.parametrize("text", LISTED)
def test_a_refusal_names_rule_and_remedy(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refusal(text)
    assert error is not None
    assert error.rule
    assert error.remedy
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_every_rule_of_the_code_has_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    met = {broken_rule(error) for text in LISTED if (error := refusal(text)) is not None}
    missing = {rule for rule in rules() if rule not in met and rule.rpartition(":")[0] not in ON_RANKS}
    assert not missing, "a line in tests/layout_refusals.py, then python tests/layouts_page.py"


def test_exceptions_are_functions_that_refuse():
    functions = {rule.rpartition(":")[0] for rule in rules()}
    assert functions >= set(ON_RANKS)
    assert not functions & set(ELSEWHERE)
