"""docs/layouts.md is what its generator writes, and every two degrees that the rules allow are proved together."""

import pytest
from layouts_page import DEGREES, PAGE, REFUSED, page, refusal


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "python tests/layouts_page.py"


def test_every_pair_is_proved_or_refused():
    rows = [line for line in page().splitlines() if line.startswith(tuple(f"| `{name}` | " for name in DEGREES))]
    assert sum("proved" in row for row in rows) >= 5
    assert not [row for row in rows if "not proved" in row]


@pytest.mark.parametrize("text", REFUSED)
def test_a_refusal_names_rule_and_remedy(text):
    error = refusal(text)
    assert error is not None
    assert error.rule
    assert error.remedy
