"""`diagnose`: how far new training data are from old ones, streamed, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_optim.retention.diagnosis.corpora import (
    Record,
    Token,
    Tokenizer,
    fingerprint,
    records,
)
from cl_optim.retention.diagnosis.findings import Conflict, Diagnosis, LabelDrift

MAX_VOCABULARY = 1_000_000
MAX_PROMPTS = 200_000
_ANSWERS, _EXCERPT, _LISTED = 8, 80, 100  # per prompt; characters of each; conflicts listed
_MAX_CLASSES = 10_000
_PENDING = 1 << 16  # tokens counted before they go into the vocabulary


def diagnose(
    old: Iterable[Any],
    new: Iterable[Any],
    tokenizer: Tokenizer | None = None,
    *,
    smoothing: float = 0.5,
    max_vocabulary: int = MAX_VOCABULARY,
    max_prompts: int = MAX_PROMPTS,
) -> Diagnosis:
    """Compare new training data with what a model knows, before training on them.

    Both are read once, in a stream. Token distributions are smoothed over the union V of the
    vocabularies: p(t) = (count(t) + smoothing) / (tokens + smoothing·V). Near-same prompts, and
    same answers, differ in case, white space, and stops and quotes around words only. A prompt that
    has more than 8 different answers in the old data has no one answer to contradict, and is left
    out. Corpora of very different sizes diverge, and share little of their vocabularies, even if
    they are of one kind: the verdict is about what exceeds the figures of a random sample of the
    larger one that is as large as the smaller.

    Args:
        old: Texts; sequences of token ids; pairs (prompt, answer) of texts; pairs (text, label)
            with an integer label; or mappings with ``"prompt"`` and ``"answer"``, or ``"text"`` and
            a ``"label"`` that is an integer or a text. :func:`read_corpus` makes them of a file.
        new: The same.
        tokenizer: Makes tokens of a text: a function, or something with ``encode``. None:
            casefolded words and punctuation marks.
        smoothing: Added to each count; 0.5 is Jeffreys' prior.
        max_vocabulary: Different tokens that are counted (about 0.2 kB each). Further ones, in the
            order old, new, count as one: the figures are then lower bounds on this distance.
        max_prompts: Old prompts that are kept (at most about 1 kB each). Of more, those with the
            smallest hashes are, a random sample, and conflicts are looked for among these.

    Returns:
        The figures, the verdict and what it implies; rich prints it as a table.

    Raises:
        ValueError: A corpus has no token, an option is out of range, or there are more than 10 000
            labels.
        TypeError: An item is not one of those above, or one corpus has token ids, the other texts;
            or the tokenizer does not return integers or strings.
    """
    if not 0 < smoothing < math.inf:
        raise ValueError(f"smoothing must be positive and finite, not {smoothing!r}.")
    for name, value in (("max_vocabulary", max_vocabulary), ("max_prompts", max_prompts)):
        if value < 1:
            raise ValueError(f"{name} must be a positive whole number, not {value!r}.")
    vocabulary, prompts = _Vocabulary(max_vocabulary), _Prompts(max_prompts)
    labels: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    kinds: set[bool] = set()
    for side, (name, items) in enumerate((("old", old), ("new", new))):
        for record in records(items, name, tokenizer):
            vocabulary.add(side, record.tokens)
            kinds.add(record.ids)
            if len(kinds) > 1:
                raise TypeError(
                    f"{name} must have what the records before it have, token ids or texts: give a "
                    "tokenizer to compare both."
                )
            prompts.add(side, record)
            if record.label is not None:
                labels[side][record.label] += 1
                if len(labels[side]) > _MAX_CLASSES:
                    raise ValueError(f"{name} must have at most {_MAX_CLASSES:,} different labels.")
        vocabulary.flush(side)
        if not vocabulary.tokens[side]:
            raise ValueError(f"{name} must contain at least one token, but it is empty.")
    counts = vocabulary.counts()
    present = counts > 0
    alike = _of_sizes(counts)
    return Diagnosis(
        kl_new_old=_kl(counts[1], counts[0], smoothing),
        kl_old_new=_kl(counts[0], counts[1], smoothing),
        jaccard=_jaccard(counts),
        kl_of_size=(_kl(alike[1], alike[0], smoothing), _kl(alike[0], alike[1], smoothing)),
        jaccard_of_size=_jaccard(alike),
        tokens=(vocabulary.tokens[0], vocabulary.tokens[1]),
        vocabulary=(int(present[0].sum()), int(present[1].sum())),
        smoothing=smoothing,
        uncounted=sum(vocabulary.rest),
        conflicts=tuple(prompts.conflicts),
        conflict_count=prompts.conflict_count,
        prompts_examined=prompts.examined,
        labels=_drift(*labels),
    )


def _kl(p_counts: NDArray[np.float64], q_counts: NDArray[np.float64], smoothing: float) -> float:
    p, q = ((c + smoothing) / (c.sum() + smoothing * len(c)) for c in (p_counts, q_counts))
    return float((p * np.log(p / q)).sum())


def _jaccard(counts: NDArray[np.float64]) -> float:
    present = counts > 0
    return float(present.all(axis=0).sum() / present.any(axis=0).sum())


def _of_sizes(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the larger counts, and in place of the smaller ones a sample of them as large."""
    sizes = counts.sum(1)
    smaller, larger = (0, 1) if sizes[0] < sizes[1] else (1, 0)
    alike: NDArray[np.float64] = counts.copy()
    draw = np.random.default_rng(0)
    alike[smaller] = draw.multinomial(int(sizes[smaller]), counts[larger] / sizes[larger])
    return alike


def _drift(old: Counter[str], new: Counter[str]) -> LabelDrift | None:
    if not old or not new:
        return None
    totals = old.total(), new.total()
    classes = sorted(old.keys() | new.keys())
    return LabelDrift(
        distance=sum(abs(old[c] / totals[0] - new[c] / totals[1]) for c in classes) / 2,
        appeared=tuple(c for c in classes if c not in old),
        vanished=tuple(c for c in classes if c not in new),
        classes=len(classes),
    )


class _Vocabulary:
    """Token counts of the two sides.

    Attributes:
        tokens: How many tokens each side has.
        rest: How many of them were not counted one by one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens, self.rest = [0, 0], [0, 0]
        self._index: dict[Token, int] = {}
        self._counts: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self._pending: Counter[Token] = Counter()

    def add(self, side: int, tokens: Iterable[Token]) -> None:
        self._pending.update(tokens)
        if len(self._pending) > _PENDING:
            self.flush(side)

    def flush(self, side: int) -> None:
        """Give the tokens that came since an index each, in order, as long as there is room.

        A token without one was left out on both sides, since the table stays full once it is.
        """
        for token, count in self._pending.items():
            index = self._index.get(token)
            if index is None and len(self._index) < self.limit:
                index = self._index[token] = len(self._index)
            if index is None:
                self.rest[side] += count
            else:
                self._counts[side][index] += count
            self.tokens[side] += count
        self._pending.clear()

    def counts(self) -> NDArray[np.float64]:
        """Return [2, V]; the last column is the rest, if there is one."""
        counts = np.zeros((2, len(self._index) + (sum(self.rest) > 0)))
        for side in (0, 1):
            for index, count in self._counts[side].items():
                counts[side, index] = count
            if sum(self.rest):
                counts[side, -1] = self.rest[side]
        return counts


class _Prompts:
    """The prompts of the old data with their answers; finds the new ones that contradict them.

    Attributes:
        conflicts: The first of them.
        conflict_count: How many there are.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.conflicts: list[Conflict] = []
        self.conflict_count = 0
        self._below = 1 << 64  # only prompts with a hash below it are looked at
        self._answers: dict[int, dict[int, str] | None] = {}  # None: too many

    @property
    def examined(self) -> float:
        return self._below / 2**64

    def add(self, side: int, record: Record) -> None:
        if record.prompt is None or record.answer is None:
            return
        key, answer = fingerprint(record.prompt), fingerprint(record.answer)
        if key >= self._below:
            return
        if side == 0:
            answers = self._answers.setdefault(key, {})
            if answers is not None:
                answers.setdefault(answer, record.answer[:_EXCERPT])
                if len(answers) > _ANSWERS:
                    self._answers[key] = None
            while len(self._answers) > self.limit:
                self._below //= 2
                self._answers = {k: v for k, v in self._answers.items() if k < self._below}
            return
        answers = self._answers.get(key)
        if answers is not None and answer not in answers:
            self.conflict_count += 1
            if len(self.conflicts) < _LISTED:
                old = tuple(answers.values())
                self.conflicts.append(Conflict(record.prompt, old, record.answer[:_EXCERPT]))
