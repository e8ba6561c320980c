"""What README, docs and RESULTS say is what the files in bench/results hold."""

from __future__ import annotations

import figures
import pytest
from figures import Sentence, Table

PAGE = """# A page

## First

| name | value |
|---|--:|
| old | 1 |

## Second

| name | value |
|---|--:|
| old | 1 |
| older | 2 |

It takes 1.5 times as
long, **-3 to +4.25 %**.
"""


def test_pages_say_what_the_files_hold():
    stale = [page for page, (was, now) in figures.filled().items() if was != now]
    assert not stale, "run: python bench/figures.py"


def test_a_table_is_made_anew():
    table = Table("a.md", "| name | value |", lambda: ["| new | 3 |"], "## Second")
    assert table.fill(PAGE) == PAGE.replace("| old | 1 |\n| older | 2 |", "| new | 3 |")
    first = Table("a.md", "| name | value |", lambda: ["| a | 1 |", "| b | 2 |"])
    assert first.fill(PAGE) == PAGE.replace("| old | 1 |", "| a | 1 |\n| b | 2 |", 1)


def test_numbers_are_filled_in():
    numbers = {"times": "22", "low": "-1", "high": "0.5"}
    text = "It takes {times} times as long, **{low} to {high} %**."
    sentence = Sentence("a.md", text, lambda: numbers)
    assert sentence.fill(PAGE).endswith("It takes 22 times as\nlong, **-1 to 0.5 %**.\n")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Table("a.md", "| other |", list), r"a\.md has no table that begins with"),
        (Sentence("a.md", "It took {times} times", dict), r"a\.md does not say 'It took"),
    ],
    ids=["table", "sentence"],
)
def test_what_a_page_no_longer_has_is_told(place, message):
    with pytest.raises(SystemExit, match=message):
        place.fill(PAGE)
