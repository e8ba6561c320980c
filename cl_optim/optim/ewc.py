"""EWC: an optimizer around any other one, which pulls what that steps towards old weights."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from cl_optim.distributed import whole
from cl_optim.ops.capture import is_capturing
from cl_optim.ops.checks import check_groups, dtype_name
from cl_optim.ops.ewc_adamw_arguments import Penalty
from cl_optim.ops.ewc_pull import Numbers, Options
from cl_optim.optim import protection
from cl_optim.optim.cuda_graphs import warn_of_captured
from cl_optim.optim.ewc_options import (
    FIXED,
    LEFT,
    OPTIONS,
    OWN,
    check_group,
    check_options,
    check_wrapped,
    chosen,
    given,
)
from cl_optim.optim.groups import are_of, name_of, renumbered
from cl_optim.optim.kronecker.ledger import Ledger, amount
from cl_optim.optim.kronecker.matrices import check_saved
from cl_optim.optim.kronecker.pull import Pull
from cl_optim.optim.kronecker.stacks import apart
from cl_optim.optim.launch import Roles, Step
from cl_optim.optim.options import lr_stays_tensor
from cl_optim.optim.protecting import Protecting
from cl_optim.optim.pulling import Batch, Pulling, batches
from cl_optim.optim.shards import Shards
from cl_optim.optim.state import check_param_state, loaded, misfit, spread
from cl_optim.optim.wrapper import Wrapper, inside_step, passed_on

_KEY = "ewc"  # of a state dict
_MARK = "consolidations"  # of its groups, where there are some

_Loss = TypeVar("_Loss")  # what a closure returns, as for EWCAdamW
_ImportanceDtype: TypeAlias = Literal["float32", "bfloat16", "log8"] | torch.dtype
_AnchorDtype: TypeAlias = Literal["float32", "bfloat16"] | torch.dtype | None
_State: TypeAlias = defaultdict[Tensor, dict[str, Any]]


class EWC(Protecting, Wrapper):
    r"""Elastic weight consolidation around any optimizer: it needs nothing of that but its step.

    With :math:`Δ = θ − θ^*`, the importance F of earlier tasks and the learning rate of the wrapped
    optimizer's group:

    ``"proximal"``
        after the step, θ ← θ* + (θ − θ*)/(1 + 2·lr·λ·F): the implicit form, stable for every λ;
    ``"decoupled"``
        after the step, θ ← θ − lr·2λFΔ, with Δ from before it: a copy of the protected weights is
        kept for the time of a step;
    ``"gradient"``
        before the step, g ← g + 2λFΔ: the loss term as the papers write it, which momentum and
        preconditioners make another direction of. After gradient clipping, which does not see it.

    Around ``torch.optim.AdamW`` the first two are :class:`cl_optim.EWCAdamW`'s::

        inner = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        optimizer = cl_optim.EWC(inner, strength=0.001)
        train(model, optimizer, task_a)
        optimizer.consolidate(cl_optim.estimate_fisher(model, task_a_batches))
        train(model, optimizer, task_b)  # as before

    The pull reads and writes 16 bytes per float32 weight; with ``every`` = k it is that of k steps
    at once, for the sum of their learning rates: 16/k bytes. In between weights are up to k steps
    ahead of it: call :meth:`settle`, or let :meth:`settle_before` do it, before you evaluate, save
    or write weights. A parameter without a gradient in a step is not pulled.

    **What a learning rate is** is the wrapped optimizer's business: ``group["lr"]`` is taken at its
    word. torch's Muon multiplies it by a factor of a matrix's shape, so that its steps are longer
    than the pull knows; Adafactor with ``relative_step=True`` has none, and is refused but for
    ``"gradient"``. schedulefree's parameters are, in training, a mixture of two sequences, of which
    a pull would reach one: it takes ``"gradient"``, which both follow.

    **Order.** ``GEM(EWC(opt))`` projects the gradient and then pulls (and adds a ``"gradient"``
    pull after the projection); ``EWC(GEM(opt))`` lets GEM step, and project such a pull with the
    rest. ``EWC(InputProjection(opt))`` pulls what has been projected, the other way round the pull
    is projected, too.

    All else is the wrapped optimizer's: groups, state, defaults, schedulers, ``GradScaler``,
    closures, hooks. The options below stand in its groups, where they may differ
    (``group["ewc_lambda"]``); its state dict does not have them.

    Args:
        optimizer: Any optimizer of dense parameters but EWCAdamW, which has a pull of its own. It
            keeps its place as ``self.optimizer``.
        ewc_lambda: λ ≥ 0, for λ Σ F Δ² without ½.
        penalty: The form of the pull.
        importance_dtype: As for :class:`cl_optim.EWCAdamW`, as are the next two.
        anchor_dtype: How θ* is stored.
        strength: λ without a unit, from each :meth:`consolidate` on; None: λ is ``ewc_lambda``.
            0.1 to begin with where a step is as long as the learning rate says, as Adam's; less
            around SGD, whose gradients are what the pull is compared with.
        every: Steps between pulls, for ``"proximal"``; of Kronecker importance, too, where 10 keeps
            as much as 1.
        rounding: How bfloat16 weights take up pulls of less than half a unit of their last place:
            ``"nearest"``: not at all; ``"stochastic"``: on average.
        basis_dtype: Of Kronecker importance.
        importance_damping: κ ≥ 0. What the wrapped step does to a weight, not the pull, is divided
            by 1 + κF/F̂, as in :class:`cl_optim.EWCAdamW`, but with its weight decay; a copy of the
            protected weights is kept for the time of a step.

    Raises:
        TypeError: ``optimizer`` is no optimizer.
        ValueError: An option is out of range, or the optimizer cannot be wrapped.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796 (EWC); Parikh & Boyd 2014 (proximal algorithms).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        ewc_lambda: float = 1.0,
        penalty: Penalty = "proximal",
        *,
        importance_dtype: _ImportanceDtype = "float32",
        anchor_dtype: _AnchorDtype = None,
        strength: float | None = None,
        every: int = 1,
        rounding: Literal["nearest", "stochastic"] = "nearest",
        basis_dtype: Literal["float32", "bfloat16"] | torch.dtype = "float32",
        importance_damping: float = 0.0,
    ) -> None:
        options = {
            "ewc_lambda": ewc_lambda,
            "penalty": penalty,
            "importance_dtype": dtype_name(importance_dtype),
            "anchor_dtype": dtype_name(anchor_dtype),
            "strength": strength,
            "every": every,
            "rounding": rounding,
            "basis_dtype": dtype_name(basis_dtype),
            "importance_damping": importance_damping,
        }
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}."
            )
        check_wrapped(optimizer)
        own = [{**options, **of_group} for of_group in chosen(optimizer.param_groups)]
        for group, values in zip(optimizer.param_groups, own, strict=True):
            check_group({**group, **values, **LEFT, **FIXED})
        super().__init__(optimizer)
        self._options = options
        for group, values in zip(optimizer.param_groups, own, strict=True):
            group.update(**values, **LEFT, **FIXED)
        self._begin_anew(defaultdict(dict))

    def _begin_anew(self, state: _State) -> None:
        self._protected_state = state
        self._pull = Pull()
        self._shards = Shards()
        self._pulling = Pulling()
        self._ledger = Ledger()
        self._members: list[list[int]] | None = None
        self._whole: list[list[Batch]] = []  # each group's members, all of them, by device
        # The groups' parameters then, their dtype, and how they are rounded.
        self._seen: list[tuple[list[Tensor], torch.dtype | None, str]] = []
        self._frozen: dict[Tensor, Tensor] = {}
        self._fixed = []
        self._was_captured = False
        self._is_stepping = False
        self._note_fixed()

    # --- the protection ---------------------------------------------------------------------------

    @property
    def _protection(self) -> MutableMapping[Tensor, dict[str, Any]]:
        return self._protected_state

    def _protection_changes(self, what: str) -> None:
        if self._was_captured:
            self._was_captured = False
            warn_of_captured(what)
        self._pulling.forget()
        self._members = None

    def _reset(self, param: Tensor) -> None:
        raise ValueError(
            "reset_state is not for an optimizer that is wrapped, whose state is its own: make a "
            "new one, and an EWC around it, and load this one's protection."
        )

    def consolidate(self, *args: Any, reset_state: bool = False, **kwargs: Any) -> None:
        """Protect what has been learned, as :meth:`cl_optim.EWCAdamW.consolidate` does.

        What the wrapped optimizer has due is settled first.

        Raises:
            ValueError: As there; or ``reset_state``, since a wrapped optimizer's state is its own.
        """
        if reset_state:
            self._reset(next(self._params()))
        super().consolidate(*args, **kwargs)

    def _before_freezing(self) -> None:
        super()._before_freezing()
        self._members = None

    def _look(self) -> list[list[int]]:
        """Return each group's parameters that have a diagonal pull, by their place in it.

        Raises:
            RuntimeError: What is protected is not what the groups have, or was cast.
        """
        groups = self._shards.follow(self.param_groups, self._protection).groups
        if self._members is None or not _are_the_same(groups, self._seen):
            shards = self._local()
            groups, state = shards.groups, shards.state
            self._check_groups()
            if self._seen:
                self._ledger.renumber(renumbered([params for params, *_ in self._seen], groups))
            self._seen = [(list(g["params"]), _dtype(g), g["rounding"]) for g in groups]
            self._pulling.forget()
            self._pull.look_again()
            in_matrices = self._pull.members(self.param_groups, self._protection)
            self._members = [
                [
                    index
                    for index, param in enumerate(group["params"])
                    if "importance" in state.get(param, {}) and param not in in_matrices
                ]
                for group in groups
            ]
            self._whole = [
                batches(number, group["params"], self._members[number])
                for number, group in enumerate(groups)
            ]
            frozen = ((p, protection.frozen_weights(s, p)) for p, s in self._protected_states())
            self._frozen = {p: mask for p, mask in frozen if bool(mask.any())}
            for group in groups:
                if group["rounding"] == "stochastic":
                    for param in group["params"]:
                        if "importance" in state.get(param, {}):
                            count = torch.zeros((), dtype=torch.float32, device=param.device)
                            state[param].setdefault("step", count)
        return self._members

    def _check_groups(self) -> None:
        here = set(self._params())
        lost = sum(param not in here for param in self._protection)
        if lost:
            raise RuntimeError(
                f"{lost} parameters that are protected are not the optimizer's any more: make an "
                "EWC of the optimizer as it is now, and consolidate() that."
            )
        for group in self.param_groups:
            for key in OWN:
                if key not in group:
                    raise RuntimeError(
                        f"a group has no {key!r}: it was added or loaded into the wrapped "
                        "optimizer itself; call add_param_group() and load_state_dict() of the EWC."
                    )
            for param in group["params"]:
                found = misfit(self._protection.get(param, {}), param)
                if found is not None:
                    raise RuntimeError(
                        f"parameter {name_of(group, param)} was cast to {param.dtype} after its "
                        f"{found!r} was made: optimizer.load_state_dict(optimizer.state_dict()) "
                        "casts that, too."
                    )

    # --- the wrapped optimizer --------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer; it is unprotected until the next consolidate()."""
        own = {**self._options, **given(param_group), **LEFT, **FIXED}
        rest = {key: value for key, value in param_group.items() if key not in OPTIONS}
        params = rest["params"]
        rest["params"] = [params] if isinstance(params, Tensor) else list(params)
        check_options({**self.defaults, **rest, **own})
        self.optimizer.add_param_group(rest)
        group = self.param_groups[-1]
        try:
            check_group({**group, **own})
        except ValueError:
            self.param_groups.pop()
            raise
        group.update(own)
        self._members = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tell GradScaler whether the wrapped optimizer unscales and skips by itself."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    # GradScaler sets these two for the time of a step.
    grad_scale = passed_on("grad_scale")
    found_inf = passed_on("found_inf")

    def __repr__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self._options.items())
        return f"EWC ({options}) around {self.optimizer!r}"

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a deep copy holds: all but hooks; what is due of pulls, too."""
        return {
            "optimizer": self.optimizer,
            "options": self._options,
            "protection": list(apart(self._protected_state).items()),
            "ledgers": (self._ledger, self._pull.ledger),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle or for a deep copy."""
        super().__init__(state["optimizer"])
        self._options = state["options"]
        self._begin_anew(defaultdict(dict, state["protection"]))
        if "ledgers" in state:  # else nothing was due
            self._ledger, self._pull.ledger = state["ledgers"]

    # --- the step ---------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    @_disable_dynamo
    def step(self, closure: Callable[[], _Loss] | None = None) -> _Loss | None:
        """Let the wrapped optimizer step, and pull before or after.

        Args:
            closure: For the wrapped optimizer: evaluates the model again and returns the loss. With
                ``"gradient"`` the penalty is added to gradients and loss of each evaluation.

        Returns:
            The loss, without the penalty.

        Raises:
            ValueError: A group's options are out of range, or do not go with its learning rate.
            RuntimeError: A gradient is sparse, for ``"gradient"``; or a CUDA graph is captured that
                would not replay the step. Nothing has been updated then.
        """
        options, roles, before, moving = self._begin_step()
        losses: list[_Loss] = []
        self._is_stepping = True
        try:
            with inside_step(self.optimizer):  # in the caller's gradient mode, as it would be alone
                step: Callable[..., Any] = self.optimizer.step
                if closure is None:
                    self._pull_gradients(options)
                    loss: _Loss | None = step()
                elif any(one.penalty == "gradient" for one in options):
                    step(partial(self._with_penalty, closure, options, losses))
                    loss = losses[0]
                else:
                    loss = step(closure)
        finally:
            self._is_stepping = False
        if closure is not None:
            pairs = zip(moving, self._moving(), strict=True)
            moving = [[a or b for a, b in zip(*flags, strict=True)] for flags in pairs]
        self._end_step(options, roles, before, moving)
        return loss

    @torch.no_grad()
    def _begin_step(self) -> tuple[list[Options], Roles, dict[Tensor, Tensor], list[list[bool]]]:
        """Check everything, and return what the end of the step is to know from before it."""
        members = self._look()
        options = [check_options(group) for group in self.param_groups]
        roles = self._pull.roles(self.param_groups, self._protection)
        self._refuse_capture()
        self._warn_of_moving()
        # Gradients are looked at now: some optimizers let go of those that they have used.
        return options, roles, self._before(options, members), self._moving()

    @torch.no_grad()
    def _end_step(
        self,
        options: Sequence[Options],
        roles: Roles,
        before: Mapping[Tensor, Tensor],
        moving: Sequence[Sequence[bool]],
    ) -> None:
        if self._frozen or any(map(_is_damped, self.param_groups)):
            self._settle_wrapped()
        self._damp(before)
        self._pull_weights(options, moving, before)
        steps = self._pull.ledger.steps
        if any(steps.get(i, 0) + 1 >= g["every"] for i, g in enumerate(self.param_groups)):
            self._settle_wrapped()
        taken = Step(
            self.param_groups, self._protected_state, [one.hyper() for one in options], ({}, {}),
            None, getattr(self, "found_inf", None), roles, self._shards,
        )  # fmt: skip
        self._pull.after_step(taken, self._says(moving))
        for param, mask in self._frozen.items():
            param.copy_(torch.where(mask, before[param], param))

    def _damp(self, before: Mapping[Tensor, Tensor]) -> None:
        """Take back a part of the step where weights are important."""
        shards = self._shards
        for group in shards.groups:
            if not _is_damped(group):
                continue
            factor = min(group["importance_damping"] / group["importance_mean"], sys.float_info.max)
            for param in group["params"]:
                if "importance" in shards.state.get(param, {}):
                    importance, _ = protection.read(shards.state[param], param)
                    largest = torch.finfo(importance.dtype).max
                    shorter = importance.mul_(min(factor, largest)).add_(1.0)
                    was = before[param].to(importance.dtype)
                    param.copy_(was + (param.to(importance.dtype) - was) / shorter)

    def _before(
        self, options: Sequence[Options], members: Sequence[Sequence[int]]
    ) -> dict[Tensor, Tensor]:
        """Copy the weights that a pull, or what is frozen, is to know from before the step."""
        wanted = dict.fromkeys(self._frozen)
        shards = self._shards
        state = shards.state
        for group, one, indices in zip(shards.groups, options, members, strict=True):
            if one.penalty == "decoupled":
                wanted.update(dict.fromkeys(group["params"][index] for index in indices))
            if _is_damped(group):
                protected = (p for p in group["params"] if "importance" in state.get(p, {}))
                wanted.update(dict.fromkeys(protected))
        return {param: param.detach().clone() for param in wanted}

    def _moving(self) -> list[list[bool]]:
        """Return of each group which parameters have a gradient."""
        return [[p.grad is not None for p in group["params"]] for group in self.param_groups]

    def _says(self, moving: Sequence[Sequence[bool]]) -> Callable[[Tensor], bool]:
        """Return what says of a parameter whether it has moved."""
        of_params: dict[Tensor, bool] = {}

        def has_moved(param: Tensor) -> bool:
            if not of_params:
                flags = (flag for of_group in moving for flag in of_group)
                of_params.update(zip(self._params(), flags, strict=True))
            return of_params[param]

        return has_moved

    def _batches(self, number: int, moving: Sequence[bool]) -> list[Batch]:
        """Return the members of a group that move, by device."""
        if all(moving):
            return self._whole[number]
        assert self._members is not None
        members = [index for index in self._members[number] if moving[index]]
        return batches(number, self._shards.groups[number]["params"], members)

    @torch.no_grad()
    def _pull_gradients(self, options: Sequence[Options]) -> None:
        if not any(one.penalty == "gradient" for one in options):
            return
        with self._shards.with_grads():
            self._pull_local_gradients(options)

    def _pull_local_gradients(self, options: Sequence[Options]) -> None:
        moving = self._moving()
        groups = self._shards.groups
        for number, (group, one) in enumerate(zip(groups, options, strict=True)):
            if one.penalty != "gradient" or one.ewc_lambda == 0.0:
                continue
            for batch in self._batches(number, moving[number]):
                for index in batch.members:
                    grad = batch.params[index].grad
                    if grad is not None and grad.layout is not torch.strided:
                        name = name_of(group, batch.params[index])
                        raise RuntimeError(
                            f"the gradient of parameter {name} must be dense, not {grad.layout}: "
                            "penalty='proximal' needs no gradient."
                        )
                scale = _number(getattr(self, "grad_scale", None), batch.device)
                numbers = Numbers(None, scale, None)
                self._pulling.take(batch, self._shards.state, one, numbers, {})

    def _with_penalty(
        self,
        closure: Callable[[], _Loss],
        options: Sequence[Options],
        losses: list[_Loss],
    ) -> Any:
        """Evaluate the model, and add the penalty to gradients and loss."""
        with torch.enable_grad():
            loss: Any = closure()
        losses.append(loss)
        self._pull_gradients(options)
        forms = {p: g["penalty"] for g in self.param_groups for p in g["params"]}
        with torch.no_grad():
            penalty = self._penalty_of(lambda param: forms[param] == "gradient")
        if isinstance(loss, Tensor):
            return loss + penalty.to(loss.device, loss.dtype)
        return loss if loss is None else loss + float(penalty)

    def _pull_weights(
        self,
        options: Sequence[Options],
        moving: Sequence[Sequence[bool]],
        before: Mapping[Tensor, Tensor],
    ) -> None:
        found_inf = getattr(self, "found_inf", None)
        for number, (group, one) in enumerate(zip(self.param_groups, options, strict=True)):
            members = self._members[number] if self._members else []
            if group["every"] == 1 and number in self._ledger.due:
                self._take_due(number)  # of steps before the option was changed
            if one.penalty == "gradient" or not members:
                continue
            if group["every"] > 1:
                lr = group["lr"] if lr_stays_tensor(group) else None
                moved = tuple(moving[number][index] for index in members)
                owed = amount(one.ewc_lambda, one.lr, lr, found_inf)
                if any(moved) and self._ledger.add(number, moved, owed) >= group["every"]:
                    self._take_due(number)
                continue
            if one.ewc_lambda == 0.0:
                continue
            for batch in self._batches(number, moving[number]):
                lr = _number(group["lr"], batch.device) if lr_stays_tensor(group) else None
                numbers = Numbers(lr, None, _number(found_inf, batch.device))
                self._settle_wrapped()
                self._pulling.take(batch, self._shards.state, one, numbers, before)

    def _take_due(self, number: int) -> None:
        """Take the pull of several steps of a group at once."""
        members = self._look()[number]
        shards = self._shards
        group = shards.groups[number]
        due = self._ledger.take(number)
        if any(len(moved) != len(members) for moved in due):
            return  # what was due is of another protection
        # Of each sum that parameters owe: most often all owe the same.
        owing: dict[tuple[bool, ...], list[int]] = {}
        for place, index in enumerate(members):
            owing.setdefault(tuple(moved[place] for moved in due), []).append(index)
        amounts = list(due.values())
        self._settle_wrapped()
        for flags, indices in owing.items():
            owed = [one for one, flag in zip(amounts, flags, strict=True) if flag]
            if not owed:
                continue
            total = sum(owed[1:], start=owed[0])
            for batch in batches(number, group["params"], indices):
                lr = _number(total, batch.device)
                one = Options(
                    0.0 if isinstance(total, Tensor) else total, 1.0,
                    stochastic=group["rounding"] == "stochastic",
                )  # fmt: skip
                self._pulling.take(batch, shards.state, one, Numbers(lr), {})

    def _refuse_capture(self) -> None:
        if not is_capturing():
            return
        if self._frozen or any(group["every"] > 1 for group in self.param_groups):
            raise RuntimeError(
                "a step of EWC with every > 1 or with frozen weights cannot be captured in a CUDA "
                "graph, since steps are counted on the host: set every=1 and unfreeze(), or call "
                "step() outside of the graph."
            )
        self._was_captured = True

    @_disable_dynamo
    @torch.no_grad()
    def settle(self) -> None:
        """Take the pull that is due, after what the wrapped optimizer has due.

        Call it before you evaluate, save or write weights where ``every`` is above 1, or let
        :meth:`settle_before` do it. Where nothing is due it does nothing, nor in a step, whose
        closure may evaluate the model.
        """
        if self._is_stepping:
            return
        self._settle_wrapped()
        if self._ledger.due:
            self._look()
        for number in list(self._ledger.due):
            self._take_due(number)
        super().settle()

    def _settle_wrapped(self) -> None:
        """Let the wrapped optimizer do what it has due before others write the weights."""
        settle = getattr(self.optimizer, "settle", None)
        if settle is not None:
            settle()

    # --- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict, and the protection with it.

        That is under ``"ewc"``: options of each group, and by a parameter's place what protects it.
        The wrapped optimizer's part is untouched, but that groups which are protected say so, so
        that a loss of the rest is noticed. Nothing is due: it settles. Tensors are the optimizer's
        own, as always in torch.
        """
        self._before_saving()
        self.settle()
        shards = self._local()
        state_dict = self.optimizer.state_dict()
        state_dict["param_groups"] = [
            {
                key: value
                for key, value in group.items()
                if key not in OWN or (key == _MARK and value)
            }
            for group in state_dict["param_groups"]
        ]
        state_dict[_KEY] = {
            "groups": [{key: group[key] for key in OWN} for group in self.param_groups],
            "state": {
                place: spread(self._protection[param], shards.part(param), param)
                for place, param in enumerate(self._params())
                if param in self._protection
            },
        }
        return self._saved(state_dict)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of an EWC, or of a bare optimizer like the wrapped one.

        One without ``"ewc"`` leaves options and protection as they are, so that a job can begin to
        protect. Parameters are matched as the wrapped optimizer matches them. What was due here is
        not taken.

        Args:
            state_dict: For parameters of the same shapes.

        Raises:
            ValueError: The state dict is truncated or belongs to other parameters, or it is of
                protected weights and has lost its ``"ewc"``, as those do that go through
                ``torch.distributed.checkpoint.state_dict``. Nothing has changed then, as far as the
                wrapped optimizer checks what is its own.
        """
        state_dict = self._before_loading(state_dict)
        self._check_whole(state_dict)
        options = [{key: group[key] for key in OWN} for group in self.param_groups]
        state = self._protected_state
        if _KEY in state_dict:
            options, state = self._loaded(state_dict)
        self._protection_changes("load_state_dict()")
        self.optimizer.load_state_dict(_without_own(state_dict))
        for group, own in zip(self.param_groups, options, strict=True):
            group.update(own)
        self._begin_anew(state)
        self._after_loading()

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if :meth:`load_state_dict` would refuse the state dict.

        Of the wrapped optimizer as far as it has a ``check_state_dict()`` itself.
        """
        self._check_whole(state_dict)
        check = getattr(self.optimizer, "check_state_dict", None)
        if check is not None:
            check(_without_own(state_dict))
        if _KEY in state_dict:
            self._loaded(state_dict)

    def _check_whole(self, state_dict: Mapping[str, Any]) -> None:
        check_groups(state_dict, self.param_groups)
        groups, states = state_dict["param_groups"], state_dict["state"].values()
        if _KEY not in state_dict and any("importance" in state for state in states):
            raise ValueError(
                "the state dict is an EWCAdamW's, which keeps its protection with its moments: "
                "load it into a cl_optim.EWCAdamW."
            )
        if _KEY not in state_dict and any(group.get(_MARK) for group in groups):
            raise ValueError(
                f"the state dict is of protected weights and has no {_KEY!r}, which "
                "torch.distributed.checkpoint.state_dict leaves out: save optimizer.state_dict() "
                "itself."
            )

    def _loaded(self, state_dict: Mapping[str, Any]) -> tuple[list[dict[str, Any]], _State]:
        """Return what is a state dict's own, checked: the groups' options, and the protection."""
        saved = state_dict[_KEY]
        for key in ("groups", "state"):
            if key not in saved:
                raise ValueError(f"the state dict is truncated: its {_KEY!r} has no {key!r}.")
        groups = self.param_groups
        if len(saved["groups"]) != len(groups):
            raise ValueError(
                f"the state dict belongs to other parameters: its {_KEY!r} has "
                f"{len(saved['groups'])} groups, not {len(groups)}."
            )
        options = []
        for own, group in zip(saved["groups"], groups, strict=True):
            for key in OWN:
                if key not in own:
                    raise ValueError(f"the state dict is truncated: a group has no {key!r}.")
            check_group({**group, **own})
            options.append({key: own[key] for key in OWN})
        params = list(self._params())
        by_place = dict(zip(self._saved_places(state_dict), params, strict=True))
        group_of = {p: {**g, **own} for g, own in zip(groups, options, strict=True)
                    for p in g["params"]}  # fmt: skip
        found: _State = defaultdict(dict)
        shards = self._local()
        checked = []
        for place, one in saved["state"].items():
            if place not in by_place:
                raise ValueError(
                    f"the state dict belongs to other parameters: its {_KEY!r} has something for "
                    f"place {place} of {len(params)}."
                )
            param = by_place[place]
            name = name_of(group_of[param], param)
            protects = {key: value for key, value in one.items() if key != "step"}
            check_param_state(protects, param, name)
            checked.append((protects, param, group_of[param], name))
            found[param] = loaded(one, param, shards.part(param), group_of[param])
        check_saved(checked)
        return options, found


def _are_the_same(
    groups: Sequence[Mapping[str, Any]],
    seen: Sequence[tuple[Sequence[Tensor], torch.dtype | None, str]],
) -> bool:
    """Tell if groups have the parameters that were seen, the first of each with its dtype."""
    return are_of(groups, [params for params, *_ in seen]) and all(
        _dtype(group) is dtype and group.get("rounding") == rounding
        for group, (_, dtype, rounding) in zip(groups, seen, strict=True)
    )


def _is_damped(group: Mapping[str, Any]) -> bool:
    return bool(group["importance_damping"] > 0.0 and group["importance_mean"] > 0.0)


def _dtype(group: Mapping[str, Any]) -> torch.dtype | None:
    return group["params"][0].dtype if group["params"] else None


def _without_own(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state_dict.items() if key != _KEY}


def _number(value: Any, device: torch.device) -> Tensor | None:
    return whole(value).to(device, torch.float32) if isinstance(value, Tensor) else None
