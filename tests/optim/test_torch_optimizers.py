"""torch's own optimizer inputs (common_optimizers): EWCAdamW; GEM and EWC around every optimizer.

torch ships the inputs, the errors and the learning-rate schedulers, not the tests that walk them:
these are ours. Each optimizer is set beside its peer: EWCAdamW beside AdamW, GEM and EWC beside
what they wrap, with a memory that agrees with every gradient, and a pull that moves nothing.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
    optim_error_inputs_func_adamw,
)

from cl_optim import EWC, GEM, EWCAdamW
from cl_optim.ops.nnqp import Status

# What EWCAdamW takes where AdamW refuses, by torch's description of the input.
TAKEN = {
    "lr as Tensor doesn't work with foreach & not capturable": "it is read once a step",
    "betas must be either both floats or both Tensors": "both are read once a step",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "the same",
}
# Where both refuse: AdamW raises RuntimeError, EWCAdamW ValueError, as for all bad arguments.
# Differences that no input of torch shows: complex parameters are refused (the penalty of one has
# no meaning), and so are DTensors; `differentiable=True` takes the reference.

INFOS = {info.optim_cls.__name__: info for info in optim_db}
# LBFGS evaluates closures within a step and SparseAdam takes sparse gradients: GEM refuses both.
REFUSED_BY_GEM = ("LBFGS", "SparseAdam")


@dataclass(frozen=True)
class Subject:
    """An optimizer of ours, and torch's that it equals.

    Attributes:
        name: Of the test.
        info: Its peer's inputs.
        make: Called with parameters and keyword arguments.
        exact: Whether it equals its peer bit for bit.
    """

    name: str
    info: OptimizerInfo
    make: Callable[..., Optimizer]
    exact: bool

    def inputs(self) -> list[OptimizerInput]:
        # The parameters here are leaves, which a differentiable step may not change.
        every = _get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", torch.float32, self.info, skip=("differentiable",)
        )
        if self.info.optim_cls is torch.optim.AdamW:
            betas = (torch.tensor(0.75), torch.tensor(0.875))  # exact in float32
            tensors = {"lr": torch.tensor(2.0**-9), "betas": betas}
            every.append(OptimizerInput(None, tensors, "Tensor lr and betas"))
            every += [  # torch walks these on GPUs only
                OptimizerInput(None, {**given.kwargs, "foreach": True}, f"{given.desc} & foreach")
                for given in self.info.optim_inputs_func("cpu")
            ]
        return every

    def __str__(self) -> str:
        return self.name


def around(make: Callable[..., Optimizer]) -> Callable[..., GEM]:
    def made(params: Any, **kwargs: Any) -> GEM:
        return GEM(make(params, **kwargs))

    return made


def pulled(make: Callable[..., Optimizer]) -> Callable[..., EWC]:
    def made(params: Any, **kwargs: Any) -> EWC:
        ewc = EWC(make(params, **kwargs), ewc_lambda=1e-30)
        ewc.consolidate(None)
        return ewc

    return made


ADAMW = INFOS["AdamW"]
OURS = [
    Subject("EWCAdamW", ADAMW, EWCAdamW, exact=False),
    Subject("GEM(EWCAdamW)", ADAMW, around(EWCAdamW), exact=False),
]
SUBJECTS = OURS + [
    Subject(f"GEM({name})", info, around(info.optim_cls), exact=True)
    for name, info in INFOS.items()
    if name not in REFUSED_BY_GEM
]
SUBJECTS += [
    Subject(f"EWC({name})", info, pulled(info.optim_cls), exact=True)
    for name, info in INFOS.items()
    if name not in REFUSED_BY_GEM
]
CASES = [
    pytest.param(subject, given, id=f"{subject}-{given.desc or 'default'}")
    for subject in SUBJECTS
    for given in subject.inputs()
]


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Matrices, since Muon takes no others; one is not contiguous."""
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(shape, generator=generator) for shape in ((3, 5), (7, 2), (1, 1), (4, 6))]
    values[1] = values[1].t()
    return [nn.Parameter(value.to(dtype)) for value in values]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    """Positive ones, which agree with `agreeing`."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.rand(param.shape, generator=generator) + 0.01
        param.grad = torch.empty_like(param).copy_(grad)


def agreeing(params: list[nn.Parameter]) -> Callable[[], None]:
    def closure() -> None:
        sum(param.sum() for param in params).backward()

    return closure


def arguments(given: OptimizerInput) -> dict[str, Any]:
    return copy.deepcopy(given.kwargs)


def as_floats(given: OptimizerInput) -> OptimizerInput:
    """Numbers in place of tensors, with which AdamW computes in float32, also for float64."""

    def number(value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    kwargs = {
        key: tuple(map(number, value)) if isinstance(value, tuple) else number(value)
        for key, value in given.kwargs.items()
    }
    return OptimizerInput(None, kwargs, given.desc)


def saved(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(
    make: Callable[..., Optimizer], given: OptimizerInput, dtype: torch.dtype, through_file: bool
) -> list[nn.Parameter]:
    """Six steps; after three the optimizer is another, which has loaded the state."""
    params = make_params(dtype)
    optimizer = make(params, **arguments(given))
    for step in range(6):
        if step == 3 and through_file:
            state_dict = saved(optimizer.state_dict())
            optimizer = make(params, **arguments(given))
            optimizer.load_state_dict(state_dict)
        if isinstance(optimizer, GEM) and step in (0, 3):
            optimizer.remember("old", agreeing(params))
        set_gradients(params, step)
        optimizer.step()
        if isinstance(optimizer, GEM):
            assert optimizer.last_projection.status.tolist() == [Status.INACTIVE]
    return params


@pytest.mark.parametrize(("subject", "given"), CASES)
def test_equals_its_peer_through_a_checkpoint(subject, given):
    for dtype in [torch.float32] if subject.exact else [torch.float32, torch.float64]:
        ours = run(subject.make, given, dtype, through_file=True)
        numbers = given if subject.exact else as_floats(given)
        theirs = run(subject.info.optim_cls, numbers, dtype, through_file=False)
        tolerance = 0.0 if subject.exact else 32 * torch.finfo(dtype).eps
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def model_of() -> nn.Module:
    torch.manual_seed(1)
    # Without biases: Muon takes matrices only.
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 1, bias=False))


def objective(model: nn.Module, maximize: bool = False) -> Tensor:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return -loss if maximize else loss


@pytest.mark.parametrize(("subject", "given"), CASES)
def test_goes_in_the_right_direction_under_each_scheduler(subject, given):
    for makers in subject.info.scheduler_inputs:
        model = model_of()
        optimizer = subject.make(model.parameters(), **arguments(given))
        schedulers = [make(optimizer) for make in makers]
        before = objective(model).item()
        for _ in range(20):
            optimizer.zero_grad()
            loss = objective(model, given.kwargs.get("maximize", False))
            loss.backward()
            loss = loss.detach()
            optimizer.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*[loss] if plateau else [])
        assert objective(model).item() < before


@pytest.mark.parametrize(("subject", "given"), CASES)
def test_without_gradients_nothing_happens(subject, given):
    params = make_params()
    optimizer = subject.make(params, **arguments(given))
    before = [p.detach().clone() for p in params]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    # ASGD's λ is a weight decay, too.
    if not optimizer.defaults.get("weight_decay") and "lambd" not in optimizer.defaults:
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize(("subject", "given"), CASES)
def test_copies_go_on_alike(subject, given):
    params = make_params()
    optimizer = subject.make(params, **arguments(given))
    set_gradients(params, 0)
    optimizer.step()
    twin, twins = copy.deepcopy((optimizer, params))
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert public == {key for key in vars(twin) if not key.startswith("_")}
    for each, those in ((optimizer, params), (twin, twins)):
        set_gradients(those, 1)
        each.step()
    for a, b in zip(params, twins, strict=True):
        assert a is not b
        assert torch.equal(a, b)


@pytest.mark.parametrize("subject", OURS, ids=str)
def test_refuses_what_its_peer_refuses(subject):
    taken = set()
    for case in optim_error_inputs_func_adamw("cpu", torch.float32):
        given = case.optimizer_error_input
        assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
        params = make_params() if given.params is None else given.params
        if given.desc in TAKEN:
            taken.add(given.desc)
            subject.make(params, **given.kwargs)
        elif case.error_type is UserWarning:
            with pytest.warns(UserWarning, match=case.error_regex):
                subject.make(params, **given.kwargs)
        else:
            with pytest.raises((ValueError, TypeError)) as raised:
                subject.make(params, **given.kwargs)
            assert raised.type is case.error_type
    assert taken == set(TAKEN)


@pytest.mark.parametrize("subject", OURS, ids=str)
def test_fused_excludes_foreach_and_differentiable(subject):
    for flag in ("foreach", "differentiable"):
        with pytest.raises(ValueError, match=f"{flag}=True and fused=True exclude each other"):
            subject.make(make_params(), fused=True, **{flag: True})


@pytest.mark.parametrize(("subject", "given"), CASES)
def test_loads_its_peers_state_dict_from_before_an_option_existed(subject, given):
    def made(make: Callable[..., Optimizer]) -> Optimizer:
        params = make_params()
        optimizer = make(params, **arguments(given))
        set_gradients(params, 0)
        optimizer.step()
        return optimizer

    theirs, ours = made(subject.info.optim_cls), made(subject.make)
    older = theirs.state_dict()
    flags = [flag for flag in subject.info.not_og_supported_flags if flag in theirs.defaults]
    for group in older["param_groups"]:
        for flag in flags:
            del group[flag]
    for optimizer in (theirs, ours):
        optimizer.load_state_dict(copy.deepcopy(older))
    own = ("foreach", "fused") if subject in OURS else ()  # EWCAdamW keeps its own
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [a[flag] for flag in flags if flag not in own] == [
            b[flag] for flag in flags if flag not in own
        ]
    ours.step()


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_state_dicts_have_names_if_the_optimizer_has(subject):
    def made(named: bool) -> Optimizer:
        model = model_of()
        optimizer = subject.make(model.named_parameters() if named else model.parameters())
        objective(model).backward()
        optimizer.step()
        return optimizer

    for source in (True, False):
        for target in (True, False):
            optimizer = made(target)
            names = optimizer.param_groups[0].get("param_names")
            assert (names == ["0.weight", "2.weight"]) if target else (names is None)
            optimizer.load_state_dict(made(source).state_dict())
            optimizer.step()


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_hooks_are_called_once_in_order(subject):
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    params = make_params()
    optimizer = subject.make(params)
    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    optimizer.register_state_dict_pre_hook(note("state_dict pre"))
    optimizer.register_state_dict_post_hook(note("state_dict post"))
    optimizer.register_load_state_dict_pre_hook(note("load pre"))
    optimizer.register_load_state_dict_post_hook(note("load post"))
    set_gradients(params, 0)
    optimizer.step()
    assert called == ["pre", "post"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert called[2:] == ["state_dict pre", "state_dict post", "load pre", "load post"]


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_groups_keep_their_own_options(subject):
    results = []
    for make in (subject.make, subject.info.optim_cls):
        params = make_params()
        optimizer = make([{"params": params[:2], "lr": 0.0}, {"params": params[2:]}], lr=0.01)
        set_gradients(params, 0)
        optimizer.step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.0 if subject.exact else 4e-6, atol=0.0)
