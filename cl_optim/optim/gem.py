"""GEM: an optimizer around another one, whose steps do not raise the losses of earlier tasks."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from cl_optim.importance.unobserved import unobserved
from cl_optim.ops import gram as gram_ops
from cl_optim.ops import nnqp
from cl_optim.ops.capture import is_capturing
from cl_optim.ops.warn import warn
from cl_optim.optim.ewc_adamw import EWCAdamW
from cl_optim.optim.groups import check_groups, is_dtensor, name_of
from cl_optim.optim.state import in_order

BLOCKS = ("global", "group", "tensor")
EVICT = ("error", "oldest")
ON_INVALID = ("skip", "raw", "raise")
# Of these only the fused ones leave out a step on the device.
_TORCH_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad)
# What the products of rows and gradients are computed for.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_OPTIONS = (
    "memory_strength",
    "blocks",
    "average",
    "capacity",
    "evict",
    "on_invalid",
    "memory_dtype",
    "track_update",
)
_INVALID = (
    "NaN or Inf in the gradient or in a memory row, or a problem without a solution: the step was "
    "skipped (on_invalid='raise')."
)

_Loss = TypeVar("_Loss")  # what a closure returns, as for EWCAdamW


class Projection(NamedTuple):
    """What a step did to the gradient, for B blocks and t rows, on the parameters' device.

    Attributes:
        status: [B] int8, an :class:`cl_optim.ops.nnqp.Status` per block; negative: the block was
            not projected, and ``on_invalid`` decided what became of the step.
        active: [B, t] bool, the rows that have been added to the gradient.
        v: [B, t] float64, how much of each: g̃ = g + Gᵀv. 0 where the status is negative.
        gap: [B] float64, ‖g̃ − g̃*‖² ≤ 2·gap with the exact projection g̃*.
        grad_norm: [B] float64, ‖g‖.
        projected_norm: [B] float64, ‖g̃‖, from the products alone: accurate to 1e-8·‖g‖.
        update_dot: [t] float64, G·Δθ of the update that the wrapped optimizer made of g̃: what it
            adds to each old loss, to first order. None without ``track_update``.
    """

    status: Tensor
    active: Tensor
    v: Tensor
    gap: Tensor
    grad_norm: Tensor
    projected_norm: Tensor
    update_dot: Tensor | None


class _Products(NamedTuple):
    """Of rows and gradient: Q [B, t, t], c [B, t] and ‖g‖² [B], float64."""

    gram: Tensor
    linear: Tensor
    square: Tensor


@dataclass(eq=False)
class _Memory:
    """A memory's entry; its row is in `_Rows`.

    Attributes:
        closure: None where only the row was loaded, until `remember` attaches one.
        refresh_every: Steps after which the row is computed anew; None: never.
        age: Steps taken since it was.
    """

    name: str
    closure: Callable[[], object] | None
    refresh_every: int | None
    age: int = 0

    @property
    def due(self) -> bool:
        return self.refresh_every is not None and self.age >= self.refresh_every


class _Rows:
    """Memory rows by parameter, and their products with each other.

    Attributes:
        params: Those with elements, in the optimizer's order.
        rows: For each parameter [t, *shape], every row laid out like the parameter.
        gram: Q by parameter, [n, t, t] float64.
        stale: The rows whose products are not in ``gram`` yet.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.params: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.gram = torch.zeros(0, 0, 0, dtype=torch.float64, device="cpu")
        self.stale: set[int] = set()

    def __len__(self) -> int:
        return self.gram.shape[1]

    def follow(self, params: list[Tensor]) -> None:
        """Keep the rows of these parameters; a new parameter's are zero."""
        if (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and all(rows.device == p.device for rows, p in zip(self.rows, params, strict=True))
        ):
            return
        device = _one_device(params)
        index = {param: i for i, param in enumerate(self.params)}
        gram = self.gram.new_zeros(len(params), len(self), len(self), device=device)
        rows = []
        for i, param in enumerate(params):
            rows.append(self._empty(param, len(self)).zero_())
            if param in index:
                rows[i].copy_(self.rows[index[param]])
                gram[i] = self.gram[index[param]]
        self.params, self.rows, self.gram = list(params), rows, gram

    def append(self) -> None:
        """Make room for another row. One parameter after the other, to spare memory."""
        size = len(self)
        for i, (param, old) in enumerate(zip(self.params, self.rows, strict=True)):
            self.rows[i] = self._empty(param, size + 1)
            self.rows[i][:size] = old
            self.rows[i][size] = 0.0
        self.gram = torch.nn.functional.pad(self.gram, (0, 1, 0, 1))
        self.stale.add(size)

    def drop(self, k: int) -> None:
        """Remove a row."""
        for i, (param, old) in enumerate(zip(self.params, self.rows, strict=True)):
            self.rows[i] = self._empty(param, len(self) - 1)
            self.rows[i][:k] = old[:k]
            self.rows[i][k:] = old[k + 1 :]
        self.gram = torch.cat([self.gram[:, :k], self.gram[:, k + 1 :]], dim=1)
        self.gram = torch.cat([self.gram[:, :, :k], self.gram[:, :, k + 1 :]], dim=2)
        self.stale = {j - (j > k) for j in self.stale if j != k}

    def write(self, k: int, values: Mapping[Tensor, Tensor]) -> None:
        """Replace a row; it is zero for the parameters without a value."""
        for param, rows in zip(self.params, self.rows, strict=True):
            if param in values:
                rows[k] = values[param]
            else:
                rows[k] = 0.0
        self.stale.add(k)

    def products(self, grads: Sequence[Tensor | None]) -> tuple[list[int], _Products]:
        """Products of the parameters that have a gradient, and these parameters' indices."""
        size = len(self)
        used = [i for i, grad in enumerate(grads) if grad is not None]
        index = None if len(used) == len(grads) else _on_device(used, self.gram.device)
        if len(self.stale) == size:
            # One pass for all products: then g = −G_k gives c = −Q_k exactly. A parameter without
            # a gradient needs its Q all the same, for a later step.
            pairs = zip(self.rows, grads, strict=True)
            fill = [rows[0] if grad is None else grad for rows, grad in pairs]
            whole = gram_ops.gram_per_tensor(self.rows, fill)
            self.gram = whole[:, :size, :size].clone()
            dots = whole[:, size] if index is None else whole[:, size].index_select(0, index)
        else:
            for k in sorted(self.stale):
                column = gram_ops.dots_per_tensor(self.rows, [rows[k] for rows in self.rows])
                self.gram[:, k] = column[:, :size]
                self.gram[:, :, k] = column[:, :size]
            given = [grad for grad in grads if grad is not None]
            dots = gram_ops.dots_per_tensor([self.rows[i] for i in used], given)
        self.stale.clear()
        gram = self.gram if index is None else self.gram.index_select(0, index)
        return used, _Products(gram, dots[:, :size], dots[:, size])

    def _empty(self, param: Tensor, size: int) -> Tensor:
        row = torch.empty_like(
            param.detach(), dtype=self.dtype, memory_format=torch.preserve_format
        )
        return row.new_empty_strided((size, *row.shape), (row.numel(), *row.stride()))


class GEM(torch.optim.Optimizer):
    r"""Gradient episodic memory around another optimizer: no step raises an old task's loss.

    Before each step of the wrapped optimizer the gradient g is replaced by the nearest vector that
    has no negative product with any memory row, a row being the gradient of an earlier task's loss
    on samples that were kept: :math:`g̃ = g + Gᵀv`, v the solution of :mod:`cl_optim.ops.nnqp`. A
    gradient that violates nothing stays as it is, bit for bit.

    Each task that is to be kept has a closure, which runs ``backward()`` on its samples::

        optimizer = cl_optim.GEM(torch.optim.AdamW(model.parameters(), fused=True))
        train(model, optimizer, task_a)
        optimizer.remember("A", lambda: loss(model(x_kept), y_kept).backward(), refresh_every=10)
        train(model, optimizer, task_b)  # as before

    All else is the wrapped optimizer's: ``param_groups``, ``state``, ``defaults`` and
    ``zero_grad()`` are its own, and learning-rate schedulers, hooks and ``torch.amp.GradScaler``
    take this object as they take any optimizer. Gradient clipping before the step sees g;
    ``last_projection.projected_norm`` is what clipping after it would need. Hooks of all
    optimizers (``register_optimizer_step_pre_hook``) are called for this object, once a step; the
    wrapped optimizer's own find the projected gradient in ``.grad``.
    :meth:`cl_optim.EWCAdamW.consolidate`, ``freeze``, ``unfreeze``, ``penalty`` and ``protected``
    of a wrapped EWCAdamW are methods of this object, too.

    What it guarantees is about the gradient. Momentum and Adam's preconditioning make another
    direction of it: ``track_update=True`` reports what the update itself does to each old loss.
    With :class:`cl_optim.EWCAdamW` inside, the task's gradient is projected and the penalty added
    after it; the rows are then added in its fused step, and ``.grad`` stays as it was. Any other
    optimizer finds the projected gradient in ``.grad``.

    Closures run inside :meth:`step`, at the weights before it. They are part of training: what they
    do to random numbers and running statistics remains, and the scaler's factor is not theirs
    (rows and gradient are both unscaled). Under DistributedDataParallel let them run the bare
    module on the same samples in every process, so that all processes project alike.

    Nothing here waits for a GPU, with one exception: to skip a step that is invalid, it must be
    known to be. The wrapped optimizer finds out by itself where it supports this
    (``_step_supports_amp_scaling``: EWCAdamW, and torch's Adam, AdamW, Adagrad and SGD with
    ``fused=True``, SGD with momentum not before its second step); for others one number is read in
    every step, unless ``on_invalid="raw"``. (A first step with learning rate 0 is looked at, too.)

    Copies by ``copy.deepcopy`` and ``pickle``, like state dicts, hold the rows and not the
    closures, which belong to the model of the original: see :meth:`remember`.

    Args:
        optimizer: Any optimizer with dense gradients of real parameters on one device: not LBFGS,
            SparseAdam or another GEM. It keeps its place as ``self.optimizer``.
        memory_strength: γ ≥ 0 of the paper: v ≥ γ wherever anything is projected.
        blocks: ``"global"``: one problem for all parameters, as published. ``"group"`` or
            ``"tensor"``: one for each parameter group or tensor, a stricter condition.
        average: A-GEM: a single row, the mean of all memories' gradients. It is recomputed, by all
            closures, whenever one memory is due.
        capacity: How many memories there may be; None: any number.
        evict: What :meth:`remember` does when the capacity is reached: ``"error"``, or forget the
            ``"oldest"`` memory.
        on_invalid: What becomes of a step with NaN or Inf in the gradient or in a row, or in the
            rare case that a problem is not solved. ``"skip"``: it is skipped. ``"raw"``: the
            gradient is used as it is (in a block whose problem is invalid). ``"raise"``: it is
            skipped and a RuntimeError raised: at once where the number is read (see above) or the
            parameters are on the CPU, else by the next :meth:`step`.
        memory_dtype: Of the rows: float32, float64, bfloat16 or float16, as a dtype or its name;
            None: each parameter's own. bfloat16 moves g̃ by about 1e-3 of its norm.
        track_update: Compute ``last_projection.update_dot``, which takes a copy of the parameters.

    Raises:
        ValueError: An option is out of range, or the optimizer cannot be wrapped.
        TypeError: ``optimizer`` is no optimizer.

    References:
        Lopez-Paz & Ranzato 2017, arXiv:1706.08840 (GEM); Chaudhry et al. 2019, arXiv:1812.00420
        (A-GEM).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        memory_strength: float = 0.0,
        blocks: Literal["global", "group", "tensor"] = "global",
        average: bool = False,
        capacity: int | None = None,
        evict: Literal["error", "oldest"] = "error",
        on_invalid: Literal["skip", "raw", "raise"] = "skip",
        memory_dtype: torch.dtype | str | None = None,
        *,
        track_update: bool = False,
    ) -> None:
        options = {
            "memory_strength": memory_strength,
            "blocks": blocks,
            "average": average,
            "capacity": capacity,
            "evict": evict,
            "on_invalid": on_invalid,
            "memory_dtype": memory_dtype,
            "track_update": track_update,
        }
        _check_options(options)
        _check_optimizer(optimizer)
        for group in optimizer.param_groups:
            _check_group(group)
        _one_device([param for group in optimizer.param_groups for param in group["params"]])
        self.optimizer = optimizer
        self._set_options(options)
        self._memories: list[_Memory] = []
        self._rows = _Rows(self.memory_dtype)
        self._mean_is_outdated = False
        self._solved: tuple[tuple[Any, ...], Tensor] | None = None
        self._last: tuple[Projection, _Products] | None = None
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._start_hooks()

    def _start_hooks(self) -> None:
        """What torch's __init__ does, but for groups and state, which are another's here."""
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    def _set_options(self, options: Mapping[str, Any]) -> None:
        self.memory_strength = float(options["memory_strength"])
        self.blocks: str = options["blocks"]
        self.average: bool = options["average"]
        self.capacity: int | None = options["capacity"]
        self.evict: str = options["evict"]
        self.on_invalid: str = options["on_invalid"]
        self.memory_dtype: torch.dtype | None = _dtype(options["memory_dtype"])
        self.track_update: bool = options["track_update"]

    # --- the wrapped optimizer's ------------------------------------------------------------------

    # A load rebinds these, so they are looked up each time.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The wrapped optimizer's state; the rows are not in it."""
        return self.optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.optimizer.defaults = value

    # Where that is an EWCAdamW; an AttributeError where it is not.
    consolidate = property(attrgetter("optimizer.consolidate"))
    freeze = property(attrgetter("optimizer.freeze"))
    unfreeze = property(attrgetter("optimizer.unfreeze"))
    penalty = property(attrgetter("optimizer.penalty"))
    protected = property(attrgetter("optimizer.protected"))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, as the wrapped optimizer does it."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; its rows are zero until they are refreshed."""
        self.optimizer.add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            _one_device(self._params())
        except ValueError:
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        memories = ", ".join(repr(name) for name in self.memories) or "none"
        options = ", ".join(f"{key}={getattr(self, key)!r}" for key in _OPTIONS)
        return f"GEM (memories: {memories}; {options}) around {self.optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a deep copy holds: everything but the closures and hooks."""
        return {
            "optimizer": self.optimizer,
            **{key: getattr(self, key) for key in _OPTIONS},
            "_memories": [_Memory(m.name, None, m.refresh_every, m.age) for m in self._memories],
            "_rows": self._rows,
            "_mean_is_outdated": self._mean_is_outdated,
            "_solved": None,
            "_last": self._last,
            "_pending": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or for a deep copy."""
        self.__dict__.update(state)
        self._start_hooks()

    # --- memories ---------------------------------------------------------------------------------

    @property
    def memories(self) -> tuple[str, ...]:
        """Names, in the order in which they were first remembered; row k is memory k's."""
        return tuple(memory.name for memory in self._memories)

    @property
    def closures(self) -> dict[str, tuple[Callable[[], object], int | None]]:
        """By memory, what :meth:`remember` takes: to attach the same to a copy."""
        return {m.name: (m.closure, m.refresh_every) for m in self._memories if m.closure}

    @torch.no_grad()
    def remember(
        self, name: str, closure: Callable[[], object], refresh_every: int | None = 1
    ) -> None:
        """Keep a task: from now on no gradient may point uphill for its loss.

        The row is computed at once. ``.grad`` of the optimizer's parameters is afterwards what it
        was before, also where the closure raises. Parameters that are not this optimizer's keep
        what the closure adds to theirs: where they are trained, by another optimizer, the closure
        must put theirs back itself. A :class:`cl_optim.FisherEstimator` does not count the samples.

        A state dict holds rows and no closures: a load leaves the closures that are here. For a
        loaded memory without one, the first call with its name attaches the closure and leaves the
        row as it was saved, so that training goes on as if it had never stopped. For a name that
        has a closure, the closure is replaced and the row computed anew.

        Args:
            name: Of the memory.
            closure: Computes the task's loss on samples of it and calls ``backward()``, once or
                for many batches: the row is the mean gradient of its backward passes. It may reset
                gradients before the first of them, but not between them. Parameters that it gives
                no gradient to have a zero row.
            refresh_every: The row is recomputed at the weights of now once it is this many steps
                old; 1: for each step. None: never, which is there for research and *hurts*: the
                gradient at the end of a task is mostly noise (on Permuted-Digits accuracy fell to
                40 %, from 58 % without protection and 93 % with a refresh every 10 steps).

        Raises:
            ValueError: An argument is out of range.
            TypeError: ``closure`` cannot be called.
            RuntimeError: The closure gave no gradient to any of the parameters, or the capacity is
                reached. Nothing has changed then, nor where the closure itself raises.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a string that is not empty, not {name!r}.")
        if not callable(closure):
            raise TypeError(f"closure must be callable, not {closure!r}.")
        if refresh_every is not None and not (_is_int(refresh_every) and refresh_every >= 1):
            raise ValueError(
                f"refresh_every must be a whole number of at least 1, or None, not "
                f"{refresh_every!r}."
            )
        index = next((k for k, m in enumerate(self._memories) if m.name == name), None)
        if index is not None and self._memories[index].closure is None:
            self._memories[index].closure = closure
            self._memories[index].refresh_every = refresh_every
            return
        memory = _Memory(name, closure, refresh_every)
        memories = list(self._memories)
        if index is not None:
            memories[index] = memory
        else:
            memories = [*self._room_for(name), memory]
        self._rows.follow(self._params())
        values = self._mean(memories) if self.average else self._gradient(memory)
        # From here on nothing raises.
        for old in [m for m in self._memories if m not in memories and m.name != name]:
            self._remove(old)
        if len(self._rows) < (1 if self.average else len(memories)):
            self._rows.append()
        self._memories = memories
        if self.average:
            self._write_mean(values)
        else:
            self._rows.write(memories.index(memory), values)

    def _room_for(self, name: str) -> list[_Memory]:
        """The memories that remain when another one comes."""
        capacity = nnqp.MAX_SIZE if self.capacity is None else self.capacity
        if len(self._memories) < capacity:
            return self._memories
        if self.evict == "error":
            raise RuntimeError(
                f"the capacity of {capacity} memories is reached, by {_listed(self.memories)}: "
                f"forget one before {name!r} is remembered, or use evict='oldest'."
            )
        return self._memories[len(self._memories) - capacity + 1 :]

    @torch.no_grad()
    def forget(self, name: str) -> None:
        """Drop a memory: its loss may rise again. A-GEM's mean is recomputed by the next step.

        Raises:
            ValueError: There is no memory of this name.
        """
        memory = next((m for m in self._memories if m.name == name), None)
        if memory is None:
            known = _listed(self.memories) if self._memories else "there is none"
            raise ValueError(f"no memory is named {name!r}: {known}.")
        self._remove(memory)

    def _remove(self, memory: _Memory) -> None:
        k = self._memories.index(memory)
        del self._memories[k]
        if not self.average:
            self._rows.drop(k)
        elif not self._memories:
            self._rows.drop(0)
            self._mean_is_outdated = False
        else:
            self._mean_is_outdated = True

    def _refresh(self) -> None:
        """Recompute the rows that are due."""
        for memory in self._memories:
            if memory.closure is None and (memory.refresh_every is not None or self.average):
                raise RuntimeError(
                    f"memory {memory.name!r} has no closure, since none is saved: call "
                    f"remember({memory.name!r}, closure) to attach one, or forget it."
                )
        if self.average:
            if self._mean_is_outdated or any(memory.due for memory in self._memories):
                self._write_mean(self._mean(self._memories))
            return
        for memory in [memory for memory in self._memories if memory.due]:
            gradient = self._gradient(memory)
            if memory in self._memories:  # its closure may forget it
                self._rows.write(self._memories.index(memory), gradient)
                memory.age = 0

    def _write_mean(self, values: Mapping[Tensor, Tensor]) -> None:
        self._rows.write(0, values)
        self._mean_is_outdated = False
        for memory in self._memories:
            memory.age = 0

    def _mean(self, memories: Sequence[_Memory]) -> dict[Tensor, Tensor]:
        """The mean of all memories' gradients."""
        mean: dict[Tensor, Tensor] = {}
        for memory in memories:
            for param, value in self._gradient(memory).items():
                mean[param] = mean[param] + value if param in mean else _wide(value)
        return {param: value / len(memories) for param, value in mean.items()}

    def _gradient(self, memory: _Memory) -> dict[Tensor, Tensor]:
        """The mean gradient of the closure's backward passes, by parameter."""
        if memory.closure is None:
            raise RuntimeError(
                f"memory {memory.name!r} has no closure, since none is saved, and the mean of all "
                f"memories needs it: call remember({memory.name!r}, closure) first, or forget it."
            )
        params = [param for param in self._params() if param.requires_grad]
        passes = dict.fromkeys(params, 0)
        sums: dict[Tensor, Tensor | None] = {}
        reset = False

        def count(param: Tensor) -> None:
            nonlocal reset
            passes[param] += 1
            # Each pass adds to the tensor of the first one.
            reset |= sums.setdefault(param, param.grad) is not param.grad

        saved = [param.grad for param in params]
        versions = [None if grad is None else grad._version for grad in saved]
        handles = [
            param.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]
            for param in params
        ]
        try:
            for param in params:
                param.grad = None
            with torch.enable_grad(), unobserved():
                memory.closure()
            grads = {param: param.grad for param in params if param.grad is not None}
        finally:
            for handle in handles:
                handle.remove()
            for param, grad in zip(params, saved, strict=True):
                param.grad = grad
        if versions != [None if grad is None else grad._version for grad in saved]:
            raise RuntimeError(
                f"the closure of memory {memory.name!r} wrote into the gradients of the step, and "
                "they are lost: under DistributedDataParallel with gradient_as_bucket_view=True it "
                "must run the bare module, model.module."
            )
        total = max(passes.values(), default=0)
        if total == 0 or not grads:
            raise RuntimeError(
                f"the closure of memory {memory.name!r} left no gradient on any parameter of this "
                "optimizer: it must call backward() on a loss of the model that is trained."
            )
        for param, grad in grads.items():
            self._check_dense(param, grad, f"in memory {memory.name!r} ")
        if reset:
            raise RuntimeError(
                f"the closure of memory {memory.name!r} must not reset gradients between its "
                "backward passes: the row is made of their sum."
            )
        if total == 1:
            return grads
        return {param: _wide(grad) / total for param, grad in grads.items()}

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.numel() > 0]

    def _check_dense(self, param: Tensor, grad: Tensor, where: str = "") -> None:
        if grad.layout is not torch.strided:
            group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
            raise RuntimeError(
                f"the gradient of parameter {name_of(group, param)} {where}must be dense, not "
                f"{grad.layout}: GEM takes products over every weight."
            )

    # --- the step ---------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    @_disable_dynamo  # it keeps what it did for the reports
    @torch.no_grad()
    def step(self, closure: Callable[[], _Loss] | None = None) -> _Loss | None:
        """Refresh the rows that are due, project the gradients, let the wrapped optimizer step.

        Parameters without a gradient take no part and do not move. Without memories, or without
        gradients, this is the wrapped optimizer's step.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned. (The
                memories' closures are given to :meth:`remember`.)

        Raises:
            RuntimeError: A memory has no closure (after a load), a gradient is sparse, a CUDA graph
                is being captured, or, with ``on_invalid="raise"``, this step or the one before it
                was invalid.
        """
        if is_capturing():
            raise RuntimeError(
                "a step of GEM cannot be captured in a CUDA graph: which rows are due is decided "
                "anew in each step, and a replay would not refresh them. Capture the forward and "
                "the backward pass, and call step() outside of the graph."
            )
        self._raise_pending()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = self._params()
        grads = [param.grad for param in params]
        for param, grad in zip(params, grads, strict=True):
            if grad is not None:
                self._check_dense(param, grad)
        self._last = None
        if not self._memories or all(grad is None for grad in grads) or self._is_idle(grads):
            with _inside_step(self.optimizer):
                self.optimizer.step()
        else:
            self._rows.follow(params)
            self._refresh()
            self._projected_step(grads)
        return loss

    def _is_idle(self, grads: Sequence[Tensor | None]) -> bool:
        """Whether this is a step without gradient and learning rate that only begins the state.

        torch.distributed.checkpoint takes one, which is no step of the training.
        """
        rates = [group.get("lr") for group in self.param_groups]
        return (
            not self.state
            and all(not isinstance(lr, Tensor) or lr.is_cpu for lr in rates)
            and all(lr is not None and lr == 0.0 for lr in rates)
            and not any(grad is not None and grad.any() for grad in grads)
        )

    def _projected_step(self, grads: Sequence[Tensor | None]) -> None:
        rows_have_changed = bool(self._rows.stale)
        used, per_tensor = self._rows.products(grads)
        blocks = self._blocks(used)
        products = _Products(*(self._by_block(values, used, blocks) for values in per_tensor))
        params = [self._rows.params[i] for i in used]
        solution = nnqp.nnqp(
            products.gram,
            products.linear,
            self.memory_strength,
            # Sums of P products in float64; Q and c may come from different passes.
            gram_error=nnqp.sum_error(sum(param.numel() for param in params)),
            only_violated=True,
            state=self._solver_state(products.gram, used, rows_have_changed),
        )
        invalid = solution.status < 0
        v = torch.where(invalid[:, None], 0.0, solution.v)
        rows = [self._rows.rows[i] for i in used]
        if self._is_fused():
            take_step = self._fused_step(params, rows, v, blocks)
        else:
            given = [grad for grad in grads if grad is not None]
            gram_ops.combine_(given, rows, v, blocks)
            take_step = self.optimizer.step

        before = [param.detach().clone() for param in params] if self.track_update else None
        with _inside_step(self.optimizer):
            refused = self._take_step(take_step, invalid.any())
        update_dot = None
        if before is not None:
            moved = [param.detach() - old for param, old in zip(params, before, strict=True)]
            update_dot = gram_ops.dots_per_tensor(rows, moved)[:, : len(self._rows)].sum(0)
        self._last = _projection(solution, v, products, update_dot), products
        for memory in self._memories:
            memory.age += 1
        if refused:
            raise RuntimeError(_INVALID)

    def _solver_state(self, gram: Tensor, used: Sequence[int], changed: bool) -> Tensor:
        """What the last solution with the same Q left: the next one begins there."""
        key = (tuple(used), tuple(gram.shape), gram.device)
        if changed or self._solved is None or self._solved[0] != key:
            self._solved = key, nnqp.new_state(len(gram), gram.shape[1], gram.device)
        return self._solved[1]

    def _is_fused(self) -> bool:
        """Whether the wrapped optimizer adds the rows itself, which saves a pass over memory.

        Not before hooks of its own, which are to find (and may change) the projected gradient.
        """
        return (
            isinstance(self.optimizer, EWCAdamW)
            and not self.optimizer._optimizer_step_pre_hooks
            and all(
                row.dtype != torch.float64 or param.dtype == torch.float64
                for row, param in zip(self._rows.rows, self._rows.params, strict=True)
            )
        )

    def _fused_step(
        self, params: Sequence[Tensor], rows: Sequence[Tensor], v: Tensor, blocks: Sequence[int]
    ) -> Callable[[], object]:
        assert isinstance(self.optimizer, EWCAdamW)
        memories = dict(zip(params, rows, strict=True))
        coefficients = dict(zip(params, (v[block] for block in blocks), strict=True))
        return partial(self.optimizer.step_projected, memories, coefficients)

    def _take_step(self, take_step: Callable[[], object], invalid: Tensor) -> bool:
        """Let the wrapped optimizer step, unless the step is invalid; whether that is an error."""
        if self.on_invalid == "raw":
            take_step()
        elif self._skips_on_device() and not (self.on_invalid == "raise" and invalid.is_cpu):
            with _found_inf(self.optimizer, invalid):
                take_step()
            if self.on_invalid == "raise":
                self._pending = _to_host(invalid)
        elif invalid.item():
            return self.on_invalid == "raise"
        else:
            take_step()
        return False

    def _skips_on_device(self) -> bool:
        """Whether the wrapped optimizer leaves out a step that its ``found_inf`` calls invalid."""
        if not getattr(self.optimizer, "_step_supports_amp_scaling", False):
            return False
        if isinstance(self.optimizer, _TORCH_FUSED) and not all(
            group["fused"] for group in self.param_groups
        ):
            return False  # a state dict that was loaded has changed it
        if not isinstance(self.optimizer, torch.optim.SGD):
            return True
        # A first step that torch's SGD leaves out leaves uninitialised memory as momentum.
        return all(
            group["momentum"] == 0
            or param.grad is None
            or self.state.get(param, {}).get("momentum_buffer") is not None
            for group in self.param_groups
            for param in group["params"]
        )

    def _raise_pending(self) -> None:
        if self._pending is not None:
            invalid, event = self._pending
            self._pending = None
            event.synchronize()  # of the step before: long done
            if invalid.item():
                raise RuntimeError(_INVALID)

    def _blocks(self, used: Sequence[int]) -> list[int]:
        """The block of each parameter that has a gradient."""
        if self.blocks == "global":
            return [0] * len(used)
        if self.blocks == "tensor":
            return list(used)
        sizes = (sum(p.numel() > 0 for p in group["params"]) for group in self.param_groups)
        groups = [number for number, size in enumerate(sizes) for _ in range(size)]
        return [groups[i] for i in used]

    def _by_block(self, values: Tensor, used: Sequence[int], blocks: Sequence[int]) -> Tensor:
        """Sums over the parameters of each block; 0 for a block without gradients.

        Every entry in the same order, which `gram_ops.total` takes care of.
        """
        if self.blocks == "global":
            return gram_ops.total(values)[None]
        if self.blocks == "group":
            sizes = [blocks.count(number) for number in range(len(self.param_groups))]
            return torch.stack([gram_ops.total(part) for part in torch.split(values, sizes)])
        if len(used) == len(self._rows.params):
            return values
        whole = values.new_zeros(len(self._rows.params), *values.shape[1:])
        return whole.index_copy_(0, _on_device(used, values.device), values)

    # --- reports ----------------------------------------------------------------------------------

    @property
    def last_projection(self) -> Projection:
        """What the last step did to the gradient: device tensors; reading them waits for them.

        Raises:
            RuntimeError: There was no step yet, or the last one had no memories or no gradients.
        """
        return self._last_step()[0]

    def conflicts(self) -> Tensor:
        """Cosines of the last step's gradient, before its projection, with the memory rows.

        Returns:
            [t] float64 for ``blocks="global"``, else [B, t], on the parameters' device: below 0
            where the new task conflicts with a memory; 0 where the gradient or the row is 0. Over
            the parameters that had a gradient. From products that the step needed anyway.

        Raises:
            RuntimeError: There was no step yet, or the last one had no memories or no gradients.
        """
        products = self._last_step()[1]
        # Roots before the product: the squares of tiny or huge norms would leave float64's range.
        norms = products.gram.diagonal(dim1=1, dim2=2).sqrt() * products.square.sqrt()[:, None]
        cosines = torch.where(norms == 0, 0.0, products.linear / norms).clamp(-1.0, 1.0)
        return cosines[0] if self.blocks == "global" else cosines

    def _last_step(self) -> tuple[Projection, _Products]:
        if self._last is None:
            raise RuntimeError(
                "there is no projection to report: no step was taken yet, or the last one had no "
                "memories or no gradients."
            )
        return self._last

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict, and under ``"gem"`` the memories and options.

        Tensors in it are the optimizer's own, as always in torch. Closures are not in it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._rows.follow(self._params())
        dtype = None if self.memory_dtype is None else str(self.memory_dtype).removeprefix("torch.")
        state_dict = self.optimizer.state_dict()
        state_dict["gem"] = {
            "options": {**{key: getattr(self, key) for key in _OPTIONS}, "memory_dtype": dtype},
            "memories": [
                {"name": m.name, "refresh_every": m.refresh_every, "age": m.age}
                for m in self._memories
            ],
            "rows": dict(zip(self._indices(), self._rows.rows, strict=True)),
            "gram": self._rows.gram,
            "stale": sorted(self._rows.stale),
            "mean_is_outdated": self._mean_is_outdated,
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            if result is not None:
                state_dict = result
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of a GEM, or of a bare optimizer like the wrapped one.

        Options are loaded as hyperparameters are, and the memories become those of the state dict:
        their rows, in the dtype that they were saved in, how old these are and when they are
        refreshed. A memory whose name has a closure here keeps it; another waits for one
        (:meth:`remember`). One that is only here is forgotten, and a warning names it. Trainers
        may therefore load a state dict at any time, as Accelerate's ``prepare()`` does.

        A state dict without ``"gem"``, which is a bare optimizer's or has been through
        ``torch.distributed.checkpoint.state_dict``, leaves options and memories as they are. The
        next step computes the rows anew, but for those that are never refreshed.

        Parameters are matched as the wrapped optimizer matches them: by place, or
        (:class:`cl_optim.EWCAdamW`) by name.

        Args:
            state_dict: For parameters of the same shapes.

        Raises:
            ValueError: The state dict is truncated or belongs to other parameters. Nothing has
                changed then, as far as the wrapped optimizer checks what is its own.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            if result is not None:
                state_dict = result
        check_groups(state_dict, self.param_groups)
        inner = {key: value for key, value in state_dict.items() if key != "gem"}
        loaded = None
        if "gem" in state_dict:
            loaded = self._loaded(state_dict["gem"], self._saved_places(state_dict))
            self._warn_of_forgotten(loaded[1])
        self.optimizer.load_state_dict(inner)
        if loaded is not None:
            options, self._memories, self._rows, self._mean_is_outdated = loaded
            self._set_options(options)
        else:
            for memory in self._memories:  # the weights may be others now
                memory.age = memory.refresh_every or memory.age
        self._solved = self._last = self._pending = None
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _warn_of_forgotten(self, loaded: Sequence[_Memory]) -> None:
        names = {memory.name for memory in loaded}
        forgotten = [name for name in self.memories if name not in names]
        if forgotten:
            warn(
                f"memories that the state dict does not have are forgotten: {_listed(forgotten)}. "
                "Call remember() after the load to keep one."
            )

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if :meth:`load_state_dict` would refuse the state dict.

        Of the wrapped optimizer as far as it has a ``check_state_dict()`` itself.
        """
        check_groups(state_dict, self.param_groups)
        if isinstance(self.optimizer, EWCAdamW):
            inner = {key: value for key, value in state_dict.items() if key != "gem"}
            self.optimizer.check_state_dict(inner)
        if "gem" in state_dict:
            self._loaded(state_dict["gem"], self._saved_places(state_dict))

    def _saved_places(self, state_dict: dict[str, Any]) -> list[int]:
        """For each parameter its place among those of the state dict."""
        groups = state_dict["param_groups"]
        if isinstance(self.optimizer, EWCAdamW):
            groups = in_order(state_dict, self.param_groups)["param_groups"]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        places = {index: place for place, index in enumerate(saved)}
        return [places[index] for group in groups for index in group["params"]]

    def _indices(self) -> list[int]:
        """The places of the parameters with elements among all."""
        params = (param for group in self.param_groups for param in group["params"])
        return [i for i, param in enumerate(params) if param.numel() > 0]

    def _loaded(
        self, saved: Any, places: Sequence[int]
    ) -> tuple[dict[str, Any], list[_Memory], _Rows, bool]:
        """The contents of a state dict's ``"gem"``, checked and copied.

        Args:
            saved: The contents.
            places: Of this optimizer's parameters among the saved ones.
        """
        keys = ("options", "memories", "rows", "gram", "stale", "mean_is_outdated")
        for key in keys:
            if key not in saved:
                raise ValueError(f"the state dict is truncated: its 'gem' has no {key!r}.")
        options = saved["options"]
        for key in _OPTIONS:
            if key not in options:
                raise ValueError(f"the state dict is truncated: its options have no {key!r}.")
        _check_options(options)
        closures = {memory.name: memory.closure for memory in self._memories}
        try:
            memories = [
                _Memory(m["name"], closures.get(m["name"]), m["refresh_every"], m["age"])
                for m in saved["memories"]
            ]
        except KeyError as error:
            raise ValueError(f"the state dict is truncated: a memory has no {error}.") from None
        size = min(len(memories), 1) if options["average"] else len(memories)
        params, indices = self._params(), [places[index] for index in self._indices()]
        in_saved_order = sorted(indices)
        if list(saved["rows"]) != in_saved_order:
            raise ValueError(
                f"the state dict belongs to other parameters, or is truncated: it has rows for "
                f"parameters {_listed(list(saved['rows']))}, this optimizer for "
                f"{_listed(in_saved_order)}."
            )
        for index, param in zip(indices, params, strict=True):
            value, shape = saved["rows"][index], (size, *param.shape)
            if not isinstance(value, Tensor) or value.dtype not in DTYPES or value.shape != shape:
                raise ValueError(
                    f"the state dict belongs to other parameters: the rows of parameter {index} "
                    f"must be a tensor of shape {shape}, not {_described(value)}."
                )
        shape = (len(params), size, size)
        if not isinstance(saved["gram"], Tensor) or saved["gram"].shape != shape:
            raise ValueError(
                f"the state dict is damaged: 'gram' must be a tensor of shape {shape}, not "
                f"{_described(saved['gram'])}."
            )
        if not set(saved["stale"]) <= set(range(size)):
            raise ValueError(f"the state dict is damaged: 'stale' is {saved['stale']}.")
        rows = _Rows(_dtype(options["memory_dtype"]))
        rows.gram = rows.gram.new_zeros(0, size, size)
        rows.follow(params)
        for i, index in enumerate(indices):
            if rows.rows[i].dtype != saved["rows"][index].dtype:
                rows.rows[i] = rows.rows[i].to(saved["rows"][index].dtype)
            rows.rows[i].copy_(saved["rows"][index])
        ranks = {index: rank for rank, index in enumerate(in_saved_order)}
        rows.gram.copy_(saved["gram"][[ranks[index] for index in indices]])
        rows.stale = set(saved["stale"])
        return dict(options), memories, rows, bool(saved["mean_is_outdated"])


def _projection(
    solution: nnqp.Solution, v: Tensor, products: _Products, update_dot: Tensor | None
) -> Projection:
    change = (v * (2.0 * products.linear + (products.gram @ v[:, :, None])[:, :, 0])).sum(1)
    # Where v = 0 nothing has changed, whatever the rows hold.
    square = products.square + torch.where((v != 0).any(1), change, 0.0)
    return Projection(
        status=solution.status,
        active=v != 0,
        v=v,
        gap=solution.gap,
        grad_norm=products.square.sqrt(),
        projected_norm=square.clamp(min=0.0).sqrt(),
        update_dot=update_dot,
    )


# Optimizers whose step is a part of a GEM's just now, by id.
_inside: set[int] = set()


class _Once:
    """A global step hook that is not called again for a part of a GEM's step."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, optimizer: torch.optim.Optimizer, *args: Any) -> Any:
        return None if id(optimizer) in _inside else self._hook(optimizer, *args)


@contextmanager
def _inside_step(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the wrapped optimizer's step have its own hooks: global ones are called for GEM's."""
    hooks: Any
    for hooks in (_global_optimizer_pre_hooks, _global_optimizer_post_hooks):
        for key, hook in hooks.items():
            if not isinstance(hook, _Once):
                hooks[key] = _Once(hook)
    _inside.add(id(optimizer))
    try:
        yield
    finally:
        _inside.discard(id(optimizer))


@contextmanager
def _found_inf(optimizer: torch.optim.Optimizer, invalid: Tensor) -> Iterator[None]:
    """Tell the optimizer whether to leave out its step, as GradScaler does."""
    inner: Any = optimizer
    inner.grad_scale = None
    inner.found_inf = invalid.float()
    try:
        yield
    finally:
        del inner.grad_scale, inner.found_inf


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy that is there once the event is."""
    copy = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)
    copy.copy_(flag, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(flag.device))
    return copy, event


def _on_device(indices: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(indices, device="cpu").to(device, non_blocking=True)


def _wide(value: Tensor) -> Tensor:
    """In float32 at least, so that dividing it rounds nothing that matters."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _one_device(params: Sequence[Tensor]) -> torch.device:
    devices = list(dict.fromkeys(param.device for param in params))
    if len(devices) > 1:
        raise ValueError(
            f"all parameters must be on one device; they are on {', '.join(map(str, devices))}."
        )
    return devices[0] if devices else torch.device("cpu")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {optimizer!r}.")
    if isinstance(optimizer, GEM):
        raise ValueError("optimizer must not be a GEM itself: one holds any number of memories.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer must not be LBFGS, which takes its gradients from a closure of its own, "
            "several in a step."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ValueError("optimizer must not be SparseAdam: GEM needs dense gradients.")


def _check_group(group: Mapping[str, Any]) -> None:
    for param in group["params"]:
        if param.dtype not in DTYPES:
            raise ValueError(
                f"parameter {name_of(group, param)} must be of a real floating-point dtype, one of "
                f"{_listed([str(dtype) for dtype in DTYPES])}, not {param.dtype}."
            )
        if is_dtensor(param):
            raise ValueError(
                f"parameter {name_of(group, param)} must not be a DTensor: products of sharded "
                "gradients would have to be summed over processes."
            )


def _check_options(options: Mapping[str, Any]) -> None:
    strength, capacity = options["memory_strength"], options["capacity"]
    if not 0.0 <= strength < math.inf:
        raise ValueError(f"memory_strength must be finite and at least 0, not {strength}.")
    for key, choices in (("blocks", BLOCKS), ("evict", EVICT), ("on_invalid", ON_INVALID)):
        if options[key] not in choices:
            raise ValueError(f"{key} must be one of {choices}, not {options[key]!r}.")
    if capacity is not None and not (_is_int(capacity) and 1 <= capacity <= nnqp.MAX_SIZE):
        raise ValueError(
            f"capacity must be a whole number from 1 to {nnqp.MAX_SIZE}, or None, not {capacity!r}."
        )
    _dtype(options["memory_dtype"])


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, value, value) if isinstance(value, str) else value
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"memory_dtype must be None or one of {_listed([str(d) for d in DTYPES])}, not "
            f"{value!r}."
        )
    return dtype


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(items: Sequence[object]) -> str:
    shown = ", ".join(str(item) for item in items[:6])
    return shown if len(items) <= 6 else f"{shown} and {len(items) - 6} more"


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} of shape {tuple(value.shape)}"
