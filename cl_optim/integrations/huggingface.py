"""The guard in Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from cl_optim.integrations.accelerate import unwrapped
from cl_optim.retention import Evaluation, RetentionGuard

_KEY = "cl_optim.RetentionCallback"


class RetentionCallback(TrainerCallback):
    """Runs a :class:`cl_optim.retention.RetentionGuard` inside a Trainer.

    The guard counts optimizer steps, whatever the gradient accumulation. Its baselines and history
    are in Trainer's own checkpoints, so that ``trainer.train(resume_from_checkpoint=True)`` goes on
    with them. A roll-back restores model, optimizer, scheduler and random numbers; the position in
    the data and ``global_step`` are Trainer's, and stay. With a ``budget`` or ``on_end`` the model
    has the weights of :meth:`~cl_optim.retention.RetentionGuard.finish` when training ends; those
    of Trainer's last checkpoint are the ones before.

    Args:
        evaluations: As for the guard.
        **options: The guard's, but for ``scheduler`` and ``data``.

    Attributes:
        guard: There once training has begun.

    Example:
        .. code-block:: python

            optimizer = cl_optim.EWCAdamW(model.named_parameters(), lr=1e-4, ewc_lambda=10.0)
            optimizer.consolidate(importance)
            callback = RetentionCallback([english], on_breach="stop", every=100)
            trainer = Trainer(
                model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]
            )
            trainer.train()
            print(callback.guard.report())
    """

    def __init__(self, evaluations: Iterable[Evaluation], **options: Any) -> None:
        self._evaluations = list(evaluations)
        self._options = options
        self.guard: RetentionGuard | None = None
        names = ", ".join(evaluation.name for evaluation in self._evaluations)
        self._key = f"{_KEY}({names})"  # there may be several, of different evaluations

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the baselines, or go on with those of the checkpoint.

        Raises:
            ValueError: Trainer would load other weights than those at which the guard stops.
        """
        self.guard = RetentionGuard(
            kwargs["model"],
            unwrapped(kwargs["optimizer"]),
            self._evaluations,
            scheduler=kwargs["lr_scheduler"],
            **self._options,
        )
        asked = self._options.get("on_breach") or "stop"  # the guard's default
        ends = {"stop", "rollback", "raise_lambda"}  # λ has a limit, at which it stops
        acts = not ends.isdisjoint((asked,) if isinstance(asked, str) else asked)
        goes_back = any(self._options.get(name) is not None for name in ("budget", "on_end"))
        if acts and args.load_best_model_at_end and not goes_back:
            raise ValueError(
                "with load_best_model_at_end=True Trainer loads its own best checkpoint after the "
                "guard has stopped, whatever that one has forgotten: leave it out, or give the "
                "guard a budget in place of on_breach, which the weights are brought to that are "
                "loaded."
            )
        if self._key in _states(state):
            self.guard.continue_from(_states(state)[self._key])
        elif state.global_step > 0 and any(key.startswith(_KEY) for key in _states(state)):
            saved = [key for key in _states(state) if key.startswith(_KEY)]
            raise ValueError(
                f"the checkpoint has the guards {saved}, none of which is {self._key}: resume with "
                "the evaluations that it was begun with."
            )
        else:
            self.guard.start()
            _states(state)[self._key] = self.guard.state_dict()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count an optimizer step; evaluate, act and stop where it is time."""
        assert self.guard is not None  # training has begun
        if self.guard.step():
            control.should_training_stop = True
        _states(state)[self._key] = self.guard.state_dict()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go back a part of the way where the guard has a budget, or ``on_end``."""
        assert self.guard is not None  # training has begun
        self.guard.finish()


def _states(state: TrainerState) -> dict[str, Any]:
    """Return what Trainer writes into checkpoints for its callbacks; declared a list, a dict."""
    return cast("dict[str, Any]", state.stateful_callbacks)
