"""FisherEstimator attached to training loops that do more than one forward and backward pass."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import (
    CLASSES,
    NoSynchronisation,
    assert_sums,
    attached,
    batches,
    data_labels,
    loop,
    oracle,
)
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.checkpoint import checkpoint
from trainer_cases import one_epoch, tiny_llama

from cl_optim import GEM, EWCAdamW, FisherEstimator


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


def of_batches(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    plain = Model()
    plain.load_state_dict(model.state_dict())
    return oracle(
        plain, torch.cat([x for x, _ in data]), data_labels(torch.cat([y for _, y in data]))
    )


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
    assert not torch_module._global_forward_hooks  # both are over, although the loss is kept
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


# --- what the loss is multiplied with -------------------------------------------------------------


def fused(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "AdamW": fused,
    "EWCAdamW": lambda model: EWCAdamW(model.named_parameters(), lr=1e-2),
    "GEM": lambda model: GEM(torch.optim.SGD(model.parameters(), lr=0.1)),
    "GEM of EWCAdamW": lambda model: GEM(EWCAdamW(model.named_parameters(), lr=1e-2)),
}


@pytest.mark.parametrize("overflow", [None, 0, 3])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_scaler_that_nobody_mentions(optimizer, unscaled, overflow):
    """It is found when it takes the first step; without waiting for the device afterwards."""
    model = Model()
    steps = OPTIMIZERS[optimizer](model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    fisher = FisherEstimator(model, during_training=True, decay=0.5)
    fisher.attach(steps)
    # The scaler is not known before the first step that is taken.
    first = [0] if optimizer in ("AdamW", "EWCAdamW") else [0, 1]
    dropped = {None: [], 3: [3], 0: first}[overflow]
    expected = {name: torch.zeros_like(p).double() for name, p in model.named_parameters()}
    taken = 0
    for k, (x, y) in enumerate(batches(6)):
        part = of_batches(model, [(x, y)])
        steps.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if k == overflow:
            loss = loss * 1e38
        scaler.scale(loss).backward()
        if unscaled:
            scaler.unscale_(steps)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        called: list[int] = []
        handle = steps.register_step_post_hook(lambda *args, called=called: called.append(1))
        with NoSynchronisation() if k > 1 and optimizer == "EWCAdamW" else nullcontext():
            scaler.step(steps)
        scaler.update()
        handle.remove()
        taken += len(called)
        for name in expected:
            expected[name] += 0.0 if k in dropped else part[name]
            expected[name] *= 0.5 if called else 1.0
    importance = fisher.finalize()
    assert_sums(importance, expected, 2e-5)
    assert importance.metadata["dropped_samples"] == 6 * len(dropped)
    fisher.detach()
    assert taken >= 5


def test_a_scaler_that_comes_late():
    model = Model()
    fisher, optimizer = attached(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (x, y), *_ = batches(1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    with pytest.raises(RuntimeError, match=r"attach\(optimizer, scaler=\.\.\.\)\.$"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="make a new FisherEstimator"):
        fisher.finalize()


def train(model, optimizer, data, accumulation: int, divided: bool, **zero_grad: bool) -> None:
    for k, (x, y) in enumerate(data):
        loss = F.cross_entropy(model(x), y)
        (loss / accumulation if divided else loss).backward()
        if (k + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad(**zero_grad)


@pytest.mark.parametrize("divided", [False, True])
def test_accumulation_that_nobody_mentions(divided):
    """It is refused before the first step; nothing has changed then."""
    model = Model()
    fisher, optimizer = attached(model)
    data = batches(6)
    weights = [p.detach().clone() for p in model.parameters()]
    message = (
        r"^3 backward passes .* pass accumulation_steps=3 to attach\(\) if they were, "
        r"accumulation_steps=1 if not\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        train(model, optimizer, data, 3, divided)
    assert all(map(torch.equal, weights, model.parameters()))
    with pytest.raises(RuntimeError, match="nothing was observed"):
        fisher.finalize()
    fisher.detach()
    optimizer.zero_grad()
    fisher.attach(optimizer, accumulation_steps=3 if divided else 1)
    train(model, optimizer, data, 3, divided)
    assert_sums(fisher.finalize(), of_batches(model, data), 1e-5)
    assert fisher.finalize().samples == 36


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_every_third_step(decay, accumulation):
    """Of the other steps nothing is observed, and nothing is missed."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fisher = FisherEstimator(model, during_training=True, decay=decay)
    steps = None if accumulation == 1 else accumulation
    fisher.attach(optimizer, every=3, accumulation_steps=steps)
    data = batches(7 * accumulation)
    train(model, optimizer, data, accumulation, divided=True)
    observed = [
        of_batches(model, data[step * accumulation : (step + 1) * accumulation])
        for step in (0, 3, 6)
    ]
    # By steps: each of the seven decays what there is.
    expected = {
        name: sum(
            decay ** (7 - step) * part[name] for step, part in zip((0, 3, 6), observed, strict=True)
        )
        for name in observed[0]
    }
    assert_sums(fisher.finalize(), expected, 1e-5)
    samples = 6 * accumulation * sum(decay ** (7 - step) for step in (0, 3, 6))
    assert fisher.finalize().samples == pytest.approx(samples)


def test_accumulation_that_begins_late():
    model = Model()
    fisher, optimizer = attached(model)
    train(model, optimizer, batches(2), 1, True)
    with pytest.raises(RuntimeError, match=r"^2 backward passes"):
        train(model, optimizer, batches(2), 2, True)
    with pytest.raises(RuntimeError, match="make a new FisherEstimator"):
        fisher.finalize()


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_left_out_is_no_accumulation(scaled):
    """By the loop, which forgets the gradients; or by a scaler, which leaves zeros of them."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    fisher = FisherEstimator(model, during_training=True)
    fisher.attach(optimizer, scaler=scaler)
    data = batches(4)
    for k, (x, y) in enumerate(data):
        optimizer.zero_grad(set_to_none=not scaled)
        loss = F.cross_entropy(model(x), y)
        if scaler is not None:
            scaler.scale(loss * 1e38 if k == 2 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            continue
        loss.backward()
        if k != 2:
            optimizer.step()
    kept = [batch for k, batch in enumerate(data) if k != 2 or not scaled]
    assert_sums(fisher.finalize(), of_batches(model, kept), 1e-5)


def test_closures():
    """Each evaluation of the loss is a batch; several in one step do not accumulate."""
    model = Model()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.0, max_iter=3)
    fisher = FisherEstimator(model, during_training=True)
    fisher.attach(optimizer)
    ((x, y),) = batches(1)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad(set_to_none=False)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert evaluations > 2
    expected = of_batches(model, [(x, y)] * evaluations)
    assert_sums(fisher.finalize(), expected, 1e-5)


def test_a_sum_that_is_said_to_be_a_mean():
    """In the gradient of the logits it is seen; nothing has changed when it is refused."""
    model = Model()
    fisher, optimizer = attached(model)
    ((x, y),) = batches(1)
    for scale in (1.0, 8.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(F.cross_entropy(model(x), y, reduction="sum")).backward()
        with pytest.raises(RuntimeError, match=r"is a sum, not divided by 6: pass loss_terms=1\.$"):
            scaler.step(optimizer)
        fisher.detach()
        optimizer.zero_grad()
        fisher = FisherEstimator(model, during_training=True)
        fisher.attach(optimizer)
    fisher.detach()
    fisher.attach(optimizer, loss_terms=1)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    optimizer.step()
    assert_sums(fisher.finalize(), of_batches(model, [(x, y)]), 1e-5)


def test_a_sum_in_observe():
    model = Model()
    ((x, y),) = batches(1)
    fisher = FisherEstimator(model)
    message = r"is a sum, not divided by 6: pass loss_terms=1\.$"
    with pytest.raises(RuntimeError, match=message), fisher.observe(6, loss_scale=4.0):
        (4.0 * F.cross_entropy(model(x), y, reduction="sum")).backward()
    with pytest.raises(RuntimeError, match="make a new FisherEstimator"):
        fisher.finalize()
    fisher = FisherEstimator(model)
    with fisher.observe(6, loss_terms=1):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    assert_sums(fisher.finalize(), of_batches(model, [(x, y)]), 1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_losses_that_are_what_they_are_said_to_be(weight):
    """Weighted; of two outputs; means over rows of a sample, or over other things than samples."""
    model = Model()
    ((x, y),) = batches(1)
    losses = {
        "weighted": (1, lambda z: weight * F.cross_entropy(z, y)),
        "squares": (1, lambda z: F.mse_loss(z, torch.ones_like(z))),
        "two": (1, lambda z: F.cross_entropy(z, y) + 0.4 * F.cross_entropy(z, y.flip(0))),
        "sum": (1 / 6, lambda z: F.cross_entropy(z, y, reduction="sum")),
        "in place": (1, lambda z: F.cross_entropy(z.div_(2.0), y)),
    }
    for name, (terms, loss) in losses.items():
        fisher, optimizer = attached(model, **({} if terms == 1 else {"loss_terms": 6 * terms}))
        loss(model(x)).backward()
        optimizer.step()
        assert fisher.finalize().samples == 6, name
        fisher.detach()


class Tagger(nn.Module):
    """Logits [N, T, C], or [N, C, T], of tokens [N, T]; some have no target."""

    def __init__(self, last: bool = True) -> None:
        super().__init__()
        self.table, self.head, self.last = nn.Embedding(9, 4), nn.Linear(4, 9), last

    def forward(self, ids: Tensor, labels: Tensor | None = None, **given: Tensor) -> Tensor:
        logits = self.head(self.table(ids).tanh())
        return logits if self.last else logits.movedim(-1, 1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("ignored", [0, 5])
def test_a_mean_over_targets(ignored, last, dtype):
    """Of samples of one length it may be a mean over samples; else ``loss_terms`` must say it."""
    model = Tagger(last)
    ids = torch.randint(0, 9, (4, 6))
    labels = ids.clone()
    labels.view(-1)[:ignored] = -100

    def step(**arguments: object) -> FisherEstimator:
        fisher, optimizer = attached(model, **arguments)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            logits = model(ids, labels=labels)
        F.cross_entropy(logits if not last else logits.flatten(0, 1),
                        labels if not last else labels.flatten()).backward()  # fmt: skip
        try:
            optimizer.step()
        finally:
            fisher.detach()
        return fisher

    plain = Tagger(True)
    plain.load_state_dict(model.state_dict())
    expected = oracle(plain, ids, data_labels(labels))
    assert_sums(step(loss_terms="tokens").finalize(), expected, 5e-2 if dtype else 1e-5)
    if ignored:
        with pytest.raises(RuntimeError, match=r"mean over 19 targets, .* loss_terms='tokens'"):
            step()
    else:
        means = {name: value / 36 for name, value in expected.items()}
        assert_sums(step().finalize(), means, 5e-2 if dtype else 1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_of_transformers(accumulation, tmp_path):
    """It divides by the tokens of all micro-batches: ``loss_terms="tokens"`` and nothing more."""
    model, data = tiny_llama()

    def loss(each: nn.Module, n: int) -> Tensor:
        logits = each(input_ids=data[n]["input_ids"][None]).logits[0, :-1]
        return F.cross_entropy(logits, data[n]["labels"][1:], reduction="sum", ignore_index=-100)

    expected = loop(model, loss, 8, double=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = one_epoch(tmp_path, model, data, optimizer, accumulation)
    fisher = FisherEstimator(model, during_training=True)
    with fisher.attach(optimizer, loss_terms="tokens"):
        trainer.train()
    assert_sums(fisher.finalize(), expected, 1e-4)
    assert fisher.finalize().samples == 8
    if accumulation > 1:
        other = FisherEstimator(model, during_training=True)
        refused = pytest.raises(ValueError, match=r"num_items_in_batch, .* leave accumulation")
        with other.attach(optimizer, loss_terms="tokens", accumulation_steps=accumulation), refused:
            trainer.train()
    else:
        other = FisherEstimator(model, during_training=True)
        refused = pytest.raises(RuntimeError, match="targets, not divided by 2: pass loss_terms='t")
        with other.attach(optimizer), refused:
            trainer.train()
