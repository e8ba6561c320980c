"""What README, docs and RESULTS say is what the files in bench/results hold."""

from __future__ import annotations

import json

import figures
import places
import pytest
import records
from places import Hardware, Sentence, Table

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


def test_the_machine_of_a_file_is_told(tmp_path, monkeypatch):
    """The line of its own section, and of no other."""
    monkeypatch.setattr(places, "RESULTS", tmp_path)
    records.write(tmp_path / "a.json", seconds=[1.5])
    page = "## First\n\nText.\n\nOn a machine with\n\n## Second\n\nText.\n"
    made = Hardware("a.md", "a.json", "## First").fill(page)
    line = made.splitlines()[4]
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["seconds"] == [1.5]
    for key in ("processor", "python", "torch", "commit", "date"):
        assert told["machine"][key] in line
    assert line.startswith(f"On a machine with {told['machine']['threads']} threads: ")
    assert made == page.replace("On a machine with", line)
    with pytest.raises(SystemExit, match=r"a\.md does not say on what machine, after '## Second'"):
        Hardware("a.md", "a.json", "## Second").fill(page)
    with pytest.raises(SystemExit, match="after '## First'"):
        Hardware("a.md", "a.json", "## First").fill("## First\n\n## Second\n\nOn a machine with\n")
