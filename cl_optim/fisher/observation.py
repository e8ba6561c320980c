"""Watches parameters being used in a forward pass, and squares their gradients in the backward.

A parameter is met where a torch function receives it, not where a module holds it: functional
calls, fused heads and reused modules are seen alike, and what is not understood can be refused.

The function's own gradient is left to autograd. Its output passes through a :class:`_Tap`, the
identity, which sees the output gradient on the way back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode, resolve_name

from cl_optim.fisher import nested
from cl_optim.fisher.rules import RULES, UnsupportedUseError, Use


class _Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient and the saved tensors to ``capture``."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        capture: Callable[..., None],
        *saved: Tensor | None,
    ) -> Tensor:
        ctx.capture = capture
        ctx.save_for_backward(*saved)
        # "Changed in place" rather than returned as it came: the latter would make it a view, and
        # a ReLU(inplace=True) after it an error.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        ctx.capture(grad_output, *ctx.saved_tensors)
        return grad_output, None, None, *(None for _ in ctx.saved_tensors)


class _Capture:
    """What is kept of a :class:`Use` until its gradient comes; no tensors of the graph."""

    def __init__(self, use: Use, names: tuple[str | None, ...]) -> None:
        self.add_squares = use.add_squares
        self.names = names
        self.done = False


class Observation(TorchFunctionMode):
    """One forward pass over ``batch_size`` samples, and its backward.

    Args:
        parameters: The watched parameters by name; all require gradients.
        sums: For each of them, where Σ_n g_n² is added.
        batch_size: Number of samples.
        factor: Multiplies the gradients before they are squared.
        own_pass: The backward passes are made with :meth:`backward`, which computes no gradients
            of parameters; several through one forward pass are allowed, and their squares add.

    Attributes:
        tokens: Number of tokens in the batch, ``None`` as long as no sequence was seen.
        changed: Whether anything was added to the sums.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        batch_size: int,
        factor: float,
        *,
        own_pass: bool = False,
    ) -> None:
        super().__init__()
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._sums = sums
        self._batch_size = batch_size
        self._factor = factor
        self._own_pass = own_pass
        # Without gradients of parameters, this is what makes the graph reach back to each use.
        device = next(iter(parameters.values())).device
        self._anchor = torch.empty(0, device=device, requires_grad=True)
        self._closed = False
        self._used: set[str] = set()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._seen_grads: dict[str, Tensor] = {}
        self._unseen: list[str] = []
        self._coupled: list[str] | None = None
        # A table looked up with one index per row of the batch, and whether a sequence was as long
        # as the batch: together, the indices may be positions that all samples share.
        self._table: str | None = None
        self._long_as_batch = False
        self.tokens: int | None = None
        self.changed = False

    def __enter__(self) -> Observation:
        self._hooks = [
            parameter.register_hook(functools.partial(self._receive, name))  # type: ignore[no-untyped-call]
            for name, parameter in self._parameters.items()
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_value, traceback)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._closed = True
        self._seen_grads.clear()

    # --- forward ----------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is F.batch_norm:
            _refuse_batch_statistics(*args, **kwargs)
        names = [
            self._names[id(tensor)]
            for tensor in nested.tensors((args, kwargs))
            if id(tensor) in self._names
        ]
        if not names:
            return func(*args, **kwargs)
        rule = RULES.get(func)
        if rule is None:
            return self._call_without_rule(func, args, kwargs)
        try:
            use = rule(*args, **kwargs)
        except UnsupportedUseError as error:
            raise NotImplementedError(
                f"{_describe(func)} uses parameter {names[0]!r} in a way that is not supported: "
                f"{error}."
            ) from None
        return self._call(func, args, kwargs, use, names)

    def _call(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        use: Use,
        names: list[str],
    ) -> Tensor:
        use_names = tuple(self._names.get(id(parameter)) for parameter in use.parameters)
        for name in names:
            if name not in use_names:
                raise _no_rule([name], func)
            if name in self._used:
                raise NotImplementedError(
                    f"parameter {name!r} is used twice in one observe(): tied weights and reused "
                    f"modules are not supported yet, and each forward pass needs an observe() of "
                    f"its own."
                )
            self._used.add(name)
        self._check_samples(use, names[0])
        stand_ins = {
            id(self._parameters[name]): self._stand_in(name, self._parameters[name])
            for name in names
        }
        output = func(
            *(stand_ins.get(id(arg), arg) for arg in args),
            **{key: stand_ins.get(id(arg), arg) for key, arg in kwargs.items()},
        )
        # Detached, so that the tap is not a second path back to them; autograd still notices if
        # they are changed in place before backward.
        saved = (None if tensor is None else tensor.detach() for tensor in use.saved)
        capture = functools.partial(self._capture, _Capture(use, use_names))
        tapped: Tensor = _Tap.apply(output, self._anchor, capture, *saved)
        return tapped

    def _stand_in(self, name: str, parameter: Tensor) -> Tensor:
        """What the function gets in a parameter's place, to tell this use from others."""
        if self._own_pass:
            return parameter.detach()
        alias = parameter.view_as(parameter)
        record = functools.partial(self._seen_grads.__setitem__, name)
        alias.register_hook(record)  # type: ignore[no-untyped-call]
        return alias

    def _check_samples(self, use: Use, name: str) -> None:
        shape = list(use.input.shape)
        leading = shape[: len(shape) - use.features]
        if not leading:
            raise ValueError(
                f"parameter {name!r} met an input of shape {shape}, which has no dimension for "
                f"samples; the input must begin with batch_size = {self._batch_size} samples."
            )
        if leading[0] != self._batch_size:
            raise ValueError(
                f"parameter {name!r} met an input of shape {shape}, whose leading dimension is "
                f"{leading[0]}, but batch_size is {self._batch_size}: the leading dimension must "
                f"run over the samples."
            )
        if len(leading) > 1:
            self._long_as_batch |= leading[1] == self._batch_size
            self.tokens = max(self.tokens or 0, torch.Size(leading).numel())
        elif use.features == 0:
            self._table = name
        # In its own pass, find_coupled() knows.
        if self._table is not None and self._long_as_batch and not self._own_pass:
            raise ValueError(
                f"parameter {self._table!r} met {self._batch_size} indices, which may be "
                f"samples or positions, since sequences are as long as batch_size; use another "
                f"batch size."
            )

    def _call_without_rule(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call ``func``; a watched parameter that its result's graph leads to is an error."""
        stops = {tensor.grad_fn for tensor in nested.tensors((args, kwargs))}
        result = func(*args, **kwargs)
        nodes = [tensor.grad_fn for tensor in nested.tensors(result)]
        found, visited = set(), set(stops)
        while nodes:
            node = nodes.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            nodes.extend(following for following, _ in node.next_functions)
            # Only the node that accumulates a leaf's gradient has this attribute.
            name = self._names.get(id(getattr(node, "variable", None)))
            if name is not None:
                found.add(name)
        if found:
            raise _no_rule([name for name in self._parameters if name in found], func)
        return result

    # --- backward ---------------------------------------------------------------------------------

    def backward(self, outputs: Tensor, grad_outputs: Tensor, *, retain_graph: bool) -> None:
        """Run backward without computing gradients of the parameters (``own_pass`` only)."""
        torch.autograd.grad(
            outputs,
            # A use that was not seen still leads to its parameter; _receive hears of it.
            [self._anchor, *self._parameters.values()],
            grad_outputs,
            retain_graph=retain_graph,
            allow_unused=True,
        )

    def find_coupled(self, outputs: Tensor) -> list[str]:
        """Names of parameters whose inputs are not one sample per leading index.

        The gradient of the first sample's outputs must not reach any other sample's part of any
        input (``own_pass`` only; adds nothing to the sums).
        """
        first = torch.zeros_like(outputs)
        first[0] = 1.0
        coupled: list[str] = []
        self._coupled = coupled
        self.backward(outputs, first, retain_graph=True)
        self._coupled = None
        return coupled

    def _capture(self, capture: _Capture, grad_output: Tensor, *saved: Tensor | None) -> None:
        names = [name for name in capture.names if name is not None]
        if self._closed:
            raise RuntimeError(
                f"the backward pass reached parameter {names[0]!r} after the observe() of its "
                f"forward pass had ended; run both inside."
            )
        if self._coupled is not None:
            if (grad_output[1:].abs() > 0).any():
                self._coupled.extend(names)
            return
        if capture.done and not self._own_pass:
            raise RuntimeError(
                f"a second backward pass reached parameter {names[0]!r} in one observe(); add the "
                f"losses and run backward once: the square of a sum is not the sum of squares."
            )
        capture.done = self.changed = True
        sums = [None if name is None else self._sums[name] for name in capture.names]
        grad_output = grad_output.to(self._sums[names[0]].dtype)
        if self._factor != 1.0:
            grad_output = grad_output * self._factor
        capture.add_squares(sums, grad_output, *saved)

    def _receive(self, name: str, grad: Tensor) -> None:
        """A parameter's gradient, of all uses: compare with that of the use that was seen."""
        seen = self._seen_grads.pop(name, None)
        # A sum over several uses is a new tensor: it is not formed in place of one that is held.
        if seen is None or seen.data_ptr() != grad.data_ptr():
            self._unseen.append(name)

    def check(self) -> None:
        """Check, after the backward pass, that nothing was missed.

        Raises:
            NotImplementedError: A parameter got a gradient from a use that was not seen.
            RuntimeError: There was no backward pass.
        """
        if self._unseen:
            raise NotImplementedError(
                f"{_list(self._unseen)} received a gradient from a use that was not seen "
                f"(activation checkpointing, an autograd.Function, a hook that replaces the "
                f"gradient); {_FREEZE}"
            )
        if not self.changed:
            raise RuntimeError(
                "no gradient reached a watched parameter inside observe(): run the forward and "
                "the backward pass inside."
            )


_FREEZE = "freeze what should be left out with requires_grad_(False)."


def _list(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ("parameter " if len(unique) == 1 else "parameters ") + ", ".join(map(repr, unique))


def _describe(func: Callable[..., Any]) -> str:
    return resolve_name(func) or str(getattr(func, "__name__", func))


def _no_rule(names: list[str], func: Callable[..., Any]) -> NotImplementedError:
    supported = ", ".join(_describe(known) for known in RULES)
    return NotImplementedError(
        f"{_describe(func)} uses {_list(names)}, and there is no rule for that (there are rules "
        f"for the parameters of {supported}); {_FREEZE}"
    )


def _refuse_batch_statistics(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> None:
    if training:
        raise ValueError(
            "batch_norm in training mode makes a sample's gradient depend on the whole batch; put "
            "the BatchNorm modules in eval mode."
        )
