"""Kronecker factors during training, in other forms of batches, and of other uses of matrices."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import CLASSES, Uses, batches, losses, mlp, randn
from kronecker_rows import (
    assert_alike,
    assert_factors,
    close,
    data_losses,
    exact_scales,
    sums_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_optim import FisherEstimator, estimate_fisher
from cl_optim.importance.kronecker.importance import KroneckerImportance


def own_pass(model: nn.Module, data, **arguments) -> KroneckerImportance:
    arguments = {"labels": "empirical", "energy": 1.0, "max_samples": None, **arguments}
    return estimate_fisher(model, data, structure="kronecker", **arguments)


def kronecker(model: nn.Module, **arguments) -> FisherEstimator:
    return FisherEstimator(model, structure="kronecker", **{"energy": 1.0, **arguments})


def of_uses(model: nn.Module, x: Tensor, **arguments) -> KroneckerImportance:
    """Of the losses of a model with outputs of any shape, in training and in a pass of its own."""
    found = own_pass(model, [x], per_sample_loss=losses, **arguments)
    fisher = kronecker(model, **arguments)
    with fisher.observe(len(x), loss_terms=1):
        losses(model, x).sum().backward()
    assert_alike(fisher.finalize(), found)
    return found


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["first", False])
def test_streaming_equals_a_pass_of_its_own(verify):
    """In whatever units the losses come."""
    model, data = mlp().eval(), batches(3)
    fisher = kronecker(model, verify=verify)
    for (x, y), scale in zip(data, (1.0, 128.0, torch.tensor(0.25)), strict=True):
        model.zero_grad()
        plain = copy.deepcopy(model)
        with fisher.observe(len(x), loss_scale=scale):
            (F.cross_entropy(model(x), y) * scale).backward()
        (F.cross_entropy(plain(x), y) * scale).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    assert_alike(fisher.finalize(), own_pass(model, data))


def test_decay():
    """A, G, rows and samples decay alike."""
    model, data = mlp(), batches(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fisher = kronecker(model, during_training=True, decay=0.5)
    fisher.attach(optimizer)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = fisher.finalize()
    each = [own_pass(model.eval(), [one]) for one in data]
    weights = [0.5**4, 0.5**3, 0.5**2, 0.5]
    assert found.samples == pytest.approx(6 * sum(weights))
    for name, one in found.factors.items():
        for side in ("input", "output"):
            parts = [getattr(other.factors[name], side).matrix() for other in each]
            mean = sum(w * part for w, part in zip(weights, parts, strict=True)) / sum(weights)
            close(getattr(one, side).matrix(), mean, 1e-5, f"{side} of {name}")
        a, g = (side.matrix().sum(0).trace() for side in (one.input, one.output))
        close(one.scale.sum(), a * g, 1e-5, name)  # one row a sample


def test_an_overflowed_batch_is_dropped():
    model, data = mlp(), batches(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    fisher = kronecker(model, during_training=True, verify=False)
    fisher.attach(optimizer, scaler=scaler)
    for k, (x, y) in enumerate(data):
        loss = F.cross_entropy(model(x), y) * (1e38 if k in (1, 3) else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    kept = [one for k, one in enumerate(data) if k not in (1, 3)]
    found = fisher.finalize()
    assert found.metadata["dropped_samples"] == 12
    assert_alike(found, own_pass(model.eval(), kept), 2e-5)


def test_a_state_brings_everything_back():
    """To the bit, with a scaler, into an estimator that has seen other batches."""

    def begin():
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        fisher = kronecker(model, during_training=True, decay=0.5, block=4)
        fisher.attach(optimizer, scaler=scaler)
        return model, optimizer, scaler, fisher

    def train(model, optimizer, scaler, data):
        for x, y in data:
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()

    data = batches(6)
    model, optimizer, scaler, fisher = begin()
    train(model, optimizer, scaler, data[:3])
    state = copy.deepcopy(fisher.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer, scaler, data[3:])
    other, optimizer, scaler, resumed = begin()
    train(other, optimizer, scaler, data[:2])
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(other, optimizer, scaler, data[3:])
    expected, found = fisher.finalize(), resumed.finalize()
    assert found.samples == expected.samples
    for name, one in expected.factors.items():
        other = found.factors[name]
        assert torch.equal(other.scale, one.scale)
        for a, b in ((other.input, one.input), (other.output, one.output)):
            assert torch.equal(a.values, b.values)
            assert torch.equal(a.basis, b.basis)
    for name, value in expected.unfactored.items():
        assert torch.equal(found.unfactored[name], value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"structure": "diagonal"}, r"same structure as the estimator, 'kronecker'.*'diagonal'\.$"),
        ({"structure": "kronecker", "block": 3}, r"same block as the estimator, 2048.* block=3\.$"),
    ],
)
def test_states_of_others_are_refused(arguments, message):
    model, (x, y) = mlp(), batches(1)[0]
    given, fisher = FisherEstimator(model, **arguments), kronecker(model)
    for one in (given, fisher):
        with one.observe(len(x)):
            F.cross_entropy(model(x), y).backward()
    before = fisher.finalize()
    with pytest.raises(ValueError, match=message):
        fisher.load_state_dict(given.state_dict())
    assert_alike(fisher.finalize(), before, 0.0)


def test_a_state_of_other_shapes_is_refused():
    fisher = kronecker(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="of the same parameters; 'weight'"):
        fisher.load_state_dict(kronecker(nn.Linear(4, 2)).state_dict())


# --- other batches --------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Reads tokens one by one: a packed batch is as good as its sequences."""

    def __init__(self, vocabulary: int = 9) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(vocabulary, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, vocabulary)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.table(tokens)).tanh())


@pytest.mark.parametrize("leading", [(), (1,)])
def test_packed(leading):
    model, tokens = Tokens(), torch.randint(0, 9, (7,))
    offsets = [0, 2, 3, 7]

    def loss(model: nn.Module, n: int) -> Tensor:
        part = tokens[offsets[n] : offsets[n + 1]].unsqueeze(0)
        return F.cross_entropy(model(part)[0], part[0], reduction="sum")

    fisher = kronecker(model)
    with fisher.observe(cu_seqlens=offsets, loss_terms=1):
        logits = model(tokens.view(*leading, 7)).view(7, 9)
        F.cross_entropy(logits, tokens, reduction="sum").backward()
    assert_factors(fisher.finalize(), sums_of(model, data_losses(loss), 3), 3)


@pytest.mark.parametrize("block", [1, 2, 2048])
def test_exact_scales_of_a_tied_head(block):
    """Of a vocabulary that is diagonal, one that is cut into blocks, and one that is whole."""
    model, tokens = Tokens(20), torch.randint(0, 20, (4, 5))

    def loss(model: nn.Module, n: int) -> Tensor:
        part = tokens[n : n + 1]
        return F.cross_entropy(model(part)[0], part[0], reduction="sum")

    found = own_pass(model, [(tokens, tokens)], scale="exact", block=block)
    one = found.factors["table.weight"]
    assert one.output.blocks == {1: 0, 2: 10, 2048: 1}[block]
    expected = exact_scales(model, data_losses(loss), 4, dict(found.factors))
    for name, scale in expected.items():
        close(found.factors[name].scale[:-1, :-1], scale, 1e-5, name)


class Checkpointed(nn.Module):
    """One weight in two layers with a bias each, in checkpoints."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.layers[2][0].weight = self.layers[0][0].weight
        self.head = nn.Linear(6, CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.reentrant is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Also with several backward passes through one forward pass."""
    model, plain = Checkpointed(reentrant), Checkpointed(None)
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(5, 4), torch.randint(0, CLASSES, (5,))
    for labels in ("exact", "empirical"):
        expected = own_pass(plain, [(x, y)], labels=labels)
        assert_alike(own_pass(model, [(x, y)], labels=labels), expected)
    fisher = kronecker(model)
    for k in range(2):
        with fisher.observe(5):
            F.cross_entropy(model(x), y).backward()
        assert_alike(fisher.finalize(), expected), k
    assert expected.factors["layers.0.0.weight"].layout.bias is None  # there are two
    assert expected.factors["layers.1.0.weight"].layout.bias == "layers.1.0.bias"
    exact = own_pass(model, [(x, y)], scale="exact")
    assert_alike(exact, own_pass(plain, [(x, y)], scale="exact"))


def test_autocast():
    model, data = mlp().eval(), batches(2)
    fisher = kronecker(model)
    for x, y in data:
        with fisher.observe(len(x)):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            F.cross_entropy(logits.float(), y).backward()
    assert_alike(fisher.finalize(), own_pass(model, data), 5e-2)


def test_accumulated_passes_over_the_same_samples():
    """Rows of both forward passes count."""
    model, (x, y) = nn.Linear(7, CLASSES), batches(1)[0]
    fisher = kronecker(model)
    with fisher.observe(len(x)):
        (F.cross_entropy(model(x), y) + F.cross_entropy(model(x), y)).backward()
    one = own_pass(model, [(x, y)]).factors["weight"]
    two = fisher.finalize().factors["weight"]
    close(two.input.matrix(), one.input.matrix(), 1e-5, "inputs")
    close(two.scale.sum(), 2 * one.scale.sum().double(), 1e-5, "twice as many rows")


# --- ways of using a matrix -----------------------------------------------------------------------


def test_transposed_weights():
    """x @ w, addmm and a transposed linear are one matrix in two ways of lying."""
    x = torch.randn(5, 3, 4)
    one = Uses(lambda m, x: F.linear(x, m.p[0], m.p[1]), randn(6, 4), randn(6))
    weight, bias = (p.detach() for p in one.p)
    turned = {
        "addmm": lambda m, x: torch.addmm(m.p[1], x.flatten(0, 1), m.p[0]).view(5, 3, 6),
        "linear": lambda m, x: F.linear(x, m.p[0].T, m.p[1]),
        "matmul": lambda m, x: x @ m.p[0] + m.p[1],
    }
    expected = of_uses(one, x)
    assert not expected.factors["p.0"].layout.transposed
    for kind, use in turned.items():
        model = Uses(use, nn.Parameter(weight.T.contiguous()), nn.Parameter(bias.clone()))
        model.first.load_state_dict(one.first.state_dict())
        found = of_uses(model, x)
        layout = found.factors["p.0"].layout
        assert layout.transposed
        assert layout.bias == (None if kind == "matmul" else "p.1")
        if kind == "matmul":
            assert found.metadata["diagonal"] == {"p.1": "not a matrix"}
        torch.testing.assert_close(found["p.0"].T, expected["p.0"], rtol=1e-4, atol=1e-5)
        scale = own_pass(model, [x], per_sample_loss=losses, scale="exact")
        other = own_pass(one, [x], per_sample_loss=losses, scale="exact")
        if kind != "matmul":
            torch.testing.assert_close(scale["p.0"].T, other["p.0"], rtol=1e-4, atol=1e-5)


def test_slices_of_rows():
    """Attention to other tokens uses a third of in_proj at a time."""
    model = Uses(
        lambda m, x: m.attention(x, x.flip(1), x.roll(1, 1))[0],
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    )
    found = of_uses(model, torch.randn(3, 5, 4))
    one = found.factors["attention.in_proj_weight"]
    assert one.layout.bias == "attention.in_proj_bias"
    gradients = one.output.matrix()[0]
    assert float(gradients[:4, :4].trace()) > 0
    assert float(gradients[:4, 4:].abs().max()) < 1e-6 * float(gradients.abs().max())
    exact = own_pass(model, [torch.randn(3, 5, 4)], per_sample_loss=losses, scale="exact")
    assert float(exact.factors["attention.in_proj_weight"].scale.sum()) > 0


UNFACTORED = {
    "elementwise": (lambda m, x: x * m.p[0], (4, 4), "not used as a matrix"),
    "columns": (lambda m, x: F.linear(x[..., :3], m.p[0][:, :3]), (5, 4), "no slice of rows"),
    "a function": (lambda m, x: F.linear(x, m.p[0] / m.p[0].norm()), (5, 4), "a function of it"),
    "scaled": (lambda m, x: F.linear(x, m.p[0].exp()), (5, 4), "a function of it"),
    "two uses": (lambda m, x: F.linear(x, m.p[0]) * m.p[0], (4, 4), "not used as a matrix"),
    "experts": (
        lambda m, x: torch.bmm(x, m.p[0][torch.arange(len(x)) % 2]), (2, 4, 3), "for each expert",
    ),
    "transposed convolution": (
        lambda m, x: F.conv_transpose1d(x, m.p[0]), (4, 2, 3), "a transposed convolution",
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", UNFACTORED)
def test_other_uses_keep_the_diagonal(use):
    """And the metadata say why."""
    function, shape, why = UNFACTORED[use]
    model, x = Uses(function, randn(*shape)), torch.randn(4, 4, 4)
    found = of_uses(model, x)
    assert why in found.metadata["diagonal"]["p.0"]
    assert set(found.factors) == {"first.weight"}
    diagonal = estimate_fisher(model, [x], "empirical", per_sample_loss=losses)
    torch.testing.assert_close(found["p.0"], diagonal["p.0"], rtol=1e-5, atol=1e-6)
    exact = own_pass(model, [x], per_sample_loss=losses, scale="exact")
    torch.testing.assert_close(exact["p.0"], diagonal["p.0"], rtol=1e-5, atol=1e-6)


def test_a_bias_that_is_used_elsewhere_too():
    model = Uses(lambda m, x: F.linear(x, m.p[0], m.p[1]) + m.p[1], randn(4, 4), randn(4))
    x = torch.randn(3, 4)
    found = of_uses(model, x)
    assert found.factors["p.0"].layout.bias is None
    diagonal = estimate_fisher(model, [x], "empirical", per_sample_loss=losses)
    torch.testing.assert_close(found["p.1"], diagonal["p.1"], rtol=1e-5, atol=1e-6)


def test_a_later_use_that_has_no_factors_is_refused():
    model = Uses(lambda m, x: F.linear(x, m.p[0]) * (m.p[0] if m.odd else 1.0), randn(4, 4))
    model.odd = False

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        model.odd = bool(x[0, 0, 0] > 0)
        return losses(model, x)

    plain, odd = -torch.ones(4, 4, 4), torch.ones(4, 4, 4)
    with pytest.raises(NotImplementedError, match=r"'p\.0' has .* put such a batch first\.$"):
        own_pass(model, [plain, odd], per_sample_loss=loss)
    found = own_pass(model, [odd, plain], per_sample_loss=loss)
    assert "p.0" in found.metadata["diagonal"]


@pytest.mark.parametrize("unsupported", ["sign", "skip"])
def test_unsupported_parameters(unsupported):
    """The batch is taken again without them, and what it had decided is forgotten."""
    model = Uses(
        lambda m, x: F.linear(x, m.p[0]) + torch.cdist(F.linear(x, m.p[1]), m.p[1]),
        randn(4, 4), randn(4, 4),
    )  # fmt: skip
    x = torch.randn(5, 4, 4)
    found = own_pass(model, [x], per_sample_loss=losses, unsupported=unsupported)
    if unsupported == "skip":
        assert "p.1" in found.metadata["skipped"]
        assert "p.1" not in found
    else:
        assert found.metadata["diagonal"]["p.1"] == "not supported: random signs"
        assert "p.1" in found.unfactored
    assert set(found.factors) == {"first.weight", "p.0"}
    plain = copy.deepcopy(model)
    plain.p[1].requires_grad_(False)
    without = own_pass(plain, [x], per_sample_loss=losses)
    for name, one in without.factors.items():
        close(found.factors[name].input.matrix(), one.input.matrix(), 1e-5, name)


# --- wide sides -----------------------------------------------------------------------------------


def test_blocks_and_vocabularies():
    """What is not known is left out, and said; the rest is as it is without blocks."""
    model = nn.Sequential(nn.Linear(7, 40), nn.Tanh(), nn.Linear(40, CLASSES))
    data = batches(2)
    whole, found = own_pass(model, data), own_pass(model, data, block=2)
    assert whole.metadata["blocked"] == {}
    assert found.metadata["blocked"] == {"0.weight": [0, 4], "2.weight": [3, 0]}
    assert found.metadata["block"] == 2
    inputs = whole.factors["0.weight"].input.matrix()[0]
    for i, block in enumerate(found.factors["0.weight"].input.matrix()):
        close(block, inputs[2 * i : 2 * i + 2, 2 * i : 2 * i + 2], 1e-5, f"block {i}")
    gradients = whole.factors["0.weight"].output.matrix()[0].diagonal()
    close(found.factors["0.weight"].output.matrix(), gradients, 1e-5, "gradients")
    for name, value in whole.items():  # of the product, a diagonal needs no correlations
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    exact = own_pass(model, data, block=2, scale="exact")
    for name, one in own_pass(model, data, scale="exact").factors.items():
        close(exact.factors[name].scale.sum(), one.scale.sum().double(), 1e-4, name)


def test_wide_products_are_formed_in_halves():
    """In all parts of the triangle, in float32 and of rows in bfloat16."""
    from cl_optim.fisher.kronecker.sums import add_products_
    from cl_optim.fisher.kronecker.terms import _mirrored

    x = torch.randn(1, 6, 2051)
    for rows in (x, x.bfloat16()):
        sums = torch.zeros(1, 1, 2051, 2051, dtype=torch.float64)
        add_products_(sums, rows)
        close(_mirrored(sums)[0, 0], rows[0].double().mT @ rows[0].double(), 1e-6, "products")


def test_no_memory_for_a_width():
    model = nn.Linear(2_000_000, 2)
    with pytest.raises(RuntimeError, match=r"'weight'.* block=400000000: make block= smaller\.$"):
        own_pass(model, [torch.randn(2, 2_000_000)], labels="predicted", block=400_000_000)


def test_rows_are_independent_where_the_fisher_is_kronecker():
    """Of gradients that do not depend on the inputs, the product is the diagonal itself."""
    model = Uses(lambda m, x: F.linear(x, m.p[0]), randn(3, 4))
    signs = torch.tensor([[1.0], [-1.0]]).repeat(3, 1)
    x = torch.randn(3, 4).repeat_interleave(2, 0)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:  # every input meets every gradient
        return (model(batch) * signs).sum(1)

    found = own_pass(model, [x], per_sample_loss=loss)
    diagonal = estimate_fisher(model, [x], "empirical", per_sample_loss=loss)
    for name in ("p.0", "first.weight", "first.bias"):
        torch.testing.assert_close(found[name], diagonal[name], rtol=1e-4, atol=1e-6)


def test_it_is_logged_once(caplog):
    model, (x, y) = mlp(), batches(1)[0]
    fisher = kronecker(model)
    with fisher.observe(len(x)):
        F.cross_entropy(model(x), y).backward()
    with caplog.at_level(logging.INFO, "cl_optim"):
        fisher.finalize()
        fisher.finalize()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "2 matrices; the diagonal of 2 parameters: {'1.weight': 'not a" in record.getMessage()


def test_exact_scales_of_other_samples_are_refused():
    class Once(list):
        def __iter__(self):
            return iter([self.pop()] if self else [])

    x, y = batches(1)[0]
    with pytest.raises(ValueError, match=r"twice.* 0 samples after 6; give a list or a DataLoader"):
        own_pass(mlp(), Once([(x, y)]), scale="exact")
