"""Checkpoints of a guard that several processes have: whole, or the one before."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cl_optim import GEM, EWCAdamW
from cl_optim.distributed import here, rows_like, whole
from cl_optim.retention import CheckpointError, CheckpointWarning, Evaluation, RetentionGuard
from cl_optim.retention.checkpoint import shared


class Run:
    """A run that can be begun anew: a model, its optimizer, a stream, and a guard."""

    def __init__(self, rank: int, folder: str, kind: str, fail_at: int = 100) -> None:
        torch.manual_seed(0)
        self.rank = rank
        self.model: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        if kind == "fsdp":
            fully_shard(self.model)
        self.forward = DistributedDataParallel(self.model) if kind == "ddp" else self.model
        options: dict[str, Any] = {"importance_dtype": "log8"} if kind == "fsdp" else {}
        inner = EWCAdamW(self.model.named_parameters(), lr=0.02, ewc_lambda=0.1, **options)
        self.optimizer = GEM(inner, ranks="mean")
        self.fail_at = fail_at
        self.position = {"step": 0}
        self.guard = RetentionGuard(
            self.model,
            self.optimizer,
            [Evaluation("old", self.measure)],
            on_breach=("rollback", "raise_lambda"),
            every=2,
            folder=folder,
            data=self,
        )

    def measure(self, model: nn.Module) -> float:
        breach = self.rank == 1 and self.position["step"] == self.fail_at
        self.fail_at = 100 if breach else self.fail_at
        return 0.1 if breach else 1.0

    def state_dict(self) -> dict[str, int]:
        return dict(self.position, rank=self.rank)

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state["rank"] == self.rank
        self.position = {"step": state["step"]}

    def loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * seed + self.rank)
        x = torch.randn(4, 5, generator=generator)
        return (self.forward(x) - 1.0).square().mean() + 0 * torch.rand(()).item()

    def begin(self) -> None:
        self.optimizer.consolidate(None)
        self.optimizer.remember("a", lambda: (-self.loss(0)).backward(), refresh_every=3)

    def train(self, steps: int) -> list[Tensor]:
        while self.position["step"] < steps:
            self.optimizer.zero_grad()
            self.loss(1 + self.position["step"]).backward()
            self.optimizer.step()
            self.position["step"] += 1
            self.guard.step()
        return [*(whole(p.detach()) for p in self.model.parameters()), torch.rand(1)]


def goes_on(rank: int, folder: str, kind: str) -> None:
    """Go on from a checkpoint in a new run, and come to the same bits."""
    straight = Run(rank, f"{folder}/{kind}-straight", kind)
    straight.begin()
    straight.guard.start()
    expected = straight.train(8)
    broken = Run(rank, f"{folder}/{kind}", kind)
    broken.begin()
    broken.guard.start()
    broken.train(5)
    resumed = Run(rank, f"{folder}/{kind}", kind)
    assert resumed.guard.resume() == 4
    resumed.optimizer.remember("a", lambda: (-resumed.loss(0)).backward(), refresh_every=3)
    found = resumed.train(8)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert resumed.optimizer.penalty() == straight.optimizer.penalty() > 0
    kept = sorted(path.name for path in Path(folder, kind).iterdir())
    assert kept == [f"step-{step:012d}" for step in (4, 6, 8)]
    own = [len(list(path.iterdir())) for path in Path(folder, kind).iterdir()]
    assert own == [2, 2, 2]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_run_goes_on(tmp_path, kind):
    in_processes(goes_on, 2, str(tmp_path), kind)


def rolls_back(rank: int, folder: str) -> None:
    run = Run(rank, folder, "fsdp", fail_at=6)
    run.begin()
    run.guard.start()
    run.train(10)
    assert [check.rolled_back_to for check in run.guard.history] == [
        None, None, None, 4, None, None, None
    ]  # fmt: skip
    assert "λ raised to 0.3" in run.guard.history[3].action


def test_a_breach_on_one_rank_rolls_all_back(tmp_path):
    in_processes(rolls_back, 2, str(tmp_path))


def dies_in_a_save(rank: int, folder: str) -> None:
    run = Run(rank, folder, "fsdp")
    run.begin()
    run.guard.start()
    run.train(4)
    if rank == 1:
        shared.sealed_torch.save = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
    run.train(6)


def finds_the_one_before(rank: int, folder: str) -> None:
    run = Run(rank, folder, "fsdp")
    assert run.guard.resume() == 4
    # One process's file of the newest one is damaged: all take the one before.
    torch.distributed.barrier()
    if rank == 1:
        file = Path(folder, f"step-{4:012d}", "rank-1-of-2.pt")
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()
    with pytest.warns(CheckpointWarning, match="cannot be read"):
        assert run.guard.resume() == 2


def of_other_processes(rank: int, folder: str) -> None:
    run = Run(rank, folder, "fsdp")
    with (
        pytest.warns(CheckpointWarning, match="is not of 3 processes"),
        pytest.raises(CheckpointError, match="none of the 3 in it can be read"),
    ):
        run.guard.resume()


def test_a_rank_that_is_killed_in_a_save_leaves_the_one_before(tmp_path):
    begun = time.monotonic()
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        in_processes(dies_in_a_save, 2, str(tmp_path))
    assert time.monotonic() - begun < 60
    in_processes(finds_the_one_before, 2, str(tmp_path))
    in_processes(of_other_processes, 3, str(tmp_path))


def lies_as_before(rank: int) -> None:
    """Save and read tensors of one shape, whose parts have one shape, in two ways."""
    mesh = init_device_mesh("cpu", (2, 2))
    values = [torch.arange(16.0).view(4, 4) + 100 * index for index in range(3)]
    placements = [(Shard(0), Shard(1)), (Shard(1), Shard(0)), (Shard(0), Replicate())]
    tensors = [distribute_tensor(*one) for one in zip(values, [mesh] * 3, placements, strict=True)]
    rows = [rows_like(one, torch.stack([here(one), -here(one)])) for one in tensors]
    saved = shared._without_parts({"tensors": tensors, "rows": rows, "step": 3})
    found = shared._with_parts(saved, tensors)
    assert found["step"] == 3
    for one, value in zip(found["tensors"], values, strict=True):
        assert torch.equal(whole(one), value)
    for both, value in zip(found["rows"], values, strict=True):
        assert torch.equal(whole(both), torch.stack([value, -value]))
    with pytest.raises(CheckpointError, match="the model has none that lies so"):
        shared._with_parts(saved, tensors[:1])


def test_tensors_lie_as_they_were_saved():
    in_processes(lies_as_before, 4)


def other_models(rank: int, folder: str) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(1 + rank)))
    with pytest.raises(ValueError, match=r"^the processes have other models.* ranks='own'"):
        RetentionGuard(
            model,
            EWCAdamW(model.named_parameters()),
            [Evaluation("old", lambda model: 1.0)],
            on_breach="stop",
            folder=folder,
        )


def test_parts_of_a_model_are_no_replicas(tmp_path):
    in_processes(other_models, 2, str(tmp_path))
