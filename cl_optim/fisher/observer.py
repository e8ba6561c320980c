"""Begins the observation of each batch of training, and checks what its rows are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from cl_optim.fisher import nested
from cl_optim.fisher.alignment import not_samples
from cl_optim.fisher.checks import Verify
from cl_optim.fisher.model import trained
from cl_optim.fisher.observe.observation import Observation
from cl_optim.fisher.observe.refusals import Policy, RefusedError, not_the_samples
from cl_optim.fisher.observe.self_check import SelfCheck
from cl_optim.fisher.observe.squares import Into, Squares
from cl_optim.fisher.samples import Samples
from cl_optim.fisher.totals import Totals
from cl_optim.ops.capture import is_capturing


class Observer:
    """Observes batches of one model, whoever says where they begin and end.

    Args:
        model: The model.
        totals: What they are added to.
        policy: What is done with unsupported parameters.
        verify: Which batches are checked.
    """

    def __init__(self, model: nn.Module, totals: Totals, policy: Policy, verify: Verify) -> None:
        self._model, self._totals, self._policy = model, totals, policy
        self.verify = verify
        self._known_rows: set[str] = set()  # parameters whose inputs' rows are known to be samples

    def begin(self, samples: Samples, begin: Callable[[], Into]) -> Observation:
        """Start a batch; ``begin`` is called when its backward pass comes."""
        if is_capturing():
            raise RuntimeError(
                "a batch cannot be observed while a CUDA graph is being captured: samples are "
                "counted in Python, once and not at each replay. Observe batches that run without "
                "a graph, or detach() before the capture."
            )
        totals = self._totals
        parameters: dict[str, Tensor] = dict(totals.check_unchanged(self._model))
        checked = self.verify is True or (self.verify == "first" and totals.seen() == 0)
        squares = Squares(
            parameters,
            totals.into,
            self._policy,
            packed=samples.packed,
            check=SelfCheck() if checked else None,
            begin=begin,
        )
        squares.hear_parameters()
        observation = Observation(parameters, samples, self._policy, squares)
        observation.watch = totals.spread.watch(observation.meet, totals.reduce_batch)
        return observation

    def check_rows(self, observation: Observation, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse parameters that meet, for the first time, rows that are not the samples.

        Args:
            observation: Of the forward pass that has run.
            args: What the model was called with.
            kwargs: Likewise, by name.
        """
        samples, used = observation.samples, observation.squares.used()
        first = next((t for t in nested.tensors((args, kwargs)) if t.dim() > 0), None)
        can_reverse = (
            samples.offsets is None
            and first is not None
            and len(first) == samples.count
            and samples.count > 1
        )
        spread = self._totals.spread
        if spread and (self.verify is True or (self.verify and self._totals.seen() == 0)):
            spread.require_same_inputs((args, kwargs))
            # A forward pass is one of all processes.
            can_reverse = all(spread.together.gather(can_reverse))
        elif spread:
            return
        if not self.verify or not can_reverse:
            return
        if self.verify != "first" or not used <= self._known_rows:
            observation.paused = True
            wrong = not_samples(self._model, args, kwargs, samples.count, self._unsummed)
            observation.paused = False
            wrong = list(dict.fromkeys(itertools.chain(*spread.together.gather(wrong))))
            if known := [name for name in wrong if name not in self._policy.left]:
                observation.squares.leave_out(RefusedError(not_the_samples(known), known))
            self._known_rows |= used

    def _unsummed(self, samples: Samples) -> Observation:
        """Make an observation of a forward pass alone."""
        left, shared = dict(self._policy.left), dict(self._policy.shared)
        policy = replace(self._policy, left=left, shared=shared)
        parameters: dict[str, Tensor] = dict(trained(self._model))
        squares = Squares(parameters, self._totals.into, policy)
        observation = Observation(parameters, samples, policy, squares)
        observation.watch = self._totals.spread.watch(observation.meet)
        return observation
