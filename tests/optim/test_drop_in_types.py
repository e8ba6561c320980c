"""What a user of `mypy --strict` writes, and the lines that the pages show."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from paths import ROOT
from torch import nn

from cl_optim import EWCAdamW

USER = """
from typing import Any
from typing_extensions import assert_type

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import cl_optim
from cl_optim import GEM, EWCAdamW, ImportanceLog, InputProjection
from cl_optim.retention import Evaluation, RetentionGuard

torch.manual_seed(0)  # an accuracy of 0 would be no baseline for the guard
model = nn.Linear(3, 2)
x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])


def number() -> float:
    return tensor().item()


def tensor() -> Tensor:
    loss = nn.functional.cross_entropy(model(x), y)
    torch.autograd.backward(loss)
    return loss


def accuracy(model: nn.Module) -> float:
    return float((model(x).argmax(1) == y).float().mean())


opt = EWCAdamW(model.named_parameters(), lr=1e-3, ewc_lambda=1.0)
importance = cl_optim.estimate_fisher(model, [(x, y)])
opt.consolidate(importance)
assert_type(opt.step(), None)
assert_type(opt.step(tensor), Tensor)
assert_type(opt.step(number), float)
assert_type(opt.penalty(), Tensor)
assert_type(opt.freeze(0.05), int)

projection = InputProjection(torch.optim.AdamW(model.named_parameters()), every=2)
assert_type(projection.step(), None)
assert_type(projection.step(tensor), Tensor)
projection.settle_before(model).remove()
GEM(projection).settle()

groups: list[dict[str, Any]] = [
    {"params": [model.weight], "lr": 1e-4},
    {"params": [model.bias]},
]
EWCAdamW(groups).consolidate({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, model=model)
EWCAdamW([{"params": list(model.named_parameters())}]).consolidate(importance)

gem = GEM(opt, average=True)
gem.remember("old", tensor, refresh_every=10)
assert_type(gem.step(), None)
assert_type(gem.step(tensor), Tensor)
assert_type(gem.step(number), float)
assert_type(gem.conflicts(), Tensor)
gem.consolidate(None)
StepLR(gem, 1).step()

log = ImportanceLog("log")
log.record("old", importance, model=model)
opt.consolidate(log)
with log.watch(opt, every=100):
    opt.step(closure=tensor)
with log.watch(gem):
    gem.step(closure=tensor)

guard = RetentionGuard(
    model, gem, [Evaluation("old", accuracy)], on_breach=("rollback", "raise_lambda"), every=1,
    folder="guard",
)
guard.start()
assert_type(guard.step(), bool)
print(guard.report())
"""


def test_a_users_file_type_checks_and_runs(tmp_path):
    """With the package as it is installed for users, by its py.typed."""
    file = tmp_path / "user.py"
    file.write_text(USER)
    config = tmp_path / "mypy.ini"
    # The package's own errors are for its own settings; tests may run from a source tree.
    config.write_text(f"[mypy]\nstrict = True\nmypy_path = {ROOT}\n[mypy-cl_optim.*]\n"
                      "follow_imports = silent\n")  # fmt: skip
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir",
         str(tmp_path / "cache"), str(file)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout + checked.stderr
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(file)], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    assert "old" in ran.stdout


def test_readme_options_do_not_warn():
    """Warnings are errors here: anchors in bfloat16 are exact for weights that are."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2))
    importance = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    opt = EWCAdamW(
        model.bfloat16().named_parameters(),
        importance_dtype="log8",
        anchor_dtype="bfloat16",
        state_dtype="8bit",
        rounding="kahan",
        importance_damping=0.1,
        track_penalty=True,
    )
    opt.consolidate(importance)
    assert opt.freeze(0.05) > 0
    model(torch.ones(2, 64, dtype=torch.bfloat16)).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert not all(map(torch.equal, before, model.parameters()))
    assert opt.last_penalty == 0
    assert opt.last_drift.shape == (1,)
    opt.unfreeze()
    with pytest.warns(UserWarning, match="rounds the anchors of 4 parameters"):
        EWCAdamW(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).named_parameters(),
                 anchor_dtype="bfloat16").consolidate(None)  # fmt: skip
