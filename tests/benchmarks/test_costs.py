"""Scripts of what things cost, at toy size: files, and the rows that pages have of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import compact_formats
import cost_figures
import pytest
import shards
import torch.distributed as dist

SHAPES = [(8, 4), (4,)]


@pytest.fixture
def alone() -> Iterator[None]:
    """Leave no group of processes behind, whatever becomes of the script."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
def test_shards(tmp_path, monkeypatch, capsys):
    path = tmp_path / "shards.json"
    monkeypatch.setattr(shards, "SHAPES", {"85 M": SHAPES, "1 000 tensors of 64": [(2,)] * 3})
    monkeypatch.setattr(sys, "argv", ["shards.py", "--turns", "3", "--json", str(path)])
    shards.main()
    told = json.loads(path.read_text())
    assert told["machine"]["threads"] >= 1
    assert all(len(times) == 3 for times in told["seconds"]["85 M"].values())
    rows = cost_figures.shards(told)
    assert capsys.readouterr().out.splitlines() == rows
    assert len(rows) == 8
    assert rows[0].startswith("| 85 M | AdamW(fused), DTensors | ")
    assert set(cost_figures.looked_through(told)) == {"ours", "theirs"}


def test_compact_formats(monkeypatch):
    monkeypatch.setattr(compact_formats, "gpt2_shapes", lambda: SHAPES)
    told = {"ratios": compact_formats.measure("Kahan", 3)}
    assert all(len(ratios) == 3 for ratios in told["ratios"].values())
    assert cost_figures.formats("float32", told) == []
    rows = cost_figures.formats("bfloat16", told, told)
    assert [row.split(" | ")[0] for row in rows] == [
        "| log8, Kahan",
        "| log8, 8-bit moments, Kahan",
    ]
    assert rows[0].count(" | ") == 3  # bytes, and a column for each file
    with pytest.raises(KeyError, match="Kahan"):  # no row is left out without a word
        cost_figures.formats("bfloat16", told, {"ratios": {}})
