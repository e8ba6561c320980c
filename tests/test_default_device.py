"""Where torch makes tensors on a GPU by default, what belongs on the host is made there.

``torch.set_default_device("meta")`` stands for it: a tensor there has no values to go on with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_optim import GEM, EWCAdamW, FisherEstimator, Importance, ImportanceLog, estimate_fisher
from cl_optim import functional as CF
from cl_optim.ops import nnqp
from cl_optim.retention import ReplayBuffer

N, CLASSES = 6, 5


@pytest.fixture(params=["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[str]:
    """A default device, from the call on that the test makes, that the model is not on."""
    yield request.param
    torch.set_default_device(None)


class Tagger(nn.Module):
    """Tokens, tied to the head; convolved, and normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.conv = nn.Embedding(CLASSES, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.norm, self.scale = nn.LayerNorm(8), nn.Parameter(torch.ones(8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.token(tokens).mT).mT
        return F.linear(self.norm(x) * self.scale, self.token.weight)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 600), nn.LayerNorm(600), nn.ReLU(), nn.Linear(600, CLASSES))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="sum") / len(x)


def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(model, Tagger):
        x, y = torch.randint(0, CLASSES, (2, N, 4))
        return x, y
    return torch.randn(N, 7), torch.randint(0, CLASSES, (N,))


@pytest.mark.parametrize("make", [mlp, Tagger])
def test_the_fisher(make, elsewhere):
    model = make()
    x, y = batch(model)
    found = []
    for device in (None, elsewhere):
        torch.set_default_device(device)
        fisher = FisherEstimator(model)
        for _ in range(2):
            with fisher.observe(N):
                loss_of(model, x, y).backward()
        attached = FisherEstimator(model, during_training=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with attached.attach(optimizer):
            loss_of(model, x, y).backward()
            optimizer.step()
        generator = torch.Generator().manual_seed(0)
        each = [fisher.finalize(), attached.finalize()]
        for labels in ("empirical", "predicted", "sample"):
            options: dict[str, Any] = {"max_samples": N - 2, "generator": generator}
            each.append(estimate_fisher(model, [(x, y)], labels, **options))
        found.append(each)
    for here, there in zip(*found, strict=True):
        for name, value in here.sums.items():
            torch.testing.assert_close(there.sums[name], value)


def test_a_packed_batch(elsewhere):
    model, x = mlp(), torch.randn(1, 9, 7)
    torch.set_default_device(elsewhere)
    fisher = FisherEstimator(model)
    with fisher.observe(cu_seqlens=[0, 2, 2, 9]):
        (model(x).square().sum() / 3).backward()
    assert fisher.finalize().samples == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"importance_dtype": "log8", "state_dtype": "8bit"}, {"foreach": True}],
    ids=str,
)
def test_ewc_adamw(options, elsewhere):
    results = []
    for device in (None, elsewhere):
        torch.set_default_device(None)
        torch.manual_seed(0)
        model = mlp()
        x, y = batch(model)
        torch.set_default_device(device)
        optimizer = EWCAdamW(model.named_parameters(), track_penalty=True, **options)
        for _ in range(2):
            optimizer.consolidate(estimate_fisher(model, [(x, y)], "empirical"))
        optimizer.freeze(0.1)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
            if step == 2:
                optimizer.load_state_dict(optimizer.state_dict())
        optimizer.unfreeze()
        numbers = [optimizer.penalty(), optimizer.last_penalty, optimizer.last_drift]
        assert optimizer.suggest_lambda() > 0
        results.append([*(p.detach() for p in model.parameters()), *numbers])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there)


@pytest.mark.parametrize("blocks", ["global", "group", "tensor"])
def test_gem(blocks, elsewhere):
    results = []
    for device in (None, elsewhere):
        torch.set_default_device(None)
        torch.manual_seed(0)
        model = mlp()
        data = [batch(model) for _ in range(5)]
        torch.set_default_device(device)
        optimizer = GEM(EWCAdamW(model.named_parameters()), blocks=blocks, track_update=True)
        for k in range(2):
            optimizer.remember(str(k), lambda d=data[k], m=model: loss_of(m, *d).backward())
        for step, one in enumerate(data[2:]):
            optimizer.zero_grad()
            (-loss_of(model, *one)).backward()
            if step == 1:  # an index of what has a gradient
                model[0].bias.grad = None
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        results.append([p.detach() for p in model.parameters()])
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there)


def test_what_is_kept_of_importance(elsewhere, tmp_path):
    model = mlp()
    importance = estimate_fisher(model, [batch(model)], "empirical")
    torch.set_default_device(elsewhere)
    importance.save(tmp_path / "importance")
    loaded = Importance.load(tmp_path / "importance")
    log = ImportanceLog(tmp_path / "log")
    for codec in ("float32", "bfloat16", "log8", "topk", "rank1"):
        log.record(codec, loaded, model=model, codec=codec)
        assert all(value.isfinite().all() for value in log.load(codec).values())
    assert all(value.isfinite().all() for value in log.merge().values())
    log.report(tmp_path / "report.html")


def test_replay(elsewhere):
    data = torch.randn(40, 3), torch.arange(40) % 4
    drawn = []
    for device in (None, elsewhere):
        for policy in ("reservoir", "class_balanced"):
            torch.set_default_device(device)
            label = (lambda sample: sample[1]) if policy == "class_balanced" else None
            buffer = ReplayBuffer(12, policy=policy, label=label, seed=0)
            buffer.add(data)
            drawn += [buffer.sample(9)[0], buffer.sample(20, replacement=True)[0]]
            drawn += [buffer.sample(2)[0], buffer.samples()[0]]
    for here, there in zip(drawn[:8], drawn[8:], strict=True):
        assert torch.equal(here, there)


def test_kernels(elsewhere):
    memory, grad = torch.randn(3, 5), torch.randn(5)
    gram, linear = (memory @ memory.T)[None], (memory @ grad)[None]
    torch.set_default_device(elsewhere)
    projected, _ = CF.gem_project(grad, memory)
    v = nnqp.nnqp_reference(gram.double(), linear.double()).v
    torch.testing.assert_close(projected, grad + (v[0] @ memory.double()).float())
