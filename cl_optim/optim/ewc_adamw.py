"""EWCAdamW: AdamW with a quadratic pull towards the weights of earlier tasks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from operator import is_, itemgetter
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from cl_optim.importance import ImportanceLog
from cl_optim.importance.names import compare_names, listed, match_names
from cl_optim.ops import ewc_adamw as ops

ANCHORS = ("latest", "exact")
_LOGGER = logging.getLogger(__name__)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
# What a saved group must have.
_HYPERPARAMETERS = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "ewc_lambda",
    "penalty",
    "amsgrad",
    "maximize",
)


_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "importance", "anchor", "step")


_Projection: TypeAlias = tuple[Mapping[Tensor, Tensor], Mapping[Tensor, Tensor]]


class _Batch:
    """Parameters that take their step in one call, with the tensors of their state.

    It is kept from step to step, and is of use as long as it `is_current`: gathering the tensors
    anew each time would cost more than updating small ones.
    """

    def __init__(self, device: torch.device, amsgrad: bool, protected: bool) -> None:
        self.device = device
        self.params: list[Tensor] = []
        self.tensors: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        used = (True, True, amsgrad, protected, protected, True)
        self._keys = [key if use else None for key, use in zip(_KEYS, used, strict=True)]
        self._states: list[dict[str, Any]] = []
        self._size = 0
        self._steps = 0
        self._plan: ops.Plan | None = None

    def add(self, param: Tensor, state: dict[str, Any]) -> None:
        self.params.append(param)
        self._states.append(state)
        self._size += len(state)
        for key, tensors in zip(self._keys, self.tensors, strict=True):
            if key is not None:
                tensors.append(state[key])

    def grads(self) -> list[Tensor]:
        return [param.grad for param in self.params if param.grad is not None]

    def is_current(self, state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the parameters' state still holds these very tensors, and no others."""
        return (
            all(map(is_, map(state.get, self.params), self._states))
            and sum(map(len, self._states)) == self._size
            and all(
                all(map(is_, map(itemgetter(key), self._states), tensors))
                for key, tensors in zip(self._keys, self.tensors, strict=True)
                if key is not None
            )
        )

    def step_planned(
        self, grads: list[Tensor], hyper: ops.Hyperparameters, inputs: ops.Inputs
    ) -> bool:
        """Take the step by a launch plan, if one is worth while and possible."""
        self._steps += 1
        if self._steps == 1:
            return False  # the next step may be one of other parameters
        if self._plan is not None and self._plan.step(self.params, grads, hyper, inputs):
            return True
        self._plan = ops.Plan(self.params, *self.tensors)
        return self._plan.step(self.params, grads, hyper, inputs)


class _Prepared:
    """The batches of a group, for the parameters that had a gradient in the last step."""

    def __init__(self, params: list[Tensor], amsgrad: bool, batches: list[_Batch]) -> None:
        self._params = params
        self._amsgrad = amsgrad
        self.batches = batches

    def is_current(
        self, params: list[Tensor], amsgrad: bool, state: Mapping[Tensor, dict[str, Any]]
    ) -> bool:
        return (
            len(params) == len(self._params)
            and all(map(is_, params, self._params))
            and amsgrad == self._amsgrad
            and all(batch.is_current(state) for batch in self.batches)
        )


class Protected(NamedTuple):
    """What protects one parameter.

    Attributes:
        name: Its name; None where the optimizer was made without.
        param: The parameter.
        importance: F in the dtype of its arithmetic, of its shape.
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

    The moments are float32 (float64 for float64 parameters) whatever the parameter's dtype, and so
    is the arithmetic. Importance is stored in float32, the anchor in the parameter's dtype:
    36 bytes per float32 parameter are read and written in a step, against 28 for AdamW.

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
        amsgrad: Use the running maximum of the second moment.
        maximize: Ascend the loss.
        capturable: Accepted as torch's optimizers do; on a GPU every step can be captured.
        differentiable: Let autograd see the step, for gradients through it; takes the reference.
        foreach: ``True`` takes the reference, written with ``torch._foreach_*``.
        fused: ``True`` insists on the compiled kernels. ``None`` takes them where they are, or the
            reference with one warning that says why they are not. Neither waits for a GPU.

    Raises:
        ValueError: A hyperparameter is out of range; ``foreach`` or ``differentiable`` is true
            and so is ``fused``; a parameter is complex, or a DTensor.
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
        penalty: ops.Penalty = "gradient",
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        self._backend = ""
        self._prepared: dict[int, _Prepared] = {}
        self._projection: _Projection | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "ewc_lambda": ewc_lambda,
            "penalty": penalty,
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
        _hyperparameters({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                if not param.is_floating_point():
                    raise ValueError(
                        f"parameter {_name(group, param)} must be of a real floating-point dtype, "
                        f"not {param.dtype}."
                    )
                if is_dtensor(param):
                    raise ValueError(
                        f"parameter {_name(group, param)} must not be a DTensor: give the "
                        "optimizer its local shard, param.to_local()."
                    )
                _choose(group, param.device)
        except (ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from a pickle, with the defaults of what an older version did not have."""
        super().__setstate__(state)
        self._backend = ""
        self._prepared = {}
        self._projection = None
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    @property
    def backend(self) -> str:
        """What the last step ran on: ``"cpu"``, ``"cuda"`` (compiled kernels), or ``"foreach"``."""
        return self._backend

    # --- the step ---------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo  # it hands addresses to the kernels
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss, which is returned.

        Raises:
            ValueError: A hyperparameter of a group is out of range.
            RuntimeError: A gradient is sparse; nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step(self) -> None:
        work = [
            (batch, batch.grads(), _hyperparameters(group), group)
            for group in self.param_groups
            for batch in self._batches(group)
        ]
        for batch, grads, hyper, group in work:
            self._backend, step = _choose(group, batch.device)
            inputs = self._inputs(batch, group["lr"])
            if step is not ops.fused or not batch.step_planned(grads, hyper, inputs):
                step(batch.params, grads, *batch.tensors, hyper=hyper, inputs=inputs)

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

    def _inputs(self, batch: _Batch, lr: float | Tensor) -> ops.Inputs:
        memories, coefficients = self._projection or ({}, {})
        none = torch.empty(0, dtype=torch.float64, device=batch.device)

        def on_device(number: Tensor | None) -> Tensor | None:
            return None if number is None else number.to(batch.device, torch.float32)

        return ops.Inputs(
            [memories.get(param, param[None][:0]) for param in batch.params] if memories else [],
            [coefficients.get(param, none) for param in batch.params] if memories else [],
            on_device(lr) if _stays_on_device(lr) else None,
            # GradScaler sets these two for the time of a step.
            on_device(getattr(self, "grad_scale", None)),
            on_device(getattr(self, "found_inf", None)),
        )

    def _batches(self, group: dict[str, Any]) -> list[_Batch]:
        """The group's parameters with gradients, by device and by whether they are protected."""
        params = [param for param in group["params"] if param.grad is not None]
        if any(param.grad.layout is not torch.strided for param in params):
            self._refuse_sparse(group)
        prepared = self._prepared.get(id(group))
        if prepared is None or not prepared.is_current(params, group["amsgrad"], self.state):
            prepared = self._prepared[id(group)] = self._prepare(params, group["amsgrad"])
        return prepared.batches

    def _prepare(self, params: list[Tensor], amsgrad: bool) -> _Prepared:
        batches: dict[tuple[torch.device, bool], _Batch] = {}
        for param in params:
            state = self.state[param]
            if "step" not in state or (amsgrad and "max_exp_avg_sq" not in state):
                _start_moments(state, param, amsgrad)
            key = (param.device, "importance" in state)
            if key not in batches:
                batches[key] = _Batch(param.device, amsgrad, "importance" in state)
            batches[key].add(param, state)
        return _Prepared(params, amsgrad, list(batches.values()))

    @staticmethod
    def _refuse_sparse(group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param.grad is not None and param.grad.layout is not torch.strided:
                raise RuntimeError(
                    f"the gradient of parameter {_name(group, param)} must be dense, not "
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
                :class:`cl_optim.ImportanceLog` stands for its ``merge()``: all its tasks at once.
                ``None`` protects all weights equally (F = 1): L2-SP.
            decay: What remains of the earlier tasks' importance, in [0, 1].
            anchors: ``"latest"``: F ← decay·F + importance, θ* ← θ, in the parameter's dtype.
                ``"exact"``: F̄ ← decay·F̄ + F and θ̄ ← θ̄ + (F/F̄)(θ − θ̄), in float32.
            model: Names the parameters, where the optimizer was made without names.
            strict: An importance for an unknown parameter, or a parameter without importance, is
                an error. ``False`` ignores the former and gives the latter F = 0 for this task,
                and logs how many there are (``names.compare_names`` lists them).
            reset_state: Start the moments and step counts anew.

        Raises:
            ValueError: An argument is out of range, or an importance has an unknown or ambiguous
                name, a wrong shape, or a value that is not finite or negative. Nothing has been
                changed then.
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be in [0, 1], not {decay}.")
        if anchors not in ANCHORS:
            raise ValueError(f"anchors must be one of {ANCHORS}, not {anchors!r}.")
        if isinstance(importance, ImportanceLog):
            importance = importance.merge()
        matched = list(self._match(importance, model, strict))
        merge = self._merge_exact if anchors == "exact" else self._merge_latest
        self._prepared.clear()  # it would keep the replaced tensors alive
        for param, new in matched:
            merge(param, new, decay)
            if reset_state:
                for key in ("step", *_MOMENTS):
                    self.state[param].pop(key, None)

    def _merge_latest(self, param: Tensor, new: Tensor | None, decay: float) -> None:
        """F ← dF + F_new, θ* ← θ."""
        state = self.state[param]
        if "importance" in state:
            state["importance"].mul_(decay)
        if new is not None:
            state["importance"] = _wide(param, new).add_(state.get("importance", 0.0))
        if "importance" in state:
            state["anchor"] = param.detach().clone(memory_format=torch.preserve_format)

    def _merge_exact(self, param: Tensor, new: Tensor | None, decay: float) -> None:
        """F̄ ← dF̄ + F, θ̄ ← θ̄ + (F/F̄)(θ − θ̄): dF̄(·−θ̄)² + F(·−θ)² up to a constant."""
        state = self.state[param]
        if "importance" in state:
            state["importance"].mul_(decay)
        if new is None:
            return
        theta, new = _wide(param, param.detach()), _wide(param, new)
        total = state["importance"] = new + state.get("importance", 0.0)
        anchor = _wide(param, state["anchor"]) if "anchor" in state else theta
        moved = anchor + new / total * (theta - anchor)
        state["anchor"] = torch.where(total == 0, theta, moved)

    def _match(
        self, importance: Mapping[str, Tensor] | None, model: torch.nn.Module | None, strict: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each parameter with its checked importance, None where there is none for it."""
        if importance is None:
            for param in self._params():
                yield param, torch.ones((), device=param.device).expand(param.shape)
            return
        named = self._named_params(model)
        meanings = match_names(importance, named)
        names = {meaning: name for name, meaning in meanings.items()}
        match = compare_names(importance, named)
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
        if match.new or match.vanished:
            _LOGGER.warning("Consolidated with strict=False: %s", match)
        for name, param in named.items():
            new = importance[names[name]] if name in names else None
            if new is not None:
                _check_importance(name, new, param)
            yield param, new

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
            named.update(zip(group["param_names"], group["params"], strict=True))
        return named

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """The penalty at the current weights, Σ_groups λ Σ F (θ − θ*)².

        Returns:
            A detached 0-dim float32 tensor (float64 where a parameter is) on the first parameter's
            device; 0 before the first :meth:`consolidate`.
        """
        terms = [
            (state["importance"] * (param - state["anchor"]).to(ops.state_dtype(param)).square())
            .sum()
            .mul(group["ewc_lambda"])
            for group in self.param_groups
            for param in group["params"]
            if param in self.state and "importance" in (state := self.state[param])
        ]
        if not terms:
            return torch.zeros((), device=next(self._params()).device)
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def protected(self) -> Iterator[Protected]:
        """Each protected parameter with its importance, anchor and λ; none before `consolidate`."""
        for group in self.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for name, param in zip(names, group["params"], strict=True):
                state = self.state.get(param, {})
                if "importance" in state:
                    importance, frozen = state["importance"], torch.zeros_like(param).bool()
                    anchor = state["anchor"]
                    yield Protected(name, param, importance, frozen, anchor, group["ewc_lambda"])

    # --- state ------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, or of torch.optim.AdamW, so that a job can switch.

        Importance, moments and anchors keep their precision: nothing is cast to the parameter's
        dtype, and 16-bit moments are widened. AdamW's state dict leaves this optimizer's λ and
        form of the penalty, and no protection.

        Args:
            state_dict: What :meth:`state_dict` returned, for parameters of the same shapes.

        Raises:
            ValueError: The state dict is truncated or belongs to other parameters. The optimizer
                is unchanged then.
        """
        loaded: dict[int, dict[str, Any]] = {}

        def check(
            optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]
        ) -> dict[str, Any] | None:
            state_dict = self._from_adamw(state_dict)
            self._check_state_dict(state_dict)
            indices = [index for group in state_dict["param_groups"] for index in group["params"]]
            loaded.update(
                {i: state_dict["state"].get(index, {}) for i, index in enumerate(indices)}
            )
            return state_dict

        def restore(optimizer: torch.optim.Optimizer) -> None:
            # torch casts all state but `step` to the parameter's dtype, and `step` stays the very
            # tensor of the state dict, which the next step would advance.
            for index, param in enumerate(self._params()):
                for key, value in loaded[index].items():
                    self.state[param][key] = _loaded(key, value, param)

        # The check comes after the user's own hooks, which may replace the state dict.
        first = self.register_load_state_dict_pre_hook(check)
        last = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            first.remove()
            last.remove()

    def _from_adamw(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict of torch's AdamW with what it lacks; any other as it is."""
        groups = state_dict.get("param_groups", ())
        if not groups or not all("decoupled_weight_decay" in group for group in groups):
            return state_dict
        if any(not g["decoupled_weight_decay"] and g["weight_decay"] != 0 for g in groups):
            raise ValueError(
                "the state dict is one of torch.optim.Adam with weight decay in the gradient, "
                "which this optimizer does not have."
            )
        groups = [
            {**{key: here[key] for key in ("ewc_lambda", "penalty")}, **group}
            for here, group in zip(self.param_groups, groups, strict=False)
        ] + list(groups[len(self.param_groups) :])
        for group in groups:
            del group["decoupled_weight_decay"]
        return {**state_dict, "param_groups": groups}

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"the state dict is truncated: it has no {key!r}.")
        groups = state_dict["param_groups"]
        if [len(group.get("params", ())) for group in groups] != [
            len(group["params"]) for group in self.param_groups
        ]:
            raise ValueError(
                "the state dict belongs to other parameters: its groups have "
                f"{[len(group.get('params', ())) for group in groups]} parameters, this "
                f"optimizer's have {[len(group['params']) for group in self.param_groups]}."
            )
        for number, group in enumerate(groups):
            for key in _HYPERPARAMETERS:
                if key not in group:
                    raise ValueError(
                        f"the state dict is truncated: its group {number} has no {key!r}."
                    )
            _hyperparameters(group)
        indices = [index for group in groups for index in group["params"]]
        amsgrad = {index: group["amsgrad"] for group in groups for index in group["params"]}
        names = {
            index: _name(group, param)
            for index, (group, param) in zip(
                indices,
                ((g, p) for g in self.param_groups for p in g["params"]),
                strict=True,
            )
        }
        for index, param in zip(indices, self._params(), strict=True):
            state = state_dict["state"].get(index, {})
            required: set[str] = set()
            if state.keys() & {"step", *_MOMENTS}:
                required |= {"step", "exp_avg", "exp_avg_sq"}
                required |= {"max_exp_avg_sq"} if amsgrad[index] else set()
            if state.keys() & {"importance", "anchor"}:
                required |= {"importance", "anchor"}
            for key in sorted(required):
                if key not in state:
                    raise ValueError(
                        f"the state dict is truncated: parameter {names[index]} has no {key!r}."
                    )
                if key != "step" and state[key].shape != param.shape:
                    raise ValueError(
                        f"the state dict belongs to other parameters: {key!r} of parameter "
                        f"{names[index]} has shape {tuple(state[key].shape)}, not "
                        f"{tuple(param.shape)}."
                    )


def _choose(group: Mapping[str, Any], device: torch.device) -> tuple[str, ops.Step]:
    differentiable = group["differentiable"]
    if differentiable and group["fused"]:
        raise ValueError("differentiable=True and fused=True exclude each other: choose one.")
    return ops.choose(
        device.type, use_foreach=differentiable or group["foreach"], use_fused=group["fused"]
    )


def _stays_on_device(lr: float | Tensor) -> TypeGuard[Tensor]:
    """Whether reading the learning rate on the host would wait for a device."""
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _hyperparameters(group: Mapping[str, Any]) -> ops.Hyperparameters:
    beta1, beta2 = group["betas"]
    lr = group["lr"]
    return ops.Hyperparameters(
        lr=0.0 if _stays_on_device(lr) else float(lr),
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        ewc_lambda=group["ewc_lambda"],
        penalty=group["penalty"],
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )


def _wide(param: Tensor, value: Tensor) -> Tensor:
    """A copy in the dtype of the parameter's state, on its device, laid out like it."""
    copy = torch.empty_like(
        param, dtype=ops.state_dtype(param), memory_format=torch.preserve_format
    )
    return copy.copy_(value)


def _start_moments(state: dict[str, Any], param: Tensor, amsgrad: bool) -> None:
    def zeros() -> Tensor:
        return torch.zeros_like(
            param, dtype=ops.state_dtype(param), memory_format=torch.preserve_format
        )

    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = zeros()
        state["exp_avg_sq"] = zeros()
    if amsgrad:
        state["max_exp_avg_sq"] = zeros()


def _loaded(key: str, value: Any, param: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key == "step":
        return value.to(param.device, torch.float32, copy=True)
    dtype = value.dtype if key == "anchor" else ops.state_dtype(param)
    copy = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    return copy.copy_(value)


def is_dtensor(param: Tensor) -> bool:
    """Whether the parameter is a DTensor; without importing what that takes a second to import."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(param, module.DTensor)


def _name(group: Mapping[str, Any], param: Tensor) -> str:
    """The parameter's name, or its place and shape where the optimizer was made without names."""
    index = next(i for i, p in enumerate(group["params"]) if p is param)
    if "param_names" in group:
        return str(group["param_names"][index])
    return f"{index} of its group (shape {tuple(param.shape)})"


def _check_importance(name: str, importance: Tensor, param: Tensor) -> None:
    if not isinstance(importance, Tensor) or importance.is_complex():
        raise ValueError(f"the importance of {name!r} must be a real tensor.")
    if importance.shape != param.shape:
        raise ValueError(
            f"the importance of {name!r} must have the parameter's shape {tuple(param.shape)}, "
            f"not {tuple(importance.shape)}."
        )
    if importance.numel() == 0:
        return
    low, high = (bound.item() for bound in importance.detach().aminmax())  # NaN shows in both
    if not (low >= 0.0 and high < float("inf")):
        raise ValueError(
            f"the importance of {name!r} must be finite and at least 0; it reaches from {low} "
            f"to {high}."
        )
