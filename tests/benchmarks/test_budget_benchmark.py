"""The benchmark of budgets: its tasks, its measures, what it says."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench.retention import __main__ as retention
from bench.retention import budget
from bench.retention.text.model import ByteTransformer, Sizes, loss

SIZES = Sizes(
    width=8, layers=1, heads=2, context=16, batch=8, old_steps=6, new_steps=25, kept=32, held_out=9
)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(budget, "_HIDDEN", 16)
    monkeypatch.setattr(budget, "_EPOCHS", 1)


@pytest.mark.parametrize("name", ["digits, then permuted ones", "five digits, then five others"])
def test_a_pair_is_one_model_with_one_stream_of_losses(name):
    pair = budget.PAIRS[name](0)
    first, second = (pair.model().requires_grad_(False) for _ in range(2))
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    one, two = ([float(value(first)) for value in pair.losses()] for _ in range(2))
    assert one == two
    assert len(one) == pair.steps
    assert {e.role for e in pair.validation} == {"old", "new"}
    values = [e.measure(first) for e in pair.validation]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values[0] > values[1]  # the new task has not been learned


def test_texts_are_measured_on_windows_of_their_own():
    pair = budget._of_texts(budget.english(), budget.python_code(), 0, SIZES)
    model = pair.model()
    assert isinstance(model, ByteTransformer)
    assert pair.validation[0].measure(model) != pair.test[0].measure(model)
    corpus = budget.english()
    windows = corpus.held_out_windows(18, 17)
    with torch.no_grad():
        expected = float(loss(model, windows[1::2])) / math.log(2)
    assert pair.test[0].measure(model) == pytest.approx(expected, rel=1e-5)
    assert len(list(pair.losses())) == pair.steps == 25


def test_a_guarded_run_keeps_its_budget_and_an_unguarded_one_has_none():
    pair = budget.PAIRS["digits, then inverted ones"](0)
    free = budget.unguarded("x", pair, 0)
    assert free.lost == free.lost_before > 0.1
    run = budget.guarded("x", pair, 0, 0.05)
    assert run.lost <= 0.05
    assert run.used == pytest.approx(run.lost / 0.05)
    assert run.lost < free.lost
    alone = budget.guarded("x", pair, 0, 0.05, protected=False)
    assert alone.lost <= 0.05
    assert alone.lost_before == free.lost  # it is the same training
    assert alone.alpha < 1.0


def runs():
    """AdamW loses 8 % with one seed, and 1 % with another."""
    found = []
    for seed, free in ((0, 0.08), (1, 0.01)):
        found.append(budget.Run("pair", seed, None, False, free, free, free, 0.9, 1.0))
        found += [
            budget.Run("pair", seed, limit, True, lost, lost, before, 0.8, alpha)
            for limit, lost, before, alpha in (
                (0.02, 0.019, 0.03, 0.9),
                (0.05, 0.051, 0.04, 0.9),
                (0.10, 0.02, 0.02, 1.0),
            )
        ]
        found.append(budget.Run("pair", seed, 0.05, False, 0.04, 0.04, free, 0.7, 0.5))
    return found


def test_it_counts_what_was_kept_and_what_was_used():
    assert budget.sentences(runs()) == [
        "By λ and interpolation: within the budget at the end 4 of 6 runs; at least half of it "
        "used in 3 of the 4 in which AdamW loses so much; 4 went back towards the old weights, 2 "
        "of them to weights that lose more.",
        "By interpolation alone: within the budget at the end 2 of 2 runs; at least half of it "
        "used in 1 of the 1 in which AdamW loses so much; 2 went back towards the old weights, 1 "
        "of them to weights that lose more.",
    ]


def test_the_command_writes_table_and_json(tmp_path, monkeypatch, capsys):
    name = "digits, then inverted ones"
    monkeypatch.setattr(budget, "PAIRS", {name: budget.PAIRS[name]})
    monkeypatch.setattr(budget, "BUDGETS", (0.05,))
    assert retention.main(["budget", "--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "By λ and interpolation: within the budget at the end 2 of 2 runs" in printed
    record = json.loads((tmp_path / "budget.json").read_text())
    assert [run["budget"] for run in record["runs"]] == [None, 0.05, 0.05] * 2
    rows = (tmp_path / "budget.md").read_text().splitlines()
    (row,) = (row for row in rows if row.startswith(f"| {name}"))
    lost = [100 * run["lost"] for run in record["runs"] if run["budget"] is None]
    assert row.split("|")[3].split("±")[0].strip() == f"{sum(lost) / 2:.1f}"
