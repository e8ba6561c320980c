"""FisherEstimator and estimate_fisher against a float64 loop over single samples.

The loop is plain autograd on a float64 copy of the model and shares no code with the package.
"""

import copy
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import (
    CLASSES,
    TOLERANCE,
    Uses,
    all_labels,
    assert_sums,
    data_labels,
    mean_loss,
    oracle,
    predicted_labels,
)
from torch import Tensor, nn

from cl_optim.fisher import FisherEstimator, estimate_fisher
from cl_optim.fisher.objective import _log_once

VOCABULARY = 13


# --- models ---------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(7, 11),
            nn.LayerNorm(11, eps=0.3),
            nn.ReLU(inplace=True),
            nn.Linear(11, 9, bias=False),
            nn.LayerNorm(9, elementwise_affine=False),
            nn.Dropout(0.5),
        )
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Transformer(nn.Module):
    """One block; positions are looked up per sample."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(VOCABULARY, width, padding_idx=2)
        self.position = nn.Embedding(16, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.v, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.head = nn.Linear(width, VOCABULARY)
        with torch.no_grad():
            for norm in (self.norm1, self.norm2):
                norm.weight.normal_(1, 0.5)
                norm.weight[0] = 0.0

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
        x = self.token(tokens) + self.position(positions)
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for f in (self.q, self.k, self.v))  # fmt: skip
        causal = torch.full((tokens.shape[1],) * 2, -math.inf, dtype=x.dtype).triu(1)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + causal).softmax(-1)
        x = x + self.o((attention @ v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x)


def mlp_case() -> tuple[nn.Module, Tensor, Tensor]:
    return MLP(), torch.randn(12, 7), torch.randint(0, CLASSES, (12,))


def transformer_case() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (10, 6))
    tokens[:, 3] = tokens[:, 1]  # a token occurs twice in a sample
    return Transformer(), tokens, torch.randint(0, VOCABULARY, (10, 6))


CASES = {"mlp": mlp_case, "transformer": transformer_case}


# --- FisherEstimator ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_observe(case, dtype):
    model, inputs, targets = CASES[case]()
    model = model.to(dtype).eval()
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    fisher = FisherEstimator(model)
    with fisher.observe(batch_size=len(inputs)):
        mean_loss(model(inputs), targets).backward()
    importance = fisher.finalize()

    assert_sums(importance, oracle(model, inputs, data_labels(targets)), TOLERANCE[dtype])
    assert importance.samples == len(inputs)
    assert importance.tokens == (inputs.numel() if case == "transformer" else None)
    assert all(value.dtype == dtype for value in importance.values())


@pytest.mark.parametrize("case", CASES)
def test_grad_is_bit_identical(case):
    model, inputs, targets = CASES[case]()
    plain = copy.deepcopy(model)
    for seed in (1, 2):  # into an empty grad, and on top of one
        torch.manual_seed(seed)  # dropout
        mean_loss(plain(inputs), targets).backward()
        torch.manual_seed(seed)
        with FisherEstimator(model).observe(len(inputs)):
            mean_loss(model(inputs), targets).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
            assert p.grad.stride() == q.grad.stride()


@pytest.mark.parametrize(
    ("reduction", "loss_terms", "scale"),
    [("mean", None, 1.0), ("sum", 1, 1.0), ("tokens", 60, 1.0), ("mean", None, 2.0**16)],
)
def test_reductions_and_loss_scale(reduction, loss_terms, scale):
    model, inputs, targets = transformer_case()
    fisher = FisherEstimator(model)
    with fisher.observe(len(inputs), loss_terms=loss_terms, loss_scale=scale, tokens=42):
        total = mean_loss(model(inputs), targets) * len(inputs)
        divisor = {"mean": len(inputs), "sum": 1, "tokens": targets.numel()}[reduction]
        (total / divisor * scale).backward()
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 1e-5)
    assert fisher.finalize().tokens == 42


@pytest.mark.parametrize("case", CASES)
def test_several_batches(case):
    """Of unequal sizes, with gradient accumulation; finalize gives copies in between."""
    model, inputs, targets = CASES[case]()
    model.eval()
    fisher = FisherEstimator(model)
    earlier = []
    for x, y in zip(inputs.split(7), targets.split(7), strict=True):
        with fisher.observe(batch_size=len(x), loss_scale=0.5):
            (mean_loss(model(x), y) * 0.5).backward()
        earlier.append(fisher.finalize())
    expected = oracle(model, inputs, data_labels(targets))
    assert_sums(fisher.finalize(), expected, 1e-5)
    assert [importance.samples for importance in earlier] == [7, len(inputs)]
    assert_sums(earlier[0], oracle(model, inputs[:7], data_labels(targets)), 1e-5)


def test_bfloat16():
    """Against batches of one in bfloat16: the products and sums are float32."""
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 5))
    model = model.bfloat16()
    x, y = torch.randn(20, 3, 16).bfloat16(), torch.randint(0, 5, (20, 3))
    fisher = FisherEstimator(model)
    with fisher.observe(20, loss_terms=1):
        F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    expected = {name: torch.zeros(p.shape).double() for name, p in model.named_parameters()}
    for n in range(20):
        model.zero_grad()
        F.cross_entropy(model(x[n : n + 1])[0], y[n], reduction="sum").backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.double() ** 2
    assert all(value.dtype == torch.float32 for value in fisher.finalize().values())
    assert_sums(fisher.finalize(), expected, 2e-2)


def test_float16_loss_scale():
    """Gradients whose squares float16 cannot hold."""
    weight = nn.Linear(4, 3, bias=False).half()
    x = torch.randn(5, 4).half()
    seed = torch.full((5, 3), 2.0**-10).half()
    fisher = FisherEstimator(weight)
    with fisher.observe(5, loss_terms=1, loss_scale=2.0**4):
        weight(x).backward(seed)
    expected = (seed.double().square().T @ x.double().square()) / 2.0**8
    assert_sums(fisher.finalize(), {"weight": expected}, 1e-6)


def test_autocast():
    model, inputs, targets = mlp_case()
    model.eval()
    fisher = FisherEstimator(model)
    with fisher.observe(len(inputs)), torch.autocast("cpu", torch.bfloat16):
        mean_loss(model(inputs), targets).backward()
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 5e-2)


def test_more_dimensions():
    """[N, H, W, C]: all between samples and features are tokens; LayerNorm over two dimensions."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm((5, 4)), nn.Flatten(), nn.Linear(40, 2))
    with torch.no_grad():
        model[1].weight.normal_()
    inputs, targets = torch.randn(6, 2, 5, 3), torch.randint(0, 2, (6,))
    fisher = FisherEstimator(model)
    with fisher.observe(6):
        mean_loss(model(inputs), targets).backward()
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 1e-5)
    assert fisher.finalize().tokens == 60


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_embedding(padding_idx):
    table = nn.Parameter(torch.randn(4, 3))
    indices = torch.tensor([[0, 0, 3], [3, 1, 3], [0, 3, 3]])
    weights = torch.randn(3, 3, 3)
    model = nn.ParameterDict({"table": table})
    fisher = FisherEstimator(model)
    with fisher.observe(3, loss_terms=1):
        (F.embedding(indices, table, padding_idx) * weights).sum().backward()
    expected = torch.zeros(4, 3).double()
    for n in range(3):
        g = torch.zeros(4, 3).double()
        for t in range(3):
            if indices[n, t] != padding_idx % 4:
                g[indices[n, t]] += weights[n, t]
        expected += g**2
    assert_sums(fisher.finalize(), {"table": expected}, 1e-6)


class Functional(MLP):
    """No module is called, arguments are named, and a module is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, head = self.body[0], self.head
        x = F.linear(x, bias=first.bias, weight=first.weight)[:, :9]
        return F.linear(input=x, weight=head.weight, bias=head.bias)


def test_functional_and_frozen_and_unused():
    model = Functional()
    model.body[0].weight.requires_grad_(False)
    inputs, targets = torch.randn(6, 7), torch.randint(0, CLASSES, (6,))
    fisher = FisherEstimator(model)
    with fisher.observe(6):
        mean_loss(model(inputs), targets).backward()
    importance = fisher.finalize()
    assert "body.0.weight" not in importance
    assert importance["extra.weight"].count_nonzero() == 0
    assert_sums(importance, oracle(model, inputs, data_labels(targets)), 1e-5)


def test_harmless_uses():
    """Reading a parameter, and forward passes without gradients, are no uses."""
    model, inputs, targets = mlp_case()
    model.eval()
    p = model.head.weight
    fisher = FisherEstimator(model)
    with fisher.observe(len(inputs)):
        with torch.no_grad():
            model(inputs)
            p.mul_(1.0).norm()
        assert p.shape == p.detach().shape
        assert p.requires_grad
        assert p.data_ptr() != 0
        p.requires_grad_()
        torch.zeros_like(p)
        torch.stack([p.data, p.detach()])
        copy.deepcopy(p)
        inputs.clone().requires_grad_().type_as(p)
        loss = mean_loss(model(inputs), targets)
        torch.autograd.grad(loss, list(model.parameters()))
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 1e-5)


def test_per_token_and_metadata():
    model, inputs, targets = transformer_case()
    fisher = FisherEstimator(model)
    with fisher.observe(10):
        mean_loss(model(inputs), targets).backward()
    importance = fisher.finalize()
    name = "up.weight"
    torch.testing.assert_close(importance.per_token()[name] * 6, importance[name])
    metadata = importance.metadata
    assert (metadata["estimator"], metadata["labels"]) == ("FisherEstimator", "empirical")
    assert metadata["torch"] == torch.__version__
    assert metadata["model"]["class"].endswith("Transformer")
    assert metadata["model"]["parameters"][name] == {"shape": [24, 8], "dtype": "float32"}


# --- what observe refuses -------------------------------------------------------------------------


def run(fisher: FisherEstimator, batch_size: int, *steps) -> None:
    """Take the steps inside observe()."""
    with fisher.observe(batch_size):
        for step in steps:
            step()


def test_misuse_of_observe():
    """Errors before the backward pass leave the sums as they were."""
    model, inputs, targets = mlp_case()
    model.eval()
    n = len(inputs)
    fisher = FisherEstimator(model)
    with pytest.raises(RuntimeError, match="nothing was observed"):
        fisher.finalize()
    with pytest.raises(RuntimeError, match="cannot be used inside another"):
        run(fisher, n, lambda: run(fisher, n))
    with pytest.raises(RuntimeError, match="no gradient reached a watched parameter"):
        run(fisher, n, lambda: model(inputs))
    with pytest.raises(ZeroDivisionError):
        run(fisher, n, lambda: model(inputs), lambda: 1 / 0)
    with fisher.observe(n):
        loss = mean_loss(model(inputs), targets)
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"after the observe\(\) of its forward pass had ended"):
        loss.backward()
    assert fisher.finalize().samples == n
    assert_sums(fisher.finalize(), oracle(model, inputs, data_labels(targets)), 1e-5)


def test_an_error_in_the_backward_pass_is_remembered():
    model, inputs, targets = mlp_case()
    fisher = FisherEstimator(model)

    def step() -> None:
        loss = mean_loss(model(inputs), targets)
        loss.backward(retain_graph=True)
        loss.backward()

    with pytest.raises(RuntimeError, match="a second backward pass reached parameters 'head"):
        run(fisher, len(inputs), step)
    with pytest.raises(RuntimeError, match="make a new FisherEstimator"):
        fisher.finalize()


def test_an_input_changed_in_place_is_noticed():
    """Also where nothing but the estimator has kept it."""
    model, inputs, targets = mlp_case()

    def loss(model: nn.Module, batch) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        batch[0].add_(1)
        return losses

    with pytest.raises(RuntimeError, match="inplace operation"):
        estimate_fisher(model, [(inputs, targets)], "empirical", per_sample_loss=loss)


def test_keeps_no_input_of_a_frozen_weight():
    model = nn.Linear(4, 4)
    model.weight.requires_grad_(False)
    inputs = torch.randn(3, 4)
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(FisherEstimator(model), 3, lambda: model(inputs).square().sum().backward())
    assert kept
    assert inputs.data_ptr() not in kept


def test_leaves_no_hooks():
    model, inputs, targets = mlp_case()
    run(FisherEstimator(model), len(inputs), lambda: mean_loss(model(inputs), targets).backward())
    estimate_fisher(model, [inputs])
    assert not any(p._backward_hooks for p in model.parameters())


def test_not_finite():
    model, inputs, targets = mlp_case()
    fisher = FisherEstimator(model)
    with fisher.observe(len(inputs)):
        (mean_loss(model(inputs), targets) * math.inf).backward()
    with pytest.raises(ValueError, match=r"squared gradients of parameter .* are not finite"):
        fisher.finalize()


def test_parameters_changed():
    model, inputs, _ = mlp_case()
    fisher = FisherEstimator(model)
    model.head.bias.requires_grad_(False)
    message = r"^parameter 'head\.bias' was added, removed, frozen"
    with pytest.raises(ValueError, match=message), fisher.observe(len(inputs)):
        pass


# --- estimate_fisher ------------------------------------------------------------------------------


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    p = logits.softmax(-1)
    return torch.multinomial(p.flatten(0, -2), 1, generator=generator).view(p.shape[:-1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("case", "labels"),
    [
        ("mlp", "exact"),
        ("mlp", "sample"),
        ("mlp", "predicted"),
        ("mlp", "empirical"),
        ("transformer", "sample"),
        ("transformer", "predicted"),
        ("transformer", "empirical"),
    ],
)
def test_estimate(case, labels, dtype):
    model, inputs, targets = CASES[case]()
    model = model.to(dtype)  # in training mode
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    batches = list(zip(inputs.split(4), targets.split(4), strict=True))
    importance = estimate_fisher(
        model, batches, labels=labels, generator=torch.Generator().manual_seed(1)
    )
    if labels == "sample":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            targets = torch.cat(
                [draw(copy.deepcopy(model).eval()(x), generator) for x, _ in batches]
            )
    expected = oracle(
        model,
        inputs,
        {"exact": all_labels, "predicted": predicted_labels}.get(labels, data_labels(targets)),
    )
    assert_sums(importance, expected, TOLERANCE[dtype])
    assert importance.samples == len(inputs)
    assert importance.tokens == (inputs.numel() if case == "transformer" else None)
    assert importance.metadata["labels"] == labels
    assert importance.metadata["estimator"] == "estimate_fisher"


AUTOMATIC = {
    "100 classes": (lambda: (nn.Linear(4, 100), torch.randn(6, 4)), "exact", None),
    "101 classes": (lambda: (nn.Linear(4, 101), torch.randn(6, 4)), "sample", "of 101 classes"),
    "sequences": (lambda: transformer_case()[:2], "sample", "of sequences"),
}


@pytest.mark.parametrize("kind", AUTOMATIC)
def test_labels_are_chosen(kind, caplog):
    """Exact to 100 classes, else drawn as torch.manual_seed says, and that is said once."""
    make, labels, said = AUTOMATIC[kind]
    model, inputs = make()
    _log_once.cache_clear()
    found = []
    for chosen in ("auto", labels, "auto"):
        torch.manual_seed(3)
        found.append(estimate_fisher(model, inputs.split(4), chosen))
    for importance in found:
        assert importance.metadata["labels"] == labels
        for name, value in found[0].sums.items():
            assert torch.equal(importance.sums[name], value)
    assert [i.metadata.get("labels_chosen") for i in found] == ["auto", None, "auto"]
    sentence = (
        f"labels='auto' is labels='sample' for logits {said}: labels are drawn from the model, "
        f"since labels='exact' is for [N, C] with at most 100 classes."
    )
    assert caplog.messages == ([] if said is None else [sentence])


def test_closed_form():
    """Softmax regression: E_y[(∂ log p(y) / ∂W_ci)²] = x_i² p_c (1 − p_c), for one sample."""
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    p = model(x).softmax(-1).detach()
    bias = p * (1 - p)
    expected = {"weight": bias.T @ x**2, "bias": bias.sum(0)}
    assert_sums(estimate_fisher(model, [x]), expected, 1e-12)

    # Sampled labels converge to it; 20 000 draws per sample leave an error of about 1 %.
    repeated = x.repeat(20_000, 1).split(10_000)
    sampled = estimate_fisher(
        model, repeated, "sample", max_samples=None, generator=torch.Generator().manual_seed(0)
    )
    for name, value in sampled.sums.items():
        torch.testing.assert_close(value / 20_000, expected[name], rtol=0.05, atol=0)


def test_ignored_targets():
    """Ignored tokens have no loss in any mode; samples of nothing else are not counted."""
    model, inputs, targets = transformer_case()
    targets[torch.rand(targets.shape) < 0.4] = -100
    targets[3] = -100
    counted = int((targets != -100).sum())
    labelled = {
        "empirical": targets,
        "predicted": torch.where(targets == -100, -100, model(inputs).argmax(-1)),
    }
    for labels, y in labelled.items():
        importance = estimate_fisher(model, [(inputs, targets)], labels=labels)
        assert (importance.samples, importance.tokens) == (9, counted)
        assert_sums(importance, oracle(model, inputs, data_labels(y)), 1e-5)

    model, inputs, targets = mlp_case()
    targets[::3] = -100
    for labels, y in (("empirical", data_labels(targets)), ("exact", all_labels)):
        importance = estimate_fisher(model, [(inputs, targets)], labels, max_samples=7)
        assert importance.samples == 7
        kept = (targets != -100).nonzero().squeeze(1)[:7]
        label = y if labels == "exact" else data_labels(targets[kept])
        assert_sums(importance, oracle(model, inputs[kept], label), 1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_target_dtypes(dtype):
    model = nn.Linear(3, 200)
    inputs, targets = torch.randn(4, 3), torch.tensor([1, 156, 199, 0])  # 156 is −100 in uint8
    importance = estimate_fisher(model, [(inputs, targets.to(dtype))], "empirical")
    assert importance.samples == 4
    assert_sums(importance, oracle(model, inputs, data_labels(targets)), 1e-5)


@pytest.mark.parametrize("as_dict", [False, True])
def test_per_sample_loss(as_dict):
    model, inputs, targets = mlp_case()

    def loss(model: nn.Module, batch) -> Tensor:
        x, y = (batch["x"], batch["more"][0]) if as_dict else batch
        return F.cross_entropy(model(x), y, reduction="none")

    batches = list(zip(inputs.split(5), targets.split(5), strict=True))
    if as_dict:
        batches = [{"x": x, "more": [y], "note": "kept"} for x, y in batches]
    importance = estimate_fisher(model, batches, "empirical", max_samples=8, per_sample_loss=loss)
    assert importance.samples == 8
    assert_sums(importance, oracle(model, inputs[:8], data_labels(targets)), 1e-5)


@pytest.mark.parametrize(("limit", "samples", "taken"), [(7, 7, 2), (8, 8, 2), (None, 12, 3)])
def test_max_samples(limit, samples, taken):
    model, inputs, targets = mlp_case()
    yielded = []

    def batches():
        for batch in zip(inputs.split(4), targets.split(4), strict=True):
            yielded.append(batch)
            yield batch

    importance = estimate_fisher(model, batches(), max_samples=limit)
    assert importance.samples == samples
    assert len(yielded) == taken
    assert_sums(importance, oracle(model, inputs[:samples], all_labels), 1e-5)


class NormedMLP(MLP):
    """Has a buffer that training mode would change."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(0, nn.BatchNorm1d(7, affine=False))


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model_alone(fails):
    model, (_, inputs, targets) = NormedMLP(), mlp_case()
    model.body[1].eval()  # flags that differ
    model.body[4].weight.requires_grad_(False)
    mean_loss(model(inputs), targets).backward()
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    grads = [p.grad for p in parameters]
    values = [None if g is None else g.clone() for g in grads]
    requires = [p.requires_grad for p in parameters]

    with torch.no_grad():
        if fails:
            with pytest.raises(ValueError, match="targets must be in"):
                estimate_fisher(model, [(inputs, targets + 9)], "empirical")
        else:
            estimate_fisher(model, [(inputs, targets)])
        assert not torch.is_grad_enabled()

    assert flags == [module.training for module in model.modules()]
    assert requires == [p.requires_grad for p in parameters]
    for p, grad, value in zip(parameters, grads, values, strict=True):
        assert p.grad is grad
        assert grad is None or torch.equal(grad, value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_computes_no_gradients_of_parameters():
    """The backward pass goes to activations only."""
    model, inputs, _ = mlp_case()
    seen = []
    for p in model.parameters():
        p.register_hook(seen.append)
    estimate_fisher(model, [inputs], verify=False)
    assert seen == []


def test_masked_classes():
    """A logit of −∞ is a class that cannot be; it is no error."""
    model = Uses(lambda m, x: x.masked_fill(torch.tensor([False, False, False, True]), -math.inf))
    x = torch.randn(5, 4)
    p = F.linear(x, model.first.weight, model.first.bias)[:, :3].softmax(-1).detach()
    expected = {"first.bias": F.pad((p * (1 - p)).sum(0), (0, 1)),
                "first.weight": F.pad((p * (1 - p)).T @ x**2, (0, 0, 0, 1))}  # fmt: skip
    assert_sums(estimate_fisher(model, [x]), expected, 1e-5)


def test_progress_bar(capsys):
    model, inputs, _ = mlp_case()
    estimate_fisher(model, [inputs], progress=False)
    estimate_fisher(model, [inputs])  # not a terminal
    assert capsys.readouterr().err == ""
    estimate_fisher(model, [inputs], progress=True)
    shown = capsys.readouterr().err
    assert "Fisher" in shown
    assert "12/12" in shown


def test_no_progress_bar_without_rich(monkeypatch):
    model, inputs, _ = mlp_case()
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    estimate_fisher(model, [inputs])
    with pytest.raises(ModuleNotFoundError, match=r'needs rich: pip install "cl-optim\[cli\]"$'):
        estimate_fisher(model, [inputs], progress=True)
