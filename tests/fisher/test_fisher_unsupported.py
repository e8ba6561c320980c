"""Uses of parameters that have no rule, or are not seen: refused with a name and a remedy."""

import pytest
import torch
import torch.nn.functional as F
from fisher_cases import Opaque, Uses, losses, oracle, predicted_labels, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cl_optim import Importance
from cl_optim.fisher import FisherEstimator, estimate_fisher

N = 3

# --- seen in the forward pass ---------------------------------------------------------------------


def clamped(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, m.p[0].clone().clamp_(min=0.0))


def assigned(m: nn.Module, x: Tensor) -> Tensor:
    weight = m.p[0].clone()
    weight[0] = 0.0
    return F.linear(x, weight)


IN_PLACE = r"uses parameter 'p\.0' in a way that is not supported: it is changed in place"
# What the message must match, the use, and the shapes of the parameters and of the input.
USES = {
    "in a list": (r"^torch\.stack uses parameter 'p\.0'",
        lambda m, x: x + torch.stack([x[0], m.p[0]]).sum(), [(4,)], (N, 4)),
    "cat": (r"^torch\.cat uses parameter 'p\.0'", lambda m, x: torch.cat([x[1:], m.p[0][None]]),
        [(4,)], (N, 4)),
    "as input": (r"functional\.linear uses parameter 'first\.weight'",
        lambda m, x: F.linear(m.first.weight, x), [], (4, 4)),
    "left factor": (r"matmul.* uses parameter 'first\.weight'", lambda m, x: m.first.weight @ x, [],
        (4, 4)),
    "alpha": (r"addmm uses parameters 'p\.0', 'first\.weight' in a way.*alpha = 2",
        lambda m, x: torch.addmm(m.p[0], x, m.first.weight, alpha=2), [(4,)], (N, 4)),
    "changed in place": (r"mul_ uses parameter 'p\.0' in a way .* changed in place",
        lambda m, x: m.p[0][:].mul_(x), [(4,)], (4, 4)),
    "clamped in place": (IN_PLACE, clamped, [(7, 4)], (N, 5, 4)),
    "assigned to": (IN_PLACE, assigned, [(7, 4)], (N, 5, 4)),
    "einsum of samples": ("the first dimension of what it meets has to be the samples'",
        lambda m, x: torch.einsum("bti,bo->tio", x, m.p[0]), [(N, 7)], (N, 4, 4)),
    "einsum of a diagonal": ("a label that an operand has twice",
        lambda m, x: torch.einsum("btt,to->bto", x, m.p[0]), [(4, 7)], (N, 4, 4)),
}  # fmt: skip


# Before these the self-check's own pass finds something else: torch's error, losses of no sample.
UNVERIFIED = {"changed in place", "einsum of samples"}


@pytest.mark.parametrize("own_pass", [False, True])
@pytest.mark.parametrize("kind", USES)
def test_use_without_a_rule(kind, own_pass):
    message, use, shapes, of = USES[kind]
    model, x = Uses(use, *(randn(*shape) for shape in shapes)), torch.randn(of)

    def observed() -> None:
        with FisherEstimator(model).observe(len(x)):
            model(x)

    def in_own_pass() -> None:
        if kind in UNVERIFIED:
            estimate_fisher(model, [x], verify=False)
        else:
            estimate_fisher(model, [x], "empirical", per_sample_loss=losses)

    with pytest.raises(NotImplementedError, match=message):
        (in_own_pass if own_pass else observed)()


VECTORS, STEPS = torch.randn(N, 4, requires_grad=True), torch.randn(5, N, 4, requires_grad=True)
INDICES = torch.tensor([[1], [2], [0]])
EMBEDDING = r"embedding uses parameter '0\.weight' in a.*"
# The error, what its message must match, the module and what it is called with.
MODULES = {
    "conv1d": (NotImplementedError, "conv1d uses .*must have 3 dimensions, the first for sam",
        nn.Conv1d(4, 4, 1), [STEPS[0].mT]),
    "conv_transpose1d": (NotImplementedError, "conv_transpose1d uses .*must have 3 dimensions",
        nn.ConvTranspose1d(4, 4, 1), [STEPS[0].mT]),
    "batch_norm": (ValueError, "batch_norm in training mode", nn.BatchNorm1d(4), [VECTORS]),
    "batch_norm without parameters": (ValueError, "batch_norm in training mode",
        nn.BatchNorm1d(4, affine=False), [VECTORS]),
    "bilinear": (NotImplementedError, r"bilinear uses parameters '0\.weight', '0\.bias'",
        nn.Bilinear(4, 4, 2), [VECTORS, VECTORS]),
    "max_norm": (NotImplementedError, EMBEDDING + "max_norm", nn.Embedding(5, 3, max_norm=1.0),
        [INDICES]),
    "scale_grad_by_freq": (NotImplementedError, EMBEDDING + "scale_grad_by_freq",
        nn.Embedding(5, 3, scale_grad_by_freq=True), [INDICES]),
    "sparse": (NotImplementedError, EMBEDDING + "sparse", nn.Embedding(5, 3, sparse=True),
        [INDICES]),
    "proj_size": (NotImplementedError, "proj_size is not supported", nn.LSTM(4, 6, proj_size=3),
        [STEPS]),
    "packed sequence": (NotImplementedError, "a PackedSequence is not supported; pad it",
        nn.GRU(4, 6), [nn.utils.rnn.pack_sequence([STEPS[:, 0], STEPS[:3, 1]])]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODULES)
def test_module_without_a_rule(kind):
    error, message, module, inputs = MODULES[kind]
    model = nn.ModuleList([module, nn.Linear(4, 4)])  # so that there is a parameter
    with pytest.raises(error, match=message), FisherEstimator(model).observe(N):
        module(*inputs)


# --- seen when the gradient comes -----------------------------------------------------------------


def put_into(x: Tensor, value: Tensor) -> Tensor:
    """As a mask token is put, or what stands for a condition that is left out."""
    x = x * 1.0
    x[:, 0] = value
    return x


# What the message must match, the use, and the shapes of the parameters.
UNSEEN = {
    "put into another": (r"__setitem__ uses parameter 'p\.0', and there is no rule",
        lambda m, x: put_into(m.first(x), m.p[0]), [(4,)]),
    "alone": (r"^parameter 'p\.0' received", lambda m, x: Opaque.apply(x, m.p[0]), [(4,)]),
    "beside a seen one": (r"^parameter 'first\.b", lambda m, x: Opaque.apply(x, m.first.bias), []),
    "reentrant": (r"^parameter 'p\.0' received",
        lambda m, x: checkpoint(F.linear, x, m.p[0], use_reentrant=True), [(4, 4)]),
    "non-reentrant": ("^a function inside an activation checkpoint uses parameters",
        lambda m, x: checkpoint(F.linear, x, m.p[0], use_reentrant=False), [(4, 4)]),
    "of a function of it": (r"^parameter 'p\.0' received a gradient from a use that was not seen",
        lambda m, x: Opaque.apply(x, F.normalize(m.p[0], dim=0)), [(4,)]),
    "of a function beside a seen one": (
        r"^parameter 'p\.0' received a gradient from a use that was not seen",
        lambda m, x: x * (w := F.normalize(m.p[0], dim=0)) + Opaque.apply(x, w), [(4,)]),
    "of a view of it": (r"^parameter 'p\.0' received a gradient from a use that was not seen",
        lambda m, x: Opaque.apply(x, m.p[0][:4]), [(4,)]),
    "with data": (r"bilinear uses parameter 'p\.0', and there is no rule",
        lambda m, x: F.bilinear(x.detach(), x.detach(), m.p[0].view(1, 4, 1).expand(4, 4, 4)),
        [(4,)]),
}  # fmt: skip


@pytest.mark.parametrize("verify", ["first", False])
@pytest.mark.parametrize("kind", UNSEEN)
def test_unseen_use(kind, verify):
    """Never silent. The sums may be spoilt by then, and finalize says so."""
    message, use, shapes = UNSEEN[kind]
    model, x = Uses(use, *(randn(*shape) for shape in shapes)), torch.randn(N, 5, 4)
    fisher = FisherEstimator(model, verify=verify)
    with pytest.raises(NotImplementedError, match=message), fisher.observe(N):
        losses(model, x).sum().backward()
    spoilt = message.startswith("^parameter")  # else it fails before it has reached one
    with pytest.raises(RuntimeError, match="backward pass had begun" if spoilt else "nothing was"):
        fisher.finalize()


@pytest.mark.parametrize("verify", ["first", False])
@pytest.mark.parametrize("kind", UNSEEN)
def test_unseen_use_in_its_own_pass(kind, verify):
    message, use, shapes = UNSEEN[kind]
    model, x = Uses(use, *(randn(*shape) for shape in shapes)), torch.randn(N, 5, 4)

    def estimate() -> Importance:
        return estimate_fisher(model, [x], "empirical", per_sample_loss=losses, verify=verify)

    if kind == "non-reentrant" and torch.__version__ < "2.11":  # whose checkpoints let it be seen
        found, model.use = estimate(), lambda m, x: F.linear(x, m.p[0])
        expected = estimate()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
        return
    with pytest.raises(NotImplementedError, match=message):
        estimate()
    assert all(p.grad is None for p in model.parameters())


# --- the remedy -----------------------------------------------------------------------------------


def features(*first: nn.Module) -> nn.Module:
    """Classes of inputs [4, 4]."""
    return nn.Sequential(*first, nn.Flatten(), nn.LazyLinear(3))


REFUSED = {
    "no rule": lambda: features(Uses(lambda m, x: torch.cdist(x, m.p[0]), randn(4, 4))),
    "several at once": lambda: features(
        Uses(lambda m, x: F.bilinear(x, x, *m.p), randn(4, 4, 4), randn(4))
    ),
    "not supported": lambda: features(Uses(USES["alpha"][1], randn(4))),
    "unseen": lambda: features(Uses(UNSEEN["alone"][1], randn(4))),
    "beside a seen one": lambda: features(Uses(UNSEEN["beside a seen one"][1])),
    "rows of samples": lambda: Uses(
        lambda m, x: torch.cat([F.linear(x[:3], m.p[0]), F.linear(x[3:], m.p[0])]), randn(4, 4)
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_ends_in_its_remedy(kind):
    """Each names the parameter, and random signs then find what a loop over samples does."""
    model = REFUSED[kind]()
    x = torch.randn(4, 4)
    model(x)  # how many features there are
    freeze = "or freeze what should be left out with requires_grad_(False)."
    with pytest.raises((NotImplementedError, ValueError), match=r"parameters? '") as refused:
        estimate_fisher(model, [x])
    sentence = str(refused.value)
    assert sentence.endswith(f"; estimate it by random signs with unsupported='sign', {freeze}")
    with pytest.raises(type(refused.value)) as refused, FisherEstimator(model).observe(4):
        model(x).square().sum().backward()
    how = "estimate_fisher(..., unsupported='sign')"
    assert str(refused.value).endswith(f"; estimate it by random signs with {how}, {freeze}")
    signed = estimate_fisher(
        model, [x], "predicted", unsupported="sign", sign_draws=1000,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    expected = oracle(model, x, predicted_labels)
    left = signed.metadata["sign"]["parameters"]
    assert next(iter(left)) in sentence
    for name, value in signed.sums.items():
        if name in left:
            assert abs(float(value.sum() / expected[name].sum()) - 1) < 0.1, name
        else:
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_the_remedy_for_magnitudes_and_packed_sequences():
    """Random signs estimate squares, of samples with losses of their own."""
    model = Uses(lambda m, x: torch.cdist(x, m.first.weight))
    message = r"'first\.weight'.*; leave it out with unsupported='skip', or freeze what"
    with pytest.raises(NotImplementedError, match=message):
        estimate_fisher(model, [torch.randn(4, 4)], kind="mas")
    with (
        pytest.raises(NotImplementedError, match=r"'first\.weight'.*takes one\); freeze what"),
        FisherEstimator(model).observe(cu_seqlens=[0, 1, 4]),
    ):
        model(torch.randn(4, 4))
