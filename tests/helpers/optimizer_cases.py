"""What an optimizer holds, and that a refused call leaves it alone."""

from __future__ import annotations

from collections.abc import Callable

from bad_input import refused
from torch import Tensor
from torch.optim import Optimizer


def plain(value: object) -> object:
    """As text and numbers, comparable with ==, where a NaN is equal to itself."""
    if isinstance(value, Tensor):
        return value.dtype, repr(value.to_dense().tolist())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def snapshot(optimizer: Optimizer) -> object:
    """Groups, state, weights and gradients."""
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return plain([optimizer.param_groups, optimizer.state_dict(), params, grads])


def assert_refused(
    optimizer: Optimizer, call: Callable[[], object], error: type[Exception], message: str
) -> None:
    """The call is an error in a whole sentence, and changes nothing."""
    before = snapshot(optimizer)
    with refused(error, message) as caught:
        call()
    assert str(caught.value).endswith(".")
    assert snapshot(optimizer) == before
