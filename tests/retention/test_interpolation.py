"""Weights between the old ones and the new: exact ends, the budget, and what is refused."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from bad_input import each_of, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from cl_optim import EWCAdamW
from cl_optim.retention import (
    Checkpoints,
    Evaluation,
    InterpolationWarning,
    interpolate,
    interpolation_curve,
)

# peft asks transformers for it by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def network(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def gpt2(vocabulary=20):
    config = GPT2Config(vocab_size=vocabulary, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)


# --- given α --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_between(dtype, alpha):
    old, model = weights(network(0, dtype)), network(1, dtype)
    new = weights(model)
    curve = interpolate(model, old, alpha)
    assert (curve.points, curve.alpha, curve.chosen) == ((), alpha, None)
    if alpha in (0.0, 1.0):
        same(weights(model), old if alpha == 0.0 else new)
    for name, value in weights(model).items():
        exact = old[name].double() + alpha * (new[name].double() - old[name].double())
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def sources(old, tmp_path):
    """The same weights in every form."""
    optimizer = EWCAdamW(old.named_parameters())
    optimizer.consolidate(None)
    save_file(weights(old), tmp_path / "one.safetensors")
    torch.save(weights(old), tmp_path / "plain.pt")
    torch.save({"state_dict": weights(old), "epoch": 3}, tmp_path / "nested.ckpt")
    (tmp_path / "folder").mkdir()
    save_file(weights(old), tmp_path / "folder" / "model.safetensors")
    checkpoints = Checkpoints(tmp_path / "guard", {"model": old, "optimizer": optimizer})
    return {
        "state dict": weights(old),
        "wrapped names": {f"module.{k}": v for k, v in weights(old).items()},
        "module": old,
        "safetensors": tmp_path / "one.safetensors",
        "str": str(tmp_path / "one.safetensors"),
        "torch.save": tmp_path / "plain.pt",
        "nested": tmp_path / "nested.ckpt",
        "folder": tmp_path / "folder",
        "guard": checkpoints.save(1),
    }


def test_old_weights_in_every_form(tmp_path):
    expected = weights(network(0))
    for form, old in sources(network(0), tmp_path).items():
        model = network(1)
        interpolate(model, old, 0.0)
        same(weights(model), expected), form


def test_shards(tmp_path):
    old = gpt2()
    old.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = gpt2()
    interpolate(model, tmp_path, 0.0)
    same(weights(model), weights(old))


def test_anchors_of_an_optimizer_or_of_what_is_around_it():
    from cl_optim import GEM

    model = network(0)
    expected = weights(model)
    optimizer = EWCAdamW(model.named_parameters(), lr=0.1)
    optimizer.consolidate(None)
    for _ in range(3):
        model(torch.randn(4, 5)).sum().backward()
        optimizer.step()
    moved = weights(model)
    interpolate(model, optimizer, 0.0)
    same(weights(model), expected)
    model.load_state_dict(moved)
    interpolate(model, GEM(optimizer), 0.0)
    same(weights(model), expected)


def test_a_tied_weight_is_one():
    old, model = gpt2(), gpt2()
    given = {k: v for k, v in weights(old).items() if k != "lm_head.weight"}
    new = model.lm_head.weight.detach().clone()
    interpolate(model, given, 0.25)
    expected = torch.lerp(given["transformer.wte.weight"], new, 0.25)
    assert torch.equal(model.lm_head.weight, expected)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_lora_is_scaled_in_the_space_of_the_weights():
    base = gpt2()
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_()
    delta = layer.get_delta_weight("default").clone()
    interpolate(model, weights(base), 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)
    with torch.no_grad():
        other = weights(model)
    with pytest.raises(ValueError, match="did not begin at 0"):
        interpolate(model, other | {}, 0.5)


def test_lora_of_an_embedding_begins_with_its_other_factor():
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["wte"]))
    begin = weights(model)
    layer = model.base_model.model.transformer.wte
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_embedding" in name:
                param.normal_()
    delta = layer.get_delta_weight("default").clone()
    assert delta.abs().max() > 0.0
    interpolate(model, begin, 0.5)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.5 * delta)
    with pytest.raises(ValueError, match="did not begin at 0"):
        interpolate(model, weights(model), 0.5)


def test_each_weight_has_an_alpha_of_its_own_by_its_importance():
    old, model = weights(network(0)), network(1)
    new = weights(model)
    generator = torch.Generator().manual_seed(0)
    of_old, of_new = (
        {k: 1e-20 * torch.rand(v.shape, generator=generator) for k, v in new.items()} for _ in "ab"
    )
    for values in (of_old, of_new):
        values["0.bias"][:3] = 0.0
    interpolate(model, old, 0.4, importance=(of_old, of_new))
    for name, value in weights(model).items():
        f, g = of_old[name].double(), of_new[name].double()
        own = torch.where(f + g > 0, 0.4 * g / (0.6 * f + 0.4 * g), 0.4)
        exact = old[name] + own * (new[name].double() - old[name])
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


# --- a budget -------------------------------------------------------------------------------------


def distance(old, name="old", role="old", shape=lambda x: x):
    """An evaluation that is 1 at the old weights, and rises by ``shape`` of the way from them."""
    first = next(iter(old))

    def measure(model):
        value = weights(model)[first]
        return 1.0 + shape(float((value - old[first]).norm()))

    return Evaluation(name, measure, role, higher_is_better=False)


def way(old, new):
    first = next(iter(old))
    return float((new[first] - old[first]).norm())


@settings(max_examples=20, deadline=None)
@given(
    budget=st.floats(0.01, 0.9),
    power=st.floats(0.5, 3.0),
    most=st.floats(0.05, 3.0),
    tolerance=st.sampled_from([0.2, 0.02]),
)
def test_never_more_than_the_budget_and_as_far_as_it_goes(budget, power, most, tolerance):
    old, model = weights(network(0)), network(1)
    new = weights(model)
    scale = way(old, new)
    evaluation = distance(old, shape=lambda x: most * (x / scale) ** power)
    curve = interpolate(model, old, evaluate=evaluation, budget=budget, tolerance=tolerance)
    assert curve.monotone
    exact = min(1.0, (budget / most) ** (1 / power))
    assert exact - tolerance - 1e-3 <= curve.alpha <= exact + 1e-3
    assert curve.chosen.loss <= budget
    assert curve.chosen.loss <= curve.points[-1].loss  # not worse than the new weights
    if curve.alpha == 1.0:
        same(weights(model), new)
    else:
        assert evaluation.measure(model) == curve.chosen.measured[0].value


def test_new_tasks_are_shown_and_do_not_decide():
    old, model = weights(network(0)), network(1)
    scale = way(old, weights(model))
    evaluations = [
        distance(old, "old", shape=lambda x: x / scale),
        distance(old, "new", "new", shape=lambda x: -0.9 * x / scale),
    ]
    curve = interpolate(model, old, evaluate=evaluations, budget=0.25)
    assert curve.alpha == 0.25
    text = str(curve)
    assert "new" in text.splitlines()[0]
    assert "0.25 *" in text
    assert text.endswith("the most that fits is α = 0.25, which loses 25.0%.")


def test_losses_that_do_not_rise_are_said():
    old, model = weights(network(0)), network(1)
    scale = way(old, weights(model))
    evaluation = distance(old, shape=lambda x: math.sin(3 * x / scale))
    curve = interpolate(model, old, evaluate=evaluation, budget=0.2)
    assert curve.alpha == 1.0  # 0.14 at the end, which fits; what is between was not looked at
    evaluation = distance(old, shape=lambda x: 2 * math.sin(5 * x / (2 * scale)))
    curve = interpolate(model, old, evaluate=evaluation, budget=0.2)
    assert not curve.monotone
    assert curve.chosen.loss <= 0.2
    assert "Losses do not rise all the way" in str(curve)


def test_weights_whose_evaluation_is_not_finite_are_not_taken():
    old, model = weights(network(0)), network(1)
    scale = way(old, weights(model))
    evaluation = distance(old, shape=lambda x: 0.1 if x < 0.6 * scale else math.nan)
    curve = interpolate(model, old, evaluate=evaluation, budget=0.2)
    assert 0.57 <= curve.alpha <= 0.6
    assert all(torch.isfinite(value).all() for value in weights(model).values())


def test_a_failure_gives_back_the_new_weights():
    old, model = weights(network(0)), network(1)
    new = weights(model)
    calls = []

    def fails(model):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return 2.0 + len(calls)

    with pytest.raises(RuntimeError, match="out of luck"):
        interpolate(model, old, evaluate=Evaluation("x", fails, higher_is_better=False), budget=0.1)
    same(weights(model), new)


def test_the_whole_curve(tmp_path):
    old, model = weights(network(0)), network(1)
    new = weights(model)
    scale = way(old, new)
    curve = interpolation_curve(model, old, distance(old, shape=lambda x: x / scale), (0.5, 1))
    same(weights(model), new)
    assert [point.alpha for point in curve.points] == [0.0, 0.5, 1.0]
    assert [point.loss for point in curve.points] == pytest.approx([0.0, 0.5, 1.0])
    curve.draw(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(curve)
    assert "+50.0%" in console.export_text()


# --- batch norm -----------------------------------------------------------------------------------


def normed(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    model(3 + 2 * torch.randn(64, 5))
    return model


def test_statistics_of_batch_norms_are_estimated_anew():
    old, model = weights(normed(0)), normed(1)
    x = torch.randn(40, 5)
    interpolate(model, old, 0.5, recalibrate=lambda model: [model(part) for part in x.split(20)])
    inner = model[0](x)
    torch.testing.assert_close(model[1].running_mean, inner.mean(0))
    each = torch.stack([part.var(0) for part in inner.split(20)]).mean(0)
    torch.testing.assert_close(model[1].running_var, each)
    assert model[1].momentum == 0.1
    assert model.training
    new = weights(normed(1))
    model = normed(1)
    interpolate(model, old, 1.0, recalibrate=lambda model: model(x))
    same(weights(model), new)


def test_anchors_without_statistics_are_refused():
    """Old weights with statistics of now are no old model."""
    model = normed(1)
    optimizer = EWCAdamW(model.named_parameters())
    optimizer.consolidate(None)
    x = torch.randn(40, 5)
    with refused(ValueError, r"no running statistics, of 2 buffers .*'1.running_mean'.*state dict"):
        interpolate(model, optimizer, 0.5)
    new = weights(model)
    interpolate(model, optimizer, 0.0, recalibrate=lambda model: model(x))
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))
    # At the new end they are the model's own again.
    model.load_state_dict(new)
    old = Evaluation("old", lambda m: 1.0, higher_is_better=False)
    options = {"evaluate": old, "recalibrate": lambda model: model(x)}
    assert interpolate(model, optimizer, budget=0.1, **options).alpha == 1.0
    same(weights(model), new)
    interpolation_curve(model, optimizer, old, [0.5], recalibrate=lambda model: model(x))
    same(weights(model), new)
    with pytest.raises(ZeroDivisionError):
        interpolate(model, optimizer, 0.5, recalibrate=lambda model: (model(x), 1 / 0))
    same(weights(model), new)
    with pytest.warns(InterpolationWarning, match="1 batch norms are left as they are"):
        interpolate(model, optimizer, 0.5, strict=False)


def test_old_statistics_are_those_of_the_old_end():
    old = weights(normed(0))
    model, x = normed(1), torch.randn(40, 5)
    interpolate(model, old, 0.0, recalibrate=lambda model: model(x))
    same(weights(model), old)


def test_a_budget_of_given_baselines():
    """Of another model, say, of which these old weights have lost something already."""
    model = nn.Linear(1, 1, bias=False)
    loss = Evaluation("loss", lambda m: float(m.weight), higher_is_better=False)
    old = {"weight": torch.tensor([[1.04]])}
    given = {"evaluate": loss, "baselines": {"loss": 1.0}, "tolerance": 0.01}
    for new, budget, alpha in ((1.08, 0.06, 0.5), (1.05, 0.06, 1.0)):
        nn.init.constant_(model.weight, new)
        curve = interpolate(model, old, budget=budget, **given)
        assert curve.alpha == pytest.approx(alpha, abs=0.02)
    for new, alpha, least in ((1.08, "0", "4.0"), (1.035, "1", "3.5")):
        nn.init.constant_(model.weight, new)
        said = rf"Nothing that was tried fits a budget of 3.0%.* at α = {alpha}, {least}%\.$"
        with pytest.warns(InterpolationWarning, match=said):
            curve = interpolate(model, old, budget=0.03, **given)
        assert float(model.weight.detach()) == pytest.approx(min(new, 1.04))
    with refused(ValueError, "baselines has 'other', which is no evaluation's name"):
        interpolate(model, old, evaluate=loss, budget=0.1, baselines={"other": 1.0})


def test_statistics_of_batch_norms_in_between_are_said():
    old, model = weights(normed(0)), normed(1)
    new = weights(model)
    with pytest.warns(InterpolationWarning, match="running statistics of 1 batch norms"):
        interpolate(model, old, 0.5)
    expected = torch.lerp(old["1.running_mean"], new["1.running_mean"], 0.5)
    assert torch.equal(model[1].running_mean, expected)
    with pytest.raises(ValueError, match="recalibrate ran none of its batches"):
        interpolate(model, old, 0.5, recalibrate=lambda model: None)
    with pytest.warns(InterpolationWarning):
        curve = interpolation_curve(model, old, Evaluation("one", lambda model: 1.0))
    assert curve.alpha == 1.0


# --- refusals -------------------------------------------------------------------------------------


def resized():
    return {**weights(network(0)), "2.weight": torch.zeros(4, 7)}


def without(name):
    return {k: v for k, v in weights(network(0)).items() if k != name}


BAD = [
    ("alpha", {"alpha": 1.5}, ValueError, "^alpha must be in"),
    ("nothing to do", {"alpha": None}, ValueError, "^give either alpha or a budget"),
    ("both", {"budget": 0.1}, ValueError, "^give either alpha or a budget"),
    ("budget", {"alpha": None, "budget": 1.0}, ValueError, "^budget must be between"),
    ("budget NaN", {"alpha": None, "budget": math.nan}, ValueError, "^budget must be between"),
    ("tolerance", {"tolerance": 0.0}, ValueError, "^tolerance must be between"),
    ("no evaluation", {"alpha": None, "budget": 0.1}, ValueError, "^evaluate and budget go"),
    ("kind", {"old": 3}, TypeError, "^old must be a state dict"),
    (
        "shape",
        {"old": resized},
        ValueError,
        r"^'2.weight' has shape \(3, 7\) and the old one \(4, 7\)",
    ),
    ("missing", {"old": lambda: without("2.bias")}, ValueError, "^old has nothing for '2.bias'"),
    (
        "unknown",
        {"old": lambda: {**weights(network(0)), "more": torch.zeros(1)}},
        ValueError,
        "^old has names that the model lacks: 'more'",
    ),
    ("nothing", {"old": dict, "strict": False}, ValueError, "^old has nothing that the model has"),
    (
        "no anchors",
        {"old": lambda: EWCAdamW(network(0).named_parameters())},
        ValueError,
        "has no anchors: consolidate",
    ),
    (
        "plain optimizer",
        {"old": lambda: torch.optim.SGD(network(0).parameters(), lr=1.0)},
        ValueError,
        "has no anchors: consolidate",
    ),
    ("no file", {"old": "nowhere.safetensors"}, FileNotFoundError, "^old: there is no file"),
    (
        "importance",
        {"importance": ({"0.weight": -torch.ones(7, 5)}, {"0.weight": torch.ones(7, 5)})},
        ValueError,
        "^the importance of '0.weight' must be finite",
    ),
    (
        "importance's shape",
        {"importance": ({"0.weight": torch.ones(7)}, {"0.weight": torch.ones(7, 5)})},
        ValueError,
        "^the importance of '0.weight' has shape",
    ),
]


@each_of(BAD)
def test_refused(given, error, message):
    model = network(1)
    new = weights(model)
    arguments = {"old": weights(network(0)), "alpha": 0.5, **given}
    if callable(arguments["old"]):
        arguments["old"] = arguments["old"]()
    with refused(error, message):
        interpolate(model, **arguments)
    same(weights(model), new)


def test_the_models_own_memory_is_not_the_old_weights():
    model = network(0)
    with refused(ValueError, "^old is the model's own memory"):
        interpolate(model, model.state_dict(), 0.5)


def test_anchors_of_another_model():
    optimizer = EWCAdamW(network(0).named_parameters())
    optimizer.consolidate(None)
    with refused(ValueError, "^old is an optimizer of another model"):
        interpolate(network(0), optimizer, 0.5)


def test_two_old_values_of_a_tied_weight():
    old = weights(gpt2())
    old["lm_head.weight"] = old["lm_head.weight"] + 1.0
    with refused(ValueError, "is tied to 'lm_head.weight', and old has two values"):
        interpolate(gpt2(), old, 0.5)


def test_a_resized_vocabulary_is_named():
    with refused(ValueError, r"^'transformer.wte.weight' has shape \(24, 8\) and the old one"):
        interpolate(gpt2(24), weights(gpt2(20)), 0.5)


def test_what_only_one_has_is_left_if_it_is_asked_for():
    model, new = network(1), weights(network(1))
    old = {**without("2.bias"), "more": torch.zeros(1)}
    interpolate(model, old, 0.0, strict=False)
    same(weights(model), {**without("2.bias"), "2.bias": new["2.bias"]} | {})


@pytest.mark.parametrize("content", [b"", b"nonsense" * 9])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_damaged_files(tmp_path, content, suffix):
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    with refused(ValueError, "cannot be read"):
        interpolate(network(0), path, 0.5)


def test_a_damaged_checkpoint_of_a_guard(tmp_path):
    path = Checkpoints(tmp_path, {"model": network(0)}).save(1)
    content = bytearray(path.read_bytes())
    at = content.find(network(0)[0].weight.detach().numpy().tobytes())
    assert at > 0
    content[at] ^= 1  # which torch.load would not notice
    path.write_bytes(content)
    with refused(ValueError, "cannot be read .DamagedError."):
        interpolate(network(1), path, 0.5)


def test_weights_that_are_not_there_or_not_here():
    with refused(ValueError, "is on the meta device: load"):
        interpolate(nn.Linear(2, 2, device="meta"), {"weight": torch.ones(2, 2)}, 0.5)
    model = nn.Module()
    model.register_parameter("_flat_param", nn.Parameter(torch.ones(3)))
    with refused(ValueError, "is distributed over devices: gather"):
        interpolate(model, {"_flat_param": torch.zeros(3)}, 0.5)


def test_an_evaluation_that_says_nothing_of_the_old_weights():
    with refused(ValueError, "^the baseline of evaluation 'x' must be finite and not zero"):
        interpolate(
            network(1),
            weights(network(0)),
            evaluate=Evaluation("x", lambda model: math.nan),
            budget=0.1,
        )
