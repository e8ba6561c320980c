"""GEM: an optimizer around another one, whose steps do not raise the losses of earlier tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from cl_optim.distributed import MeanRanks, check_ranks, here
from cl_optim.ops import gram as gram_ops
from cl_optim.ops import nnqp
from cl_optim.ops.capture import is_capturing
from cl_optim.ops.checks import check_groups, check_whole, dtype_name, listed
from cl_optim.ops.warn import warn
from cl_optim.optim.ewc_adamw import EWCAdamW
from cl_optim.optim.groups import name_of
from cl_optim.optim.invalid_steps import INVALID, InvalidSteps
from cl_optim.optim.memories import Memories, Memory
from cl_optim.optim.memory_rows import Products, check_dense, one_device
from cl_optim.optim.projection import Blocks, Projection, Solver, cosines, outcome, report
from cl_optim.optim.settling import Settles
from cl_optim.optim.shards import Shards
from cl_optim.optim.wrapper import Forwarded, Wrapper, innermost, inside_step, layers

BLOCKS = ("global", "group", "tensor")
EVICT = ("error", "oldest")
ON_INVALID = ("skip", "raw", "raise")

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

_Loss = TypeVar("_Loss")  # what a closure returns, as for EWCAdamW


class GEM(Wrapper):
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

    Around a :class:`cl_optim.EWCAdamW` its calls stay the same: ``consolidate``, ``freeze``,
    ``unfreeze``, ``penalty``, ``protected``, ``suggest_lambda``, ``last_penalty`` and
    ``last_drift`` are forwarded to it, as are ``consolidate`` and ``settle`` to a
    :class:`cl_optim.InputProjection`. Around another optimizer they are an AttributeError. What
    else it has is found at ``.optimizer``.

    Weights that are frozen (``freeze``) count in the products as if they moved.

    What it guarantees is about the gradient. Momentum and Adam's preconditioning make another
    direction of it: ``track_update=True`` reports what the update itself does to each old loss.
    With :class:`cl_optim.EWCAdamW` inside, the task's gradient is projected and the penalty added
    after it; the rows are then added in its fused step, and ``.grad`` stays as it was. Any other
    optimizer finds the projected gradient in ``.grad``.

    Closures run inside :meth:`step`, at the weights before it. They are part of training: what they
    do to random numbers and running statistics remains, and the scaler's factor is not theirs
    (rows and gradient are both unscaled). Under DistributedDataParallel they run the bare module:
    on the same samples in every process, or with ``ranks="mean"`` each on its own. Where the model
    is spread over processes (DTensors of ``fully_shard`` or tensor parallelism), they run it as
    training does, each process on its own samples; products are summed over processes, in one
    order, so that all find the same v: 8 (t + 1)² bytes per block are sent in a step.

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
        ranks: Of which processes' gradients a row is the mean: ``"mean"``: of all that train the
            model, in one all-reduce whenever it is computed; a process group of
            torch.distributed: of its members'; ``"own"``: of this one's alone. None: of this
            one's, and where there are others, theirs must be the same.

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
        ranks: MeanRanks = None,
    ) -> None:
        check_ranks(ranks, "mean")
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
        one_device([param for group in optimizer.param_groups for param in group["params"]])
        super().__init__(optimizer)
        self._shards = Shards()
        self._memories = Memories(average, _dtype(memory_dtype), ranks)
        self._set_options(options)
        self._forget_steps()

    def _set_options(self, options: Mapping[str, Any]) -> None:
        self.memory_strength = float(options["memory_strength"])
        self.blocks: str = options["blocks"]
        self.capacity: int | None = options["capacity"]
        self.evict: str = options["evict"]
        self.on_invalid: str = options["on_invalid"]
        self.track_update: bool = options["track_update"]

    def _forget_steps(self) -> None:
        self._solver = Solver()
        self._invalid_steps = InvalidSteps()
        # Of which a report is made when it is asked for.
        self._last: tuple[nnqp.Solution, Tensor, Products, Tensor | None] | None = None

    @property
    def average(self) -> bool:
        """Return whether the only row is the mean of all memories' gradients."""
        return self._memories.average

    @property
    def memory_dtype(self) -> torch.dtype | None:
        """Return the dtype of new rows; None: each parameter's own."""
        return self._memories.rows.dtype

    # --- the wrapped optimizer --------------------------------------------------------------------

    consolidate = Forwarded(EWCAdamW.consolidate)
    settle = Forwarded(Settles.settle)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; its rows are zero until they are refreshed."""
        self.optimizer.add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            one_device([param for group in self.param_groups for param in group["params"]])
        except ValueError:
            self.param_groups.pop()
            raise

    def __repr__(self) -> str:
        memories = ", ".join(repr(name) for name in self.memories) or "none"
        options = ", ".join(f"{key}={value!r}" for key, value in self._options().items())
        return f"GEM (memories: {memories}; {options}) around {self.optimizer!r}"

    def _options(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in _OPTIONS}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a deep copy holds: everything but closures and hooks.

        Raises:
            RuntimeError: A parameter is a DTensor.
        """
        if self._local().any:
            raise RuntimeError(
                "a GEM of DTensors cannot be copied or pickled, since its rows are of this process "
                "alone: load its state_dict() into another one."
            )
        own = {"options": self._options(), "memories": self._memories, "last": self._last}
        return {"optimizer": self.optimizer, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or for a deep copy."""
        super().__init__(state["optimizer"])
        self._shards = Shards()
        self._memories = state["memories"]
        self._set_options(state["options"])
        self._forget_steps()
        self._last = state["last"]

    # --- memories ---------------------------------------------------------------------------------

    @property
    def memories(self) -> tuple[str, ...]:
        """Return the names, in the order in which they were remembered; row k is memory k's."""
        return self._memories.names

    @property
    def closures(self) -> dict[str, tuple[Callable[[], object], int | None]]:
        """Return by memory what :meth:`remember` takes: to attach the same to a copy."""
        return {m.name: (m.closure, m.refresh_every) for m in self._memories.kept if m.closure}

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
            ValueError: An argument is out of range; or the row is another one in another process,
                and the GEM was made without ``ranks``.
            TypeError: ``closure`` cannot be called.
            RuntimeError: The closure gave no gradient to any of the parameters, the capacity is
                reached, or parameters were exchanged under a memory that is never refreshed.
                Nothing has changed then, nor where the closure itself raises.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a string that is not empty, not {name!r}.")
        if not callable(closure):
            raise TypeError(f"closure must be callable, not {closure!r}.")
        if refresh_every is not None:
            check_whole("refresh_every", refresh_every, note=", or None")
        memory = Memory(name, closure, refresh_every)
        self._memories.remember(memory, self._local(), self.capacity, self.evict)

    @torch.no_grad()
    def forget(self, name: str) -> None:
        """Drop a memory: its loss may rise again. A-GEM's mean is recomputed by the next step.

        Raises:
            ValueError: There is no memory of this name.
        """
        self._memories.forget(name)

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
        self._invalid_steps.raise_pending()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shards = self._local()
        params = shards.whole()
        grads = [param.grad for param in params]
        for param, grad in zip(params, grads, strict=True):
            if grad is not None:
                check_dense(self.param_groups, param, grad)
        self._last = None
        if not self._memories.kept or all(grad is None for grad in grads) or self._is_idle(grads):
            with inside_step(self.optimizer):
                self.optimizer.step()
        else:
            self._memories.refresh(shards)
            with shards.with_grads():
                self._projected_step(shards)
        return loss

    def _local(self) -> Shards:
        """Return the groups as this process has them."""
        return self._shards.look(self.param_groups)

    def _is_idle(self, grads: Sequence[Tensor | None]) -> bool:
        """Tell whether this is a step without gradient and learning rate that begins the state.

        torch.distributed.checkpoint takes one, which is no step of the training.
        """
        rates = [group.get("lr") for group in self.param_groups]
        return (
            not self.state
            and all(not isinstance(lr, Tensor) or lr.is_cpu for lr in rates)
            and all(lr is not None and lr == 0.0 for lr in rates)
            and not any(
                self._shards.together.gather(
                    any(g is not None and bool(here(g).any()) for g in grads)
                )
            )
        )

    def _projected_step(self, shards: Shards) -> None:
        """Take a step with g + Gᵀv in place of each gradient g."""
        memory_rows = self._memories.rows
        rows_have_changed = bool(memory_rows.stale)
        grads = [param.grad for param in memory_rows.params]
        used, packed = memory_rows.products(grads)
        params = [memory_rows.params[i] for i in used]
        rows = [memory_rows.by_param[i] for i in used]
        blocks = Blocks(self.blocks, shards.sizes(), used)
        counted = [shards.counts(param) for param in params]
        (packed,) = shards.together.added(blocks.sum(_of_counted(packed, counted)))
        products = Products(packed)
        terms = sum(shards.size(param) for param in params)
        solution = self._solver.solve(
            products, self.memory_strength, used, terms, begin_anew=rows_have_changed
        )
        v, is_invalid, may_move = outcome(solution)
        if self._is_fused():
            take_step = self._fused_step(params, rows, v, blocks.of_used)
        else:
            if may_move:
                given = [grad for grad in grads if grad is not None]
                gram_ops.combine_(given, rows, v, blocks.of_used)
            take_step = self.optimizer.step

        before = [param.detach().clone() for param in params] if self.track_update else None
        with inside_step(self.optimizer):
            is_refused = self._invalid_steps.take_step(
                self.optimizer, take_step, is_invalid, self.on_invalid
            )
        update_dot = None
        if before is not None:
            moved = [param.detach() - old for param, old in zip(params, before, strict=True)]
            dots = gram_ops.dots_per_tensor(rows, moved)[:, : len(memory_rows)]
            (update_dot,) = shards.together.added(_of_counted(dots, counted).sum(0))
        self._last = solution, v, products, update_dot
        self._memories.grow_older()
        if is_refused:
            raise RuntimeError(INVALID)

    def _is_fused(self) -> bool:
        """Tell whether the wrapped optimizer adds the rows itself, which saves a pass over memory.

        Not before hooks of its own, which are to find (and may change) the projected gradient.
        """
        memory_rows = self._memories.rows
        return (
            isinstance(self.optimizer, EWCAdamW)
            and not self.optimizer._optimizer_step_pre_hooks
            and all(
                rows.dtype != torch.float64 or param.dtype == torch.float64
                for rows, param in zip(memory_rows.by_param, memory_rows.params, strict=True)
            )
        )

    def _fused_step(
        self, params: Sequence[Tensor], rows: Sequence[Tensor], v: Tensor, blocks: Sequence[int]
    ) -> Callable[[], object]:
        assert isinstance(self.optimizer, EWCAdamW)
        whole = [self._shards.param(param) for param in params]
        rows_of = dict(zip(whole, rows, strict=True))
        coefficients_of = dict(zip(whole, (v[block] for block in blocks), strict=True))
        return partial(self.optimizer.step_projected, rows_of, coefficients_of)

    # --- reports ----------------------------------------------------------------------------------

    @property
    def last_projection(self) -> Projection:
        """Return what the last step did to the gradient; reading the tensors waits for a device.

        Raises:
            RuntimeError: There was no step yet, or the last one had no memories or no gradients.
        """
        return report(*self._last_step())

    def conflicts(self) -> Tensor:
        """Return the cosines of the last step's gradient, not yet projected, with the memory rows.

        Returns:
            [t] float64 for ``blocks="global"``, else [B, t], on the parameters' device: below 0
            where the new task conflicts with a memory; 0 where the gradient or the row is 0. Over
            the parameters that had a gradient. From products that the step needed anyway.

        Raises:
            RuntimeError: There was no step yet, or the last one had no memories or no gradients.
        """
        by_block = cosines(self._last_step()[2])
        return by_block[0] if self.blocks == "global" else by_block

    def _last_step(self) -> tuple[nnqp.Solution, Tensor, Products, Tensor | None]:
        if self._last is None:
            raise RuntimeError(
                "there is no projection to report: no step was taken yet, or the last one had no "
                "memories or no gradients."
            )
        return self._last

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict, and under ``"gem"`` the memories and options.

        Tensors in it are the optimizer's own, as always in torch. Closures are not in it.
        """
        self._before_saving()
        dtype = dtype_name(self.memory_dtype)
        state_dict = self.optimizer.state_dict()
        state_dict["gem"] = {
            "options": {**self._options(), "memory_dtype": dtype},
            **self._memories.state_dict(self._local()),
        }
        return self._saved(state_dict)

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
        state_dict = self._before_loading(state_dict)
        check_groups(state_dict, self.param_groups)
        inner = {key: value for key, value in state_dict.items() if key != "gem"}
        loaded = None
        if "gem" in state_dict:
            loaded = self._loaded(state_dict)
            forgotten = [name for name in self.memories if name not in loaded[1].names]
            if forgotten:
                warn(
                    "memories that the state dict does not have are forgotten: "
                    f"{listed(forgotten, 6, str)}. Call remember() after the load to keep one."
                )
        self.optimizer.load_state_dict(inner)
        if loaded is None:
            self._memories.outdate()  # the weights may be others now
        else:
            options, self._memories = loaded
            self._set_options(options)
        self._forget_steps()
        self._after_loading()

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if :meth:`load_state_dict` would refuse the state dict.

        Of the wrapped optimizer as far as it has a ``check_state_dict()`` itself.
        """
        check_groups(state_dict, self.param_groups)
        check = getattr(self.optimizer, "check_state_dict", None)
        if check is not None:
            check({key: value for key, value in state_dict.items() if key != "gem"})
        if "gem" in state_dict:
            self._loaded(state_dict)

    def _loaded(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], Memories]:
        """Return the options and memories of a state dict, checked and copied."""
        saved = state_dict["gem"]
        if "options" not in saved:
            raise ValueError("the state dict is truncated: its 'gem' has no 'options'.")
        options = saved["options"]
        for key in _OPTIONS:
            if key not in options:
                raise ValueError(f"the state dict is truncated: its options have no {key!r}.")
        _check_options(options)
        memories = Memories(
            options["average"], _dtype(options["memory_dtype"]), self._memories.ranks
        )
        closures = {memory.name: memory.closure for memory in self._memories.kept}
        memories.load(saved, self._local(), self._saved_places(state_dict), closures)
        return dict(options), memories


def _of_counted(values: Tensor, counted: Sequence[bool]) -> Tensor:
    """Return products by parameter, 0 for the replicas of what another process counts."""
    if all(counted):
        return values
    mask = torch.tensor(counted, device=values.device).view(-1, *[1] * (values.dim() - 1))
    return values.where(mask, 0.0)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, not {optimizer!r}.")
    if any(isinstance(layer, GEM) for layer in layers(optimizer)):
        raise ValueError("optimizer must not be a GEM itself: one holds any number of memories.")
    inner = innermost(optimizer)
    if isinstance(inner, torch.optim.LBFGS):
        raise ValueError(
            "optimizer must not be LBFGS, which takes its gradients from a closure of its own, "
            "several in a step."
        )
    if isinstance(inner, torch.optim.SparseAdam):
        raise ValueError("optimizer must not be SparseAdam: GEM needs dense gradients.")


def _check_group(group: Mapping[str, Any]) -> None:
    for param in group["params"]:
        if param.dtype not in gram_ops.DTYPES:
            raise ValueError(
                f"parameter {name_of(group, param)} must be of a real floating-point dtype, one of "
                f"{listed(gram_ops.DTYPES, 6, str)}, not {param.dtype}."
            )


def _check_options(options: Mapping[str, Any]) -> None:
    strength, capacity = options["memory_strength"], options["capacity"]
    if not 0.0 <= strength < math.inf:
        raise ValueError(f"memory_strength must be finite and at least 0, not {strength}.")
    for key, choices in (("blocks", BLOCKS), ("evict", EVICT), ("on_invalid", ON_INVALID)):
        if options[key] not in choices:
            raise ValueError(f"{key} must be one of {choices}, not {options[key]!r}.")
    if capacity is not None:
        check_whole("capacity", capacity, most=nnqp.MAX_SIZE, note=", or None")
    _dtype(options["memory_dtype"])


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, value, value) if isinstance(value, str) else value
    if dtype is not None and dtype not in gram_ops.DTYPES:
        raise ValueError(
            f"memory_dtype must be None or one of {listed(gram_ops.DTYPES, 6, str)}, not {value!r}."
        )
    return dtype
