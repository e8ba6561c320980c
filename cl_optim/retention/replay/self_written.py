"""Text that a model writes itself, as a stand-in for data that nobody has any more."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_optim.ops.checks import check_whole
from cl_optim.ops.passes import eval_mode, unobserved
from cl_optim.ops.progress import progress_bar
from cl_optim.retention.distillation.stored import check_finite, top_k
from cl_optim.retention.replay.buffer import ReplayBuffer


def self_written(
    model: nn.Module,
    sequences: int,
    length: int,
    *,
    prompts: Iterable[str | Sequence[int] | Tensor] | None = None,
    tokenizer: Any = None,
    start: int | None = None,
    temperature: float = 1.0,
    burn_in: int = 0,
    batch_size: int = 32,
    top: int | None = None,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    logits: Callable[[nn.Module, Tensor], Tensor] | None = None,
    progress: bool | None = None,
) -> ReplayBuffer:
    """Sample sequences from a causal language model, before it learns anything new.

    They stand for what it knows where its data are not to be had: as replay, as a memory of
    :class:`~cl_optim.GEM`, as the data of :func:`~cl_optim.estimate_fisher`, and with the outputs
    beside them (``top``) for :func:`distillation_loss`. Mind that they have the model's errors, and
    may hold what it has memorised.

    The model is in eval mode meanwhile. Ends of text are tokens like others: what follows is a new
    text. Where a sample comes from depends on ``seed`` alone, and on rounding, which another
    ``batch_size`` or device may change: on several ranks give each its own.

    Args:
        model: Of transformers, whose keys and values are kept from token to token; any other with
            ``logits``, or one that returns logits [n, t, V] of tokens [n, t], is run on the whole
            sequence for each.
        sequences: How many.
        length: Tokens of each, ``burn_in`` not included, and the prompt's included.
        prompts: What they begin with, by turns; texts need a tokenizer. None: ``start``.
        tokenizer: Of transformers, for texts.
        start: The token that a sequence begins with, which is its first. None: the beginning of a
            text, or else its end, by the model's configuration.
        temperature: Above 0; 1 samples from the model itself.
        burn_in: Tokens that are written first and left out, the prompt's included: the start's
            influence.
        batch_size: Sequences written at once.
        top: Keep the so many largest log-probabilities of each position beside it (:func:`top_k`),
            from a pass over whole sequences.
        seed: Of what is sampled, and of the buffer's draws.
        path: Where the buffer is; None: in memory.
        logits: Runs the model on tokens [n, t] and returns logits [n, t, V].
        progress: Show a progress bar, by rich. Default: if it is installed and the standard error
            is a terminal.

    Returns:
        A full buffer of samples ``{"input_ids": [length], "old": TopK}``; without ``top`` only
        tokens, int64. It is flushed.

    Raises:
        ValueError: An argument is out of range; ``path`` has samples already; a prompt is empty,
            too long, or of unknown tokens; there is no start; positions do not suffice; outputs
            are NaN; or all that is written is one token.
        TypeError: The model returns no logits.
        ModuleNotFoundError: ``progress=True`` where rich is not installed.

    References:
        Huang et al. 2024, arXiv:2403.01244 (self-synthesized rehearsal); Sun et al. 2020,
        arXiv:1909.03329 (LAMOL).
    """
    for name, value in (("sequences", sequences), ("length", length), ("batch_size", batch_size)):
        check_whole(name, value)
    if burn_in < 0:
        raise ValueError(f"burn_in must be at least 0, not {burn_in}.")
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, not {temperature}.")
    total = burn_in + length
    beginnings = _beginnings(model, prompts, tokenizer, start, total)
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and total > most:
        raise ValueError(
            f"burn_in + length is {total}, and the model has {most} positions: write shorter ones."
        )
    writer = _Writer(model, temperature, seed, logits)
    buffer = ReplayBuffer(sequences, seed=seed, path=path)
    if buffer.seen:
        buffer.close()
        raise ValueError(
            f"path {str(path)!r} has {buffer.seen} samples already, of another call: give another "
            "path, remove it, or open what it has with ReplayBuffer."
        )
    used: set[int] = set()
    shown = progress_bar(progress, "sequences", sequences)
    with torch.no_grad(), eval_mode(model), unobserved(), shown as advance:
        for batch in _batches(beginnings, sequences, batch_size):
            tokens = writer.write(batch, total)[:, burn_in:]
            sample: dict[str, Any] = {"input_ids": tokens}
            if top is not None:
                sample["old"] = top_k(writer.run(tokens), top)
            if len(used) < 2:
                used.update(torch.unique(tokens).tolist())
            buffer.add(sample)
            advance(len(tokens))
    if len(used) < 2 and sequences * length > 1:
        raise ValueError(
            f"all that the model wrote is token {used.pop()}: give prompts, another start, or a "
            "higher temperature."
        )
    if path is not None:
        buffer.flush()
    return buffer


def _beginnings(
    model: nn.Module,
    prompts: Iterable[str | Sequence[int] | Tensor] | None,
    tokenizer: Any,
    start: int | None,
    total: int,
) -> list[Tensor]:
    """Return what sequences begin with, each [t] with t < total."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if prompts is None:
        config = getattr(model, "config", None)
        names = ("bos_token_id", "eos_token_id")
        known = [start, *(getattr(config, name, None) for name in names)]
        found = next((one for one in known if isinstance(one, int)), None)
        if found is None:
            raise ValueError(
                f"start must be given: {type(model).__name__} has no configuration that says "
                "which token a text begins with."
            )
        beginnings = [torch.tensor([found])]
    elif start is not None:
        raise ValueError("give prompts or start, not both: a prompt has its own beginning.")
    else:
        beginnings = []
        for prompt in prompts:
            if isinstance(prompt, str):
                if tokenizer is None:
                    raise ValueError("prompts that are texts need a tokenizer.")
                prompt = tokenizer.encode(prompt)
            beginnings.append(torch.as_tensor(prompt, dtype=torch.int64).flatten().cpu())
        if not beginnings:
            raise ValueError("prompts must have at least one; None begins with the start token.")
    for tokens in beginnings:
        if not 0 < len(tokens) < total:
            raise ValueError(
                f"a prompt has {len(tokens)} tokens, and must have at least 1 and fewer than "
                f"burn_in + length, {total}."
            )
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
            raise ValueError(
                f"a prompt has tokens beyond the model's {vocabulary}: use its own tokenizer."
            )
    return beginnings


def _batches(beginnings: Sequence[Tensor], sequences: int, batch_size: int) -> Iterator[Tensor]:
    """Yield beginnings of one length at a time, [n, t], as many in all as there are sequences."""
    by_length: dict[int, list[Tensor]] = {}
    for number in range(sequences):
        beginning = beginnings[number % len(beginnings)]
        by_length.setdefault(len(beginning), []).append(beginning)
    for alike in by_length.values():
        for first in range(0, len(alike), batch_size):
            yield torch.stack(alike[first : first + batch_size])


class _Writer:
    """Samples tokens from a model, one after another."""

    def __init__(
        self,
        model: nn.Module,
        temperature: float,
        seed: int,
        logits: Callable[[nn.Module, Tensor], Tensor] | None,
    ) -> None:
        self._model, self._temperature, self._logits = model, temperature, logits
        first = next(model.parameters(), None)
        self._device = torch.device("cpu") if first is None else first.device
        self._generator = torch.Generator(self._device).manual_seed(seed)
        # Those of transformers that write have it; a cache is worth having.
        self._caches = logits is None and hasattr(model, "generate") and hasattr(model, "config")
        takes = inspect.signature(model.forward).parameters
        self._cache = "cache" if "cache" in takes else "past_key_values"  # by transformers' version

    def run(self, tokens: Tensor) -> Tensor:
        """Return the logits of whole sequences, [n, t, V]."""
        tokens = tokens.to(self._device)
        if self._logits is not None:
            found = self._logits(self._model, tokens)
        else:
            output = self._model(tokens)
            found = getattr(output, "logits", output)
        if not isinstance(found, Tensor) or found.shape[:-1] != tokens.shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(
                f"the model must return logits [n, t, V] of tokens {list(tokens.shape)}, not {got}:"
                " give logits=, which does."
            )
        check_finite(found, "the model's logits")
        return found

    def write(self, tokens: Tensor, total: int) -> Tensor:
        """Return sequences of a length, [n, total], that begin with these."""
        tokens = tokens.to(self._device)
        cache: Any = None
        while tokens.shape[1] < total:
            if self._caches:
                fresh = tokens if cache is None else tokens[:, -1:]
                given = {self._cache: cache} if cache is not None else {}
                output = self._model(input_ids=fresh, use_cache=True, **given)
                cache, last = getattr(output, self._cache), output.logits[:, -1]
                check_finite(last, "the model's logits")
            else:
                last = self.run(tokens)[:, -1]
            shares = torch.softmax(last.float() / self._temperature, -1)
            drawn = torch.multinomial(shares, 1, generator=self._generator)
            tokens = torch.cat([tokens, drawn], 1)
        return tokens
