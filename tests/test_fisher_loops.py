"""FisherEstimator attached to training loops that do more than one forward and backward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import assert_sums, data_labels, loop, oracle
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_optim import FisherEstimator

CLASSES = 5


class Model(nn.Module):
    """Perhaps with a block that is recomputed in the backward pass."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 9), nn.Linear(9, CLASSES)
        self.block = nn.Sequential(nn.Linear(9, 9), nn.LayerNorm(9), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None or not torch.is_grad_enabled():
            return self.last(self.block(x))
        return self.last(checkpoint(self.block, x, use_reentrant=self.reentrant))


def batches(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 7), torch.randint(0, CLASSES, (size,))) for _ in range(count)]


def of_batches(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    plain = Model()
    plain.load_state_dict(model.state_dict())
    return oracle(
        plain, torch.cat([x for x, _ in data]), data_labels(torch.cat([y for _, y in data]))
    )


def attached(model: nn.Module, **arguments: object) -> tuple[FisherEstimator, torch.optim.SGD]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fisher = FisherEstimator(model, during_training=True)
    fisher.attach(optimizer, **arguments)
    return fisher, optimizer


# --- which forward pass a batch is ----------------------------------------------------------------


def evaluate(model: nn.Module, x: Tensor) -> None:
    model.eval()
    model(x)
    model.train()


@torch.no_grad()
def without_gradients(model: nn.Module, x: Tensor) -> None:
    model(x)


def gradients_of_inputs(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).logsumexp(1).sum(), x)


def discard(model: nn.Module, x: Tensor) -> None:
    model(x)


def keep(model: nn.Module, x: Tensor) -> None:
    model.__dict__.setdefault("kept", []).append(model(x))


BESIDES = [
    (besides, reentrant)
    for besides in (evaluate, without_gradients, discard, keep, gradients_of_inputs)
    for reentrant in (None, False, True)
    # torch.autograd.grad does not go through reentrant checkpoints.
    if not (besides is gradients_of_inputs and reentrant)
]


@pytest.mark.parametrize(("besides", "reentrant"), BESIDES)
@pytest.mark.parametrize("where", ["before", "between", "after"])
def test_forward_passes_besides_the_batch(besides, where, reentrant):
    """Of other numbers of samples, before the batch's forward pass, after it, or after its end."""
    model = Model(reentrant)
    fisher, optimizer = attached(model)
    data = batches(3)
    other = torch.randn(2, 7)
    for x, y in data:
        if where == "before":
            besides(model, other)
        loss = F.cross_entropy(model(x), y)
        if where == "between":
            besides(model, other)
        loss.backward()
        if where == "after":
            besides(model, other)
        optimizer.step()
        optimizer.zero_grad()
    assert_sums(fisher.finalize(), of_batches(model, data), 1e-5)
    assert fisher.finalize().samples == 18
    fisher.detach()


def test_several_forward_passes_before_their_backward_passes():
    model = Model()
    fisher, optimizer = attached(model, accumulation_steps=1)
    data = [*batches(1), *batches(1, 4), *batches(1, 3)]
    losses = [F.cross_entropy(model(x), y) for x, y in data]
    for loss in losses[::-1]:
        loss.backward()
    optimizer.step()
    assert_sums(fisher.finalize(), of_batches(model, data), 1e-5)
    assert fisher.finalize().samples == 13


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("size", [6, 4])
def test_two_forward_passes_in_one_loss(size, reentrant):
    """They may be two views of a sample, or a batch and a memory."""
    model = Model(reentrant)
    fisher, optimizer = attached(model)
    (x, y), (other_x, other_y) = *batches(1), *batches(1, size)
    loss = F.cross_entropy(model(x), y) + F.cross_entropy(model(other_x), other_y)
    with pytest.raises(RuntimeError, match=r"in one backward pass, .* use observe\(batch_size="):
        loss.backward()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert_sums(fisher.finalize(), of_batches(model, [(x, y)]), 1e-5)
    assert fisher.finalize().samples == 6


def test_two_views_of_a_sample():
    """In observe(): their gradients add before the square."""
    model = Model()
    (x, y), (other, _) = batches(2)

    def losses(model: nn.Module, part: slice) -> Tensor:
        both = [t[part].to(next(model.parameters()).dtype) for t in (x, other)]
        a, b = (model(view) for view in both)
        return F.cross_entropy(a, y[part], reduction="none") + (a - b).square().sum(1)

    fisher = FisherEstimator(model)
    with fisher.observe(6):
        losses(model, slice(None)).mean().backward()
    expected = loop(model, lambda each, n: losses(each, slice(n, n + 1)).sum(), 6)
    assert_sums(fisher.finalize(), expected, 1e-5)


@pytest.mark.parametrize("stepped", [False, True])
def test_two_backward_passes_through_one_forward_pass(stepped):
    model = Model()
    fisher, optimizer = attached(model)
    (x, y), *_ = data = batches(2)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    if stepped:
        optimizer.step()
    with pytest.raises(RuntimeError, match="after its batch had" if stepped else "second backward"):
        loss.backward()
    kept = data if stepped else data[1:]
    optimizer.zero_grad()
    F.cross_entropy(model(data[1][0]), data[1][1]).backward()
    optimizer.step()
    assert_sums(fisher.finalize(), of_batches(model, kept), 1e-5)
    assert fisher.finalize().samples == 6 * len(kept)


def test_a_backward_pass_that_fails():
    """What it had added is not kept; where that is too late, the estimator says so."""

    class BoomError(Exception):
        pass

    def fail(grad: Tensor) -> None:
        raise BoomError

    def void(handle: object) -> None:
        """A forward hook's result would replace the output."""

    def fails(model: Model, x: Tensor, y: Tensor) -> None:
        handle = model.block.register_forward_hook(lambda *args: void(args[2].register_hook(fail)))
        with pytest.raises(BoomError):
            F.cross_entropy(model(x), y).backward()
        handle.remove()

    model = Model()
    fisher, optimizer = attached(model)
    data = batches(2)
    fails(model, *data[0])
    F.cross_entropy(model(data[1][0]), data[1][1]).backward()
    optimizer.step()
    assert_sums(fisher.finalize(), of_batches(model, data[1:]), 1e-5)
    fails(model, *data[0])
    with pytest.raises(RuntimeError, match="make a new FisherEstimator"):
        fisher.finalize()
