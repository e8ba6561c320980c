"""What README, docs and RESULTS say is what the files in bench/results hold."""

from __future__ import annotations

import json

import cost_figures
import figures
import places
import pytest
import records
from places import Hardware, Sentence, Table

import cl_optim
from cl_optim.demo.machine import machine, sentence

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
    records.write(tmp_path / "a.json", {"seconds": [1.5]})
    page = "## First\n\nText.\n\nOn a machine with\n\n## Second\n\nText.\n"
    made = Hardware("a.md", "a.json", "## First").fill(page)
    line = made.splitlines()[4]
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["seconds"] == [1.5]
    for key in ("processor", "python", "torch", "commit", "date"):
        assert told["machine"][key] in line
    assert line == sentence(told["machine"])
    assert made == page.replace("On a machine with", line)
    with pytest.raises(SystemExit, match=r"a\.md does not say on what machine, after '## Second'"):
        Hardware("a.md", "a.json", "## Second").fill(page)
    with pytest.raises(SystemExit, match="after '## First'"):
        Hardware("a.md", "a.json", "## First").fill("## First\n\n## Second\n\nOn a machine with\n")


def test_the_machine_of_a_page_is_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "RESULTS", tmp_path)
    line = sentence(machine())
    page = "## First\n\nOn a machine with\n"
    (tmp_path / "a.md").write_text(f"| table |\n\n{line}\n")
    assert Hardware("b.md", "a.md", "## First").fill(page) == f"## First\n\n{line}\n"
    (tmp_path / "a.md").write_text("| table |\n")
    with pytest.raises(SystemExit, match=r"a\.md does not say on what machine it was made"):
        Hardware("b.md", "a.md", "## First").fill(page)


def test_a_machine_without_kernels_is_told():
    """A benchmark of accuracy runs on the reference, too."""
    told = machine()
    assert told["backends"]["cpu"]["simd"] in sentence(told)
    assert "GCC" in sentence(told)
    two = sentence({**told, "threads": 2})
    assert two.startswith(f"On a machine with 2 threads: {told['processor']}, ")
    bare = {**told, "threads": 1, "backends": {"cpu": {}, "cuda": {}}}
    line = sentence(bare)
    assert line.startswith(f"On a machine with 1 thread: {told['processor']}, no kernels built; ")
    assert "GCC" not in line


def test_an_installed_package_tells_its_version_in_place_of_a_commit(tmp_path, monkeypatch):
    """And not the commit of a repository that it was installed into."""
    package = tmp_path / "repository" / "site-packages" / "cl_optim"
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    monkeypatch.setattr(cl_optim, "__file__", str(package / "__init__.py"))
    told = machine()
    assert told["commit"] is None
    assert f"; cl_optim {cl_optim.__version__}, {told['date']}." in sentence(told)


def test_kernels_that_are_not_here_are_not_measured(monkeypatch):
    monkeypatch.setattr(records.library, "available", lambda device: False)
    monkeypatch.setattr(records.library, "explain", lambda device: "not built: build it")
    with pytest.raises(SystemExit, match="not built: build it"):
        records.parser("A script.")


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records.write(None, {"seconds": [1.5]})
    assert not [*tmp_path.iterdir()]


def test_ratios_are_of_turns():
    """Each turn is divided by the base's in it: not medians by medians."""
    steps = {"AdamW fused": [1.0, 2.0, 4.0], "EWCAdamW": [2.0, 2.0, 12.0]}
    (base, ours) = cost_figures.training_step({"ms": steps})
    assert base == "| AdamW fused | 2 | 1 |  |"
    assert ours == "| EWCAdamW | 2 | 2 | 2.00 (1.00–3.00) |"
    assert cost_figures.whole_step({"ms": steps}) == {"whole": "2.00"}
    told = {
        "arguments": {"samples": "8"},
        "demo": {"diagonal": [2.0, 2.0, 2.0], "Kronecker": [3.0, 4.0, 5.0]},
        "passes": {"diagonal": [2.0, 4.0], "kronecker": [5.0, 3.0]},
        "decompositions": 1.25,
        "every": 10,
        "seconds": {"AdamW": [1.0, 2.0], "between": [1.0, 2.0], "pull": [1.0, 4.0]},
        "bytes_per_weight": {"anchor": 4.0, "tails": 0.001},
    }
    rows = cost_figures.kronecker(told)
    assert "| whole step at `every=10` ÷ AdamW's | 1.15 (1.10–1.20) |" in rows
    assert "| the Fisher's pass over 8 samples ÷ the diagonal's | 1.50 |" in rows
    assert rows[-2].endswith("| 4.00: anchor 4.00 |")
    assert rows[-1].endswith("| 2.00 (1.50–2.50) |")


def test_the_log_is_compared_with_dd():
    turn = {"nbytes": 2_000_000, "write": 2.0, "read": 0.5, "dd": 1.0, "dd_float32": 4.0}
    error = {"bytes_per_weight": 1.0, "relative": 0.025, "largest": 20.0, "top_overlap": 0.5}
    (row,) = cost_figures.log_codecs({"codecs": {"log8": {"error": error, "turns": [turn] * 2}}})
    assert row == (
        "| log8 | 1.000 | 2.50 % | ×2e+01 | 50.00 % | 2 | 1.000 | 2.000 | 0.50 (0.50–0.50) | 0.500 "
        "| 2.00 (2.00–2.00) | 2.00 (2.00–2.00) | 8.00 (8.00–8.00) |"
    )
