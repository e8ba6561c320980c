"""KL(old ‖ new): against its definition in float64, with what was stored, and what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bad_input import each_of, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from cl_optim import EWCAdamW, FisherEstimator, estimate_fisher
from cl_optim.retention import (
    Hidden,
    OldModel,
    ReplayBuffer,
    distillation_loss,
    divergence,
    top_k,
)
from cl_optim.retention.distillation.stored import TopK

# peft asks transformers for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
F64 = torch.float64


def logits(seed, *shape, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def by_definition(new, old, mask, reduction, temperature):
    """One position after another, one class after another."""
    p, q = (torch.softmax(x.double() / temperature, -1) for x in (old, new))
    samples = []
    for n in range(len(new)):
        rows = []
        for index in range(new[n][..., 0].numel()):
            if mask is None or mask[n].flatten()[index]:
                a, b = p[n].reshape(-1, p.shape[-1])[index], q[n].reshape(-1, p.shape[-1])[index]
                rows.append(
                    temperature**2
                    * sum(x * (x / y).log() for x, y in zip(a, b, strict=True) if x > 0)
                )
        samples.append(rows)
    flat = [value for rows in samples for value in rows]
    if reduction == "sum":
        return sum(flat)
    if reduction == "token":
        return sum(flat) / max(len(flat), 1)
    means = [sum(rows) / len(rows) for rows in samples if rows]
    return sum(means) / max(len(means), 1)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(4, 6), (3, 5, 4), (1, 1, 2), (2, 2, 3, 5)]),
    reduction=st.sampled_from(["token", "sequence", "sum"]),
    masked=st.booleans(),
    temperature=st.sampled_from([1.0, 2.0]),
    chunk=st.sampled_from([None, 1, 2, 100]),
    seed=st.integers(0, 100),
)
def test_against_the_definition(shape, reduction, masked, temperature, chunk, seed):
    new, old = logits(seed, *shape).requires_grad_(), logits(seed + 1, *shape)
    mask = None
    if masked:
        mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed)) > 0.5
    loss = distillation_loss(
        new, old, mask, reduction=reduction, temperature=temperature, chunk=chunk
    )
    twin = new.detach().clone().requires_grad_()
    expected = by_definition(twin, old, mask, reduction, temperature)
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    loss.backward()
    if expected.requires_grad:
        expected.backward()
        torch.testing.assert_close(new.grad, twin.grad, rtol=1e-9, atol=1e-12)
    else:
        assert not new.grad.any()


# --- hidden states --------------------------------------------------------------------------------


def hidden(seed: int, *shape: int, classes: int = 11, bias: bool = True) -> Hidden:
    return Hidden(
        logits(seed, *shape), logits(seed + 1, classes, shape[-1]),
        logits(seed + 2, classes) if bias else None,
    )  # fmt: skip


def made(one: Hidden) -> torch.Tensor:
    return F.linear(*one)


@pytest.mark.parametrize("chunk", [1, 4, 100, None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["logits", "stored", "hidden"])
def test_hidden_states_give_the_loss_and_the_gradients_of_logits(kind, bias, chunk):
    before = hidden(5, 2, 5, 3, bias=bias)
    old = {"logits": made(before), "hidden": before, "stored": top_k(made(before), 4)}[kind]
    mask = torch.rand(2, 5) > 0.3
    found = []
    for of_states in (True, False):
        new = Hidden(
            *(None if x is None else x.requires_grad_() for x in hidden(0, 2, 5, 3, bias=bias))
        )
        given_old = made(before) if kind == "hidden" and not of_states else old
        loss = distillation_loss(new if of_states else made(new), given_old, mask, chunk=chunk)
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in new if x is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert before.states.grad is None


def test_no_more_than_a_chunk_of_logits_is_ever_there():
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result,) if isinstance(x, torch.Tensor))
            return result

    positions, units, classes, chunk = 64, 4, 500, 8
    new = Hidden(*(x.requires_grad_() for x in hidden(0, 1, positions, units, classes=classes)))
    with Largest():
        distillation_loss(
            new, hidden(5, 1, positions, units, classes=classes), chunk=chunk
        ).backward()
    assert max(sizes) == chunk * classes
    assert new.states.grad.abs().sum() > 0


def test_by_itself_hidden_states_go_in_chunks(monkeypatch):
    from cl_optim.retention.distillation import loss as module

    seen = []
    inner = module._divergence

    def watched(temperature, new, before, rows, *old):
        seen.append(len(rows))
        return inner(temperature, new, before, rows, *old)

    monkeypatch.setattr(module, "_divergence", watched)
    distillation_loss(hidden(0, 1, 1500, 3), hidden(5, 1, 1500, 3))
    assert seen == [1024, 476]


@pytest.mark.parametrize("chunk", [None, 2])
def test_gradients(chunk):
    new, old = logits(0, 3, 5).requires_grad_(), logits(1, 3, 5)
    torch.autograd.gradcheck(lambda x: distillation_loss(x, old, chunk=chunk), new)
    stored = top_k(old, 2)
    torch.autograd.gradcheck(lambda x: distillation_loss(x, stored, chunk=chunk), new)
    assert distillation_loss(old, old).item() == 0.0
    old.requires_grad_()
    distillation_loss(new, old).backward()
    assert old.grad is None


def test_stored_outputs_count_the_rest_as_one_class():
    new, old = logits(0, 4, 3, 9), logits(1, 4, 3, 9)
    whole = distillation_loss(new, old)
    torch.testing.assert_close(distillation_loss(new, top_k(old, 9)), whole)
    torch.testing.assert_close(distillation_loss(new, top_k(old, 100)), whole)
    order = old.argsort(-1, descending=True)
    p, q = (torch.softmax(x, -1).gather(-1, order) for x in (old, new))
    previous = 0.0
    for k in range(1, 8):
        both = [torch.cat([x[..., :k], x[..., k:].sum(-1, keepdim=True)], -1) for x in (p, q)]
        expected = (both[0] * (both[0] / both[1]).log()).sum(-1).mean()
        found = distillation_loss(new, top_k(old, k))
        torch.testing.assert_close(found, expected)
        assert previous <= found + 1e-12 <= whole + 1e-9  # a bound that rises with k
        previous = float(found)


def test_float16_is_enough_for_what_is_stored():
    new, old = logits(0, 8, 300, dtype=torch.float32), logits(1, 8, 300, dtype=torch.float32)
    stored = top_k(old, 300)
    assert stored.log_probs.dtype == torch.float16
    assert sum(part[0].nbytes for part in top_k(old, 64)[:2]) == 6 * 64
    torch.testing.assert_close(
        distillation_loss(new, stored), distillation_loss(new, old), rtol=2e-3, atol=1e-3
    )
    sharp = torch.full((2, 5), -1e4).index_fill_(1, torch.tensor([2]), 1e4)
    for k in (1, 3, 5):
        same = distillation_loss(sharp, top_k(sharp, k))
        assert same.item() == pytest.approx(0.0, abs=1e-4)
        assert math.isfinite(distillation_loss(-sharp, top_k(sharp, k)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    new, old = logits(0, 6, 50, dtype=dtype).requires_grad_(), logits(1, 6, 50, dtype=dtype)
    loss = distillation_loss(new, old)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), distillation_loss(new.double(), old.double()), rtol=1e-5, atol=0
    )
    loss.backward()
    assert new.grad.dtype == dtype


def test_classes_that_are_impossible():
    old = torch.tensor([[0.0, -math.inf, 1.0]], dtype=F64)
    new = torch.tensor([[0.0, 5.0, 1.0]], dtype=F64, requires_grad=True)
    loss = distillation_loss(new, old)
    p, q = torch.softmax(old, -1)[0], torch.softmax(new.detach(), -1)[0]
    expected = sum(p[i] * (p[i] / q[i]).log() for i in (0, 2))
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    torch.testing.assert_close(new.grad[0], q - p)


def test_a_buffer_keeps_what_is_stored_beside_its_samples():
    x, old = torch.arange(12.0).view(6, 2), logits(0, 6, 5)
    buffer = ReplayBuffer(10)
    buffer.add({"x": x, "old": top_k(old, 3)})
    drawn = buffer.sample(4)
    rows = (drawn["x"][:, 0] / 2).long()
    loss = distillation_loss(logits(1, 6, 5)[rows], drawn["old"])
    expected = TopK(*(part[rows] for part in top_k(old, 3)))
    torch.testing.assert_close(loss, distillation_loss(logits(1, 6, 5)[rows], expected))


# --- the old model --------------------------------------------------------------------------------


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def trained(model, optimizer, steps=3):
    for seed in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        F.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:anchor_dtype rounds the anchors")
@pytest.mark.parametrize("options", [{}, {"anchor_dtype": torch.bfloat16}])
def test_anchors_are_the_old_model(options):
    model, x = classifier(), torch.randn(5, 4)
    optimizer = EWCAdamW(model.named_parameters(), lr=0.05, **options)
    optimizer.consolidate(None)
    before = copy.deepcopy(model).eval()(x)
    was = OldModel(model, optimizer)
    trained(model, optimizer)
    now = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = was(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not found.requires_grad
    if options:
        torch.testing.assert_close(found, before, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(found, before)
    assert all(torch.equal(value, now[name]) for name, value in model.state_dict().items())
    optimizer.consolidate(None)  # the next task's
    torch.testing.assert_close(was(x), copy.deepcopy(model).eval()(x), rtol=0.02, atol=0.02)


def test_other_forms_of_the_old_model(tmp_path):
    model, x = classifier(), torch.randn(5, 4)
    copy_, state = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "old.pt")
    expected = copy.deepcopy(model).eval()(x)
    for old in (copy_, state, tmp_path / "old.pt"):
        was = OldModel(model, old)
        trained(model, torch.optim.SGD(model.parameters(), lr=0.5))
        state["0.weight"].add_(1.0)  # the user's own
        assert torch.equal(was(x), expected)
        state["0.weight"].copy_(copy_[0].weight.detach())
        model.load_state_dict(copy_.state_dict())


def test_adapters_that_are_switched_off():
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    base = GPT2LMHeadModel(config).eval()
    tokens = torch.randint(0, 20, (2, 5))
    expected = base(tokens).logits.detach().clone()
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_()
    assert torch.equal(OldModel(model)(tokens).logits, expected)
    assert not torch.equal(model(tokens).logits, expected)
    value = divergence(model, None, [{"input_ids": tokens}])
    exact = distillation_loss(model(tokens).logits.detach().double(), expected.double())
    assert value == pytest.approx(float(exact), rel=1e-4)


def test_no_pull_is_taken_for_an_old_pass():
    """Else weights would change between a forward pass and its backward pass."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(6, 4)
    optimizer = EWCAdamW(model.named_parameters(), lr=0.05, penalty="proximal", strength=1.0)
    optimizer.consolidate(
        estimate_fisher(model, [(x, torch.arange(6) % 3)], "empirical", structure="kronecker")
    )
    optimizer.settle_before(model)
    before = copy.deepcopy(model)(x).detach()
    was = OldModel(model, optimizer)
    trained(model, optimizer, 3)  # a pull is due
    now = [param.detach().clone() for param in model.parameters()]
    logits = model(x)
    assert torch.equal(was(x), before)
    distillation_loss(logits, was(x)).backward()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), now, strict=True))
    model.eval()(x)  # a look at the new weights settles, as ever
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), now, strict=True))


def test_no_estimator_counts_old_passes():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), torch.randn(6, 4)
    was = OldModel(model, copy.deepcopy(model).state_dict())
    found = []
    for distilled in (False, True):
        fisher = FisherEstimator(model, during_training=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with fisher.attach(optimizer):
            loss = F.cross_entropy(model(x), torch.arange(6) % 3)
            if distilled:
                was(x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(fisher.finalize())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


# --- divergence -----------------------------------------------------------------------------------


def test_divergence_is_the_mean_over_all_batches():
    model, other = classifier(0).double(), classifier(1).double()
    x = torch.randn(10, 4, dtype=F64)
    exact = float(distillation_loss(model.eval()(x), other.eval()(x)).detach())
    model.train()
    parts = [x[:3], (x[3:8], torch.zeros(5)), [x[8:]]]
    assert divergence(model, other, parts) == pytest.approx(exact, rel=1e-12)
    assert model.training
    assert divergence(model, other, parts, top=3) == pytest.approx(exact, rel=1e-12)
    assert 0 < divergence(model, other, parts, top=1) < exact
    assert divergence(model, copy.deepcopy(model), parts) == 0.0


def test_padding_does_not_count():
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model, other = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    tokens = torch.randint(0, 20, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens}
    rows = [tokens[:1], tokens[1:, :3]]
    with torch.no_grad():
        sums = [
            float(
                distillation_loss(model.eval()(r).logits, other.eval()(r).logits, reduction="sum")
            )
            for r in rows
        ]
    assert divergence(model, other, [batch]) == pytest.approx(sum(sums) / 9, rel=1e-4)
    assert divergence(model, other, [batch], mask=lambda batch: None) != pytest.approx(
        sum(sums) / 9
    )


# --- refusals -------------------------------------------------------------------------------------

NEW, OLD = logits(0, 4, 3, 5), logits(1, 4, 3, 5)
STORED = top_k(OLD, 2)
BAD = [
    ("kind", {"old": [1.0]}, TypeError, "^old must be logits, what .* makes, or retention.Hidden"),
    ("another vocabulary", {"old": hidden(0, 4, 3, 2, classes=6)}, ValueError,
     r"^old has shape \[4, 3, 6\] and logits \[4, 3, 5\]"),
    ("a weight", {"old": Hidden(OLD, torch.ones(5, 4))}, ValueError,
     r"^the weight of old must be \[V, 5\]"),
    ("a bias", {"old": Hidden(OLD, torch.ones(5, 5), torch.ones(4))}, ValueError,
     r"^the bias of old must be \[5\], not \[4\]"),
    ("shape", {"old": OLD[:, :2]}, ValueError, r"^old has shape \[4, 2, 5\] and logits"),
    ("vocabulary", {"old": top_k(logits(1, 4, 3, 6), 2)}, ValueError,
     "^stored outputs are of 6 classes, and the model has 5: store them anew"),
    ("positions", {"old": TopK(STORED[0][:, :2], STORED[1][:, :2], STORED[2])}, ValueError,
     r"^stored outputs are of positions \[4, 2\]"),
    ("indices", {"old": STORED._replace(indices=STORED.indices + 4)}, ValueError,
     "^stored outputs have indices beyond"),
    ("stored shapes", {"old": STORED._replace(log_probs=STORED[0][..., :1])}, ValueError,
     "^stored outputs must be log_probs and indices"),
    ("stored temperature", {"old": STORED, "temperature": 2.0}, ValueError,
     "^temperature must be 1 for stored"),
    ("temperature", {"temperature": 0.0}, ValueError, "^temperature must be positive"),
    ("reduction", {"reduction": "mean"}, ValueError, "^reduction must be one of"),
    ("chunk", {"chunk": 0}, ValueError, "^chunk must be at least 1"),
    ("mask", {"mask": torch.ones(4)}, ValueError, r"^mask has shape \[4\]"),
    ("one dimension", {"logits": NEW[0, 0], "old": OLD[0, 0]}, ValueError,
     "^logits must have the shape"),
]  # fmt: skip


@each_of(BAD)
def test_losses_refused(given, error, message):
    with refused(error, message):
        distillation_loss(**{"logits": NEW, "old": OLD, **given})


def test_old_models_refused():
    model = classifier()
    with refused(ValueError, "^old must be given: Sequential has no adapters"):
        OldModel(model)
    with refused(ValueError, "^old is the model itself"):
        OldModel(model, model)
    with refused(ValueError, "has no anchors: consolidate"):
        OldModel(model, EWCAdamW(model.named_parameters()))
    with refused(ValueError, "^old has nothing for '2.weight', '2.bias'"):
        OldModel(model, {"0.weight": torch.zeros(8, 4), "0.bias": torch.zeros(8)})
    with refused(TypeError, "^old must be a state dict"):
        OldModel(model, 3)
    with refused(ValueError, "is on the meta device: load"):
        OldModel(nn.Linear(2, 2, device="meta"), {"weight": torch.ones(2, 2)})


def test_divergences_refused():
    model, other = classifier(0), classifier(1)
    with refused(ValueError, "^batches have no position that counts"):
        divergence(model, other, [])
    with refused(ValueError, "^the old model's logits must not be NaN"):
        divergence(model, other, [torch.full((2, 4), math.nan)])
    with refused(TypeError, "^the model returns dict, which has no logits"):
        divergence(_Wrapped(model), _Wrapped(other), [torch.zeros(2, 4)])
    with refused(ValueError, "^logits must not be NaN"):
        top_k(torch.tensor([[math.nan, 0.0]]))
    with refused(ValueError, "^k must be"):
        top_k(OLD, 0)


class _Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"scores": self.inner(x)}


def test_anchors_of_a_model_with_running_statistics_are_no_old_model():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model(torch.randn(64, 4))
    optimizer = EWCAdamW(model.named_parameters(), lr=0.0)
    optimizer.consolidate(None)
    with refused(ValueError, r"do not have the running statistics .*'1.running_mean'.*state dict"):
        OldModel(model, optimizer)
    was = OldModel(model, {name: value.clone() for name, value in model.state_dict().items()})
    x = torch.randn(5, 4)
    before = was(x)
    model.train()(100 + torch.randn(64, 4))
    assert torch.equal(was(x), before)
