"""The benchmark of EWC around other optimizers: its rows, and what it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench.retention import __main__ as retention
from bench.retention import optimizers
from cl_optim.demo.experiments import PERMUTED_DIGITS
from cl_optim.demo.train import Config


def test_muon_takes_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    both = optimizers.MuonAndAdamW(model.named_parameters(), 0.1)
    assert [group["param_names"] for group in both.param_groups] == [["weight"], ["bias"]]
    twin = nn.Linear(4, 3)
    twin.load_state_dict(model.state_dict())
    parts = [torch.optim.Muon([twin.weight], lr=0.1), torch.optim.AdamW([twin.bias], lr=0.1)]
    for one, step in ((model, [both]), (twin, parts)):
        one(torch.ones(2, 4)).square().sum().backward()
        for optimizer in step:
            optimizer.step()
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)
    for group in both.param_groups:
        group["lr"] = 0.0
    before = model.weight.detach().clone()
    both.step()
    assert torch.equal(model.weight, before)  # its groups are the parts'


def test_only_sgd_chooses_its_strength():
    strengths = {}
    for methods in optimizers.candidates():
        for method in methods:
            if getattr(method, "structure", None) is not None:
                strengths.setdefault(method.label, set()).add(method.strength)
    assert len(strengths.pop("EWC(SGD)")) == 4
    assert set(strengths) == {"EWCAdamW", "EWC(AdamW)", "EWC(Muon)", "EWC(Adafactor)"}
    assert all(found == {optimizers.STRENGTH} for found in strengths.values())


def test_the_command_writes_a_row_for_each(tmp_path, monkeypatch, capsys):
    small = replace(PERMUTED_DIGITS, config=Config(tasks=2, epochs=1, hidden=16))
    monkeypatch.setattr(optimizers, "PERMUTED_DIGITS", small)
    monkeypatch.setattr(optimizers, "_RATES", dict.fromkeys(optimizers._RATES, (0.01,)))
    monkeypatch.setattr(optimizers, "_SGD_STRENGTHS", (0.01,))
    monkeypatch.setattr(optimizers, "SWEEP_SEEDS", 1)
    assert retention.main(["optimizers", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert "EWC(Adafactor)" in capsys.readouterr().out
    rows = json.loads((tmp_path / "optimizers.json").read_text())["rows"]
    assert len(rows) == 2 * 5 + 4
    by_name = {(row["label"], row["structure"]): row for row in rows}
    ours, around = by_name["EWCAdamW", "diagonal"], by_name["EWC(AdamW)", "diagonal"]
    assert around["acc"] == pytest.approx(ours["acc"], abs=0.02)
    lines = (tmp_path / "optimizers.md").read_text().splitlines()
    (line,) = (one for one in lines if one.startswith("| EWC(SGD)") and "kronecker" in one)
    kronecker = by_name["EWC(SGD)", "kronecker"]["acc"]
    beside = by_name["EWCAdamW", "kronecker"]["acc"]
    difference = 50 * (sum(kronecker) - sum(beside))
    assert line.split("|")[7].split("±")[0].strip() == f"{difference:+.1f}"
