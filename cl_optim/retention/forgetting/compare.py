"""A language model and what became of it, on the same texts: bits per byte, accuracy, KL."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_optim.ops.checks import check_whole
from cl_optim.ops.passes import eval_mode
from cl_optim.ops.progress import progress_bar
from cl_optim.retention.distillation.divergence import logits_of
from cl_optim.retention.distillation.loss import distillation_loss
from cl_optim.retention.distillation.stored import check_finite
from cl_optim.retention.tables import as_lines, as_rich

if TYPE_CHECKING:
    from rich.console import RenderableType

# A document, or what is asked and the answer to it.
Text = str | tuple[str, str]

_TITLES = ("texts", "tokens", "base", "tuned", "lost", "accuracy", "", "KL, nats")
_CHUNK = 1024


@dataclass(frozen=True)
class Forgotten:
    """What both models make of some texts.

    Attributes:
        name: Of the texts.
        tokens: How many were predicted.
        bits: Per byte of the texts: of the base model, and of the tuned one.
        accuracy: The part of the tokens that were the most probable ones, likewise.
        divergence: KL(base ‖ tuned), the mean over tokens, in nats.
    """

    name: str
    tokens: int
    bits: tuple[float, float]
    accuracy: tuple[float, float]
    divergence: float

    @property
    def loss(self) -> float:
        """The part of the base model's bits per byte that came on top; ∞ if not finite."""
        base, tuned = self.bits
        return (tuned - base) / base if math.isfinite(tuned) else math.inf


@dataclass(frozen=True)
class Comparison:
    """Printable, by ``print`` and by rich.

    Attributes:
        rows: One for each of the texts.
        budget: The loss that is allowed; None: any.
    """

    rows: tuple[Forgotten, ...]
    budget: float | None

    @property
    def breached(self) -> tuple[str, ...]:
        """The texts of which more is lost than the budget, or anything not finite."""
        most = math.inf if self.budget is None else self.budget
        return tuple(r.name for r in self.rows if r.loss > most or r.loss == math.inf)

    @property
    def sentence(self) -> str:
        """What came of the budget."""
        if self.breached:
            most = "any" if self.budget is None else f"{self.budget:.1%}"
            return f"Forgotten beyond {most}: {', '.join(self.breached)}."
        if self.budget is None:
            return "No budget was given: --budget 0.05 fails above 5 %."
        return f"Nothing lost more than {self.budget:.1%} of its bits per byte."

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; what is not finite is null."""

        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None

        rows = [
            {
                "texts": row.name,
                "tokens": row.tokens,
                "bits_per_byte": {"base": row.bits[0], "tuned": number(row.bits[1])},
                "accuracy": {"base": row.accuracy[0], "tuned": row.accuracy[1]},
                "divergence_nats": number(row.divergence),
                "lost": number(row.loss),
            }
            for row in self.rows
        ]
        return {"texts": rows, "budget": self.budget, "breached": list(self.breached)}

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.name,
                f"{row.tokens}",
                *(f"{bits:.4f}" for bits in row.bits),
                f"{row.loss:+.1%}" if math.isfinite(row.loss) else "not finite",
                *(f"{part:.1%}" for part in row.accuracy),
                f"{row.divergence:.4f}",
            )
            for row in self.rows
        ]

    def __str__(self) -> str:
        lines = as_lines(_TITLES, self._cells(), left=(0,))
        return "\n".join((*lines, self.sentence))

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text as RichText

        return Group(as_rich(_TITLES, self._cells(), left=(0,)), RichText(self.sentence))


def compare_models(
    base: nn.Module,
    tuned: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Collection[Text]],
    *,
    budget: float | None = None,
    length: int = 512,
    progress: bool | None = None,
) -> Comparison:
    """Measure two causal language models on the same texts.

    Documents are cut into windows of ``length`` tokens. Each begins with the tokenizer's BOS; where
    it has none, a window's first token is not predicted, and its bytes do not count. Of a prompt
    and an answer only the answer's tokens are predicted; what is longer than a window goes on in
    further ones, without the prompt.

    Args:
        base: What the model was.
        tuned: What it has become; both return logits, [n, tokens, V].
        tokenizer: Of both, as transformers' are.
        texts: Documents, or pairs (prompt, answer), by a name.
        budget: As in the result, in (0, 1).
        length: Tokens of a window, 2 at least.
        progress: Show a bar; None: where somebody looks.

    Raises:
        ValueError: An argument is out of range; a name has no texts with a token to predict; the
            vocabularies differ, or the base model's outputs are not finite.
    """
    check_options(budget, length)
    if not texts:
        raise ValueError("texts must have something to measure: give one name, at least.")
    rows = []
    for name, documents in texts.items():
        windows = [
            window for one in documents for window in _windows(one, tokenizer, length) if window
        ]
        if not windows:
            raise ValueError(f"{name}: there is no token to predict in it; give longer texts.")
        with progress_bar(progress, name, len(windows)) as advance:
            rows.append(_measured(name, base, tuned, windows, advance))
    return Comparison(tuple(rows), budget)


def check_options(budget: float | None, length: int) -> None:
    """Refuse options that are out of range.

    Raises:
        ValueError: One is.
    """
    if budget is not None and not 0.0 < budget < 1.0:
        raise ValueError(f"budget must be between 0 and 1, both excluded, not {budget}.")
    check_whole("length", length, least=2)


@dataclass(frozen=True)
class _Window:
    """Attributes: tokens; the first that is predicted, at least 1; bytes of those that are."""

    tokens: Sequence[int]
    begin: int
    size: int


def _windows(text: Text, tokenizer: Any, length: int) -> Iterator[_Window]:
    def ids(part: str) -> list[int]:
        return list(tokenizer.encode(part, add_special_tokens=False))

    def size(tokens: Sequence[int]) -> int:
        return len(tokenizer.decode(tokens).encode())

    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    whole = text[1] if isinstance(text, tuple) else text
    tokens = ids(whole)
    rest = tokens
    if isinstance(text, tuple):
        prompt, answer, rest = ids(text[0]), tokens[: length - 1], tokens[length - 1 :]
        kept = prompt[max(0, len(prompt) + len(answer) + len(bos) - length) :]
        begin = len(bos) + len(kept)
        if begin == 0:  # nothing comes before it
            rest = tokens
        elif answer:
            written = size(answer) if rest else len(whole.encode())
            yield _Window([*bos, *kept, *answer], begin, written)
    step = length - len(bos)
    for start in range(0, len(rest), step):
        part = rest[start : start + step]
        if len(bos) + len(part) < 2:
            continue
        uncounted = part[: 1 - len(bos)]
        written = len(whole.encode()) if len(part) == len(tokens) else size(part)
        yield _Window([*bos, *part], 1, max(1, written - (size(uncounted) if uncounted else 0)))


def _measured(
    name: str,
    base: nn.Module,
    tuned: nn.Module,
    windows: Sequence[_Window],
    advance: Callable[[int], None],
) -> Forgotten:
    nats, right = [0.0, 0.0], [0, 0]
    divergence, tokens = 0.0, 0
    with torch.no_grad(), eval_mode(base), eval_mode(tuned):
        for window in windows:
            given = torch.tensor([window.tokens])
            predicted = slice(window.begin - 1, len(window.tokens) - 1)
            target = given[0, window.begin :]
            found = [_logits(model, given)[0, predicted] for model in (base, tuned)]
            if found[0].shape != found[1].shape:
                raise ValueError(
                    f"the base model has {found[0].shape[-1]} classes and the tuned one "
                    f"{found[1].shape[-1]}: resize the base model's vocabulary to compare them."
                )
            check_finite(found[0], "the base model's logits")
            for which, logits in enumerate(found):
                nats[which] += float(F.cross_entropy(logits.float(), target, reduction="sum"))
                right[which] += int((logits.argmax(-1) == target).sum())
            each = distillation_loss(found[1], found[0], reduction="none", chunk=_CHUNK)
            divergence += float(each.double().sum())
            tokens += len(target)
            advance(1)
    size = sum(window.size for window in windows)
    base_bits, tuned_bits = (value / math.log(2) / size for value in nats)
    base_right, tuned_right = (value / tokens for value in right)
    return Forgotten(
        name, tokens, (base_bits, tuned_bits), (base_right, tuned_right), divergence / tokens
    )


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return logits_of(model, {"input_ids": tokens.to(device)}).cpu()
