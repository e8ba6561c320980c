"""A call of a torch function that has watched tensors among its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_optim.fisher import nested
from cl_optim.fisher.observe.sources import Source, names_of

# Methods whose result is the tensor, or about it, and which must be called of that one.
_OF_THE_TENSOR = {"requires_grad_", "retain_grad", "register_hook"}
_NO_CHANGE = {"__invert__", "__index__", "__int__"}


class Call(NamedTuple):
    """One call.

    Attributes:
        func: The function.
        args: Its arguments.
        kwargs: Those by name.
        found: What the watched ones are, by id.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    found: Mapping[int, Source]

    def bound(self, *names: str) -> dict[str, Any]:
        """Return the arguments by name, of which these are the first ones, in their order."""
        return dict(zip(names, self.args, strict=False)) | self.kwargs

    def run(self) -> Any:
        """Call the function."""
        return self.func(*self.args, **self.kwargs)

    def replaced(self, others: Mapping[int, Tensor]) -> Call:
        """Return the call with others in place of tensors with those ids."""
        args, kwargs = nested.replace(self.args, others), nested.replace(self.kwargs, others)
        return Call(self.func, args, kwargs, self.found)

    def tensors(self) -> list[Tensor]:
        """List the tensors among the arguments."""
        return list(nested.tensors((self.args, self.kwargs)))

    def watched(self) -> list[Tensor]:
        """List those that are watched."""
        return [tensor for tensor in self.tensors() if id(tensor) in self.found]

    def others(self) -> list[Tensor]:
        """List those that are not."""
        return [tensor for tensor in self.tensors() if id(tensor) not in self.found]

    def names(self) -> list[str]:
        """List the names of the parameters, each once."""
        return names_of(self.found.values())

    def is_of_the_tensor(self) -> bool:
        """Return whether it is about the very tensor that it is of, and not its values."""
        return getattr(self.func, "__name__", "") in _OF_THE_TENSOR

    def changes_in_place(self) -> bool:
        """Return whether it writes into a tensor that it is given."""
        name: str = getattr(self.func, "__name__", "")
        if name.startswith("__"):
            return name == "__setitem__" or (name.startswith("__i") and name not in _NO_CHANGE)
        if self.kwargs.get("out") is not None:
            return True
        return name.endswith("_") and not self.is_of_the_tensor()

    def remake(self) -> Any:
        """Call it of points; what that keeps is out of reach of activation checkpointing."""
        points = {id(tensor): self.found[id(tensor)].remake() for tensor in self.watched()}
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _same):
            return self.replaced(points).run()

    def slope(self, tensor: Tensor) -> Tensor:
        """Return the derivative of an elementwise function of one tensor."""
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_same, _same):
            point = tensor.detach().requires_grad_()
            value = self.replaced({id(tensor): point}).run()
            (slope,) = torch.autograd.grad(value.sum(), point)
        return slope


def _same(tensor: Tensor) -> Tensor:
    return tensor
