"""What EWCAdamW refuses: a table of bad input for its constructor and for each of its methods.

A row has the error, where there are several, what its message must match, and what is given.
"""

import copy
import math
from math import inf, nan

import pytest
import torch
from ewc_adamw_cases import importance_like, network, train
from optimizer_cases import assert_refused
from torch import nn

from cl_optim import EWCAdamW
from cl_optim.ops import importance_codec as codec


def weight(*shape, dtype=torch.float32):
    data = torch.ones(shape or (2,), dtype=dtype)
    return nn.Parameter(data, requires_grad=dtype != torch.int64)


GROUP = {
    "ewc_lambda": ("ewc_lambda must be finite and at least 0, not -1.0", {"ewc_lambda": -1.0}),
    "infinite ewc_lambda": ("ewc_lambda must be finite", {"ewc_lambda": inf}),
    "lr": ("lr must be", {"lr": -1.0}),
    "eps": ("eps must be", {"eps": nan}),
    "weight_decay": ("weight_decay must be", {"weight_decay": -1.0}),
    "beta1": ("beta1", {"betas": (1.0, 0.9)}),
    "beta2": ("beta2", {"betas": (0.9, -0.1)}),
    "penalty": ("penalty must be one of", {"penalty": "l1"}),
    "foreach": ("foreach=True and fused=True exclude each", {"foreach": True, "fused": True}),
    "differentiable": (
        "differentiable=True and fused=True exclude", {"differentiable": True, "fused": True},
    ),
    "importance_dtype": ("importance_dtype must be one of", {"importance_dtype": "int8"}),
    "anchor_dtype": ("anchor_dtype must be one of", {"anchor_dtype": "log8"}),
    "state_dtype": ("state_dtype must be one of", {"state_dtype": torch.float16}),
    "rounding": ("rounding must be one of", {"rounding": "up"}),
    "strength": ("strength must be finite and at least 0, or None, not -1.0", {"strength": -1.0}),
    "strength NaN": ("strength must be finite and at least 0, or None", {"strength": math.nan}),
    "damping": ("importance_damping must be finite and at least 0", {"importance_damping": -1.0}),
    **{
        f"{rounding} float16": (
            "rounding must be 'nearest' for parameter bad, which is float16",
            {"params": [("bad", weight(dtype=torch.float16))], "rounding": rounding},
        )
        for rounding in ("stochastic", "kahan")
    },
    **{
        str(dtype): (
            "parameter bad must be of a real floating-point dtype",
            {"params": [("bad", weight(dtype=dtype))]},
        )
        for dtype in (torch.complex64, torch.int64)
    },
}  # fmt: skip


@pytest.mark.parametrize("given", GROUP)
def test_a_group_is_refused(given):
    message, options = GROUP[given]
    group = {"params": [("w", weight())], **options}
    with pytest.raises(ValueError, match=message):
        EWCAdamW(**group)
    optimizer = EWCAdamW([("good", weight())])
    assert_refused(optimizer, lambda: optimizer.add_param_group(group), ValueError, message)
    optimizer.add_param_group({"params": [("other", weight())]})
    assert len(optimizer.param_groups) == 2


def unnamed():
    return EWCAdamW(network().parameters())


def protected(**options):
    """In mid-training of a second task."""
    model = network()
    optimizer = EWCAdamW(model.named_parameters(), **options)
    train(model, optimizer, 1)
    optimizer.consolidate(importance_like(model))
    train(model, optimizer, 1)
    return optimizer


def of_one_name():
    layers = [nn.Linear(2, 1, bias=False) for _ in range(2)]
    optimizer = EWCAdamW([{"params": list(layer.named_parameters())} for layer in layers])
    optimizer.consolidate(None)
    return optimizer


IMPORTANCE = {
    "unknown": ("names 'more', which this optimizer does not have", "more", torch.ones(2)),
    "none": ("nothing for parameter '2.bias'", "2.bias", None),
    "shape": (r"'0.bias' must have the parameter's shape \(4,\)", "0.bias", torch.ones(5)),
    "NaN": ("'0.bias' must be finite", "0.bias", torch.tensor([1, 1, nan, 1])),
    "infinite": ("'2.bias' must be finite", "2.bias", torch.tensor([1, 1, inf])),
    "float64": ("'2.bias' must be fin", "2.bias", torch.tensor([1, 1, 1e300], dtype=torch.double)),
    "negative": ("'2.bias' must be finite and at least 0", "2.bias", torch.tensor([1, 1, -1e-9])),
    "complex": ("'2.bias' must be a real, dense tensor", "2.bias", torch.ones(3) * 1j),
    "sparse": ("'2.bias' must be a real, dense tensor", "2.bias", torch.ones(3).to_sparse()),
    "list": ("'2.bias' must be a real, dense tensor", "2.bias", [1.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("given", IMPORTANCE)
def test_an_importance_is_refused(given):
    message, name, value = IMPORTANCE[given]
    optimizer = protected()
    bad = {**importance_like(network(), 3), name: value}
    bad = {n: f for n, f in bad.items() if f is not None}
    assert_refused(optimizer, lambda: optimizer.consolidate(bad), ValueError, message)


ONE, GOOD = torch.ones(1), importance_like(network())
CONSOLIDATE = {
    "list": (TypeError, "importance must be a mapping .* not list", protected, [ONE], {}),
    **{
        f"decay {of}": (ValueError, r"decay must be in \[0, 1\]", unnamed, None, {"decay": of})
        for of in (-0.1, 1.1, nan)
    },
    "anchors": (ValueError, "anchors must be one of", unnamed, None, {"anchors": "first"}),
    "no names": (ValueError, "without parameter names", unnamed, GOOD, {}),
    "other model": (
        ValueError, "model must hold the optimizer's parameters; 4",
        unnamed, GOOD, {"model": nn.Linear(2, 2)},
    ),
    "ambiguous name": (
        ValueError, "name 'w' is ambiguous",
        lambda: EWCAdamW([("module.w", weight(1)), ("_orig_mod.w", weight(1))]),
        {"w": ONE}, {"strict": False},
    ),
    "ambiguous importance": (
        ValueError, r"'w' and 'module\.w' both mean 'w'",
        lambda: EWCAdamW([("w", weight(1))]), {"w": ONE, "module.w": ONE}, {},
    ),
    "name of two": (
        ValueError, "two parameters have the name 'weight'", of_one_name, {"weight": ONE}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", CONSOLIDATE)
def test_consolidate_refuses(given):
    error, message, make, importance, options = CONSOLIDATE[given]
    optimizer = make()
    assert_refused(optimizer, lambda: optimizer.consolidate(importance, **options), error, message)


def test_decay_is_given_by_name():
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        unnamed().consolidate(None, 0.5)


def partly_protected():
    optimizer = EWCAdamW(network().named_parameters())
    optimizer.consolidate({n: f for n, f in GOOD.items() if n != "2.bias"}, strict=False)
    return optimizer


def masks(**of):
    """One that fits, and one more."""
    return {"masks": {"0.bias": torch.ones(4).bool(), **of}}


FREEZE = {
    "no importance": (RuntimeError, r"needs importance: call consolidate\(\) first", unnamed, {}),
    **{
        f"fraction {of}": (ValueError, r"fraction must be in \[0, 1\]", unnamed, {"fraction": of})
        for of in (-0.1, 1.1, nan)
    },
    "fraction and masks": (
        ValueError, "fraction and masks exclude each other", unnamed, {"fraction": 0.05, **masks()},
    ),
    "mask of numbers": (
        TypeError, "^the mask of '0.bias' must be a bool tensor",
        partly_protected, {"masks": {"0.bias": torch.ones(4)}},
    ),
    "unknown mask": (
        ValueError, "^a mask names 'q', which this optimizer does not have",
        partly_protected, masks(q=torch.ones(1).bool()),
    ),
    "shape of a mask": (
        ValueError, r"^the mask of '0.weight' must have the parameter's shape, not \(3,\)",
        partly_protected, masks(**{"0.weight": torch.ones(3).bool()}),
    ),
    "mask of the unprotected": (
        ValueError, "^a mask is of a parameter that nothing protects",
        partly_protected, masks(**{"2.bias": torch.ones(3).bool()}),
    ),
    "name of two": (
        ValueError, "two parameters have the name 'weight'",
        of_one_name, {"masks": {"weight": torch.ones(1, 2).bool()}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", FREEZE)
def test_freeze_refuses(given):
    error, message, make, arguments = FREEZE[given]
    optimizer = make()
    assert_refused(optimizer, lambda: optimizer.freeze(**arguments), error, message)


def forget_importance(optimizer):
    nothing = {one.name: torch.zeros_like(one.param) for one in optimizer.protected()}
    optimizer.consolidate(nothing, decay=0.0)


NO_GRADIENT = r"needs a gradient: call it after backward\(\)"
SUGGEST_LAMBDA = {
    "no importance": (
        RuntimeError, r"^suggest_lambda\(\) needs importance: call consol",
        lambda o: o.state.clear(),
    ),
    "NaN in the gradient": (
        ValueError, "^the gradient of parameter 2.bias must be finite",
        lambda o: o.param_groups[1]["params"][2].grad[1].fill_(nan),
    ),
    "gradient of 0": (RuntimeError, NO_GRADIENT, lambda o: o.zero_grad(set_to_none=False)),
    "no gradient": (RuntimeError, NO_GRADIENT, lambda o: o.zero_grad()),
    "importance of 0": (
        ValueError, "^no λ balances the gradient: the importance", forget_importance,
    ),
    "two forms": (
        ValueError, r"one form of the penalty in all groups, not \['gradient",
        lambda o: o.param_groups[0].update(penalty="proximal"),
    ),
}  # fmt: skip


def ready():
    model = network()
    named = list(model.named_parameters())
    optimizer = EWCAdamW([{"params": named[:1]}, {"params": named[1:]}])
    optimizer.consolidate(importance_like(model))
    model(torch.randn(8, 5)).square().mean().backward()
    return optimizer


@pytest.mark.parametrize("given", SUGGEST_LAMBDA)
def test_suggest_lambda_refuses(given):
    error, message, change = SUGGEST_LAMBDA[given]
    optimizer = ready()
    change(optimizer)
    assert_refused(optimizer, optimizer.suggest_lambda, error, message)


@pytest.mark.parametrize("drift", [0.0, -1.0, inf, nan])
def test_suggest_lambda_refuses_a_drift(drift):
    optimizer = ready()
    message = f"^drift must be positive and finite, not {drift}"
    assert_refused(optimizer, lambda: optimizer.suggest_lambda(drift), ValueError, message)


def damaged(damage, make=lambda: protected(amsgrad=True)):
    """An optimizer and its own state dict, damaged."""

    def given():
        optimizer = make()
        saved = copy.deepcopy(optimizer.state_dict())
        damage(saved)
        optimizer.step()
        return optimizer, saved

    return given


def in_codes():
    optimizer = EWCAdamW([("w", nn.Parameter(torch.randn(5000)))], importance_dtype="log8")
    optimizer.consolidate({"w": torch.rand(5000)})
    optimizer.freeze(0.5)
    return optimizer


def cut(key):
    return lambda saved: saved["state"][0].update({key: saved["state"][0][key][:3]})


def in_groups(names):
    return EWCAdamW([{"params": [(name, weight())]} for name in names])


def of_adam():
    model = network()
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    train(model, adam, 1)
    return unnamed(), adam.state_dict()


def of_kahan():
    saved = EWCAdamW([weight(dtype=torch.bfloat16)], rounding="kahan").state_dict()
    return EWCAdamW([weight(dtype=torch.float16)]), saved


def frozen_padding():
    """The last block has codes beyond the last weight; one of them says frozen."""
    saved = in_codes().state_dict()
    saved["state"][0]["importance"][-1, -1] = codec.FROZEN
    return in_codes(), saved


FROZEN = "w has 2500 frozen weights, and 'frozen_codes' of"
LOAD_STATE_DICT = {
    "state": ("has no 'state'", damaged(lambda s: s.pop("state"))),
    "groups": ("other parameters", damaged(lambda s: s["param_groups"].pop())),
    "params": ("other parameters", damaged(lambda s: s["param_groups"][0]["params"].pop())),
    "betas": ("group 0 has no 'betas'", damaged(lambda s: s["param_groups"][0].pop("betas"))),
    "moment": ("0.weight has no 'exp_avg_sq'", damaged(lambda s: s["state"][0].pop("exp_avg_sq"))),
    "step": ("0.bias has no 'step'", damaged(lambda s: s["state"][1].pop("step"))),
    "anchor": ("2.bias has no 'anchor'", damaged(lambda s: s["state"][3].pop("anchor"))),
    "shape": ("2.weight has shape", damaged(lambda s: s["state"][2].update(importance=ONE))),
    "ewc_lambda": ("ewc_lambda", damaged(lambda s: s["param_groups"][0].update(ewc_lambda=-1.0))),
    "codes": (r"'importance' of parameter w has shape \(3, 260\)",
              damaged(cut("importance"), in_codes)),
    "frozen": (FROZEN, damaged(lambda s: s["state"][0].pop("frozen_codes"), in_codes)),
    "cut frozen": (FROZEN, damaged(cut("frozen_codes"), in_codes)),
    "frozen padding": ("w has 2501 frozen weights, and 'frozen_codes' of 2500", frozen_padding),
    "names in other groups": ("the state dict has parameter 'b' in another group",
                              lambda: (in_groups("ba"), in_groups("ab").state_dict())),
    "AdamW of others": (
        "belongs to other parameters",
        lambda: (unnamed(), torch.optim.AdamW(nn.Linear(2, 2).parameters()).state_dict()),
    ),
    "Adam's decay": ("one of torch.optim.Adam with weight decay in the", of_adam),
    "kahan": ("rounding must be 'nearest' for parameter 0 of its", of_kahan),
}  # fmt: skip


@pytest.mark.parametrize("given", LOAD_STATE_DICT)
def test_load_state_dict_refuses(given):
    message, make = LOAD_STATE_DICT[given]
    optimizer, saved = make()
    assert_refused(optimizer, lambda: optimizer.load_state_dict(saved), ValueError, message)
