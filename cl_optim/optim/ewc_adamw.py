"""EWCAdamW: AdamW with a quadratic pull towards the weights of earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Literal, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from cl_optim.ops import formats
from cl_optim.ops.capture import is_capturing
from cl_optim.ops.checks import dtype_name
from cl_optim.ops.ewc_adamw_arguments import Penalty
from cl_optim.optim.cuda_graphs import check_capture, warn_of_captured
from cl_optim.optim.groups import name_of
from cl_optim.optim.kronecker.pull import Pull
from cl_optim.optim.kronecker.stacks import apart
from cl_optim.optim.launch import AddedRows, Launch, Step, refuse_exchanged, refuse_sparse
from cl_optim.optim.options import check_group, check_param, choose
from cl_optim.optim.protecting import Protecting
from cl_optim.optim.shards import Shards, State
from cl_optim.optim.state import (
    MOMENTS,
    check_state_dict,
    from_adamw,
    in_order,
    loaded,
    spread,
)
from cl_optim.optim.suggest_lambda import suggest_lambda

# What a closure returns is what its step returns: a number, as torch types it, or a tensor.
_Loss = TypeVar("_Loss")
_ImportanceDtype: TypeAlias = Literal["float32", "bfloat16", "log8"] | torch.dtype
_AnchorDtype: TypeAlias = Literal["float32", "bfloat16"] | torch.dtype | None
_StateDtype: TypeAlias = Literal["float32", "bfloat16", "8bit"] | torch.dtype
# Options that pickles of earlier versions lack in their defaults.
_YOUNGER = {"every": 10, "basis_dtype": "float32", "strength": None, "tasks": 0.0}


class EWCAdamW(Protecting, torch.optim.Optimizer):
    r"""AdamW whose step includes the elastic weight consolidation (EWC) penalty.

    Minimises :math:`L(θ) + λ Σ_i F_i (θ_i − θ^*_i)^2`, where the importance F is the diagonal of
    the Fisher information of earlier tasks and the anchor θ* the weights that they left. There is
    no ½: the gradient is 2λFΔ with Δ = θ − θ*, so λ here is half of Kirkpatrick's.

    Before the first :meth:`consolidate` this is :class:`torch.optim.AdamW`. The three forms of the
    penalty differ in where the pull enters the step:

    ``"gradient"``
        g ← g + 2λFΔ, then AdamW: the loss term as the papers write it. Adam's √v rescales the pull.
    ``"decoupled"``
        AdamW on g, and θ ← θ − lr·2λFΔ beside the weight decay, with Δ from before the step.
    ``"proximal"``
        AdamW on g gives θ′, then θ ← θ* + (θ′ − θ*)/(1 + 2·lr·λ·F): the implicit form, stable for
        every finite λ.

    Two things differ from adding the term to the loss: gradient clipping does not see the penalty,
    and a parameter without a gradient in a step is skipped. ``maximize`` negates the gradient of
    the task, not the penalty's.

    Arithmetic is in float32 (float64 for float64 parameters) whatever the parameter's dtype, and so
    are moments and importance unless narrower ones are asked for; the anchor has the parameter's
    dtype. 36 bytes per float32 parameter are read and written in a step, against 28 for AdamW; 33
    with ``importance_dtype="log8"``.

    On a GPU every step but the first can be captured in a CUDA graph: take one before, as in the
    usual warm-up on a side stream, so that the state does not begin inside. Numbers are fixed in
    the graph: λ, the betas, and the learning rate unless it is a tensor on the GPU. What
    :meth:`consolidate` and :meth:`load_state_dict` bring is not in it: capture anew after them.

    Args:
        params: Parameters, named parameters (``model.named_parameters()``, which lets
            :meth:`consolidate` find them by name) or groups of either.
        lr: Learning rate, a number or a 0-dim tensor. A tensor on a GPU is read there: the way to
            change it between replays of a CUDA graph.
        betas: Decay of the first and of the second moment.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay, times lr.
        ewc_lambda: λ ≥ 0; may differ between groups.
        strength: λ without a unit: each :meth:`consolidate` sets ``ewc_lambda`` to
            strength · T / (mean F · mean θ*²), with the means over all protected weights that are
            not frozen and T the number of tasks in F. A drift of all weights by their own size, in
            root mean square, then costs ``strength`` per weight and task, whatever the scale of
            loss, weights and learning rate. 0.1 to begin with where the penalty is ``"proximal"``;
            with ``"gradient"`` smaller values. None: λ is ``ewc_lambda``.
        penalty: ``"gradient"``, ``"decoupled"`` or ``"proximal"``; may differ between groups.
        importance_dtype: How F is stored: ``"float32"``, ``"bfloat16"`` (here and below also a
            dtype) or ``"log8"``, one byte within 4.5 % (2⁻³¹ of the largest of 256 neighbours and
            less: more). Exact zeros stay zero. Further tasks are merged with stochastic rounding:
            right on average, each time within 9.2 % (0.8 % in bfloat16), which adds up.
        anchor_dtype: How θ* is stored: None for the parameter's own dtype, ``"float32"`` or
            ``"bfloat16"``, which pulls float32 weights towards rounded ones. Exact anchors are
            always float32.
        state_dtype: How moments are stored: ``"float32"``, ``"bfloat16"`` or ``"8bit"``, for
            parameters of 4 096 elements and more; the narrow ones are rounded stochastically.
        rounding: How bfloat16 parameters take up steps of less than half a unit of their last
            place: ``"nearest"``: not at all; ``"stochastic"``: on average; ``"kahan"``: from two
            more bytes that hold what was rounded away.
        importance_damping: κ ≥ 0. Adam's own step, not the pull, is divided by 1 + κF/F̂, where F̂
            is the mean over all weights that were not frozen at the last :meth:`consolidate`:
            important weights learn more slowly.
        track_penalty: Let every step also sum :attr:`last_penalty` and :attr:`last_drift`.
        every: Of Kronecker importance: after how many steps the pull is taken, for all of them at
            once. See :meth:`settle`.
        basis_dtype: Of Kronecker importance: how its directions are stored, ``"float32"`` or
            ``"bfloat16"``, which turns the pull by up to 0.4 % and no weight beside.
        amsgrad: Use the running maximum of the second moment.
        maximize: Ascend the loss.
        capturable: Accepted as torch's optimizers do, and not needed: see above.
        differentiable: Let autograd see the step, for gradients through it; takes the reference.
        foreach: ``True`` takes the reference, written with ``torch._foreach_*``.
        fused: ``True`` insists on the compiled kernels. ``None`` takes them where they are, or the
            reference with one warning that says why they are not. Neither waits for a GPU.

    Raises:
        ValueError: A hyperparameter is out of range; ``foreach`` or ``differentiable`` is true
            and so is ``fused``; a parameter is complex; ``rounding`` is not ``"nearest"`` for a
            float16 parameter; ``differentiable`` is true for a DTensor.
        RuntimeError: ``fused=True`` where there are no compiled kernels.

    References:
        Loshchilov & Hutter 2019, arXiv:1711.05101 (AdamW); Kirkpatrick et al. 2017,
        arXiv:1612.00796 (EWC); Schwarz et al. 2018, arXiv:1805.06370 (online EWC).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ewc_lambda: float = 1.0,
        penalty: Penalty = "gradient",
        *,
        importance_dtype: _ImportanceDtype = "float32",
        anchor_dtype: _AnchorDtype = None,
        state_dtype: _StateDtype = "float32",
        rounding: Literal["nearest", "stochastic", "kahan"] = "nearest",
        strength: float | None = None,
        importance_damping: float = 0.0,
        track_penalty: bool = False,
        every: int = 10,
        basis_dtype: Literal["float32", "bfloat16"] | torch.dtype = "float32",
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        self._forget_steps()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "ewc_lambda": ewc_lambda,
            "penalty": penalty,
            "importance_dtype": dtype_name(importance_dtype),
            "anchor_dtype": dtype_name(anchor_dtype),
            "state_dtype": dtype_name(state_dtype),
            "rounding": rounding,
            "importance_damping": importance_damping,
            "strength": strength,
            # What consolidate() leaves: F̂, of how many tasks, and how often it was called.
            "importance_mean": 0.0,
            "tasks": 0.0,
            "consolidations": 0,
            "track_penalty": track_penalty,
            "every": every,
            "basis_dtype": dtype_name(basis_dtype),
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    # GradScaler leaves it to the step to unscale the gradients and to skip overflowed ones.
    _step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in mid-training, too; it is unprotected until the next `consolidate`."""
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        formats.settle(group)
        try:
            for param in group["params"]:
                check_param(group, param)
                choose(group, param.device)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a deep copy holds: what is due of the pull, too."""
        state = super().__getstate__()
        return {**state, "state": apart(self.state), "ledger": self._pull.ledger}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, with the defaults of what an older version did not have."""
        state = dict(state)
        ledger = state.pop("ledger", None)
        super().__setstate__(state)
        self._forget_steps()
        if ledger is not None:
            self._pull.ledger = ledger
        self.defaults = {**_YOUNGER, **self.defaults}
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._note_fixed()

    def _forget_steps(self) -> None:
        """Begin anew with what is known of earlier steps."""
        self._launch = Launch()
        self._pull = Pull()
        self._shards = Shards()
        self._added_rows: AddedRows = ({}, {})
        self._fixed = []
        self._was_captured = False

    @property
    def backend(self) -> str:
        """Name what took the last step: compiled kernels (``"cpu"``, ``"cuda"``), ``"foreach"``."""
        return self._launch.backend

    # --- the step ---------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    @_disable_dynamo  # it hands addresses to the kernels
    def step(self, closure: Callable[[], _Loss] | None = None) -> _Loss | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned.

        Raises:
            ValueError: A hyperparameter of a group is out of range, or a tensor of the state, a
                gradient or a memory row does not fit its parameter.
            RuntimeError: A gradient is sparse; a parameter was cast to a dtype that its state does
                not fit; protected parameters were exchanged for others, or a group's options were
                set back; or a CUDA graph is captured that would not replay the step. Nothing has
                been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            shards = self._shards
            if shards.any:
                self._refuse_differentiable()
                shards.follow(self.param_groups, self.state)
                with shards.with_grads():
                    self._take(self._next_step())
            else:
                self._take(self._next_step())
        return loss

    def _refuse_differentiable(self) -> None:
        if self.defaults["differentiable"]:
            raise ValueError(
                "differentiable=True is not for DTensors, whose parts are stepped where autograd "
                "does not see them: use it on one device."
            )

    def _take(self, step: Step) -> None:
        if is_capturing():
            check_capture(step, self._launch.sums)
            self._was_captured = True
        if not self._launch.repeat(step):
            if not step.shards.any and self._local().any:  # exchanged for DTensors
                self._refuse_differentiable()
                with step.shards.with_grads():
                    return self._take(self._next_step())
            refuse_exchanged(self.param_groups, self.state)
            refuse_sparse(step.groups)
            self._warn_of_moving()
            self._launch.begin(step)
        return self._pull.after_step(step)

    def _next_step(self) -> Step:
        shards = self._shards
        groups = self.param_groups
        state: State = self.state
        rows, coefficients = self._added_rows
        if shards.any:
            groups, state = shards.groups, shards.state
            rows = {shards.part(param): of_param for param, of_param in rows.items()}
            coefficients = {shards.part(param): v for param, v in coefficients.items()}
        return Step(
            groups,
            state,
            [check_group(group) for group in self.param_groups],
            (rows, coefficients),
            # GradScaler sets these two for the time of a step.
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self._pull.roles(groups, state),
            shards,
        )

    def step_projected(
        self, memories: Mapping[Tensor, Tensor], coefficients: Mapping[Tensor, Tensor]
    ) -> None:
        """Take a step with g + Gᵀv in place of each gradient g, which is not written: for GEM.

        Args:
            memories: G by parameter: [t, ...], rows of the parameter's shape and strides. A
                parameter that is not in it has none.
            coefficients: v by parameter: [t] float64, on its device.
        """
        self._added_rows = (memories, coefficients)
        try:
            self.step()
        finally:
            self._added_rows = ({}, {})

    @property
    def _protection(self) -> MutableMapping[Tensor, dict[str, Any]]:
        return self.state

    def _protection_changes(self, what: str) -> None:
        self._warn_of_captured(what)
        self._launch.forget()  # it would keep the replaced tensors alive

    def _reset(self, param: Tensor) -> None:
        for key in ("step", *MOMENTS):
            self.state[param].pop(key, None)

    def _warn_of_captured(self, what: str) -> None:
        if self._was_captured:
            self._was_captured = False
            warn_of_captured(what)

    # --- what is known of the protection ----------------------------------------------------------

    @torch.no_grad()
    def suggest_lambda(self, drift: float = 0.01) -> float:
        r"""Find the λ at which weights that have drifted are pulled as hard as the task pushes.

        Solves :math:`‖2λFδ‖ = ‖g‖`, both norms over all protected weights that are not frozen, of
        parameters that the step would not skip. δ is ``drift`` times the root mean square of the
        tensor's anchor, for each of its weights. g is what the pull meets in the step: with
        ``penalty="gradient"`` the gradients that the parameters have now; in the other forms
        Adam's direction m̂/(√v̂ + ε) of the last step.

        Call it after :meth:`consolidate` and a ``backward()`` on the new task (of the mean over
        several batches, for less noise), not scaled by a GradScaler; in the other forms after a
        step. Nothing is changed: set ``group["ewc_lambda"]``. One λ for all groups, and only a
        place to begin: the norms say nothing of how the two directions lie. Validate over factors
        of 10, smaller first.

        Args:
            drift: How far weights may go before the pull is as large, relative to their size:
                0.01 is 1 %, for fine-tuning; what is learned anew can need 1. λ is inversely
                proportional to it.

        Returns:
            λ > 0, computed in float64.

        Raises:
            ValueError: ``drift`` is not positive and finite, a gradient is not finite, groups
                differ in ``penalty``, or no λ does: the importance is 0.
            RuntimeError: Nothing has been consolidated; or there is no gradient (step), or it is 0.
        """
        shards = self._local()
        members = [
            (name_of(group, part), part, shards.state[part], group)
            for group in shards.groups
            for part in group["params"]
            if "importance" in shards.state.get(part, {})
        ]
        matrices = self._pull.squares(self.param_groups, self.state)
        with shards.with_grads():
            return suggest_lambda(members, drift, matrices, shards)

    @property
    def last_penalty(self) -> Tensor:
        """Return the penalty as the last step met it, Σ_groups λ Σ F (θ − θ*)² before the update.

        Summed by the step itself, in the same order each time, over the parameters that it updated;
        nothing waits for a GPU until the number is read. A detached 0-dim float64 tensor on the
        first parameter's device; 0 before the first step after :meth:`consolidate`. Matrices with
        Kronecker importance are in it as the last pull met them, Σ S (UᵀΔU)². Of DTensors it is
        that of all processes, which all read it.

        Raises:
            RuntimeError: The optimizer was made without ``track_penalty=True``.
        """
        return self._tracked("last_penalty")[:, 0].sum()

    @property
    def last_drift(self) -> Tensor:
        """Return ‖θ − θ*‖ of each group, float64 [groups], as the last step or pull met it.

        Of DTensors it is that of all processes, which all read it.
        """
        return self._tracked("last_drift")[:, 1].sqrt()

    def _tracked(self, what: str) -> Tensor:
        if not any(group["track_penalty"] for group in self.param_groups):
            raise RuntimeError(f"{what} needs an optimizer made with track_penalty=True.")
        device = next(self._params()).device
        shards = self._local()
        of_steps = self._launch.sums.by_group(shards.groups, device)
        return shards.together.added(of_steps)[0] + self._pull.sums(self.param_groups, device)

    # --- state ------------------------------------------------------------------------------------

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dict, of which nothing is due: the optimizer settles before.

        What is kept of a DTensor are DTensors, in whatever format: codes as the bfloat16 numbers
        that they stand for. ``torch.distributed.checkpoint`` saves and loads them, on another
        number of processes, too.
        """
        self.settle()
        shards = self._local()
        if not shards.any:
            return super().state_dict()

        def spread_out(
            optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
        ) -> dict[str, Any]:
            indices = [i for group in state_dict["param_groups"] for i in group["params"]]
            for index, param in zip(indices, self._params(), strict=True):
                if index in state_dict["state"]:
                    state = state_dict["state"][index]
                    state_dict["state"][index] = spread(state, shards.part(param), param)
            return state_dict

        # The user's own hooks come after it.
        first = self.register_state_dict_post_hook(spread_out, prepend=True)
        try:
            return super().state_dict()
        finally:
            first.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of torch.optim.AdamW, so that a job can switch.

        Importance, moments and anchors keep their precision, as far as the parameters' dtype has
        it: nothing is cast to that, and 16-bit moments are widened. AdamW's state dict leaves this
        optimizer's λ and form of the penalty, its ``foreach`` and ``fused``, and no protection.
        Parameters keep their names here. They are matched by name where the names are the same, in
        whatever order and without what wrappers put into them, else by their place, as in torch.

        Args:
            state_dict: What :meth:`state_dict` returned, for parameters of the same shapes.

        Raises:
            ValueError: The state dict is truncated or belongs to other parameters. The optimizer
                is unchanged then.
        """
        saved: dict[int, dict[str, Any]] = {}
        own_names = [group.get("param_names") for group in self.param_groups]

        def check(
            optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
        ) -> dict[str, Any] | None:
            state_dict = self._checked(state_dict)
            indices = [index for group in state_dict["param_groups"] for index in group["params"]]
            saved.update({i: state_dict["state"].get(index, {}) for i, index in enumerate(indices)})
            self._warn_of_captured("load_state_dict()")
            return state_dict

        def restore(optimizer: torch.optim.Optimizer) -> None:
            # torch casts all state but `step` to the parameter's dtype, and `step` stays the very
            # tensor of the state dict, which the next step would advance.
            for group in self.param_groups:
                formats.settle(group)
            groups = {param: group for group in self.param_groups for param in group["params"]}
            shards = self._local()
            for index, param in enumerate(self._params()):
                if saved[index]:
                    part = shards.part(param)
                    self.state[param] = loaded(saved[index], param, part, groups[param])
            for group, names in zip(self.param_groups, own_names, strict=True):
                if names is not None:
                    group["param_names"] = names
            self._note_fixed()

        # The check comes after the user's own hooks, which may replace the state dict.
        first = self.register_load_state_dict_pre_hook(check)
        last = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()
            last.remove()

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if :meth:`load_state_dict` would refuse the state dict."""
        self._checked(state_dict)

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = in_order(from_adamw(state_dict, self.param_groups), self.param_groups)
        names = [name_of(g, param) for g in self.param_groups for param in g["params"]]
        check_state_dict(state_dict, self.param_groups, names)
        for group in state_dict["param_groups"]:
            check_group({**self.defaults, **group})
        return state_dict
