"""Numbers in words, each rule at its edges."""

import math
from collections.abc import Callable

import pytest

from bam_merge.text import (
    bound,
    cosine_text,
    count,
    drift_percent,
    fixed,
    human_bytes,
    in_percent,
    listed,
    multiple,
    number,
    percent,
    share_percent,
    short,
    span,
    thousandths,
    times,
    whole_percent,
)


@pytest.mark.parametrize(("text", "value", "expected"), [
    (human_bytes, 999, "999 bytes"), (human_bytes, 1000, "1 kB"), (human_bytes, 1234567, "1.23 MB"), (human_bytes, 5e15, "5000 TB"),
    (number, 9_999_999_999, "9,999,999,999"), (number, 671_100_000_000, "671.1 G"), (number, 10**15, "1 P"), (number, 1234.5, "1,234"),
    (bound, 1000, "1,000"), (bound, 0.5, "0.5"),
    (short, None, "-"), (short, math.inf, ">1.8e308"), (short, 0.12345, "0.123"),
    (in_percent, 0.00283, "0.283%"), (in_percent, 12.3, "1.23e+03%"),
    (percent, None, "-"), (percent, 0.00283, "0.283%"), (percent, 9.99, "999%"), (percent, 9.995, "9.99 x"), (percent, math.inf, ">1.8e+308 x"),
    (drift_percent, None, "an unknown share"), (drift_percent, 0.0, "<4.9e-322%"), (drift_percent, math.inf, ">1.8e310%"),
    (drift_percent, 0.5, "50%"),
    (share_percent, 0.9994, "99.9%"), (share_percent, 0.9999, ">99.9%"), (share_percent, 1.0, "100%"),
    (whole_percent, 0.0, "0%"), (whole_percent, -1e-12, "0%"), (whole_percent, 0.004, "<1%"), (whole_percent, 0.5, "50%"),
    (whole_percent, 0.999, ">99%"), (whole_percent, 1.0, "100%"),
    (thousandths, None, "-"), (thousandths, 0.2834, ".283"), (thousandths, -0.5, "-.500"), (thousandths, 1.0, "1.000"),
    (cosine_text, None, "-"), (cosine_text, 0.99996, ">0.9999"), (cosine_text, 1.0, "1.0000"), (cosine_text, -0.5, "-0.5000"),
    (multiple, 1.1, "1.1"), (multiple, math.inf, "more than 1.8e308"),
    (times, 0.0123, "0.012"), (times, 0.5, "0.50"), (times, 9.99, "9.99"), (times, 123.4, "123"),
])  # fmt: skip
def test_a_number_in_words(text: Callable[[float | None], str], value: float | None, expected: str) -> None:
    assert text(value) == expected


def test_digits_after_the_point() -> None:
    assert [fixed(value, 2) for value in (None, -0.001, 1.414, math.inf)] == ["0.00", "0.00", "1.41", ">1.8e308"]
    assert fixed(0.99951, 3) == "1.000"


def test_an_estimate_of_a_cosine_is_never_one() -> None:
    assert [cosine_text(value, estimate=True) for value in (0.9999, 0.99991, 1.0)] == ["0.9999", ">0.9999", ">0.9999"]


def test_ends_of_a_range() -> None:
    assert span([]) == span([None]) == "-"
    assert span([0.3, None, 0.02]) == "0.02 to 0.3" and span([1.0, 1.0001]) == "1"
    assert span([0.5, 0.25], in_percent) == "25% to 50%"


def test_things_in_numbers_and_lists() -> None:
    assert (count(1, "file"), count(2000, "file")) == ("1 file", "2,000 files")
    assert (count(1, "entry", "entries"), count(0, "entry", "entries")) == ("1 entry", "0 entries")
    assert [listed(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
