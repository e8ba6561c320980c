"""Curves of times against sizes."""

from __future__ import annotations

import json
import sys

import pytest
import scaling


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 3.0])
def test_an_exact_power_is_found(power):
    points = {size: 2.5 * size**power for size in (1, 10, 100, 1000, 10_000)}
    assert scaling.exponent(points) == pytest.approx(power)


def test_what_is_constant_at_first_does_not_count():
    assert scaling.exponent(
        {1: 5.0, 10: 5.0, 100: 5.0, 1000: 50.0, 10_000: 500.0}
    ) == pytest.approx(1.0)


def test_quick_writes_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick", "--folder", str(tmp_path)])
    scaling.main()
    told = json.loads((tmp_path / "scaling.json").read_text())
    assert [len(curve["seconds"]) for curve in told["curves"]] == [2] * 7
    for curve, asked in zip(told["curves"], scaling.QUICK, strict=True):
        assert curve["axis"] == asked.axis
        for times in curve["seconds"].values():
            assert list(times) == [str(size) for size in asked.sizes]
            assert all(one > 0.0 for each in times.values() for one in each)
    assert "exponent" in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_sizes_that_do_not_fit_are_left_out_and_said(capsys):
    curve = scaling.Curve(
        "A sum", "numbers", (1, 2, 10**15), lambda size: {"ours": int, "other": int}, memory=8
    )
    measured = scaling.measure(curve, turns=3)
    assert [list(times) for times in measured.values()] == [[1, 2], [1, 2]]
    assert "left out: 1,000,000,000,000,000 numbers take more" in capsys.readouterr().out
    assert scaling.table(curve, measured, scaling.box.SIMPLE).row_count == 3  # and the exponents
