"""What the demo's sentences say is what is expected of them, and no held-out value is trained on."""

from __future__ import annotations

import datetime
import re
from random import Random

import pytest

from jobs.demo import texts


@pytest.mark.parametrize(
    ("number", "british", "american"),
    [
        (0, "zero", "zero"),
        (19, "nineteen", "nineteen"),
        (20, "twenty", "twenty"),
        (99, "ninety-nine", "ninety-nine"),
        (100, "one hundred", "one hundred"),
        (101, "one hundred and one", "one hundred one"),
        (342, "three hundred and forty-two", "three hundred forty-two"),
        (1000, "one thousand", "one thousand"),
        (1001, "one thousand and one", "one thousand one"),
        (9999, "nine thousand nine hundred and ninety-nine", "nine thousand nine hundred ninety-nine"),
        (12_050, "twelve thousand and fifty", "twelve thousand fifty"),
        (700_813, "seven hundred thousand eight hundred and thirteen", "seven hundred thousand eight hundred thirteen"),
    ],
)
def test_number_words(number: int, british: str, american: str) -> None:
    assert texts.number_words(number) == british
    assert texts.number_words(number, british=False) == american


@pytest.mark.parametrize(
    ("number", "digits", "words"),
    [
        (1, "1st", "first"),
        (2, "2nd", "second"),
        (3, "3rd", "third"),
        (4, "4th", "fourth"),
        (8, "8th", "eighth"),
        (11, "11th", "eleventh"),
        (12, "12th", "twelfth"),
        (13, "13th", "thirteenth"),
        (20, "20th", "twentieth"),
        (21, "21st", "twenty-first"),
        (22, "22nd", "twenty-second"),
        (30, "30th", "thirtieth"),
        (31, "31st", "thirty-first"),
    ],
)
def test_ordinals(number: int, digits: str, words: str) -> None:
    assert texts.ordinal(number) == digits
    assert texts.ordinal_words(number) == words


def test_year_words() -> None:
    rng = Random(0)
    assert texts.year_words(1999, rng) == "nineteen ninety-nine"
    assert texts.year_words(2000, rng) == "two thousand"
    assert {texts.year_words(2003, rng) for _ in range(50)} == {
        "two thousand and three",
        "two thousand three",
        "twenty oh three",
    }
    assert texts.year_words(2041, rng) == "twenty forty-one"


@pytest.mark.parametrize(
    ("digits", "grouped"), [("7", "7"), ("123", "123"), ("1234", "1.234"), ("1234567", "1.234.567")]
)
def test_group(digits: str, grouped: str) -> None:
    assert texts.group(digits, ".") == grouped


def test_dates_with_all_numbers_say_their_order() -> None:
    """Read back by their own label, every numeric date with a day and a month that could be swapped is the date."""
    rng, seen = Random(1), 0
    for _ in range(20_000):
        text, expected = texts.make_date(rng)
        if match := re.fullmatch(r"(\d+)[-/](\d+)[-/](\d{4}) \((.*)\)", text):
            order = match[4].upper().replace("-", "/").split("/")
            parts = dict(zip(order, (int(match[i]) for i in (1, 2, 3)), strict=True))
            assert datetime.date(parts["YYYY"], parts["MM"], parts["DD"]).isoformat() == expected
            seen += 1
        else:
            assert not re.search(r"\d+[-/]\d+[-/]\d{4}", text), f"{text!r} can be read in two ways"
    assert seen > 500


def test_weekdays_are_those_of_the_dates() -> None:
    rng, seen = Random(2), 0
    for _ in range(5_000):
        text, expected = texts.make_date(rng)
        if match := re.match(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun)", text):
            assert datetime.date.fromisoformat(expected).strftime("%a") == match[1]
            seen += 1
    assert seen > 500


def test_amounts_read_back() -> None:
    """Digits with separators, read by the stated rule: the last separator before exactly two digits is decimal."""
    rng, seen = Random(3), 0
    for _ in range(5_000):
        whole, cents = rng.randint(0, 10 ** rng.randint(1, 7) - 1), rng.choice((0, rng.randint(1, 99)))
        text = texts.write_number(whole, cents, rng)
        match = re.fullmatch(r"(.*?)(?:[.,](\d\d))?", text)
        assert match is not None
        assert int(re.sub(r"\D", "", match[1])) == whole, text
        assert int(match[2] or 0) == cents, text
        seen += bool(match[2])
    assert seen > 2_000


def test_no_two_values_for_one_text() -> None:
    """A bare value or a sentence that two different values produce would be ambiguous by construction."""
    rng, known = Random(4), dict[str, str]()
    for _ in range(150_000):
        value, expected = texts.MAKERS[rng.choice(texts.KINDS)](rng)
        assert known.setdefault(value, expected) == expected, f"{value!r} is {known[value]} and {expected}"


def test_training_and_held_out_rows_share_no_value() -> None:
    rng = Random(5)
    trained = {texts.make_row(rng).expected for _ in range(30_000)}
    kept = [texts.make_row(rng, keep_held_out=True) for _ in range(5_000)]
    assert not trained & {row.expected for row in kept}
    assert {row.kind for row in kept} == set(texts.KINDS)


def test_every_row_has_a_normal_form() -> None:
    forms = {
        "date": r"(19[5-9]|20[0-4])\d-\d\d-\d\d",
        "money": r"\d+\.\d\d (USD|EUR|GBP|CHF)|\d+ JPY",
        "duration": r"P(?=.)(\d+Y)?(\d+M)?(\d+W)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?",
        "time": r"([01]\d|2[0-3]):[0-5]\d",
    }
    rng = Random(6)
    for _ in range(20_000):
        row = texts.make_row(rng)
        assert re.fullmatch(forms[row.kind], row.expected), row
