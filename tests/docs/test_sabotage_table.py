"""docs/explanation/verification.md lists every sabotage of the tests, with the checks that find it."""

import re
from pathlib import Path

from test_one_layer import FAULTS
from test_sabotage import SABOTAGE

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "verification.md"


def test_the_table_is_that_of_the_tests() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (quick|full) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    expected = {name: ", ".join(checks) for name, (_, checks) in SABOTAGE.items()}
    expected |= {f"in one layer of seven: {name}": ", ".join(checks) for name, (_, checks) in FAULTS.items()}
    expected["in one layer of seven: a rotary table of another theta"] = "expert isolation"
    assert {name: checks for name, checks, _ in rows} == expected
    assert len(rows) == len(expected)
    assert {level for _, _, level in rows} == {"quick"}  # both are run for each
