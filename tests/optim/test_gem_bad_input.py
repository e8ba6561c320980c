"""What GEM refuses: a table of bad input for its constructor and for each of its methods.

A row has the error, where there are several, what its message must match, and what is given.
"""

import copy
from math import inf, nan

import pytest
import torch
from gem_cases import Memory, backward, make_model
from optimizer_cases import assert_refused
from torch import nn
from torch.optim import LBFGS, SGD, SparseAdam

from cl_optim import GEM, EWCAdamW


@pytest.fixture
def process_group(tmp_path):
    """Of this process alone."""
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def around_sgd(*memories):
    """With these memories, and the gradient of a step."""
    model = make_model()
    optimizer = GEM(SGD(model.parameters()))
    for name in memories:
        optimizer.remember(name, Memory(model, 1))
    backward(model, 2)
    return optimizer


OPTIONS = {
    "memory_strength": (
        "memory_strength must be finite and at least 0, not -0.1", {"memory_strength": -0.1},
    ),
    "NaN memory_strength": ("memory_strength must be", {"memory_strength": nan}),
    "infinite memory_strength": ("memory_strength must be", {"memory_strength": inf}),
    "blocks": ("blocks must be one of", {"blocks": "layer"}),
    "evict": ("evict must be one of", {"evict": "newest"}),
    "on_invalid": ("on_invalid must be one of", {"on_invalid": "ignore"}),
    "capacity": ("capacity must be a whole number from 1 to 1024, or None, not 0", {"capacity": 0}),
    "broken capacity": ("capacity must be", {"capacity": 2.5}),
    "large capacity": ("capacity must be", {"capacity": 1025}),
    "int8": ("memory_dtype must be None or one of torch.float32", {"memory_dtype": "int8"}),
    "zeros": ("memory_dtype must be", {"memory_dtype": "zeros"}),
    "complex64": ("memory_dtype must be", {"memory_dtype": torch.complex64}),
}  # fmt: skip


@pytest.mark.parametrize("given", OPTIONS)
def test_an_option_is_refused(given):
    message, options = OPTIONS[given]
    with pytest.raises(ValueError, match=message):
        GEM(SGD(make_model().parameters()), **options)


OPTIMIZER = {
    "LBFGS": (ValueError, "must not be LBFGS", LBFGS),
    "SparseAdam": (ValueError, "must not be SparseAdam", SparseAdam),
    "GEM": (ValueError, "must not be a GEM itself", lambda params: GEM(SGD(params))),
    "parameters": (TypeError, r"must be a torch\.optim\.Optimizer", iter),
}


@pytest.mark.parametrize("given", OPTIMIZER)
def test_an_optimizer_is_refused(given):
    error, message, make = OPTIMIZER[given]
    inner = make(make_model().parameters())
    with pytest.raises(error, match=message):
        GEM(inner)


DTYPE = "bad must be of a real floating-point dtype, one of"
PARAMETER = {
    "complex": (DTYPE, torch.zeros(2, dtype=torch.complex64)),
    "float8": (DTYPE, torch.zeros(2, dtype=torch.float8_e4m3fn)),
    "elsewhere": ("on one device; they are on cpu, meta", torch.ones(2, device="meta")),
}


@pytest.mark.parametrize("given", PARAMETER)
def test_a_parameter_is_refused(given):
    message, data = PARAMETER[given]
    good, bad = ("good", nn.Parameter(torch.ones(2))), ("bad", nn.Parameter(data))
    with pytest.raises(ValueError, match=message):
        GEM(SGD([good, bad]))
    optimizer = GEM(SGD([good]))
    group = {"params": [bad]}
    assert_refused(optimizer, lambda: optimizer.add_param_group(group), ValueError, message)


REMEMBER = {
    "empty name": (ValueError, "name must be a string that is not empty, not ''", ("", print)),
    "number as name": (ValueError, "name must be a string", (3, print)),
    "no closure": (TypeError, "closure must be callable, not None", ("b", None)),
    "age 0": (ValueError, "refresh_every must be a whole number .* not 0", ("b", print, 0)),
    "age 1.5": (ValueError, "refresh_every must be", ("b", print, 1.5)),
    "age True": (ValueError, "refresh_every must be", ("b", print, True)),
    "no gradient": (RuntimeError, "'b' left no gradient on any parameter", ("b", print)),
    "none any more": (RuntimeError, "'a' left no gradient on any parameter", ("a", print)),
    "other model": (
        RuntimeError, "left no gradient on any parameter of this optimizer",
        ("b", Memory(nn.Linear(5, 3), 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", REMEMBER)
def test_remember_refuses(given):
    error, message, arguments = REMEMBER[given]
    optimizer = around_sgd("a")
    assert_refused(optimizer, lambda: optimizer.remember(*arguments), error, message)
    optimizer.step()


@pytest.mark.parametrize(("memories", "there"), [("", "there is none"), ("bc", "b, c")])
def test_forget_refuses(memories, there):
    optimizer = around_sgd(*memories)
    message = f"no memory is named 'a': {there}"
    assert_refused(optimizer, lambda: optimizer.forget("a"), ValueError, message)


def forgets_its_gradients(optimizer, memory):
    memory()
    optimizer.zero_grad()


def resets_in_between(optimizer, memory):
    for _ in range(2):
        optimizer.zero_grad()
        memory()


def zeroes_in_between(optimizer, memory):
    for _ in range(2):
        optimizer.zero_grad(set_to_none=False)
        memory()


def zeroes_at_the_end(optimizer, memory):
    memory()
    optimizer.zero_grad(set_to_none=False)


CLOSURE = {
    "zeroes": ("must not reset gradients between its backward passes", zeroes_in_between),
    "zeroes at the end": ("reset gradients .* nor after them", zeroes_at_the_end),
    "forgets": ("left no gradient", forgets_its_gradients),
    "no backward": ("left no gradient", lambda optimizer, memory: memory.loss()),
    "resets": ("must not reset gradients between its backward passes", resets_in_between),
}


@pytest.mark.parametrize("given", CLOSURE)
def test_a_closure_is_refused(given):
    message, closure = CLOSURE[given]
    model = make_model()
    optimizer = GEM(SGD(model.parameters()))
    memory = Memory(model, 1)
    with pytest.raises(RuntimeError, match=message):
        optimizer.remember("a", lambda: closure(optimizer, memory))
    assert optimizer.memories == ()


def test_sparse_gradients_are_refused():
    embedding, linear = nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2)
    optimizer = GEM(SGD([*linear.named_parameters(), ("tokens.weight", embedding.weight)]))

    def closure():
        linear(embedding(torch.tensor([1]))).sum().backward()

    message = r"tokens\.weight in memory 'a' must be dense"
    assert_refused(optimizer, lambda: optimizer.remember("a", closure), RuntimeError, message)
    closure()
    message = r"parameter tokens\.weight must be dense"
    assert_refused(optimizer, optimizer.step, RuntimeError, message)


def test_a_closure_that_overwrites_gradients_is_refused(process_group):
    """DistributedDataParallel may keep them in buckets that the closure's backward fills."""
    model = make_model()
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = GEM(SGD(parallel.parameters(), lr=0.1))
    for step in range(2):  # from the second step on the gradients are views
        backward(parallel, step)
        optimizer.remember("a", Memory(model, 1))
        optimizer.step()
    with pytest.raises(RuntimeError, match="wrote into the gradients of the step"):
        optimizer.remember("b", Memory(parallel, 1))
    assert optimizer.memories == ("a",)


LOAD_STATE_DICT = {
    "state": ("has no 'state'", lambda s: s.pop("state")),
    "param_groups": ("has no 'param_groups'", lambda s: s.pop("param_groups")),
    "groups": ("other parameters", lambda s: s["param_groups"].append(s["param_groups"][0])),
    "params": ("other parameters", lambda s: s["param_groups"][0]["params"].pop()),
    "ewc_lambda": ("has no 'ewc_lambda'", lambda s: s["param_groups"][0].pop("ewc_lambda")),
    "rows": ("its 'gem' has no 'rows'", lambda s: s["gem"].pop("rows")),
    "gram": ("its 'gem' has no 'gram'", lambda s: s["gem"].pop("gram")),
    "no blocks": ("options have no 'blocks'", lambda s: s["gem"]["options"].pop("blocks")),
    "blocks": ("blocks must be one of", lambda s: s["gem"]["options"].update(blocks="all")),
    "memories": (r"rows of parameter 0 .* \(1, 4, 5\), not", lambda s: s["gem"]["memories"].pop()),
    "age": ("a memory has no 'age'", lambda s: s["gem"]["memories"][1].pop("age")),
    "row": ("rows for parameters 0, 1, 3", lambda s: s["gem"]["rows"].pop(2)),
    "shape": ("rows of parameter 1", lambda s: s["gem"]["rows"].update({1: torch.ones(2, 5)})),
    "dtype": ("rows of parameter", lambda s: s["gem"]["rows"].update({1: torch.ones(2, 4).long()})),
    "list": ("rows of parameter 1", lambda s: s["gem"]["rows"].update({1: [1.0]})),
    "gram's shape": (
        "'gram' must be a tensor of", lambda s: s["gem"].update(gram=torch.ones(4, 1, 1)),
    ),
    "stale": ("'stale' is", lambda s: s["gem"].update(stale=[2])),
}  # fmt: skip


@pytest.mark.parametrize("given", LOAD_STATE_DICT)
def test_a_damaged_state_dict_is_refused_and_changes_nothing(given):
    message, damage = LOAD_STATE_DICT[given]
    model = make_model()
    optimizer = GEM(EWCAdamW(model.parameters()))
    for name in "ab":
        optimizer.remember(name, Memory(model, ord(name)))
    for _ in range(2):
        backward(model, 1)
        optimizer.step()
    damaged = copy.deepcopy(optimizer.state_dict())
    damage(damaged)
    optimizer.step()
    assert_refused(optimizer, lambda: optimizer.load_state_dict(damaged), ValueError, message)
    optimizer.step()  # the closures are still there


def test_a_state_dict_of_other_parameters_is_refused():
    """As many, of other shapes: torch's own optimizers would take them."""
    other = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    optimizer = GEM(SGD(other.parameters()))
    saved = around_sgd().state_dict()
    message = r"the rows of parameter 0 .* \(0, 6, 4\)|other param"
    assert_refused(optimizer, lambda: optimizer.load_state_dict(saved), ValueError, message)
