"""What protects an optimizer's weights, and everything that is done with it but the step itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from cl_optim.distributed import like
from cl_optim.importance import ImportanceLog, KroneckerImportance
from cl_optim.importance.importance import check_reduced, tasks_in
from cl_optim.ops import formats
from cl_optim.ops.checks import check_fraction
from cl_optim.ops.ewc_adamw_reference import penalty_sums
from cl_optim.optim import matching, protection
from cl_optim.optim.kronecker.consolidation import Consolidated, consolidated, store
from cl_optim.optim.kronecker.pull import Pull
from cl_optim.optim.settling import Settling, settle_before
from cl_optim.optim.shards import Shards
from cl_optim.optim.state import weight_of

ANCHORS = ("latest", "exact")


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


class Protecting:
    """A mixin of optimizers: importance, anchors and frozen weights of their parameters.

    Attributes:
        param_groups: The optimizer's, each with the options of a protection.
    """

    param_groups: list[dict[str, Any]]
    _pull: Pull
    _shards: Shards
    _fixed: list[Tensor]  # what has no importance because it cannot move

    @property
    @abstractmethod
    def _protection(self) -> MutableMapping[Tensor, dict[str, Any]]:
        """Return what protects each parameter: a dict for any that is asked for."""

    @abstractmethod
    def _protection_changes(self, what: str) -> None:
        """Let go of the tensors that protect, which ``what`` replaces."""

    @abstractmethod
    def _reset(self, param: Tensor) -> None:
        """Start a parameter's moments and step count anew."""

    def _local(self) -> Shards:
        """Return the groups, and what protects their parameters, as this process has them."""
        return self._shards.look(self.param_groups, self._protection)

    def _warn_of_moving(self) -> None:
        moving = [param for param in self._fixed if param.grad is not None]
        if moving:
            self._fixed = [param for param in self._fixed if param.grad is None]
            matching.warn_of_moving(moving, self.param_groups)

    def _note_fixed(self) -> None:
        self._fixed = matching.unprotected(self.param_groups, self._protection)

    # --- consolidation ----------------------------------------------------------------------------

    @torch.no_grad()
    def consolidate(
        self,
        importance: Mapping[str, Tensor] | ImportanceLog | None,
        *,
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
        Where parameters are DTensors, all processes call it; each keeps what is of its part, and
        an importance may be whole in each process or spread over them.

        Args:
            importance: F ≥ 0 by parameter name, each of its parameter's shape and of any real
                dtype, on any device (an :class:`cl_optim.Importance`, or any mapping). Names
                match without what DDP, torch.compile, FSDP and PEFT put into them. An
                :class:`cl_optim.ImportanceLog` stands for its ``merge()``, all its tasks at once,
                and what they froze is frozen. A :class:`cl_optim.KroneckerImportance` pulls the
                matrices of linear maps along the directions of its factors, every ``every`` steps,
                in groups with ``penalty="proximal"``; its diagonal is what else needs one, such as
                :meth:`freeze`. All tasks are of one kind, or ``decay=0`` forgets the earlier ones.
                ``None`` protects all weights equally (F = 1): L2-SP. What does not require a
                gradient, such as the weights under LoRA, cannot move: it needs no importance, and
                has no state unless one names it. Where it is trained later, the first step warns
                that it is unprotected until the next :meth:`consolidate`.
            decay: What remains of the earlier tasks' importance, in [0, 1].
            anchors: ``"latest"``: F ← decay·F + importance, θ* ← θ, in the parameter's dtype;
                factors are merged in bases of their sums, each no larger than its side.
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
                parameter's arithmetic; it is of one of several processes; two parameters have one
                name; or Kronecker factors do not go together with a group's options, ``anchors``,
                what is there of earlier tasks, or with DTensors.
                Nothing has been changed then, in any process.
        """
        check_fraction("decay", decay)
        if anchors not in ANCHORS:
            raise ValueError(f"anchors must be one of {ANCHORS}, not {anchors!r}.")
        shards = self._local()
        with shards.together.agreeing():
            check_reduced(importance)
            frozen: dict[str, Tensor] = {}
            if isinstance(importance, ImportanceLog):
                log = importance
                importance, frozen = log.merge(strict=strict), log.frozen(strict=strict)
            new_tasks = tasks_in(importance)
            if importance is not None and not isinstance(importance, Mapping):
                raise TypeError(
                    "importance must be a mapping of tensors by parameter name, an ImportanceLog "
                    f"or None, not {type(importance).__name__}."
                )
            for group in self.param_groups:
                formats.settle(group)
            matched, masks, matrices = self._matched(
                importance, frozen, decay, model, strict=strict, exact=anchors == "exact"
            )
        self.settle()
        self._protection_changes("consolidate()")
        groups = {param: group for group in shards.groups for param in group["params"]}
        if anchors == "latest":
            protection.warn_of_rounded_anchors(groups)
        for param, new in matched:
            part = shards.part(param)
            state = self._protection[param]
            protection.merge(state, part, new, decay, groups[part], exact=anchors == "exact")
            if reset_state:
                self._reset(param)
        for param, mask in masks:
            protection.pin(self._protection[param], shards.part(param), mask)
        store(matrices, self.param_groups, self._protection)
        self._pull.forget()
        mean, unit = protection.scales(self._protected_states(), self._local())
        if mean > 0.0 and unit == 0.0:
            protection.warn_of_no_unit(self.param_groups)
        for group in self.param_groups:
            group["importance_mean"] = mean
            group["tasks"] = decay * group["tasks"] + new_tasks
            group["consolidations"] += 1
            if group["strength"] is not None:
                group["ewc_lambda"] = group["strength"] * group["tasks"] * unit
        self._note_fixed()

    def _matched(
        self,
        importance: Mapping[str, Tensor] | None,
        frozen: Mapping[str, Tensor],
        decay: float,
        model: torch.nn.Module | None,
        *,
        strict: bool,
        exact: bool,
    ) -> tuple[matching.Matched, matching.Masks, list[Consolidated]]:
        """Return what there is for each parameter, for the part that is here, all of it checked."""
        if importance is None:
            params = list(self._params())
            matched = matching.equal_importance(params, self._shards.part)
            named = {}
        else:
            named = matching.named_params(self.param_groups, model)
            if isinstance(importance, KroneckerImportance):
                matching.refuse_dtensors(named)
            matched = matching.match_importance(importance, named, strict=strict)
        matrices = consolidated(
            importance,
            matched,
            named,
            self._pull.matrices(self.param_groups, self._protection),
            self.param_groups,
            self._protection,
            decay,
            exact=exact,
        )
        masks = matching.match_masks(frozen, named, strict=strict) if frozen else []
        return matched, masks, matrices

    def _params(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _protected_states(self) -> protection.States:
        """Return what protects the parameters, by the parts of them that are here."""
        shards = self._local()
        return [
            (param, shards.state[param])
            for group in shards.groups
            for param in group["params"]
            if "importance" in shards.state.get(param, {})
        ]

    # --- frozen weights ---------------------------------------------------------------------------

    @torch.no_grad()
    def freeze(
        self, fraction: float | None = None, *, masks: Mapping[str, Tensor] | None = None
    ) -> int:
        """Pin the most important weights: they keep their bits, whatever is stepped or merged.

        The most important ones of all protected parameters together, λ aside; of equally important
        ones, those that come first. Weights that are frozen already count towards the fraction, and
        stay frozen even if it is smaller. A frozen weight is left out of the penalty.

        Args:
            fraction: Of the protected weights, in [0, 1]; 0.05 where there are no masks either.
            masks: Which weights to pin instead: bool, of the parameter's shape, by its name.

        Returns:
            How many weights are frozen now.

        Raises:
            TypeError: A mask is not of bool.
            ValueError: ``fraction`` is out of range or beside ``masks``, or a mask's name or shape
                is none of the optimizer's. Nothing has been changed then.
            RuntimeError: Nothing has been consolidated.
        """
        if fraction is not None and masks is not None:
            raise ValueError("fraction and masks exclude each other: call freeze() for each.")
        fraction = 0.05 if fraction is None else fraction
        check_fraction("fraction", fraction)
        states = self._protected_states()
        if not states:
            raise RuntimeError("freeze() needs importance: call consolidate() first.")
        shards = self._local()
        if masks is None:
            self._before_freezing()
            return protection.freeze(states, fraction, shards)
        named = matching.named_params(self.param_groups, None)
        matched = matching.match_masks(masks, named, strict=True)
        if any("importance" not in self._protection.get(param, {}) for param, _ in matched):
            raise ValueError("a mask is of a parameter that nothing protects.")
        self._before_freezing()
        for param, mask in matched:
            protection.pin(self._protection[param], shards.part(param), mask)
        return protection.count_frozen(states, shards)

    @torch.no_grad()
    def unfreeze(self) -> None:
        """Let all frozen weights move again; they are as important as they were."""
        self._before_freezing()
        for _, state in self._protected_states():
            protection.unfreeze(state)

    def frozen_weights(self, param: Tensor) -> Tensor | None:
        """Return which weights are frozen, bool; None where nothing protects the parameter."""
        stored = self._protection.get(param, {}).get("importance")
        if stored is None:
            return None
        return like(param, formats.frozen_weights(stored, self._local().part(param)))

    def _before_freezing(self) -> None:
        """Take what is due of the weights that were free until now."""
        self.settle()
        self._pull.look_again()

    # --- Kronecker importance ---------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def settle(self) -> None:
        """Take the pull of Kronecker importance that is due now, and begin to count anew.

        It is taken every ``every`` steps, for the learning rates of all of them at once; in between
        the weights are up to as many steps ahead of it. :meth:`state_dict`, :meth:`consolidate`,
        :meth:`freeze` and :meth:`unfreeze` settle first, and so does
        :class:`cl_optim.retention.RetentionGuard` before it evaluates or saves; see
        :meth:`settle_before` for what you evaluate and save yourself. Where nothing is due, and for
        diagonal importance, it does nothing.

        Raises:
            RuntimeError: A CUDA graph is being captured.
        """
        self._pull.settle(self.param_groups, self._protection)

    def settle_before(self, model: torch.nn.Module) -> Settling:
        """Settle before a model is evaluated, saved or loaded into.

        So nobody sees weights that are ahead of the pull, and a model that is saved in a file of
        its own, before the optimizer, is the one that the optimizer's state belongs to. That is
        before a forward pass in eval mode, ``model.state_dict()`` and ``model.load_state_dict()``.

        Args:
            model: What is called and saved: the bare model, or what is around it.

        Returns:
            What ends it: ``remove()``. It ends with the optimizer, too.
        """
        return settle_before(self, model)

    # --- what is known of the protection ----------------------------------------------------------

    @torch.no_grad()
    def protected(self) -> Iterator[Protected]:
        """Yield what protects each parameter that is protected, in the optimizer's order.

        Of a DTensor they are DTensors.
        """
        shards = self._local()
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            for name, param in zip(names, group["params"], strict=True):
                state = self._protection.get(param, {})
                if "importance" in state:
                    read = protection.read(state, shards.part(param))
                    importance, frozen, anchor = (
                        like(param, part) for part in (*read, state["anchor"])
                    )
                    yield Protected(name, param, importance, frozen, anchor, group["ewc_lambda"])

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Sum the penalty at the current weights, Σ_groups λ Σ F (θ − θ*)², frozen ones left out.

        Of matrices with Kronecker importance it is λ Σ S (UᵀΔU)², with Δ = 0 where they are frozen.

        Returns:
            A detached 0-dim float64 tensor, which nothing overflows that float32 parameters can
            have, on the first parameter's device; 0 before the first :meth:`consolidate`. Of
            DTensors it is that of all processes, which all call it.
        """
        in_matrices = self._pull.members(self.param_groups, self._protection)
        total = self._penalty_of(lambda param: param not in in_matrices)
        for penalty in self.matrix_penalties().values():
            total += penalty.to(total.device)
        return total

    def _penalty_of(self, wanted: Callable[[Tensor], bool]) -> Tensor:
        """Sum the penalty of diagonal importance over some parameters."""
        total = torch.zeros((), dtype=torch.float64, device=next(self._params()).device)
        shards = self._local()
        for group in shards.groups:
            for part in group["params"]:
                state = shards.state.get(part, {})
                if "importance" in state and shards.counts(part) and wanted(shards.param(part)):
                    importance, frozen = protection.read(state, part)
                    weight = weight_of(part, state)
                    sums = penalty_sums(weight, importance, frozen, state["anchor"])
                    total += (group["ewc_lambda"] * sums[0]).to(total.device)
        return shards.together.added(total)[0]

    @torch.no_grad()
    def matrix_penalties(self) -> dict[Tensor, Tensor]:
        """Return λ Σ S (UᵀΔU)² of each matrix with Kronecker importance, by its parameters.

        That of a matrix stands with its weight, and 0 with its bias. Float64, 0-dim, on the
        parameter's device; at the current weights.
        """
        of_weights = self._pull.penalties(self.param_groups, self._protection)
        return {
            param: of_weights.get(param, torch.zeros((), dtype=torch.float64, device=param.device))
            for param in self._pull.members(self.param_groups, self._protection)
        }


def protecting(optimizer: Any) -> Protecting | None:
    """Return what protects weights: an optimizer, or the first that it is around; None if none."""
    while optimizer is not None and not isinstance(optimizer, Protecting):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def anchors(optimizer: Any) -> dict[Tensor, Tensor]:
    """Return the anchors of an optimizer, or of the one that it is around, as they are stored."""
    found = protecting(optimizer)
    if found is None:
        return {}
    return {
        param: like(param, found._protection[param]["anchor"])
        for group in found.param_groups
        for param in group["params"]
        if "anchor" in found._protection.get(param, {})
    }
