"""RetentionGuard: watches old tasks while a new one is learned, and acts when one is forgotten."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from cl_optim.distributed import MeanRanks, Together, check_ranks, refuse_own
from cl_optim.ops.checks import check_whole
from cl_optim.ops.warn import warn
from cl_optim.optim.gem import GEM
from cl_optim.optim.settling import settle
from cl_optim.retention.checkpoint.checkpoints import Checkpoints
from cl_optim.retention.checkpoint.parts import Stateful
from cl_optim.retention.checkpoint.shared import checkpoints
from cl_optim.retention.guard.controller import LambdaController, largest_lambda
from cl_optim.retention.guard.evaluation import Check, Evaluation
from cl_optim.retention.guard.judge import Judge, packed
from cl_optim.retention.guard.loggers import Logger
from cl_optim.retention.guard.quantize import Quantize
from cl_optim.retention.guard.report import Report
from cl_optim.retention.guard.way_back import WayBack
from cl_optim.retention.interpolation.curve import Curve
from cl_optim.retention.interpolation.old_weights import Old

Action = Literal["warn", "stop", "raise_lambda", "rollback"]


class RetentionWarning(UserWarning):
    """An old task is being forgotten."""


class RetentionGuard:
    """Evaluates old and new tasks during training, and acts when an old one is forgotten.

    An old task is in breach when more than ``threshold`` of its baseline is lost; any task, when
    its number is not finite. Then, by ``on_breach``:

    ``"warn"``
        A :class:`RetentionWarning`; training goes on.
    ``"stop"``
        :meth:`step` returns True from now on.
    ``"raise_lambda"``
        The optimizer's ``ewc_lambda`` is raised (:class:`LambdaController`); where it is at its
        limit, training is stopped.
    ``"rollback"``
        Everything goes back to the last good checkpoint, and training is stopped: the same bits
        would come to the same breach again.
    ``("rollback", "raise_lambda")``
        Everything goes back, and training goes on with a larger λ; where λ is at its limit, it is
        stopped there.

    With a ``budget`` none of these is asked for: "lose at most so much of any old task". Where the
    optimizer has a λ, it is raised while more than the budget is lost and lowered while less is
    (:meth:`LambdaController.steer`), and when training is over, :meth:`finish` goes back towards
    the old weights as far as it must. Without old data let ``retention.old_outputs`` be the
    evaluation.

    Where several processes train one model, each has a guard and all evaluate, on the same old
    samples or each on its part: the mean of their numbers counts, so that all act alike in the same
    step (a number that is not finite in one is none in any).

    With a ``folder``, every check without a breach, or under a budget, is followed by a checkpoint
    of model, optimizer (importance and anchors included), scheduler, data position, random number
    generators and whatever ``extra`` names. :meth:`resume` continues a run from it in a new
    process. Several processes have one folder, that all can read: each writes what it alone has,
    its parts of DTensors included, and as many go on.

    Args:
        model: The network in training.
        optimizer: Its optimizer.
        evaluations: What is measured; at least one has the role ``"old"``. Names are unique.
        threshold: The relative loss that is too much, in (0, 1).
        on_breach: An action, or the pair above.
        every: Steps between evaluations.
        folder: Where checkpoints go; needed for ``"rollback"``.
        keep: Checkpoints kept.
        scheduler: The learning rate's scheduler.
        data: Where the batches come from: a :class:`DataStream`, or anything with
            ``state_dict()`` and ``load_state_dict()`` (torchdata's StatefulDataLoader).
        extra: Further parts of a checkpoint by name: a GradScaler, a FisherEstimator, a
            ReplayBuffer (one on disk must not be added to during the run: its files cannot go
            back).
        useful: Old tasks whose forgetting is wanted: they are measured, and never in breach.
        quantize: ``"int8"`` or ``torch.int8``: measure everything on a copy of the model with int8
            weights, too. An evaluation "English" has a second one "English (int8)" with its own
            baseline.
        loggers: Where each check is written.
        raise_by: For ``"raise_lambda"`` and a budget: see :class:`LambdaController`.
        limit: The same.
        budget: The part of any old task that may be lost at the end, in (0, 1). In place of
            ``threshold`` and ``on_breach``; numbers that are not finite stop training.
        on_end: ``"interpolate"``: :meth:`finish` sets the weights between the old ones and the new;
            a budget implies it, and the threshold is one.
        old: The old weights, as for :func:`cl_optim.retention.interpolate`. None: the optimizer's
            anchors where these are the weights at :meth:`start`; else a copy of them, in the folder
            if there is one and this is the only process, or in memory.
        ranks: Whose evaluations count: the ``"mean"`` over all processes, or over those of a
            process group of torch.distributed; ``"own"``: this process's, which trains alone.

    Raises:
        ValueError: An argument is out of range, or two do not go together.
        TypeError: A part of a checkpoint lacks ``state_dict()`` or ``load_state_dict()``.

    Example:
        .. code-block:: python

            english = Evaluation("English", bits_per_byte, higher_is_better=False)
            guard = RetentionGuard(model, optimizer, [english], folder="runs/guard")
            guard.start()
            for batch in batches:
                train_step(batch)
                if guard.step():
                    break
            print(guard.report())
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        evaluations: Iterable[Evaluation],
        *,
        threshold: float = 0.10,
        on_breach: Action | Sequence[Action] | None = None,
        every: int = 100,
        folder: str | os.PathLike[str] | None = None,
        keep: int = 3,
        scheduler: Stateful | None = None,
        data: Stateful | None = None,
        extra: Mapping[str, Stateful] | None = None,
        useful: Iterable[str] = (),
        quantize: Quantize | torch.dtype | None = None,
        loggers: Iterable[Logger] = (),
        raise_by: float = 3.0,
        limit: float = 1000.0,
        budget: float | None = None,
        on_end: Literal["interpolate"] | None = None,
        old: Old | None = None,
        ranks: MeanRanks = "mean",
    ) -> None:
        check_ranks(ranks, "mean")
        refuse_own(model, ranks)
        self._judge = Judge(evaluations, useful, quantize, ranks)
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold must be between 0 and 1, both excluded, not {threshold}.")
        check_whole("every", every)
        if on_end not in (None, "interpolate"):
            raise ValueError(f"on_end must be 'interpolate' or None, not {on_end!r}.")
        if budget is not None:
            if not 0.0 < budget < 1.0:
                raise ValueError(f"budget must be between 0 and 1, both excluded, not {budget}.")
            if on_breach is not None:
                raise ValueError(
                    f"on_breach must be left out beside a budget, not {on_breach!r}: the budget is "
                    "kept by λ and, at the end, by interpolation."
                )
            threshold, on_end = budget, "interpolate"
        if on_end is not None and not self._judge.guards_any:
            raise ValueError(
                "useful names all old tasks: there is nothing to keep within a budget."
            )
        if old is not None and on_end is None:
            raise ValueError("old is for on_end='interpolate' or a budget: give one of them.")
        self._actions = ("stop",) if on_breach is None else _check_actions(on_breach)
        if "rollback" in self._actions and folder is None:
            raise ValueError("on_breach='rollback' needs a folder for its checkpoints.")
        self.model = model
        self.optimizer = optimizer
        self.budget = budget
        self._way_back = None
        if on_end is not None:
            alone = Together(ranks).size == 1
            self._way_back = WayBack(model, optimizer, old, folder if alone else None, ranks)
        self.threshold = threshold
        self.every = every
        self.loggers = tuple(loggers)
        self.history: list[Check] = []
        self.baselines: dict[str, float] = {}
        self.steps = 0
        self.stopped = False
        self._controller = (
            LambdaController(optimizer, raise_by, limit)
            if "raise_lambda" in self._actions or (budget is not None and largest_lambda(optimizer))
            else None
        )
        parts: dict[str, Stateful | None] = {
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler,
            "data": data,
            "guard": self,
        }
        for name in extra or {}:
            if name in parts:
                raise ValueError(f"extra must not have the name {name!r}, which the guard uses.")
        present = {name: part for name, part in parts.items() if part is not None}
        present |= extra or {}
        self._checkpoints = None if folder is None else checkpoints(folder, present, keep, ranks)

    # --- the run ----------------------------------------------------------------------------------

    def start(self, baselines: Mapping[str, float] | None = None) -> Check:
        """Measure the baselines and write the first checkpoint: before training, or go on anew.

        Args:
            baselines: Instead of those measured now, by an evaluation's name.

        Raises:
            ValueError: A baseline is not finite, or that of a guarded task is zero, or it names no
                evaluation; or the folder holds checkpoints of another run. Nothing has been changed
                then.
        """
        if self._checkpoints is not None and self._checkpoints.steps:
            raise ValueError(
                f"folder {str(self._checkpoints.folder)!r} holds checkpoints of an earlier run: "
                "resume() goes on from them; choose another folder to begin anew."
            )
        values = self._measured()
        start = self._judge.baselines(values, baselines)
        if self._way_back is not None:
            self._way_back.start()
        self.baselines = start
        try:
            check = self._compare(values)
            self._record(check)
            self._save()
        except BaseException:
            self.baselines, self.history = {}, []
            raise
        return check

    def resume(self) -> int:
        """Set everything to the newest whole checkpoint of an earlier process; returns its step.

        Memories of :class:`cl_optim.GEM` keep the closures that they have here.

        Raises:
            ValueError: The guard has no folder.
            CheckpointError: There is no checkpoint that can be read, or it has other parts.
        """
        if self._checkpoints is None:
            raise ValueError("resume() needs a guard with a folder.")
        return self._restore(self._checkpoints)

    def step(self) -> bool:
        """Count a training step; evaluate and act where it is time.

        Returns:
            Whether to stop training.

        Raises:
            RuntimeError: :meth:`start` or :meth:`resume` has not been called.
        """
        self._require_started()
        if not self.stopped:
            self.steps += 1
            if self.steps % self.every == 0:
                self.check()
        return self.stopped

    def check(self) -> Check:
        """Evaluate now, act on a breach, and write a checkpoint if there is none.

        Raises:
            RuntimeError: :meth:`start` or :meth:`resume` has not been called.
            CheckpointError: A roll-back finds no checkpoint that can be read.
        """
        self._require_started()
        check = self._compare(self._measured())
        if self.budget is not None and check.is_finite:
            check = self._steer(check)
        elif check.breached:
            check = self._act(check)
        elif self._controller is not None and not self._judge.breached(
            check.measured, self.threshold / 2
        ):
            self._controller.relax()
        self._record(check)
        if not check.breached or (self.budget is not None and check.is_finite):
            self._save()
        return check

    def finish(self) -> Curve | None:
        """End the run: go back towards the old weights until what is lost fits the budget.

        What the weights lose no more than the budget of, or the threshold, stays as it is. Nothing
        is done without ``on_end`` or a budget. The last check of the history is that of the weights
        afterwards; the optimizer's moments are those of before.

        Returns:
            What was measured on the way; None where nothing was to be done.

        Raises:
            RuntimeError: :meth:`start` or :meth:`resume` has not been called.
            ValueError: As for :func:`cl_optim.retention.interpolate`.
        """
        self._require_started()
        if self._way_back is None:
            return None
        settle(self.optimizer)
        curve = self._way_back.go(self._judge.of_weights(), self.threshold, self.baselines)
        check = self._compare(self._measured())
        if curve.alpha < 1.0:
            action = f"went back to α = {curve.alpha:.3g} of the way from the old weights."
            check = replace(check, action=action)
        self._record(check)
        return curve

    def report(self) -> Report:
        """Say what is retained of each task, what was learned, where it stopped, what is next."""
        self._require_started()
        return Report.of(self.history, self.threshold, self._judge.wanted)

    def state_dict(self) -> dict[str, Any]:
        """Return steps, baselines, history and the controller's factor, as JSON can hold them.

        Not the model's nor the optimizer's: for trainers that keep those themselves.
        """
        return {
            "steps": self.steps,
            "stopped": self.stopped,
            "baselines": dict(self.baselines),
            "history": [packed(check) for check in self.history],
            "controller": None if self._controller is None else self._controller.state_dict(),
            "anchor_sums": None if self._way_back is None else self._way_back.anchors,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there. History that this guard has itself is kept: it has been seen.

        Raises:
            ValueError: It is of a guard with other evaluations. Nothing has been changed then.
        """
        self.check_state_dict(state_dict)
        self.steps = state_dict["steps"]
        self.stopped = state_dict["stopped"]
        self.baselines = dict(state_dict["baselines"])
        if not self.history:
            self.history = [
                self._judge.unpacked(check, self.baselines) for check in state_dict["history"]
            ]
        if self._controller is not None and state_dict["controller"] is not None:
            self._controller.load_state_dict(state_dict["controller"])
        if self._way_back is not None:
            self._way_back.anchors = state_dict.get("anchor_sums")  # earlier versions had none

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError if the state is of a guard with other evaluations, or an older one."""
        own = self._judge.names
        saved = set(state_dict["baselines"])  # none where it had not been started
        if saved and own != saved:
            raise ValueError(
                f"the saved guard has the evaluations {sorted(state_dict['baselines'])}, this one "
                f"has {sorted(own)}."
            )
        if any("rolled_back_to" not in check for check in state_dict.get("history", ())):
            raise ValueError(
                "the saved guard's history is of an earlier version of cl_optim, which did not say "
                "what was rolled back: start() anew from the weights that you have."
            )

    def continue_from(self, state_dict: Mapping[str, Any]) -> None:
        """Go on inside a trainer that has restored everything else from its own checkpoint.

        The guard's checkpoints of later steps belong to a run that was given up, and are deleted.
        Where none is left, one is written, so that there is something to roll back to.

        Raises:
            ValueError: It is of a guard with other evaluations. Nothing has been changed then.
        """
        self.load_state_dict(state_dict)
        if self._checkpoints is not None:
            self._checkpoints.discard_after(self.steps)
            if self.baselines and not self._checkpoints.steps:
                self._save()

    def _measured(self) -> dict[str, float]:
        """Measure the weights that would be saved, of which no pull is due."""
        settle(self.optimizer)
        return self._judge.measure(self.model)

    def _require_started(self) -> None:
        if not self.baselines:
            raise RuntimeError("the guard has no baselines yet: call start(), or resume(), first.")

    def _compare(self, values: Mapping[str, float]) -> Check:
        measured = self._judge.compare(values, self.baselines)
        breached = self._judge.breached(measured, self.threshold)
        return Check(self.steps, measured, breached, largest_lambda(self.optimizer))

    def _record(self, check: Check) -> None:
        self.history.append(check)
        for logger in self.loggers:
            logger.log(check)

    # --- acting -----------------------------------------------------------------------------------

    def _act(self, check: Check) -> Check:
        done = [
            f"{one.evaluation.name} lost {one.loss:.1%} of its baseline"
            if math.isfinite(one.value)
            else f"{one.evaluation.name} is {one.value}"
            for one in check.measured
            if one.evaluation.name in check.breached
        ]
        back = None
        if "rollback" in self._actions:
            back = self._roll_back()
            done.append(f"rolled back to step {back}")
        if "raise_lambda" in self._actions:
            done.append(self._raise_lambda())
        elif self._actions != ("warn",):
            self.stopped = True
            done.append("training stopped")
        action = "; ".join(done) + "."
        if self._actions == ("warn",):
            warn(f"step {check.step}: {action}", RetentionWarning)
        return replace(check, action=action, rolled_back_to=back, stopped=self.stopped)

    def _steer(self, check: Check) -> Check:
        assert self.budget is not None
        if self._controller is None:
            return check
        before = largest_lambda(self.optimizer)
        self._controller.steer(self._judge.most_lost(check.measured) / self.budget)
        now = largest_lambda(self.optimizer)
        return check if now == before else replace(check, action=f"λ is {now:g} now.")

    def _roll_back(self) -> int:
        assert self._checkpoints is not None  # the constructor saw to it
        kept = None if self._controller is None else self._controller.state_dict()
        step = self._restore(self._checkpoints)
        self.optimizer.zero_grad()  # what is there belongs to other weights
        if self._controller is not None and kept is not None:
            # A breach does not undo what earlier ones taught.
            self._controller.load_state_dict(kept)
            self._controller.apply()
        return step

    def _restore(self, kept: Checkpoints) -> int:
        """Go back; if that fails, what it has undone has neither history nor closures."""
        history = self.history
        closures = self.optimizer.closures if isinstance(self.optimizer, GEM) else {}
        try:
            return kept.restore()
        except BaseException:
            self.history = history
            if isinstance(self.optimizer, GEM):
                lost = closures.keys() - self.optimizer.closures.keys()
                for name in lost & set(self.optimizer.memories):
                    self.optimizer.remember(name, *closures[name])
            raise

    def _raise_lambda(self) -> str:
        assert self._controller is not None  # the constructor saw to it
        if self._controller.at_limit:
            self.stopped = True
            return "λ is at its limit, training stopped"
        self._controller.raise_lambda()
        return f"λ raised to {largest_lambda(self.optimizer):g}"

    def _save(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(self.steps)


def _check_actions(on_breach: Action | Sequence[Action]) -> tuple[str, ...]:
    actions = (on_breach,) if isinstance(on_breach, str) else tuple(on_breach)
    single = len(actions) == 1 and actions[0] in get_args(Action)
    if not single and actions != ("rollback", "raise_lambda"):
        raise ValueError(
            f"on_breach must be one of {get_args(Action)} or ('rollback', 'raise_lambda'), not "
            f"{on_breach!r}."
        )
    return actions
