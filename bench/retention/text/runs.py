"""One run: learn the new text by some method, and measure both texts on the way back to the old."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

import torch
from torch import Tensor

from bench.retention.drift import Drift
from bench.retention.text.corpora import Corpus
from bench.retention.text.model import (
    ByteTransformer,
    Sizes,
    bits_per_byte,
    cross_entropy,
    loss,
)
from bench.retention.training import part_of, rate_factor, take_step
from cl_optim import GEM, EWCAdamW, Importance, InputProjection, estimate_fisher
from cl_optim.demo.methods import WEIGHT_DECAY, Structure
from cl_optim.demo.scenarios import generator
from cl_optim.demo.train import DivergedError
from cl_optim.optim.settling import settle
from cl_optim.retention import (
    Evaluation,
    OldModel,
    ReplayBuffer,
    RetentionGuard,
    distillation_loss,
    interpolation_curve,
    self_written,
)
from cl_optim.retention.guard.evaluation import Role

OLD_LR, NEW_LR = 3e-3, 1e-3
_FISHER_WINDOWS = 500
_GEM_BATCH = 64  # of the kept windows, in a memory row
_GEM_REFRESH = 10
_START = ord("\n")  # what a text begins with that the model writes
TOP = 64  # outputs of a position that are kept: 384 bytes
_WARM_UP = 50  # steps; Adam's first steps, at full length, forget more than all that follow
GUARD_EVERY = 5


@dataclass(frozen=True)
class Method:
    """How the new text is learned.

    Attributes:
        label: In tables and pictures.
        family: Methods that differ in one number only have the same.
        ewc_lambda: λ; None: no EWC.
        structure: Of the importance.
        strength: Of the input projection; None: none.
        replay: The part of each batch that is old, in [0, 1).
        own: The part of each batch that the old model wrote itself, where the loss is KL to its
            outputs, in [0, 1).
        lwf: The weight of KL to the old model's outputs on the new text; 0: none.
        gem: Project gradients against one memory of old windows.
        decay: The learning rate falls to 0, linearly, after the first fifth of the steps.
    """

    label: str
    family: str
    ewc_lambda: float | None = None
    structure: Structure = "diagonal"
    strength: float | None = None
    replay: float = 0.0
    own: float = 0.0
    lwf: float = 0.0
    gem: bool = False
    decay: bool = False


_PENALTY: Final = "proximal"  # which kept as much at two thirds of the gradient form's cost
_DIAGONAL = (1.0, 3.0, 10.0, 30.0)
_KRONECKER = (0.3, 1.0, 3.0, 10.0)
_STRENGTHS = (0.1, 1.0)
FRACTIONS = (0.05, 0.10, 0.25)
OWN_FRACTIONS = (0.10, 0.25)
LWF_WEIGHTS = (0.3, 1.0)
WITH_REPLAY = 0.10  # is what EWC is added to
ADAMW = Method("AdamW", "AdamW")


def _kronecker(value: float) -> Method:
    return Method(f"EWC, Kronecker, λ = {value:g}", "EWC, Kronecker", value, "kronecker")


REPLAY = Method(f"replay {WITH_REPLAY:.0%}", "replay", replay=WITH_REPLAY)
DIAGONAL, KRONECKER = Method("EWC, λ = 1", "EWC", 1.0), _kronecker(1.0)
EWC_REPLAY = replace(DIAGONAL, label="EWC + replay 10%", family="EWC + replay", replay=WITH_REPLAY)
KRONECKER_REPLAY = replace(
    KRONECKER, label="EWC, Kronecker + replay 10%", family="EWC + replay", replay=WITH_REPLAY
)
OWN = Method("self-written 25%, KL", "self-written, KL", own=0.25)
OWN_KRONECKER = replace(
    KRONECKER, label="EWC, Kronecker + self-written 25%", family="EWC + self-written", own=0.25
)
# With a constant learning rate, and again with one that decays.
BASE = (
    ADAMW,
    *(replace(DIAGONAL, label=f"EWC, λ = {value:g}", ewc_lambda=value) for value in _DIAGONAL),
    *(_kronecker(value) for value in _KRONECKER),
    *(
        Method(f"input projection, {value:g}", "input projection", strength=value)
        for value in _STRENGTHS
    ),
    Method("GEM", "GEM", gem=True),
    *(Method(f"replay {f:.0%}", "replay", replay=f) for f in FRACTIONS),
    EWC_REPLAY,
    KRONECKER_REPLAY,
    *(replace(OWN, label=f"self-written {f:.0%}, KL", own=f) for f in OWN_FRACTIONS),
    *(Method(f"LwF, {w:g}", "LwF", lwf=w) for w in LWF_WEIGHTS),
    OWN_KRONECKER,
)
METHODS = (*BASE, *(replace(method, decay=True) for method in BASE))
FAMILIES = tuple(dict.fromkeys(method.family for method in BASE))
# θ* + α (θ − θ*): from what was learned back towards the old weights.
ALPHAS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Learned:
    """A model that knows the old text.

    Attributes:
        seed: Of its weights, and of the windows drawn.
        weights: Its state dict.
        importance: Its Fisher information on the old text, by structure.
        own: Windows that it wrote, and its outputs there.
        old_bpb: Bits per byte on the old text's held-out part.
        new_bpb: On the new one's.
    """

    seed: int
    weights: Mapping[str, Tensor]
    importance: Mapping[Structure, Importance]
    own: Mapping[str, Any]
    old_bpb: float
    new_bpb: float


@dataclass(frozen=True)
class Run:
    """What one method did with one seed.

    Attributes:
        method: How it was learned.
        seed: Of the model and the windows.
        old: Bits per byte on the old text's held-out part at each of `ALPHAS`, the end first.
        new: On the new one's.
        drift: How far the end is from the old model.
    """

    method: Method
    seed: int
    old: tuple[float, ...]
    new: tuple[float, ...]
    drift: Drift


def learn_old(old: Corpus, new: Corpus, sizes: Sizes, seed: int) -> Learned:
    """Learn the old text from nothing, and which weights matter for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ByteTransformer(sizes)
    optimizer = EWCAdamW(model.named_parameters(), lr=OLD_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sizes.old_steps, OLD_LR / 10)
    draw = generator(seed, "old windows")
    for _ in range(sizes.old_steps):
        take_step(optimizer, loss(model, old.windows(sizes.batch, sizes.context + 1, draw)))
        schedule.step()
    windows = old.windows(_FISHER_WINDOWS, sizes.context, draw)
    importance: dict[Structure, Importance] = {
        structure: estimate_fisher(
            model,
            torch.split(windows, 32),
            labels="sample",
            structure=structure,
            generator=generator(seed, "labels"),
            progress=False,
        )
        for structure in get_args(Structure)
    }
    own = self_written(
        model, sizes.kept, sizes.context, start=_START, top=TOP, seed=seed, progress=False
    )
    own_windows = own.sample(sizes.kept)
    return Learned(
        seed, model.state_dict(), importance, own_windows, *_measure(model, old, new, sizes)
    )


def learn_new(method: Method, learned: Learned, old: Corpus, new: Corpus, sizes: Sizes) -> Run:
    """Go on from a model that knows the old text.

    All methods with a seed see the same windows of the new text, less those that replay replaces.

    Raises:
        DivergedError: The loss is not finite at the end.
    """
    model = ByteTransformer(sizes)
    model.load_state_dict(learned.weights)
    optimizer = _optimizer(method, model, learned, old, sizes)
    batches = _batches(method, learned.seed, old, new, sizes)
    schedule = _schedule(method, optimizer, sizes)
    objective = _objective(method, model, learned, sizes)
    for _ in range(sizes.new_steps):
        take_step(optimizer, objective(next(batches)))
        schedule.step()
    settle(optimizer)
    evaluations = [_evaluation(old, sizes, role="old"), _evaluation(new, sizes, role="new")]
    curve = interpolation_curve(model, learned.weights, evaluations, ALPHAS)
    found = {point.alpha: [one.value for one in point.measured] for point in curve.points}
    if not sum(found[1.0]) < float("inf"):
        raise DivergedError(f"{method.label} diverged while learning {new.name}.")
    olds, news = zip(*(found[alpha] for alpha in ALPHAS), strict=True)
    return Run(method, learned.seed, olds, news, _drift(model, learned, new, sizes))


def watch(
    method: Method, learned: Learned, old: Corpus, new: Corpus, sizes: Sizes, folder: str
) -> RetentionGuard:
    """Train likewise, with a guard that goes back and stops when 10 % of the old is lost."""
    model = ByteTransformer(sizes)
    model.load_state_dict(learned.weights)
    optimizer = _optimizer(method, model, learned, old, sizes)
    batches = _batches(method, learned.seed, old, new, sizes)
    evaluations = [
        _evaluation(old, sizes, role="old"),
        _evaluation(new, sizes, role="new"),
    ]
    schedule = _schedule(method, optimizer, sizes)
    guard = RetentionGuard(
        model, optimizer, evaluations, every=GUARD_EVERY, on_breach="rollback", folder=folder,
        scheduler=schedule,
    )  # fmt: skip
    guard.start()
    for _ in range(sizes.new_steps):
        take_step(optimizer, loss(model, next(batches)))
        schedule.step()
        if guard.step():
            break
    return guard


def _schedule(
    method: Method, optimizer: torch.optim.Optimizer, sizes: Sizes
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm up; and decay, where the method does."""
    factor = rate_factor(sizes.new_steps, _WARM_UP, decay=method.decay)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _evaluation(corpus: Corpus, sizes: Sizes, role: Role) -> Evaluation:
    windows = corpus.held_out_windows(sizes.held_out, sizes.context + 1)
    return Evaluation(
        corpus.name, lambda model: bits_per_byte(model, windows), role, higher_is_better=False
    )


def _drift(model: ByteTransformer, learned: Learned, new: Corpus, sizes: Sizes) -> Drift:
    inputs = new.held_out_windows(sizes.held_out, sizes.context)
    own = learned.own["input_ids"][: sizes.held_out]
    fisher = learned.importance["diagonal"]
    return Drift.of(model, learned.weights, fisher, torch.split(inputs, 32), torch.split(own, 32))


def _measure(model: ByteTransformer, old: Corpus, new: Corpus, sizes: Sizes) -> tuple[float, float]:
    length = sizes.context + 1
    old_bpb, new_bpb = (
        bits_per_byte(model, corpus.held_out_windows(sizes.held_out, length))
        for corpus in (old, new)
    )
    return old_bpb, new_bpb


def _kept(seed: int, old: Corpus, sizes: Sizes) -> ReplayBuffer:
    """Keep windows of the old text that are still there when the new one is learned."""
    kept = ReplayBuffer(sizes.kept, seed=seed)
    kept.add(old.windows(sizes.kept, sizes.context + 1, generator(seed, "kept windows")))
    return kept


def _optimizer(
    method: Method, model: ByteTransformer, learned: Learned, old: Corpus, sizes: Sizes
) -> torch.optim.Optimizer:
    optimizer = EWCAdamW(
        model.named_parameters(),
        lr=NEW_LR,
        weight_decay=WEIGHT_DECAY,
        ewc_lambda=method.ewc_lambda or 0.0,
        penalty=_PENALTY,
    )
    if method.ewc_lambda is not None:
        optimizer.consolidate(learned.importance[method.structure])
    if method.strength is not None:
        projection = InputProjection(optimizer, strength=method.strength)
        projection.consolidate(learned.importance["kronecker"])
        return projection
    if not method.gem:
        return optimizer
    gem = GEM(optimizer)
    kept = _kept(learned.seed, old, sizes)
    gem.remember(
        old.name, kept.closure(lambda windows: loss(model, windows), _GEM_BATCH), _GEM_REFRESH
    )
    return gem


def _objective(
    method: Method, model: ByteTransformer, learned: Learned, sizes: Sizes
) -> Callable[[Tensor], Tensor]:
    """Return the loss of a batch: cross-entropy, and KL to the old model's outputs."""
    if method.lwf:
        before = ByteTransformer(sizes)
        before.load_state_dict(learned.weights)
        was = OldModel(model, before)

        def with_old_outputs(windows: Tensor) -> Tensor:
            logits = model(windows[:, :-1])
            entropy = cross_entropy(logits, windows)
            return entropy + method.lwf * distillation_loss(logits, was(windows[:, :-1]))

        return with_old_outputs
    if not method.own:
        return lambda windows: loss(model, windows)
    own = ReplayBuffer(sizes.kept, seed=learned.seed)
    own.add(learned.own)
    rounding = generator(learned.seed, "self-written windows")

    def with_own(windows: Tensor) -> Tensor:
        count = part_of(sizes.batch, method.own, rounding)
        new = loss(model, windows[count:])
        if not count:
            return new
        written = own.sample(count)
        kept = distillation_loss(model(written["input_ids"]), written["old"])
        return new + (kept - new) * (count / len(windows))  # as many positions in each window

    return with_own


def _batches(method: Method, seed: int, old: Corpus, new: Corpus, sizes: Sizes) -> Iterator[Tensor]:
    """Yield windows of the new text, of which a part is replaced by kept windows of the old."""
    kept = _kept(seed, old, sizes)
    draw_new, rounding = generator(seed, "new windows"), generator(seed, "replayed windows")
    while True:
        batch = new.windows(sizes.batch, sizes.context + 1, draw_new)
        replayed = part_of(sizes.batch, method.replay, rounding)
        if replayed:
            batch[:replayed] = kept.sample(replayed)
        yield batch
