"""Training parts of a model: last layers, and LoRA with EWC in the full space."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from bad_input import each_of, refused
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from cl_optim import EWCAdamW, estimate_fisher
from cl_optim.retention.adapters import LoRAPenalty, train_last_layers

# peft asks transformers for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.second = nn.Linear(8, 3)

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2))


def randomised(model):
    """B is 0 at first; here nothing is."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.normal_()
    return model


def lora(base, targets, **options):
    return get_peft_model(
        base, LoraConfig(r=2, lora_alpha=6, target_modules=targets, lora_dropout=0.0, **options)
    )


def importance_of(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


CASES = [
    (Classifier, ["first", "second"], {}),
    (gpt2, ["c_attn"], {"fan_in_fan_out": True}),  # Conv1D: W is transposed
    (gpt2, ["wte"], {}),
    (Classifier, ["first"], {"use_rslora": True}),
]


@pytest.mark.parametrize(("make", "targets", "options"), CASES)
def test_the_penalty_is_that_of_the_merged_weights(make, targets, options):
    base = make()
    importance = importance_of(base)
    before = {name: p.detach().double().clone() for name, p in base.named_parameters()}
    model = randomised(lora(base, targets, **options))
    penalty = LoRAPenalty(model, importance, ewc_lambda=0.7)
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    expected = sum(
        0.7 * (importance[name].double() * (merged[name].double() - before[name]) ** 2).sum()
        for name in before
        if any(target in name for target in targets) and name.endswith("weight")
    )
    assert expected > 0.1
    assert penalty().item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("make", "targets", "options"), CASES)
def test_backward_is_the_gradient_of_the_penalty(make, targets, options):
    base = make()
    importance = importance_of(base)
    model = randomised(lora(base, targets, **options))
    penalty = LoRAPenalty(model, importance, ewc_lambda=0.3)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(penalty(), trained)
    value = penalty.backward()
    assert value.item() == pytest.approx(penalty().item())
    for param, grad in zip(trained, expected, strict=True):
        torch.testing.assert_close(param.grad, grad)
    direction = [torch.randn_like(p) for p in trained]
    slope = sum((g * d).sum() for g, d in zip(expected, direction, strict=True)).item()
    ends = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            torch._foreach_add_(trained, direction, alpha=step)
        ends.append(penalty().item())
        with torch.no_grad():
            torch._foreach_add_(trained, direction, alpha=-step)
    assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=1e-2)


def test_the_penalty_does_not_depend_on_how_the_update_is_factored():
    base = Classifier()
    model = randomised(lora(base, ["first"]))
    penalty = LoRAPenalty(model, importance_of(Classifier()))
    layer = model.base_model.model.first
    before = penalty().item()
    mixing = torch.tensor([[2.0, 1.0], [0.5, 3.0]])
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(mixing @ layer.lora_A["default"].weight)
        layer.lora_B["default"].weight.copy_(layer.lora_B["default"].weight @ mixing.inverse())
    assert penalty().item() == pytest.approx(before, rel=1e-5)


def test_consolidate_moves_the_anchor_and_adds_importance():
    base = Classifier()
    first, second = importance_of(base, 1), importance_of(base, 2)
    model = randomised(lora(base, ["first"]))
    penalty = LoRAPenalty(model, first, ewc_lambda=2.0)
    layer = model.base_model.model.first
    anchor = layer.get_delta_weight("default").detach()
    penalty.consolidate(second, decay=0.5)
    assert penalty().item() == 0.0
    state = copy.deepcopy(penalty.state_dict())
    randomised(model)
    moved = layer.get_delta_weight("default").detach() - anchor
    merged = 0.5 * first["first.weight"] + second["first.weight"]
    assert penalty().item() == pytest.approx(2.0 * (merged * moved**2).sum().item(), rel=1e-5)
    other = LoRAPenalty(model, first)
    other.load_state_dict(state)
    assert other().item() == penalty().item()


@pytest.mark.parametrize("space", ["full", "adapters"])
def test_lora_under_ewc_keeps_what_matters_on_a_real_fisher(space):
    """Two tasks that disagree: with EWC, in either space, the first one is forgotten less."""
    torch.manual_seed(0)
    x = torch.randn(300, 5)
    first, second = (x[:, 0] > 0).long(), (x[:, 0] + 2 * x[:, 1] < 0).long()
    base = Classifier()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(base(x), first).backward()
        optimizer.step()
    fisher = estimate_fisher(base, x.split(50), progress=False)
    losses = {}
    for ewc_lambda in (0.0, 30.0):
        torch.manual_seed(1)
        model = lora(copy.deepcopy(base), ["first", "second"])
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        optimizer = EWCAdamW(trained, lr=1e-2, ewc_lambda=ewc_lambda)
        penalty = LoRAPenalty(model, fisher, ewc_lambda)
        if space == "adapters":
            optimizer.consolidate(estimate_fisher(model, x.split(50), progress=False))
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x), second).backward()
            if space == "full":
                penalty.backward()
            optimizer.step()
        losses[ewc_lambda] = [F.cross_entropy(model(x), y).item() for y in (first, second)]
    assert losses[30.0][0] < 0.8 * losses[0.0][0]


def penalty(importance=None, ewc_lambda=1.0, merge=False, **options):
    model = lora(Classifier(), ["first"], **options)
    if merge:
        model.merge_adapter()
    return LoRAPenalty(model, importance or importance_of(Classifier()), ewc_lambda)


def first(value, dtype=torch.float32):
    return {"first.weight": torch.full((8, 5), value, dtype=dtype)}


def loaded(name, shape):
    """Load a state with an anchor that is of no weight of the model."""
    lora_penalty = penalty()
    state = lora_penalty.state_dict()
    state["anchors"] = {name: torch.zeros(shape)}
    lora_penalty.load_state_dict(state)


BAD = [
    ("anchor of another layer", lambda: loaded("second.weight", (8, 5)),
     ValueError, "second.weight.*is of no adapted weight: load it for the model"),
    ("anchor of another shape", lambda: loaded("first.weight", (5, 8)),
     ValueError, r"of shape \(5, 8\), is of no adapted weight"),
    ("no adapters", lambda: LoRAPenalty(Classifier(), first(1.0)),
     ValueError, "must have LoRA layers of peft; Classifier has none"),
    ("another layer", lambda: penalty({"second.weight": torch.ones(3, 8)}),
     ValueError, r"nothing for weight '.*first.base_layer.weight'"),
    ("another shape", lambda: penalty({"first.weight": torch.ones(5, 8)}),
     ValueError, r"must have the weight's shape \(8, 5\), not \(5, 8\)"),
    *((f"importance {bad}", lambda bad=bad: penalty(first(bad)),
       ValueError, "must be finite and at least 0") for bad in (-1.0, math.nan, math.inf)),
    *((f"ewc_lambda={bad}", lambda bad=bad: penalty(ewc_lambda=bad),
       ValueError, "ewc_lambda must be finite and at least 0")
      for bad in (-1.0, math.nan, math.inf)),
    ("importance beyond float32", lambda: penalty(first(1e300, torch.float64)),
     ValueError, r"at least 0 in float32; Importance.normalize\(\) scales"),
    ("consolidate() with decay 2", lambda: penalty().consolidate(first(1.0), decay=2.0),
     ValueError, r"decay must be in \[0, 1\], not 2"),
    ("DoRA", lambda: penalty(use_dora=True), ValueError, "is a DoRA"),
    ("merged adapters", lambda: penalty(merge=True), ValueError, "must not be merged"),
    # An initialisation that changes the frozen weights.
    *((how, lambda how=how: penalty(init_lora_weights=how),
       ValueError, f"'default' has init_lora_weights='{how}'") for how in ("pissa", "olora")),
]  # fmt: skip


@each_of(BAD)
def test_bad_input_to_the_penalty_is_one_sentence(given, error, message):
    with refused(error, message):
        given()


def test_ewc_on_the_adapters_themselves():
    """All parameters given, as one would: the base model cannot move, and costs nothing."""
    model = lora(Classifier(), ["first"])
    x, y = torch.randn(12, 5), torch.randint(3, (12,))
    optimizer = EWCAdamW(model.named_parameters(), ewc_lambda=10.0)
    optimizer.consolidate(estimate_fisher(model, [(x, y)], labels="empirical"))
    names = {name for name, param in model.named_parameters() if param.requires_grad}
    assert len(names) == 2
    assert {one.name for one in optimizer.protected()} == names
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert {param for param in optimizer.state if optimizer.state[param]} == {
        param for param in model.parameters() if param.requires_grad
    }
    # An importance of the whole model, recorded before there were adapters, protects it, too.
    full = {name: torch.ones_like(param) for name, param in Classifier().named_parameters()}
    full |= {name: torch.ones_like(dict(model.named_parameters())[name]) for name in names}
    optimizer.consolidate(full)
    assert len(list(optimizer.protected())) == len(list(model.parameters()))


@pytest.mark.parametrize("initial", [True, "gaussian", "orthogonal"])
def test_the_penalty_begins_at_zero(initial):
    base = Classifier()
    importance = importance_of(base)
    model = lora(base, ["first"], init_lora_weights=initial)
    assert LoRAPenalty(model, importance)().item() < 1e-12


def test_layers_of_a_model_that_is_a_stack_itself():
    inner = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)])
    model = nn.Sequential(inner, nn.ReLU(), nn.Linear(2, 1))
    assert train_last_layers(model, 1) == ["2.weight", "2.bias"]


def test_the_last_layers_learn_and_nothing_else_moves():
    model = gpt2()
    names = train_last_layers(model, 2, also=["transformer.ln_f"])
    assert {name.rsplit(".", 2)[0].split(".")[2] for name in names if ".h." in name} == {"1", "2"}
    assert "transformer.ln_f.weight" in names
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    named = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    optimizer = EWCAdamW(named, lr=0.1)
    tokens = torch.randint(0, 20, (4, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= set(names)
    assert {n for n in names if n.endswith("c_fc.weight")} <= moved
    train_last_layers(model, 1, layers="transformer.h")  # again, on a model that is frozen
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all(".h.2." in name for name in learning)


LAYERS = [
    ("no list of layers", lambda model: train_last_layers(model, 1, layers="layers"),
     ValueError, r"layers must name .*'transformer.h'.*, not 'layers'"),
    *((f"n={n}", lambda model, n=n: train_last_layers(model, n),
       ValueError, "n must be a whole number from 1 to 3, the number") for n in (0, 4, 1.0)),
    ("also no module", lambda model: train_last_layers(model, 1, also=["head"]),
     ValueError, "also names 'head', which is no module"),
    ("a model without layers", lambda _: train_last_layers(nn.Linear(2, 2), 1),
     ValueError, r"Linear has no nn\.ModuleList"),
]  # fmt: skip


@each_of(LAYERS)
def test_bad_input_about_layers_is_one_sentence_and_changes_nothing(given, error, message):
    model = gpt2()
    with refused(error, message):
        given(model)
    assert all(param.requires_grad for param in model.parameters())


def test_under_a_scaler_the_penalty_is_scaled_as_the_loss_is():
    model = randomised(lora(Classifier(), ["first", "second"]))
    penalty = LoRAPenalty(model, importance_of(Classifier()), 3.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(penalty(), trained)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale(sum(0.0 * p.sum() for p in trained)).backward()
    value = penalty.backward(scaler)
    scaler.unscale_(optimizer)
    for param, gradient in zip(trained, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)
    assert float(value) == pytest.approx(float(penalty().detach()))
