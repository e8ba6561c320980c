"""What a model was, to be asked for its outputs, without a second copy of it where that can be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.ops.passes import eval_mode, unobserved
from cl_optim.optim.settling import unsettled
from cl_optim.retention.interpolation.old_weights import (
    Old,
    anchors_of,
    check_local,
    matched,
    old_weights,
    running_statistics,
)


class OldModel:
    """A model's outputs with the weights that it had, in eval mode and without gradients.

    No pull that is due is taken for it. One thread at a time: the old weights stand in the model
    meanwhile.

    - ``old`` an optimizer with anchors: the model runs with its anchors in place of its weights. No
      copy is made but of anchors that have another dtype, for the time of the pass. Anchors have no
      running statistics: for a model that has some give one of the following.
    - ``old=None``: the model of peft runs with its adapters switched off.
    - ``old`` another module: that is the old model, frozen.
    - ``old`` a state dict, a file or a folder: the model runs with these weights, which are read
      once and kept, on the model's device and in its dtypes.

    Args:
        model: The model in training.
        old: As above.

    Raises:
        ValueError: There are no anchors, or the model has running statistics that they lack; there
            are no adapters to switch off; or names or shapes
            differ.
        TypeError: ``old`` is something else.

    Example:
        .. code-block:: python

            from cl_optim.retention import OldModel, distillation_loss

            opt.consolidate(importance)
            was = OldModel(model, opt)
            loss = distillation_loss(model(x), was(x))  # beside the task's
    """

    def __init__(self, model: nn.Module, old: Old | None = None) -> None:
        self._model = model
        self._old: Old | None = None
        if not isinstance(old, nn.Module) and old is not None:
            check_local(dict([*model.named_parameters(), *model.named_buffers()]))
        self._weights: dict[str, Tensor] | None = None
        if old is None:
            if not hasattr(model, "disable_adapter"):
                raise ValueError(
                    f"old must be given: {type(model).__name__} has no adapters that could be "
                    "switched off; give the optimizer with anchors, or the old weights."
                )
        elif isinstance(old, nn.Module):
            if old is model:
                raise ValueError("old is the model itself: give a copy from before the training.")
            self._old = old
        elif hasattr(old, "param_groups"):
            self._matched(old)  # so that what is wrong is found now
            statistics = running_statistics(model)
            if statistics:
                raise ValueError(
                    f"an optimizer's anchors do not have the running statistics of the model "
                    f"({statistics[0]!r}), which training changes: give the old weights as a state "
                    "dict, {name: value.clone() for name, value in model.state_dict().items()}."
                )
            self._old = old
        else:
            self._weights = {
                name: value.detach().clone() if isinstance(old, Mapping) else value
                for name, value in self._matched(old).items()
            }

    def _matched(self, old: Old) -> dict[str, Tensor]:
        values, missing = matched(old_weights(old, self._model), self._model, strict=True)
        if missing:
            raise ValueError(
                f"old has nothing for {', '.join(map(repr, missing[:5]))}: consolidate them, or "
                "give all the old weights."
            )
        tensors = dict([*self._model.named_parameters(), *self._model.named_buffers()])
        return {
            name: read().to(tensors[name].device, tensors[name].dtype)
            for name, read in values.items()
        }

    def _read(self) -> dict[str, Tensor]:
        if self._weights is not None:
            return self._weights
        params = dict(self._model.named_parameters())
        anchors = anchors_of(self._old, self._model)
        return {
            name: anchor.to(params[name].device, params[name].dtype)
            for name, anchor in anchors.items()
        }

    @contextmanager
    def _quiet(self, model: nn.Module) -> Iterator[None]:
        with torch.no_grad(), eval_mode(model), unobserved(), unsettled():
            yield

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the old model makes of these arguments."""
        if isinstance(self._old, nn.Module):
            with self._quiet(self._old):
                return self._old(*args, **kwargs)
        with self._quiet(self._model):
            if self._old is None and self._weights is None:
                model: Any = self._model
                with model.disable_adapter():
                    return model(*args, **kwargs)
            return torch.func.functional_call(self._model, self._read(), args, kwargs)


def old_model(model: nn.Module, old: OldModel | Old | None) -> OldModel:
    """Return ``old`` as an :class:`OldModel` of ``model``."""
    return old if isinstance(old, OldModel) else OldModel(model, old)
