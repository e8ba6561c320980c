"""FisherEstimator: the empirical Fisher information of a loss, during ordinary training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_optim.distributed import Ranks, Together, check_ranks, place
from cl_optim.fisher import nested
from cl_optim.fisher.attachment import Attached, Attachment, Hook, LossTerms, refuse_contradiction
from cl_optim.fisher.checks import (
    Number,
    Verify,
    check_integer,
    check_model,
    check_number,
    check_structure,
    check_verify,
)
from cl_optim.fisher.kronecker.structure import Scale, Structure
from cl_optim.fisher.kronecker.sums import FactorSums
from cl_optim.fisher.loss_scale import CrossEntropy, watch
from cl_optim.fisher.model import eagerly, trained
from cl_optim.fisher.observe.observation import Observation
from cl_optim.fisher.observe.refusals import Policy, refusing_checkpointed_functions
from cl_optim.fisher.observe.taps import in_backward
from cl_optim.fisher.observer import Observer
from cl_optim.fisher.samples import Samples
from cl_optim.fisher.totals import Totals
from cl_optim.importance.importance import Importance
from cl_optim.importance.kronecker.side import BLOCK, ENERGY, MAX_RANK
from cl_optim.ops.passes import is_unobserved


class FisherEstimator:
    """Sums squared per-sample gradients of a loss while it is being trained on.

    .. code-block:: python

        fisher = FisherEstimator(model)
        for inputs, targets in batches:
            with fisher.observe(batch_size=len(inputs)):
                loss = cross_entropy(model(inputs), targets)
                loss.backward()
            optimizer.step()
        importance = fisher.finalize()

    This is the *empirical* Fisher: of the loss that is backpropagated, with the data's labels. It
    is exact per sample, in one backward pass: a sample is what the leading dimension of each
    layer's input counts (or, in a packed batch, one run of tokens), so that for inputs
    [N, T, features] it is a sequence, whose tokens' gradients add before the square. The
    parameters' ``grad`` is what it would be without, up to rounding.

    Where the training loop should stay as it is, :meth:`attach` observes it from the outside:

    .. code-block:: python

        fisher = FisherEstimator(model, during_training=True, decay=0.999)
        fisher.attach(optimizer)
        train(model, optimizer, batches)
        importance = fisher.finalize()

    Observed are the parameters that require gradients when the estimator is made, where they are
    used by linear (also ``@`` and addmm), embedding, conv1d to conv3d, layer, RMS, group and (eval
    mode) batch norm, multi-head attention, or added to or multiplied with what the samples give;
    several times, tied, through views, and inside activation checkpointing, too. Any other use is
    an error that names the parameter; :func:`cl_optim.register_fisher_rule` teaches a new one.
    Memory: one tensor per parameter for the sums, float32 (float64 for float64 parameters), and a
    bounded chunk; with ``structure="kronecker"``, for each matrix float64 sums of output width² +
    input width² in place of that.

    On a GPU, gradients of rows of a table that is looked up (an embedding), and of the rows of one
    sample where samples are packed or routed to experts, are added atomically, in any order: sums
    differ in rounding from run to run, unless ``torch.use_deterministic_algorithms(True)``.

    Args:
        model: The model whose parameters are observed.
        unsupported: What happens to a parameter that is used in an unsupported way: ``"error"``,
            or ``"skip"``, which leaves it out and lists it in the importance's metadata.
        verify: Check that the gradients put together from what was captured are the parameters'
            gradients: in the ``"first"`` batch, in each (``True``) or not at all. It finds uses
            that were missed and wrong rules. And, where a parameter is used for the first time,
            that the rows of what it meets are the samples: two more forward passes of the model
            itself, in eval mode, without a backward pass, in which reversed samples must reverse
            them. It finds experts that get as many rows as there are samples, and sequences as
            long as the batch whose positions come first. It cannot be made of packed batches, or
            where the model's first tensor does not begin with the samples, and does not tell
            samples from positions where the model does not, either; :func:`estimate_fisher` has the
            losses of single samples, and finds these, too. Waits for the device.
        during_training: Allow :meth:`attach`.
        decay: What remains of sums and counts after each optimizer step
            (:meth:`apply_decay`), in (0, 1].
        structure: ``"diagonal"``, or ``"kronecker"``: the matrices of linear maps get Kronecker
            factors in place of their diagonal, as for :func:`estimate_fisher`, and
            :meth:`finalize` returns a ``KroneckerImportance``.
        scale: ``"product"``; the exact one needs a second pass over the samples.
        block: The widest block of a factor, as for :func:`estimate_fisher`.
        energy: The share of each factor's trace that is kept, as for :func:`estimate_fisher`.
        max_rank: The most directions of a block, as for :func:`estimate_fisher`.
        reduce_dtype: Of a model that ``fully_shard`` has spread over processes, the dtype in which
            squares are sent to be added up: ``torch.bfloat16`` sends half as much, and rounds what
            each process adds, and each sum on the way, by up to 0.2 %.

    Raises:
        TypeError: ``model`` is not a module, or an argument is of a wrong type.
        ValueError: It has no parameter that requires gradients, or a complex one; or an argument
            is not one of its values.
        NotImplementedError: Its parameters are spread over processes in a way that is not
            supported, or ``structure="kronecker"`` is asked for under tensor parallelism.

    References:
        Kirkpatrick et al. 2017, arXiv:1612.00796; van de Ven 2025, arXiv:2502.11756; Martens &
        Grosse 2015, arXiv:1503.05671 (K-FAC, whose running means of factors are with decay).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        unsupported: Literal["error", "skip"] = "error",
        verify: Verify = "first",
        during_training: bool = False,
        decay: float = 1.0,
        structure: Literal["diagonal", "kronecker"] = "diagonal",
        scale: Scale = "product",
        block: int = BLOCK,
        energy: float = ENERGY,
        max_rank: int | None = MAX_RANK,
        reduce_dtype: torch.dtype = torch.float32,
    ) -> None:
        check_model(model)
        if reduce_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"reduce_dtype must be torch.float32 or torch.bfloat16, not {reduce_dtype}: "
                "squares of gradients need the range of these."
            )
        if unsupported not in ("error", "skip"):
            raise ValueError(
                f"unsupported must be 'error' or 'skip', not {unsupported!r}; random signs need "
                f"the losses of single samples: use estimate_fisher(..., unsupported='sign')."
            )
        check_verify(verify)
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], not {decay}.")
        self._model = model
        self._during_training = during_training
        self._policy = Policy(unsupported)
        check_structure(structure, scale, block, energy, max_rank)
        if scale == "exact":
            raise ValueError(
                "scale='exact' needs a second pass over the samples: use "
                "estimate_fisher(..., structure='kronecker', scale='exact')."
            )
        matrices = None
        if structure == "kronecker":
            matrices = FactorSums(Structure(trained(model), block, energy, max_rank))
        self._totals = Totals(model, decay, matrices, reduce_dtype)
        self._observer = Observer(model, self._totals, self._policy, verify)
        self._observing: Observation | None = None
        self._attached: Attachment | None = None

    @contextmanager
    def observe(
        self,
        batch_size: int | None = None,
        loss_terms: Number | None = None,
        loss_scale: Number = 1.0,
        *,
        tokens: int | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Add one batch: goes around one forward pass and its backward pass.

        With gradient accumulation, each micro-batch gets an ``observe()`` of its own. Several
        forward passes over the same samples, whose losses are added up before one backward pass,
        belong into one. Forward passes under ``no_grad`` are not observed. What got no gradient (an
        unused head) adds zero. After an error in the forward pass the sums are as before; one that
        comes when the backward pass has begun leaves them incomplete, and :meth:`finalize` then
        refuses.

        Args:
            batch_size: Number of samples N, the leading dimension of every layer's input. (Layers
                that see [N·T, features] are understood where another tensor shows T.)
            loss_terms: What the loss, a mean, was divided by: with weights of classes the sum of
                the targets' (``weight[y].sum()``). Default: ``batch_size``; 1 for a sum
                over samples; the number of loss tokens where it is a mean over tokens. A number or
                a tensor of one element.
            loss_scale: What the loss was multiplied by: the scale of mixed-precision training,
                times 1/steps with gradient accumulation. A number or a tensor of one element.
            tokens: Number of tokens that the loss counts. Default: every position of [N, T] inputs,
                or none where there are no sequences. Matters only to ``Importance.per_token()``.
            cu_seqlens: For a packed batch, whose inputs are [1, ΣT, ...] or [ΣT, ...]: the N + 1
                offsets where sequences begin and the last one ends. Best a list or on the CPU: it
                is needed there. Attention and positions must keep the sequences apart themselves.

        Raises:
            TypeError: An argument is not a number.
            ValueError: An argument is out of range; an input's leading dimension is not
                ``batch_size``; or the model's trained parameters are not what they were.
            NotImplementedError: A parameter is used in a way that is not supported; or it has
                Kronecker factors, by the first batch that it was in, and is used otherwise.
            RuntimeError: No backward pass ran inside, or two did; or inside another ``observe()``,
                or while a CUDA graph is captured; or the self-check failed; or ``loss_terms`` was
                left out, and the gradient of the logits shows that cross entropy was not a mean
                over samples.
        """
        samples = _samples(batch_size, cu_seqlens)
        if tokens is not None:
            check_integer("tokens", tokens, 0)
        terms = samples.count if loss_terms is None else loss_terms
        for argument, number in (("loss_terms", terms), ("loss_scale", loss_scale)):
            check_number(argument, number)
        if self._observing is not None or self._attached is not None:
            raise RuntimeError("observe() cannot be used inside another observe(), or attached.")
        factor = terms / loss_scale
        observation = self._observer.begin(samples, lambda: self._totals.begin(factor))
        self._observing = observation

        found: list[CrossEntropy] = []

        def check(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled() or in_backward() or is_unobserved():
                return
            self._observer.check_rows(observation, args, kwargs)
            if loss_terms is None and observation.squares.check is not None:
                for tensor in nested.tensors(output):
                    watch(tensor, found)

        hook = self._model.register_forward_hook(Hook(check), with_kwargs=True)
        before = self._model.register_forward_pre_hook(
            Hook(observation.call_with), with_kwargs=True
        )
        try:
            with eagerly(), refusing_checkpointed_functions(), observation:
                yield
            observation.squares.finish()
            refuse_contradiction([(each, terms, samples.count) for each in found], loss_scale)
        except BaseException:
            self._totals.broken |= observation.squares.changed
            raise
        finally:
            self._observing = None
            hook.remove()
            before.remove()
            observation.close()
        self._totals.count(samples.count, samples.tokens if tokens is None else tokens)

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        loss_terms: LossTerms = "samples",
        accumulation_steps: int | None = None,
        scaler: torch.amp.GradScaler | None = None,
        every: int = 1,
    ) -> Attached:
        """Observe training from the outside, until :meth:`detach`.

        Each forward pass of the model in training mode whose backward pass comes is a batch; each
        step of the optimizer decays what has been summed. Evaluation, in eval mode or under
        ``no_grad``, forward passes without a backward pass, gradients of inputs alone and the
        closures of GEM's memories are not observed. Call the model itself, once per batch: what the
        loop does with its submodules, or with two forward passes in one backward pass, needs
        :meth:`observe`. A compiled model is run uncompiled meanwhile; the estimator is made of what
        ``torch.compile`` returned.

        What the loss was multiplied with is found where it can be, and what contradicts the
        arguments is refused. Until the first step, batches are kept in a second tensor per
        parameter, so that none of a wrong scale is added. A GradScaler is known by its ``step()``.
        Accumulated gradients do not say if the losses were divided by the number of micro-batches:
        that needs ``accumulation_steps``. That cross entropy is a sum, or a mean over fewer targets
        than ``loss_terms`` says, is seen in the gradient of the logits that the model returns; of
        other losses that are sums, ``loss_terms`` must say it. (``verify=False`` looks at none.)

        Args:
            optimizer: Its steps are the ones that count.
            loss_terms: What the loss is divided by. ``"samples"``: it is a mean over the leading
                dimension of the model's first tensor. ``"tokens"``: over the tokens whose
                ``labels`` are not −100 (of a causal language model, without the first position), as
                the losses in transformers are; all tokens, if the model is not given ``labels``. A
                number, e.g. 1 for a sum; or a function of the model's ``args`` and ``kwargs`` that
                returns one, or a tensor of one element.
            accumulation_steps: What the loss is divided by besides, for gradient accumulation: 1
                if gradients accumulate and it is not. Default: there is one batch per step, or the
                model is given ``num_items_in_batch`` as by transformers' Trainer, with
                ``loss_terms="tokens"``: that divides by the tokens of all micro-batches at once.
            scaler: The GradScaler that scales the loss. Default: the one whose ``step()`` takes the
                first step. A batch whose gradients overflow is dropped whole, on the device, and
                counted in the metadata, at the price of a second tensor per parameter.
            every: Observe the batches of the first of every so many steps; the others cost, and
                send between processes, nothing. Decay is by step all the same.

        Returns:
            A handle; its ``remove()``, or leaving it as a context, is :meth:`detach`.

        Raises:
            ValueError: The estimator was not made with ``during_training=True``, or an argument is
                out of range.
            RuntimeError: It is attached already. Later, from the model: an input's rows are not the
                samples, or a CUDA graph is being captured. From ``backward()``: two forward passes
                are in it, or it is the second through one. From ``optimizer.step()``: no batch was
                observed since the last step, or what its loss was multiplied with is not known.
        """
        if not self._during_training:
            raise ValueError(
                "attach() needs an estimator for it: FisherEstimator(model, during_training=True)."
            )
        if self._attached is not None or self._observing is not None:
            raise RuntimeError("the estimator is attached already, or inside observe().")
        if accumulation_steps is not None:
            check_integer("accumulation_steps", accumulation_steps, 1)
        check_integer("every", every, 1)
        if isinstance(loss_terms, str) and loss_terms not in ("samples", "tokens"):
            raise ValueError(
                f"loss_terms must be 'samples', 'tokens', a number or a function, not "
                f"{loss_terms!r}."
            )
        if not isinstance(loss_terms, str) and not callable(loss_terms):
            check_number("loss_terms", loss_terms)
        self._attached = Attachment(
            self._model,
            optimizer,
            self._observer,
            self._totals,
            loss_terms,
            accumulation_steps,
            scaler,
            every,
        )
        return Attached(self.detach)

    def detach(self) -> None:
        """End what :meth:`attach` began. Nothing happens if it was not called."""
        if self._attached is not None:
            attached, self._attached = self._attached, None
            attached.remove()

    def apply_decay(self) -> None:
        """Decay what has been summed: call it once per optimizer step (:meth:`attach` does)."""
        self._totals.apply_decay()

    def finalize(self, *, ranks: Ranks = None) -> Importance:
        """Return the importance so far, as a copy: observing may go on.

        Args:
            ranks: Of several processes of ``torch.distributed``, each with samples of its own:
                ``"sum"`` adds up all of theirs, or those of a process group, in one all-reduce
                that every process must call. ``"own"``: this one has seen all samples itself.
                ``None``: where there are others, the importance is marked as one rank's, and
                what would protect by it refuses it. A model that is spread over processes by
                ``fully_shard`` has seen the samples of all: every process calls it, and has its
                part of the importance, as DTensors. So it is under tensor parallelism, whose
                processes have the same samples; where others have other samples, and nothing but
                DistributedDataParallel joins them, a group of those with the same parts is given.

        Raises:
            RuntimeError: Nothing was observed, or an ``observe()`` failed in its backward pass.
            ValueError: A sum is not finite, ``ranks`` is none of these, or the processes observe
                other parameters. What one process raises is raised in all.
        """
        check_ranks(ranks)
        together = self._totals.spread.ranks(Together(ranks))
        with together.agreeing(), self._totals.spread.together.agreeing():
            if self._attached is not None:
                self._attached.settle()
        totals, policy = self._totals, self._policy
        if together.size > 1:
            totals, policy = totals.over(together, policy)
        metadata: dict[str, Any] = {"estimator": "FisherEstimator", "labels": "empirical"}
        metadata |= together.metadata
        if self._during_training:
            metadata |= {"during_training": True, "decay": self._totals.decay}
        return totals.importance(self._model, policy, **metadata)

    def state_dict(self) -> dict[str, Any]:
        """Return what was observed so far, between two batches: for a checkpoint.

        The sums are the estimator's own tensors, as in torch's state dicts.

        Raises:
            RuntimeError: Inside ``observe()``, or one failed in its backward pass.
        """
        if self._observing is not None:
            raise RuntimeError("inside observe() there is no state: half a batch may be summed.")
        if self._attached is not None:
            self._attached.settle()
        here = place()
        return {
            **({} if here is None else {"rank": here}),
            **self._totals.state_dict(),
            "left": dict(self._policy.left),
            "shared": dict(self._policy.shared),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from there, for the same model.

        Raises:
            ValueError: It is of other parameters, or of another process. Nothing has been changed
                then.
            RuntimeError: Inside ``observe()``.
        """
        self.check_state_dict(state_dict)
        if self._observing is not None:
            raise RuntimeError("a state cannot be loaded inside observe().")
        self._totals.load_state_dict(state_dict)
        if self._attached is not None:
            self._attached.restart()
        self._policy.left = dict(state_dict["left"])
        self._policy.shared = dict(state_dict["shared"])

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError if the state is of other parameters, structure or process."""
        _check_rank(state_dict.get("rank"))
        own = self._totals.shapes
        shapes = {name: value.shape for name, value in state_dict["sums"].items()}
        factors, state = self._totals.factors, state_dict.get("kronecker")
        if (factors is None) != (state is None):
            here, there = ("diagonal", "kronecker")[:: 1 if factors is None else -1]
            raise ValueError(
                f"the state must be of the same structure as the estimator, {here!r}, not "
                f"{there!r}: make the estimator with structure={there!r}."
            )
        if factors is not None and state is not None:
            block = state["structure"]["block"]
            if block != factors.structure.block:
                raise ValueError(
                    f"the state must be of the same block as the estimator, "
                    f"{factors.structure.block}, not {block}: make the estimator with "
                    f"block={block}."
                )
            shapes |= state["structure"]["shapes"]
        for name in {**own, **shapes}:
            if own.get(name) != shapes.get(name):
                raise ValueError(
                    f"the state must be of the same parameters; {name!r} is not in both, or has "
                    "another shape."
                )


def _check_rank(saved: Sequence[int] | None) -> None:
    """Raise ValueError where a state is another process's."""
    here = place()
    if (None if saved is None else tuple(saved)) == here:
        return
    of, this = (
        f"rank {one[0]} of {one[1]}" if one else "one process alone" for one in (saved, here)
    )
    raise ValueError(
        f"the state is of {of}, and this is {this}: samples would be counted twice, or lost. Save "
        "and load a state for each rank; to go on with another number of processes, "
        "finalize(ranks='sum') before, and merge what comes after."
    )


def _samples(batch_size: int | None, cu_seqlens: Tensor | Sequence[int] | None) -> Samples:
    if cu_seqlens is None:
        if batch_size is None:
            raise TypeError("observe() needs batch_size, or cu_seqlens for a packed batch.")
        check_integer("batch_size", batch_size, 1)
        return Samples(batch_size)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens must have one dimension, not {cu_seqlens.dim()}.")
    offsets = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else list(cu_seqlens)
    if len(offsets) < 2 or offsets[0] != 0 or any(a > b for a, b in itertools.pairwise(offsets)):
        raise ValueError(
            f"cu_seqlens must be increasing offsets from 0 to the number of tokens, not {offsets}."
        )
    if batch_size not in (None, len(offsets) - 1):
        raise ValueError(
            f"batch_size is {batch_size}, but cu_seqlens has offsets of {len(offsets) - 1} samples."
        )
    return Samples(len(offsets) - 1, offsets)
