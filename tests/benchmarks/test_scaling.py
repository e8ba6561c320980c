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
    assert [len(curve["seconds"]) for curve in told["curves"]] == [2] * 6
    for curve, (_, axis, sizes, _) in zip(told["curves"], scaling.QUICK, strict=True):
        assert curve["axis"] == axis
        for times in curve["seconds"].values():
            assert list(times) == [str(size) for size in sizes]
            assert all(one > 0.0 for each in times.values() for one in each)
    assert "exponent" in (tmp_path / "scaling.md").read_text()
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
