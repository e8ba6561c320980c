"""Questions that a small language model can answer, with one right and three wrong answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bench.retention.pretrained.texts import Tokenize


@cache
def probes() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the questions with their answers, the right one first, each after a space."""
    lines = Path(__file__).with_name("probes.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split(" | ") for line in lines if not line.startswith("#")]
    return tuple(
        (question, tuple(f" {answer}" for answer in answers)) for question, *answers in found
    )


@dataclass(frozen=True)
class Answers:
    """How a model answers.

    Attributes:
        accuracy: The part of the questions whose right answer is the most probable of the four.
        nats: −log of the right answer's part of the four's probability, the mean.
    """

    accuracy: float
    nats: float


@torch.no_grad()
def ask(logits_of: Callable[[Tensor], Tensor], tokenize: Tokenize, start: int) -> Answers:
    """Compare the answers' probabilities, each the product of its tokens', normalised to 1.

    Args:
        logits_of: Returns a model's logits [n, t, V] of tokens [n, t].
        tokenize: Turns a text into tokens.
        start: The token before a question.
    """
    right, nats = 0, 0.0
    for question, answers in probes():
        asked = [start, *tokenize(question)]
        scores = _scores(logits_of, asked, [tokenize(answer) for answer in answers])
        right += int(scores.argmax()) == 0
        nats -= float(torch.log_softmax(scores, 0)[0])
    return Answers(right / len(probes()), nats / len(probes()))


def _scores(
    logits_of: Callable[[Tensor], Tensor], question: Sequence[int], answers: Sequence[Sequence[int]]
) -> Tensor:
    """Return the log-probability of each answer, float64."""
    longest = max(map(len, answers))
    # What a shorter answer is filled up with comes after it, so that no counted token sees it.
    filled = [[*question, *answer, *[0] * (longest - len(answer))] for answer in answers]
    tokens = torch.tensor(filled)
    logits = logits_of(tokens)[:, len(question) - 1 : -1].double()
    chosen = tokens[:, len(question) :].to(logits.device)
    each = torch.log_softmax(logits, -1).gather(2, chosen[..., None])[..., 0]
    counted = torch.arange(longest) < torch.tensor([[len(answer)] for answer in answers])
    return torch.where(counted.to(each.device), each, 0.0).sum(1)
