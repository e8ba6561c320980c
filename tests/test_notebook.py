"""The notebook of examples/ runs on the results that are there, and shows what it draws."""

from __future__ import annotations

import json
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot as plt
from paths import ROOT

NOTEBOOK = ROOT / "examples/frontier.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_it_runs(monkeypatch):
    monkeypatch.chdir(NOTEBOOK.parent)
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    drawn = len(plt.get_fignums())
    for number, cell in enumerate(CELLS):
        exec(compile("".join(cell["source"]), f"frontier.ipynb[{number}]", "exec"), names)
    assert len(plt.get_fignums()) - drawn == 2
    plt.close("all")
    # As the table of bench/results/pretrained.md has it.
    cost, kept = names["frontier"](names["runs"]["replay 5%"])
    assert (round(cost[0], 2), round(kept[0])) == (0.71, 47)


def test_its_outputs_are_pictures_alone():
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert [list(output["data"]) for output in outputs] == [["image/png"]] * 2
    assert NOTEBOOK.stat().st_size < 150_000
