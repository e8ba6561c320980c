"""EWCAdamW: AdamW with a quadratic pull towards the weights of earlier tasks."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from cl_optim.importance import ImportanceLog
from cl_optim.importance.names import compare_names, listed, match_names
from cl_optim.ops import ewc_adamw as ops
from cl_optim.ops import ewc_adamw_arguments as arguments
from cl_optim.ops import formats
from cl_optim.ops.capture import is_capturing
from cl_optim.ops.ewc_adamw_reference import penalty_sums
from cl_optim.ops.warn import warn
from cl_optim.optim import protection
from cl_optim.optim.groups import is_dtensor, name_of
from cl_optim.optim.launch import Batch, Plans, are_alike, gather
from cl_optim.optim.state import (
    MOMENTS,
    check_rounding,
    check_state_dict,
    from_adamw,
    has_moments,
    in_order,
    loaded,
    misfit,
    weight_of,
)
from cl_optim.optim.suggest_lambda import suggest_lambda

ANCHORS = ("latest", "exact")
_LOGGER = logging.getLogger(__name__)

# What a closure returns is what its step returns: a number, as torch types it, or a tensor.
_Loss = TypeVar("_Loss")
_Projection: TypeAlias = tuple[Mapping[Tensor, Tensor], Mapping[Tensor, Tensor]]


class Protected(NamedTuple):
    """What protects one parameter.

    Attributes:
        name: Its name; None where the optimizer was made without.
        param: The parameter.
        importance: F in the dtype of its arithmetic, of its shape; of frozen weights, too.
        frozen: Bool, of its shape.
        anchor: θ*, as stored.
        ewc_lambda: Its group's λ.
    """

    name: str | None
    param: Tensor
    importance: Tensor
    frozen: Tensor
    anchor: Tensor
    ewc_lambda: float


class EWCAdamW(torch.optim.Optimizer):
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
        penalty: ``"gradient"``, ``"decoupled"`` or ``"proximal"``; may differ between groups.
        importance_dtype: How F is stored: ``"float32"``, ``"bfloat16"`` or ``"log8"``, one byte
            within 4.5 % (2⁻³² of the largest of 256 neighbours and less: more). Exact zeros stay
            zero. Further tasks are merged with stochastic rounding: right on average, each time
            within 9.2 % (0.8 % in bfloat16), which adds up.
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
        amsgrad: Use the running maximum of the second moment.
        maximize: Ascend the loss.
        capturable: Accepted as torch's optimizers do, and not needed: see above.
        differentiable: Let autograd see the step, for gradients through it; takes the reference.
        foreach: ``True`` takes the reference, written with ``torch._foreach_*``.
        fused: ``True`` insists on the compiled kernels. ``None`` takes them where they are, or the
            reference with one warning that says why they are not. Neither waits for a GPU.

    Raises:
        ValueError: A hyperparameter is out of range; ``foreach`` or ``differentiable`` is true
            and so is ``fused``; a parameter is complex, or a DTensor; ``rounding`` is not
            ``"nearest"`` for a float16 parameter.
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
        penalty: arguments.Penalty = "gradient",
        *,
        importance_dtype: Literal["float32", "bfloat16", "log8"] = "float32",
        anchor_dtype: Literal["float32", "bfloat16"] | None = None,
        state_dtype: Literal["float32", "bfloat16", "8bit"] = "float32",
        rounding: Literal["nearest", "stochastic", "kahan"] = "nearest",
        importance_damping: float = 0.0,
        track_penalty: bool = False,
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
            "importance_dtype": importance_dtype,
            "anchor_dtype": anchor_dtype,
            "state_dtype": state_dtype,
            "rounding": rounding,
            "importance_damping": importance_damping,
            # What consolidate() leaves: F̂, and how often it was called.
            "importance_mean": 0.0,
            "consolidations": 0,
            "track_penalty": track_penalty,
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
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                if not param.is_floating_point():
                    raise ValueError(
                        f"parameter {name_of(group, param)} must be of a real floating-point "
                        f"dtype, not {param.dtype}."
                    )
                if is_dtensor(param):
                    raise ValueError(
                        f"parameter {name_of(group, param)} must not be a DTensor: give the "
                        "optimizer its local shard, param.to_local()."
                    )
                check_rounding(group, param, name_of(group, param))
                _choose(group, param.device)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, with the defaults of what an older version did not have."""
        super().__setstate__(state)
        self._forget_steps()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._note_fixed()

    def _forget_steps(self) -> None:
        """Begin anew with what is known of earlier steps only to make the next one faster."""
        self._backend = ""
        self._batches: list[Batch] = []
        self._plans: Plans | None = None
        self._projection: _Projection | None = None
        self._sums: dict[tuple[int, torch.device], Tensor] = {}
        self._fixed: list[Tensor] = []
        self._was_captured = False

    @property
    def backend(self) -> str:
        """What the last step ran on: ``"cpu"``, ``"cuda"`` (compiled kernels), or ``"foreach"``."""
        return self._backend

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
                not fit; or a CUDA graph is captured that would not replay the step. Nothing has
                been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step(self) -> None:
        for group in self.param_groups:
            _check_group(group)
        if is_capturing():
            self._check_capture()
        if self._plans is not None and self._step_planned(self._plans):
            return
        for group in self.param_groups:
            self._refuse_sparse(group)
        self._warn_of_moving()
        batches = [batch for group in self.param_groups for batch in gather(group, self.state)]
        for batch in batches:
            _refuse_misfits(batch)
        self._clear_sums(kept={self._sums_key(batch) for batch in batches if batch.is_protected})
        chosen = [_choose(batch.group, batch.device) for batch in batches]
        inputs = [self._inputs(batch) for batch in batches]
        for batch, given in zip(batches, inputs, strict=True):
            amsgrad = batch.group["amsgrad"]
            arguments.check(batch.params, batch.grads(), batch.lists(), amsgrad, given)
        for batch, given, (self._backend, step) in zip(batches, inputs, chosen, strict=True):
            hyper = _hyperparameters(batch.group)
            step(batch.params, batch.grads(), batch.lists(), hyper=hyper, inputs=given)
        # A plan is worth its making where steps are alike, and once where it is not possible.
        compiled = bool(chosen) and all(step is ops.fused for _, step in chosen)
        if not compiled or not are_alike(batches, self._batches):
            self._plans = None
        elif self._plans is None or self._plans.possible:
            self._plans = Plans(batches, self)
        self._batches = batches

    def _step_planned(self, plans: Plans) -> bool:
        if not plans.possible:
            return False
        chosen = [_choose(batch.group, batch.device) for batch in plans.batches]
        inputs = [self._inputs(batch) for batch in plans.batches]
        if any(step is not ops.fused for _, step in chosen):
            return False
        if not plans.step(self, _hyperparameters, inputs):
            return False
        self._backend = chosen[-1][0]
        return True

    def step_projected(
        self, memories: Mapping[Tensor, Tensor], coefficients: Mapping[Tensor, Tensor]
    ) -> None:
        """Take a step with g + Gᵀv in place of each gradient g, which is not written: for GEM.

        Args:
            memories: G by parameter: [t, ...], rows of the parameter's shape and strides. A
                parameter that is not in it has none.
            coefficients: v by parameter: [t] float64, on its device.
        """
        self._projection = (memories, coefficients)
        try:
            self.step()
        finally:
            self._projection = None

    def _inputs(self, batch: Batch) -> arguments.Inputs:
        def on_device(number: Tensor | None) -> Tensor | None:
            return None if number is None else number.to(batch.device, torch.float32)

        return arguments.Inputs(
            *self._rows(batch),
            _lr_tensor(batch.group, batch.device),
            # GradScaler sets these two for the time of a step.
            on_device(getattr(self, "grad_scale", None)),
            on_device(getattr(self, "found_inf", None)),
            self._sums_of(batch),
        )

    def _rows(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        memories, coefficients = self._projection or ({}, {})
        if not memories:
            return [], []
        none = torch.empty(0, dtype=torch.float64, device=batch.device)
        return (
            [memories.get(param, param[None][:0]) for param in batch.params],
            [coefficients.get(param, none) for param in batch.params],
        )

    def _sums_of(self, batch: Batch) -> Tensor | None:
        if not batch.group["track_penalty"] or not batch.is_protected:
            return None
        key = self._sums_key(batch)
        if key not in self._sums:
            self._sums[key] = torch.zeros(2, dtype=torch.float64, device=batch.device)
        return self._sums[key]

    @staticmethod
    def _sums_key(batch: Batch) -> tuple[int, torch.device]:
        return id(batch.group), batch.device

    def _clear_sums(self, kept: Collection[tuple[int, torch.device]] = ()) -> None:
        # In place: a captured step writes there.
        for key, sums in self._sums.items():
            if key not in kept:
                sums.zero_()

    def _check_capture(self) -> None:
        """Refuse a step that the CUDA graph which is being captured would not replay."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._check_captured(group, param)
        for number, group in enumerate(self.param_groups):
            lr = group["lr"]
            # A scheduler leaves the rate that it began with.
            if not _stays_tensor(group) and (isinstance(lr, Tensor) or "initial_lr" in group):
                warn(
                    f"the learning rate of group {number} is on the host: the CUDA graph that is "
                    "being captured keeps the one of now, whatever a scheduler does. To change it "
                    "between replays, make the optimizer with a tensor on the GPU, "
                    "lr=torch.tensor(1e-3, device='cuda')."
                )
        self._was_captured = True

    def _check_captured(self, group: dict[str, Any], param: Tensor) -> None:
        state = self.state.get(param, {})
        if not param.is_cuda:
            raise RuntimeError(
                f"parameter {name_of(group, param)} is on {param.device}, and the CUDA graph that "
                "is being captured would not update it in replays: give it an optimizer whose "
                "steps are outside of the graph."
            )
        tracked = group["track_penalty"] and "importance" in state
        if not has_moments(state, param, group) or (
            tracked and (id(group), param.device) not in self._sums
        ):
            raise RuntimeError(
                f"the state of parameter {name_of(group, param)} would begin inside the CUDA graph "
                "that is being captured, and anew at each replay: take one step before the "
                "capture, as in the usual warm-up on a side stream."
            )

    def _warn_of_captured(self, what: str) -> None:
        """Say that a graph goes on with what it was captured with."""
        if self._was_captured:
            self._was_captured = False
            warn(
                f"a step was captured in a CUDA graph before this {what}: its replays would go on "
                "with the tensors of then, whose memory others may have by now. Capture the step "
                "anew."
            )

    @staticmethod
    def _refuse_sparse(group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param.grad is not None and param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"the gradient of parameter {name_of(group, param)} must be dense, not "
                    f"{param.grad.layout}: EWCAdamW updates every weight in every step."
                )

    # --- consolidation ----------------------------------------------------------------------------

    @torch.no_grad()
    def consolidate(
        self,
        importance: Mapping[str, Tensor] | ImportanceLog | None,
        decay: float = 1.0,
        anchors: Literal["latest", "exact"] = "latest",
        model: torch.nn.Module | None = None,
        strict: bool = True,
        reset_state: bool = False,
    ) -> None:
        """Protect what has been learned: the weights as they are now become the anchor.

        Call it at the end of each task. Both ways of keeping earlier tasks cost the same per step:
        ``anchors="latest"`` is online EWC, one quadratic around the newest weights;
        ``anchors="exact"`` keeps the sum of all tasks' quadratics, which is one quadratic, too.

        Args:
            importance: F ≥ 0 by parameter name, each of its parameter's shape and of any real
                dtype, on any device (an :class:`cl_optim.Importance`, or any mapping). Names
                match without what DDP, torch.compile, FSDP and PEFT put into them. An
                :class:`cl_optim.ImportanceLog` stands for its ``merge()``, all its tasks at once,
                and what they froze is frozen.
                ``None`` protects all weights equally (F = 1): L2-SP. What does not require a
                gradient, such as the weights under LoRA, cannot move: it needs no importance, and
                has no state unless one names it. Where it is trained later, the first step warns
                that it is unprotected until the next :meth:`consolidate`.
            decay: What remains of the earlier tasks' importance, in [0, 1].
            anchors: ``"latest"``: F ← decay·F + importance, θ* ← θ, in the parameter's dtype.
                ``"exact"``: F̄ ← decay·F̄ + F and θ̄ ← θ̄ + (F/F̄)(θ − θ̄), in float32.
            model: Names the parameters, where the optimizer was made without names.
            strict: An importance for an unknown parameter, or a parameter without importance, is
                an error. ``False`` ignores the former, gives the latter and those that have another
                shape now F = 0 for this task, and logs which they are
                (``importance.names.compare_names`` lists them for a program). Of a parameter whose
                shape changed within a log, the newest importance counts.
            reset_state: Start the moments and step counts anew.

        Raises:
            TypeError: ``importance`` is none of these.
            ValueError: An argument is out of range; an importance has an unknown or ambiguous name,
                a wrong shape, or a value that is negative, or not finite in the dtype of the
                parameter's arithmetic; or two parameters have one name. Nothing has been changed
                then.
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], not {decay}.")
        if anchors not in ANCHORS:
            raise ValueError(f"anchors must be one of {ANCHORS}, not {anchors!r}.")
        frozen: dict[str, Tensor] = {}
        if isinstance(importance, ImportanceLog):
            log = importance
            importance, frozen = log.merge(strict=strict), log.frozen(strict=strict)
        if importance is not None and not isinstance(importance, Mapping):
            raise TypeError(
                "importance must be a mapping of tensors by parameter name, an ImportanceLog or "
                f"None, not {type(importance).__name__}."
            )
        matched = list(self._match(importance, model, strict))
        masks = self._masks(frozen, self._named_params(model), strict) if frozen else []
        self._warn_of_captured("consolidate()")
        self._plans = None  # it would keep the replaced tensors alive
        self._batches = []
        self._clear_sums()
        groups = {param: group for group in self.param_groups for param in group["params"]}
        if anchors == "latest":
            _warn_of_rounded_anchors([param for param, _ in matched], groups)
        for param, new in matched:
            state = self.state[param]
            protection.merge(state, param, new, decay, groups[param], exact=anchors == "exact")
            if reset_state:
                for key in ("step", *MOMENTS):
                    state.pop(key, None)
        for param, mask in masks:
            protection.pin(self.state[param], param, mask)
        mean = protection.mean_importance(self._protected_states())
        for group in self.param_groups:
            group["importance_mean"] = mean
            group["consolidations"] += 1
        self._note_fixed()

    def _match(
        self, importance: Mapping[str, Tensor] | None, model: torch.nn.Module | None, strict: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each parameter with its checked importance, None where there is none for it."""
        if importance is None:
            fixed = self._cannot_move()
            for param in self._params():
                one = torch.ones((), device=param.device)
                yield param, None if param in fixed else one.expand(param.shape)
            return
        named = self._named_params(model)
        meanings = match_names(importance, named)
        names = {meaning: name for name, meaning in meanings.items()}
        match = compare_names(importance, named)
        fixed = self._cannot_move()
        match = match._replace(new=[name for name in match.new if named[name] not in fixed])
        if strict and match.vanished:
            raise ValueError(
                f"importance names {listed(match.vanished)}, which this optimizer does not have "
                "(strict=False ignores it)."
            )
        if strict and match.new:
            raise ValueError(
                f"importance has nothing for parameter {listed(match.new)} "
                "(strict=False leaves it without)."
            )
        resized = []
        for name, param in named.items():
            new = importance[names[name]] if name in names else None
            if not strict and isinstance(new, Tensor) and new.shape != param.shape:
                resized.append(name)
                new = None
            if new is not None:
                _check_importance(name, new, param)
            yield param, new
        if match.new or match.vanished or resized:
            match = match._replace(resized=resized)
            _LOGGER.warning("Consolidated with strict=False: %s", match)

    def _cannot_move(self) -> set[Tensor]:
        """What requires no gradient and has none; nothing, where all gradients are set by hand."""
        params = list(self._params())
        if not any(param.requires_grad for param in params):
            return set()
        return {param for param in params if not param.requires_grad and param.grad is None}

    def _note_fixed(self) -> None:
        """Remember what has no importance because it cannot move."""
        fixed = self._cannot_move()
        self._fixed = [
            param
            for group in self.param_groups
            for param in group["params"]
            if group["consolidations"]
            and param in fixed
            and "importance" not in self.state.get(param, {})
        ]

    def _warn_of_moving(self) -> None:
        """Say once that a parameter moves now which consolidate() left without importance."""
        moving = [param for param in self._fixed if param.grad is not None]
        if not moving:
            return
        self._fixed = [param for param in self._fixed if param.grad is None]
        names = [
            name_of(group, param)
            for group in self.param_groups
            for param in group["params"]
            if any(param is one for one in moving)
        ]
        warn(
            f"parameter {listed(names)} did not require a gradient at the last consolidate(), and "
            "is trained now without protection: call consolidate() with its importance once it "
            "requires one."
        )

    def _params(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _named_params(self, model: torch.nn.Module | None) -> dict[str, Tensor]:
        if model is not None:
            names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
            absent = [p for p in self._params() if p not in names]
            if absent:
                raise ValueError(
                    f"model must hold the optimizer's parameters; {len(absent)} of them are not "
                    f"in it, the first of shape {tuple(absent[0].shape)}."
                )
            return {names[param]: param for param in self._params()}
        named: dict[str, Tensor] = {}
        for group in self.param_groups:
            if "param_names" not in group:
                raise ValueError(
                    "the optimizer was made without parameter names: make it from "
                    "model.named_parameters(), or pass model=model to consolidate()."
                )
            for name, param in zip(group["param_names"], group["params"], strict=True):
                if name in named:
                    raise ValueError(
                        f"two parameters have the name {name!r}: make the optimizer from the "
                        "named_parameters() of one model, or pass model=model to consolidate()."
                    )
                named[name] = param
        return named

    def _protected_states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [
            (param, self.state[param])
            for param in self._params()
            if param in self.state and "importance" in self.state[param]
        ]

    # --- frozen weights ---------------------------------------------------------------------------

    @torch.no_grad()
    def freeze(self, fraction: float | Mapping[str, Tensor] = 0.05) -> int:
        """Pin the most important weights: they keep their bits, whatever is stepped or merged.

        The most important ones of all protected parameters together, λ aside; of equally important
        ones, those that come first. Weights that are frozen already count towards the fraction, and
        stay frozen even if it is smaller. A frozen weight is left out of the penalty.

        Args:
            fraction: Of the protected weights, in [0, 1]; or masks of the weights to pin, by
                parameter name.

        Returns:
            How many weights are frozen now.

        Raises:
            TypeError: A mask is not of bool.
            ValueError: ``fraction`` is out of range, or a mask's name or shape is none of the
                optimizer's. Nothing has been changed then.
            RuntimeError: Nothing has been consolidated.
        """
        if not isinstance(fraction, Mapping) and not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must be in [0, 1], not {fraction}.")
        states = self._protected_states()
        if not states:
            raise RuntimeError("freeze() needs importance: call consolidate() first.")
        if isinstance(fraction, Mapping):
            masks = self._masks(fraction, self._named_params(None), strict=True)
            if any("importance" not in self.state.get(param, {}) for param, _ in masks):
                raise ValueError("a mask is of a parameter that nothing protects.")
            for param, mask in masks:
                protection.pin(self.state[param], param, mask)
            return protection.count_frozen(states)
        return protection.freeze(states, fraction)

    def _masks(
        self, masks: Mapping[str, Tensor], named: Mapping[str, Tensor], strict: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """Each parameter with its checked mask; what fits none is an error or is left out."""
        names = match_names(masks, named)
        matched = []
        for name, mask in masks.items():
            param = named[names[name]] if name in names else None
            if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
                raise TypeError(f"the mask of {name!r} must be a bool tensor.")
            if param is not None and mask.shape == param.shape:
                matched.append((param, mask.to(param.device)))
            elif strict and param is None:
                raise ValueError(f"a mask names {name!r}, which this optimizer does not have.")
            elif strict:
                raise ValueError(
                    f"the mask of {name!r} must have the parameter's shape, not "
                    f"{tuple(mask.shape)}."
                )
        return matched

    @torch.no_grad()
    def unfreeze(self) -> None:
        """Let all frozen weights move again; they are as important as they were."""
        for _, state in self._protected_states():
            protection.unfreeze(state)

    # --- what is known of the protection ----------------------------------------------------------

    @torch.no_grad()
    def protected(self) -> Iterator[Protected]:
        """What protects each parameter that is protected, in the optimizer's order."""
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            for name, param in zip(names, group["params"], strict=True):
                state = self.state.get(param, {})
                if "importance" in state:
                    importance, frozen = protection.read(state, param)
                    anchor = state["anchor"]
                    yield Protected(name, param, importance, frozen, anchor, group["ewc_lambda"])

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """The penalty at the current weights, Σ_groups λ Σ F (θ − θ*)², frozen ones left out.

        Returns:
            A detached 0-dim float64 tensor, which nothing overflows that float32 parameters can
            have, on the first parameter's device; 0 before the first :meth:`consolidate`.
        """
        total = torch.zeros((), dtype=torch.float64, device=next(self._params()).device)
        for _, param, importance, frozen, anchor, ewc_lambda in self.protected():
            weight = weight_of(param, self.state[param])
            sums = penalty_sums(weight, importance, frozen, anchor)
            total += (ewc_lambda * sums[0]).to(total.device)
        return total

    @torch.no_grad()
    def suggest_lambda(self, drift: float = 0.01) -> float:
        r"""The λ at which weights that have drifted are pulled as hard as the task pushes.

        Solves :math:`‖2λFδ‖ = ‖g‖`, both norms over all protected weights that are not frozen, of
        parameters that the step would not skip. δ is ``drift`` times the root mean square of the
        tensor's anchor, for each of its weights. g is what the pull meets in the step: with
        ``penalty="gradient"`` the gradients that the parameters have now; in the other forms
        Adam's direction m̂/(√v̂ + ε) of the last step.

        Call it after :meth:`consolidate` and a ``backward()`` on the new task (on several batches,
        for less noise), not scaled by a GradScaler; in the other forms after a step. Nothing is
        changed: set ``group["ewc_lambda"]``. One λ for all groups, and only a place to begin: the
        norms say nothing of how the two directions lie. Validate over factors of 10, smaller first.

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
        return suggest_lambda(
            (
                (name_of(group, param), param, self.state[param], group)
                for group in self.param_groups
                for param in group["params"]
                if "importance" in self.state.get(param, {})
            ),
            drift,
        )

    @property
    def last_penalty(self) -> Tensor:
        """The penalty as the last step met it, Σ_groups λ Σ F (θ − θ*)² before the update.

        Summed by the step itself, in the same order each time, over the parameters that it updated;
        nothing waits for a GPU until the number is read. A detached 0-dim float64 tensor on the
        first parameter's device; 0 before the first step after :meth:`consolidate`.

        Raises:
            RuntimeError: The optimizer was made without ``track_penalty=True``.
        """
        return self._tracked("last_penalty")[:, 0].sum()

    @property
    def last_drift(self) -> Tensor:
        """‖θ − θ*‖ of each group as the last step met it: float64 [groups]; see `last_penalty`."""
        return self._tracked("last_drift")[:, 1].sqrt()

    def _tracked(self, what: str) -> Tensor:
        if not any(group["track_penalty"] for group in self.param_groups):
            raise RuntimeError(f"{what} needs an optimizer made with track_penalty=True.")
        device = next(self._params()).device
        nothing = torch.zeros(2, dtype=torch.float64, device=device)
        rows = [
            [sums.to(device) for (group_id, _), sums in self._sums.items() if group_id == id(group)]
            for group in self.param_groups
        ]
        return torch.stack([sum(of_group, start=nothing) for of_group in rows])

    # --- state ------------------------------------------------------------------------------------

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
            groups = {param: group for group in self.param_groups for param in group["params"]}
            for index, param in enumerate(self._params()):
                if saved[index]:
                    self.state[param] = loaded(saved[index], param, groups[param])
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
            _check_group({**self.defaults, **group})
        return state_dict


def _choose(group: Mapping[str, Any], device: torch.device) -> tuple[str, ops.Step]:
    differentiable = group["differentiable"]
    if differentiable and group["fused"]:
        raise ValueError("differentiable=True and fused=True exclude each other: choose one.")
    return ops.choose(
        device.type, use_foreach=differentiable or group["foreach"], use_fused=group["fused"]
    )


def _stays_tensor(group: Mapping[str, Any]) -> bool:
    """Whether the learning rate must not be read on the host: on a device, or for a gradient."""
    lr = group["lr"]
    return isinstance(lr, Tensor) and (lr.device.type != "cpu" or group["differentiable"])


def _lr_tensor(group: Mapping[str, Any], device: torch.device) -> Tensor | None:
    if not _stays_tensor(group):
        return None
    lr: Tensor = group["lr"]
    return lr.to(device) if group["differentiable"] else lr.to(device, torch.float32)


def _check_group(group: dict[str, Any]) -> None:
    _hyperparameters(group)
    formats.settle(group)
    if not 0.0 <= group["importance_damping"] < math.inf:
        raise ValueError(
            f"importance_damping must be finite and at least 0, not {group['importance_damping']}."
        )


def _hyperparameters(group: Mapping[str, Any]) -> arguments.Hyperparameters:
    beta1, beta2 = group["betas"]
    mean = group["importance_mean"]
    damping = group["importance_damping"] / mean if mean > 0.0 else 0.0
    return arguments.Hyperparameters(
        lr=0.0 if _stays_tensor(group) else float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        ewc_lambda=group["ewc_lambda"],
        damping=min(damping, sys.float_info.max),
        penalty=group["penalty"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
        stochastic=group["rounding"] == "stochastic",
    )


def _refuse_misfits(batch: Batch) -> None:
    for param, state in zip(batch.params, batch.states, strict=True):
        key = misfit(state, param)
        if key is not None:
            raise RuntimeError(
                f"parameter {name_of(batch.group, param)} was cast to {param.dtype} after its "
                f"{key!r} was made: optimizer.load_state_dict(optimizer.state_dict()) casts that, "
                "too."
            )


def _warn_of_rounded_anchors(
    params: list[Tensor], groups: Mapping[Tensor, Mapping[str, Any]]
) -> None:
    rounded = sum(protection.rounds_anchors(param, groups[param]) for param in params)
    if rounded:
        warn(
            f"anchor_dtype rounds the anchors of {rounded} parameters: the penalty pulls them "
            "towards weights that are up to 0.4 % off."
        )


def _check_importance(name: str, importance: Tensor, param: Tensor) -> None:
    if (
        not isinstance(importance, Tensor)
        or importance.is_complex()
        or importance.layout is not torch.strided
    ):
        raise ValueError(f"the importance of {name!r} must be a real, dense tensor.")
    if importance.shape != param.shape:
        raise ValueError(
            f"the importance of {name!r} must have the parameter's shape {tuple(param.shape)}, "
            f"not {tuple(importance.shape)}."
        )
    if importance.numel() == 0:
        return
    values = importance.detach().to(
        formats.arithmetic_dtype(param)
    )  # as they will be stored, at most
    low, high = (bound.item() for bound in values.aminmax())  # NaN shows in both
    if not (low >= 0.0 and high < float("inf")):
        raise ValueError(
            f"the importance of {name!r} must be finite and at least 0; it reaches from {low} "
            f"to {high}."
        )
