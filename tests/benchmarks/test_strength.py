"""The table that shows whether one strength does for all networks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bench.retention import strength
from cl_optim.demo import metrics, scenarios
from cl_optim.demo.train import Config, train


@pytest.fixture
def tiny(monkeypatch):
    name, experiment = next(iter(strength.NETWORKS.items()))
    experiment = replace(experiment, config=Config(tasks=2, epochs=1, hidden=8, points=0))
    monkeypatch.setattr(strength, "NETWORKS", {name: experiment})
    return name, experiment


def test_every_cell_is_what_training_gives(tiny, tmp_path):
    name, experiment = tiny
    data = scenarios.digits()
    seen = []
    cells = strength.measure(data, 2, lambda network, method: seen.append((network, method)))
    assert seen == [(cell.network, cell.method) for cell in cells]
    assert [cell.method for cell in cells] == strength.candidates()
    last = cells[-1]
    matrices = [
        train(last.method, experiment.build(data, 2, s), experiment.config, s).matrix
        for s in range(2)
    ]
    assert last.acc == tuple(metrics.acc(r) for r in matrices)
    assert last.learning_accuracy == tuple(metrics.learning_accuracy(r) for r in matrices)

    paths = strength.write(cells, tmp_path)
    written = json.loads(paths[0].read_text())["cells"]
    assert [c["strength"] for c in written] == [c.method.strength for c in cells]
    text = paths[1].read_text()
    for method, values in strength.METHODS:
        assert method.label in text
        assert values == tuple(sorted(values))
    assert text.count(name) == len(strength.METHODS)


def test_the_last_column_is_what_the_middle_loses():
    method, values = strength.METHODS[1]
    acc = (0.5, 0.9, 0.8, 0.7, 0.6)
    cells = [
        strength.Cell("a network", replace(method, strength=v), (a, a), (a, a))
        for v, a in zip(values, acc, strict=True)
    ]
    table = strength._table(cells, values, strength.box.MARKDOWN)
    assert list(table.columns[-1].cells) == ["-10.0"]
