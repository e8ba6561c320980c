"""The guard in Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from cl_optim.retention import Evaluation, RetentionGuard


class RetentionCallback(Callback):
    """Runs a :class:`cl_optim.retention.RetentionGuard` inside a Trainer with one optimizer.

    The guard counts optimizer steps, whatever the gradient accumulation. Its baselines and history
    are in Lightning's own checkpoints, so that ``trainer.fit(..., ckpt_path=...)`` goes on with
    them. A roll-back restores model, optimizer, scheduler and random numbers; the position in the
    data and ``global_step`` are Lightning's, and stay. With a ``budget`` or ``on_end`` the module
    has the weights of :meth:`~cl_optim.retention.RetentionGuard.finish` when training ends; those
    of Lightning's last checkpoint are the ones before.

    Args:
        evaluations: As for the guard; they are given the LightningModule.
        **options: The guard's, but for ``scheduler`` and ``data``.

    Attributes:
        guard: There once training has begun.

    Example:
        .. code-block:: python

            callback = RetentionCallback([english], on_breach="stop", every=100)
            Trainer(callbacks=[callback], max_epochs=1).fit(module, loader)
            print(callback.guard.report())
    """

    def __init__(self, evaluations: Iterable[Evaluation], **options: Any) -> None:
        self._evaluations = list(evaluations)
        self._options = options
        self._saved: dict[str, Any] | None = None
        self._stage = "fit"
        self._global_step = 0
        self.guard: RetentionGuard | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the baselines, or go on with those of the checkpoint.

        Raises:
            ValueError: The module has several optimizers.
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(
                "RetentionCallback needs a module with one optimizer, not "
                f"{len(trainer.optimizers)}."
            )
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.guard = RetentionGuard(
            pl_module,
            trainer.optimizers[0],
            self._evaluations,
            scheduler=schedulers[0] if schedulers else None,
            **self._options,
        )
        saved, self._saved = self._saved, None  # another fit() begins anew
        if saved is None:
            self.guard.start()
        else:
            self.guard.continue_from(saved)
        self._global_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Count an optimizer step; evaluate, act and stop where it is time."""
        assert self.guard is not None  # training has begun
        if trainer.global_step == self._global_step:
            return  # gradients are being accumulated
        self._global_step = trainer.global_step
        if self.guard.step():
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back a part of the way where the guard has a budget, or ``on_end``."""
        assert self.guard is not None  # training has begun
        self.guard.finish()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note what begins: a checkpoint that is loaded to be tested is not gone on from."""
        self._stage, self._saved = stage, None

    def state_dict(self) -> dict[str, Any]:
        """Return the guard's state; empty before training."""
        return {} if self.guard is None else self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state for the guard that the next training begins with."""
        if self._stage == "fit":
            self._saved = state_dict or None
