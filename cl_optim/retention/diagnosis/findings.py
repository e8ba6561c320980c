"""What `diagnose` found: the figures, the verdict, what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import RenderableType

HIGH_KL = 2.0  # nats
SOME_KL = 1.0
LOW_JACCARD = 0.3
LABEL_DRIFT = 0.25

# What is free comes first, and old data, which are at hand here, before what stands for them; the
# figures are those of docs/results.md.
STRATEGIES = {
    "low": "The recipe alone; L2-SP (EWCAdamW with consolidate(None)) where weights must stay "
    "near the old ones.",
    "medium": "The recipe, and a tenth of each batch from the old data: ReplayBuffer.mix. Where "
    "they may not be kept: from what the model wrote itself (self_written, distillation_loss), or "
    "EWC with Kronecker factors (estimate_fisher(structure='kronecker'), EWCAdamW).",
    "high": "The recipe, and a quarter of each batch from the old data: Replay by "
    "ReplayBuffer.mix. Where they may not be kept: a quarter that the model wrote itself. A "
    "ProgressiveNetwork's frozen columns for what must not change at all.",
}
RECIPE = (
    "a learning rate that is tuned on the new data and decays to 0",
    "at the end back towards the old weights, as far as a budget asks "
    "(RetentionGuard(budget=0.05) or interpolate)",
    "learning rate 10 to 100 times below that of pre-training",
    "gradient clipping",
    "a checkpoint every 100 to 1,000 steps, old and new tasks evaluated at each",
)

Verdict = Literal["low", "medium", "high"]


@dataclass(frozen=True)
class Conflict:
    """The same prompt, answered differently.

    Attributes:
        prompt: As the new data have it.
        old: The answers in the old data, cut to 80 characters each.
        new: The answer in the new data.
    """

    prompt: str
    old: tuple[str, ...]
    new: str


@dataclass(frozen=True)
class LabelDrift:
    """How the classes of a classification task moved.

    Attributes:
        distance: Total variation ½ Σ |p_old − p_new|, from 0 to 1.
        appeared: Classes only the new data have.
        vanished: Classes only the old data have.
        classes: How many there are in all.
    """

    distance: float
    appeared: tuple[str, ...]
    vanished: tuple[str, ...]
    classes: int


@dataclass(frozen=True)
class Diagnosis:
    """How far new data are from old data, and what that means for training on them.

    Attributes:
        kl_new_old: KL(new ‖ old) of the token distributions, in nats: how much the new data would
            surprise one who knows the old.
        kl_old_new: KL(old ‖ new), in nats.
        jaccard: |V_old ∩ V_new| / |V_old ∪ V_new| of the vocabularies.
        tokens: In the old and in the new data.
        vocabulary: Different tokens in the old and in the new data.
        smoothing: What was added to each token's count.
        uncounted: Tokens, of both, that came after the vocabulary was full; they count as one.
        kl_of_size: What both divergences would be if the smaller data were a random sample of the
            larger ones: those of data that do not differ.
        jaccard_of_size: What the index would be then.
        conflicts: The first ones found.
        conflict_count: How many new records were in conflict, of those that were looked at.
        prompts_examined: The fraction of prompts that was looked at; below 1 they are a sample.
        labels: Of a classification task, how its classes moved.
    """

    kl_new_old: float
    kl_old_new: float
    jaccard: float
    tokens: tuple[int, int]
    vocabulary: tuple[int, int]
    smoothing: float
    uncounted: int
    kl_of_size: tuple[float, float]
    jaccard_of_size: float
    conflicts: tuple[Conflict, ...]
    conflict_count: int
    prompts_examined: float
    labels: LabelDrift | None

    @property
    def kl(self) -> float:
        """The larger of the two divergences."""
        return max(self.kl_new_old, self.kl_old_new)

    @property
    def kl_beyond_size(self) -> float:
        """What the larger of the two is beyond `kl_of_size`, which the verdict is about."""
        new_old, old_new = self.kl_of_size
        return max(self.kl_new_old - new_old, self.kl_old_new - old_new)

    @property
    def verdict(self) -> Verdict:
        """The risk of forgetting.

        ``"high"`` above a divergence of 2 nats beyond that of sizes; ``"medium"`` for any of
        `reasons`; else ``"low"``.
        """
        if self.kl_beyond_size > HIGH_KL:
            return "high"
        return "medium" if self.reasons else "low"

    @property
    def reasons(self) -> tuple[str, ...]:
        """What speaks for trouble, in sentences."""
        found = []
        if self.kl_beyond_size > SOME_KL:
            found.append(
                f"The token distributions diverge by {self.kl_beyond_size:.2f} nats more than "
                f"sizes make them (trouble above {SOME_KL:g}, high risk above {HIGH_KL:g})."
            )
        if self.jaccard < LOW_JACCARD * self.jaccard_of_size:
            found.append(
                f"The vocabularies share {self.jaccard:.0%} of their tokens, of "
                f"{self.jaccard_of_size:.0%} that their sizes allow (trouble below "
                f"{LOW_JACCARD:.0%} of that)."
            )
        if self.conflict_count:
            found.append(
                f"{self.conflict_count:,} new records answer an old prompt differently: which "
                "answer is wanted? Remove or correct the other."
            )
        if self.labels and (self.labels.distance > LABEL_DRIFT or self.labels.appeared):
            new = ", ".join(self.labels.appeared[:10]) or "none"
            found.append(
                f"The classes moved by {self.labels.distance:.2f} in total variation (trouble "
                f"above {LABEL_DRIFT:g}); new classes: {new}."
            )
        return tuple(found)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about the figures' accuracy."""
        found = []
        if self.uncounted:
            found.append(
                f"The vocabulary was full: {self.uncounted:,} later tokens count as one, which "
                "makes divergence and distance of vocabularies lower than they are."
            )
        if self.prompts_examined < 1:
            found.append(
                f"Conflicts are those of a sample of {self.prompts_examined:.2%} of the prompts."
            )
        if self.labels and self.labels.classes == 1:
            found.append("There is one class only, which says nothing about a drift of classes.")
        return tuple(found)

    @property
    def strategy(self) -> str:
        """What the verdict implies."""
        return STRATEGIES[self.verdict]

    @property
    def recipe(self) -> tuple[str, ...]:
        """How to train on the new data."""
        return RECIPE

    def to_json(self) -> dict[str, Any]:
        """Return all of it, as JSON knows it."""
        derived = ("verdict", "reasons", "notes", "strategy", "recipe")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        def above(of_size: float) -> str:
            return f"> {SOME_KL + of_size:.3g}, high > {HIGH_KL + of_size:.3g}"

        table = Table("", "measured", "trouble")
        rows = [
            *(
                (f"KL({name}), nats", f"{kl:.3f}", above(of_size))
                for name, kl, of_size in (
                    ("new ‖ old", self.kl_new_old, self.kl_of_size[0]),
                    ("old ‖ new", self.kl_old_new, self.kl_of_size[1]),
                )
            ),
            (
                "Jaccard index of vocabularies",
                f"{self.jaccard:.3f}",
                f"< {LOW_JACCARD * self.jaccard_of_size:.3g}",
            ),
            ("conflicts", f"{self.conflict_count:,}", "> 0"),
        ]
        if self.labels:
            moved = f"{self.labels.distance:.3f}"
            rows.append(("drift of classes", moved, f"> {LABEL_DRIFT:g}, new classes"))
        for name, index in (("old", 0), ("new", 1)):
            counts = f"{self.tokens[index]:,} ({self.vocabulary[index]:,} different)"
            rows.append((f"{name} tokens", counts, ""))
        for row in rows:
            table.add_row(*row)
        lines = [f"Risk of forgetting: {self.verdict}", *self.reasons, *self.notes]
        lines += [f"Strategy: {self.strategy}", f"Recipe: {'; '.join(self.recipe)}."]
        lines += [
            f"Conflict: {c.prompt!r} was answered {' or '.join(map(repr, c.old))}, now {c.new!r}"
            for c in self.conflicts[:10]
        ]
        return Group(table, *map(Text, lines))
