"""Inputs with as many rows as samples that are something else, in observe() and attached."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import CLASSES, assert_sums, data_labels, largest_error, oracle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_optim import FisherEstimator, estimate_fisher

COUNT = 6


class Experts(nn.Module):
    """Tokens [N, T, D]; each goes to the one of three experts whose feature is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).flatten(0, 1)
        expert = x[..., :3].argmax(-1).flatten()
        mixed = torch.zeros_like(tokens)
        for k, layer in enumerate(self.experts):
            rows = (expert == k).nonzero().squeeze(1)
            mixed = mixed.index_add(0, rows, layer(tokens[rows]).tanh())
        return self.head(mixed.view_as(x).mean(1))


def routed(aligned: bool) -> Tensor:
    """Each expert gets as many tokens as there are samples; where aligned, one of each sample."""
    expert = torch.arange(3).repeat(COUNT)
    if not aligned:
        expert = expert[torch.randperm(3 * COUNT)]
    return torch.randn(COUNT, 3, 4) + 9 * F.one_hot(expert, 4).view(COUNT, 3, 4)


class TimeMajor(nn.Module):
    """A recurrence along positions, in tensors [T, N, D]."""

    def __init__(self, aligned: bool, checkpointed: bool = False) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.aligned, self.checkpointed = aligned, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.first(x) if self.aligned else self.first(x.transpose(0, 1)).transpose(0, 1)
        state = torch.zeros_like(inputs[:, 0])
        for step in inputs.unbind(1):
            if self.checkpointed:
                state = checkpoint(self.again, torch.tanh(state + step), use_reentrant=True)
            else:
                state = self.again(torch.tanh(state + step))
        return self.head(state)


class Scaled(nn.Module):
    """A parameter that multiplies tensors [T, N, D], or [N, T, D]."""

    def __init__(self, aligned: bool) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, CLASSES)
        self.aligned = aligned

    def forward(self, x: Tensor) -> Tensor:
        if self.aligned:
            return self.head((x * self.scale).mean(1))
        return self.head((x.transpose(0, 1) * self.scale).transpose(0, 1).mean(1))


CASES = {
    "time-major": (TimeMajor, "first.weight"),
    "scaled": (Scaled, "scale"),
}


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(COUNT, COUNT, 4), torch.randint(0, CLASSES, (COUNT,))


def fisher_of(model: nn.Module, x: Tensor, y: Tensor, how: str, **arguments) -> FisherEstimator:
    fisher = FisherEstimator(model, during_training=True, **arguments)
    if how == "observe":
        with fisher.observe(len(x)):
            F.cross_entropy(model(x), y).backward()
        return fisher
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with fisher.attach(optimizer):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return fisher


@pytest.mark.parametrize("how", ["observe", "attach"])
@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_not_samples(case, how):
    make, name = CASES[case]
    model, (x, y) = make(aligned=False), data()
    message = rf"parameters? '{name}'.* met inputs whose rows .* requires_grad_\(False\)\.$"
    with pytest.raises(ValueError, match=message):
        fisher_of(model, x, y, how)
    assert all(p.grad is None for p in model.parameters())
    expected = oracle(model, x, data_labels(y))
    importance = fisher_of(model, x, y, how, unsupported="skip").finalize()
    skipped = set(importance.metadata["skipped"])
    assert name in skipped
    assert "head.weight" not in skipped
    assert_sums(importance, {k: v for k, v in expected.items() if k not in skipped}, 1e-5)
    # What is refused would have been wrong; the check of estimate_fisher finds it, too.
    wrong = fisher_of(model, x, y, how, verify=False).finalize().sums[name]
    assert (wrong - expected[name]).norm() > 0.05 * expected[name].norm()
    with pytest.raises(ValueError, match="the self-check failed in batch 0"):
        estimate_fisher(model, [(x, y)], "empirical")


@pytest.mark.parametrize("how", ["observe", "attach"])
@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_samples(case, how):
    make, _ = CASES[case]
    model, (x, y) = make(aligned=True), data()
    assert_sums(fisher_of(model, x, y, how).finalize(), oracle(model, x, data_labels(y)), 1e-5)


@pytest.mark.parametrize("how", ["observe", "attach"])
@pytest.mark.parametrize("aligned", [False, True])
def test_rows_of_experts_are_followed(aligned, how):
    """They are as many as the samples, and of others."""
    model, x, y = Experts(), routed(aligned), torch.randint(0, CLASSES, (COUNT,))
    assert_sums(fisher_of(model, x, y, how).finalize(), oracle(model, x, data_labels(y)), 1e-5)


@pytest.mark.parametrize("how", ["observe", "attach"])
def test_inside_reentrant_checkpoints(how):
    """There the parameters are met without gradients."""
    model, (x, y) = TimeMajor(aligned=True, checkpointed=True), data()
    plain = TimeMajor(aligned=True)
    plain.load_state_dict(model.state_dict())
    assert_sums(fisher_of(model, x, y, how).finalize(), oracle(plain, x, data_labels(y)), 1e-5)
    other = Reversed()
    with pytest.raises(ValueError, match=r"'again\.weight', 'again\.bias', .* met inputs"):
        fisher_of(other, x, y, how)


class Reversed(TimeMajor):
    """Its recurrence takes positions for samples."""

    def __init__(self) -> None:
        super().__init__(aligned=True, checkpointed=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x).cumsum(1).transpose(0, 1)).flip(0)


class Late(nn.Module):
    """A layer that is used later, with positions in front."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.used = False
        self.register_buffer("calls", torch.zeros(()))
        self.noise = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        tokens = self.noise(self.first(x))
        if self.used:
            tokens = self.late(tokens.transpose(0, 1)).transpose(0, 1)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("how", ["observe", "attach"])
def test_the_check_costs_once(how):
    """Two forward passes where parameters are met first; nothing of them is left."""
    model, (x, y) = Late(), data()
    plain = copy.deepcopy(model)
    ran: list[bool] = []
    model.first.register_forward_hook(lambda *args: ran.append(model.training))
    fisher = FisherEstimator(model, during_training=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        model.zero_grad()
        if how == "observe":
            with fisher.observe(len(x)):
                F.cross_entropy(model(x), y).backward()
            return
        with fisher.attach(optimizer):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    for k in range(2):
        torch.manual_seed(k)
        step()
        state = torch.get_rng_state()
        torch.manual_seed(k)
        plain.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        assert torch.equal(state, torch.get_rng_state())
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            torch.testing.assert_close(p.grad, q.grad)
    assert ran == [True, False, False, True]
    assert model.calls == 2
    assert model.training
    model.used = True
    with pytest.raises(ValueError, match=r"parameters 'late\.weight', 'late\.bias' met inputs"):
        step()


def test_a_model_that_cannot_be_called_again():
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise KeyError("labels")
            return self.layer(x)

    model, (x, y) = Once(), (torch.randn(COUNT, 4), torch.randint(0, CLASSES, (COUNT,)))
    with pytest.raises(RuntimeError, match=r"in eval mode .* verify=False turns the check o") as e:
        fisher_of(model, x, y, "observe")
    assert isinstance(e.value.__cause__, KeyError)
    assert model.training
    expected = oracle(nn.Sequential(model.layer), x, data_labels(y))
    found = fisher_of(model, x, y, "observe", verify=False).finalize().sums
    assert largest_error(found, {f"layer.{k[2:]}": v for k, v in expected.items()}) <= 1e-5
