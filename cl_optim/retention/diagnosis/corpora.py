"""Training data as `diagnose` sees it: records of tokens, prompts, answers and labels."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import unicodedata
from codecs import IncrementalDecoder, getincrementaldecoder
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

Token = int | str


class _HasEncode(Protocol):
    def encode(self, text: str) -> Iterable[int]: ...


# What makes tokens of a text.
Tokenizer = Callable[[str], Iterable[Token]] | _HasEncode

_ASCII_WORDS = re.compile(r"\w{1,64}|[^\w\s]")
_SPACES = re.compile(r"\s+")
_MARKS = r"[.,;:!?¡¿…。、！？\"'‘’“”„«»()\[\]]"  # those within a word or a number stay
_SENTENCE_MARKS = re.compile(rf"(?<!\w)(?![.,]\d){_MARKS}|{_MARKS}(?!\w)")
_CHUNK = 1 << 16  # characters of a text file read at a time, if it has no line breaks
_LONGEST_LINE = 1 << 24
_TELL_EVERY = 1 << 20


def words(text: str) -> list[str]:
    """Return words (of at most 64 characters; longer ones are cut) and punctuation marks.

    Casefolded and in Unicode's NFKC form; a letter's combining marks belong to its word.
    """
    if text.isascii():
        return _ASCII_WORDS.findall(text.casefold())
    return _words_with_marks().findall(unicodedata.normalize("NFKC", text).casefold())


@functools.cache
def _words_with_marks() -> re.Pattern[str]:
    letters = map(chr, range(0x300, sys.maxunicode + 1))
    marks = "".join(letter for letter in letters if unicodedata.category(letter)[0] == "M")
    return re.compile(rf"\w[\w{marks}]{{0,63}}|[^\w\s]")


def fingerprint(text: str) -> int:
    """Hash a text to 64 bits, whatever its case, white space, and marks around its words.

    "What is 2+2?" and "what is 2+2" have the same one, as have Unicode compatibility forms (NFKC);
    "What is 2-2?" has another: dashes and symbols count. Reordered or replaced words are not
    recognised.
    """
    text = _SPACES.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()
    # A text without words, such as "?", is what it is.
    plain = _SPACES.sub(" ", _SENTENCE_MARKS.sub(" ", text)).strip() or text
    return int.from_bytes(blake2b(plain.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Record:
    """One sample.

    Attributes:
        tokens: Of everything in it.
        ids: Whether they are token ids, not words.
        prompt: What is asked, if it has a prompt.
        answer: The answer to it.
        label: Its class, for classification.
    """

    tokens: Sequence[Token]
    ids: bool
    prompt: str | None = None
    answer: str | None = None
    label: str | None = None


def records(items: Iterable[Any], name: str, tokenizer: Tokenizer | None) -> Iterator[Record]:
    """Understand the items of a corpus, one after another.

    Args:
        items: Texts; sequences or 1-d integer tensors of token ids; pairs (prompt, answer) of
            texts; pairs (text, label) with an integer label; mappings as in a ``.jsonl`` file of
            :func:`read_corpus`.
        name: Of the corpus, for messages.
        tokenizer: Makes tokens of a text; None: :func:`words`.

    Raises:
        TypeError: An item is none of these, or the tokenizer returns something else.
    """
    if isinstance(items, (str, bytes)):
        raise TypeError(
            f"{name} must be an iterable of texts, not one text; read_corpus(path) reads a file."
        )
    encode = words if tokenizer is None else _encoder(tokenizer)
    is_ids = tokenizer is not None
    for number, item in enumerate(items, start=1):
        if isinstance(item, str):
            yield Record(encode(item), is_ids)
        elif isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
            text, other = item
            if isinstance(other, str):
                yield Record([*encode(text), *encode(other)], is_ids, text, other)
            elif isinstance(other, (int, np.integer)):
                yield Record(encode(text), is_ids, label=str(int(other)))
            else:
                raise TypeError(
                    f"{name}, item {number}: beside its text must be an answer (a text) or a label "
                    f"(an integer), not {type(other).__name__}; a label that is a text goes into "
                    "{'text': …, 'label': …}."
                )
        elif isinstance(item, Mapping):
            yield _of_mapping(item, f"{name}, item {number}", encode, is_ids)
        else:
            yield Record(_token_ids(item, f"{name}, item {number}"), True)


def _of_mapping(
    item: Mapping[str, Any], place: str, encode: Callable[[str], Sequence[Token]], is_ids: bool
) -> Record:
    fields = _fields(item)
    if fields is None:
        raise TypeError(
            f"{place}: must have texts 'prompt' and 'answer', or 'text' and, if it has a class, a "
            f"'label' that is an integer or a text, not {dict(item)!r:.200}."
        )
    text, answer, label = fields
    if answer is not None:
        return Record([*encode(text), *encode(answer)], is_ids, text, answer)
    return Record(encode(text), is_ids, label=None if label is None else str(label))


def _fields(item: Mapping[str, Any]) -> tuple[str, str | None, int | str | None] | None:
    """Return the text, answer and label of an item; None where it is of neither kind."""
    prompt, answer = item.get("prompt"), item.get("answer")
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt, answer, None
    text, label = item.get("text"), item.get("label")
    if isinstance(label, np.integer):
        label = int(label)
    if isinstance(text, str) and (label is None or type(label) in (int, str)):
        return text, None, label
    return None


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[Token]]:
    encode: Any = getattr(tokenizer, "encode", tokenizer)

    def tokens(text: str) -> list[Token]:
        found = encode(text)
        found = getattr(found, "ids", found)  # of the tokenizers library
        if isinstance(found, (torch.Tensor, np.ndarray)):
            found = found.tolist()
        found = list(found)
        kinds = {type(token) for token in found} - {int, str}
        odd = [kind for kind in kinds if not issubclass(kind, (int, str, np.integer))]
        if odd:
            raise TypeError(
                "tokenizer must return integers or strings for a text, not "
                f"{', '.join(sorted(kind.__name__ for kind in odd))}."
            )
        return [str(t) if isinstance(t, str) else int(t) for t in found] if kinds else found

    return tokens


def _token_ids(item: Any, place: str) -> list[int]:
    if isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim == 1:
        item = item.tolist()
    if isinstance(item, (list, tuple)):
        kinds = {type(token) for token in item}
        if all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds):
            return list(map(int, item))
    raise TypeError(
        f"{place}: must be a text, a sequence of token ids, a pair (prompt, answer), a pair "
        f"(text, label) or a mapping of these, not {type(item).__name__}."
    )


# --- files ----------------------------------------------------------------------------------------


def read_corpus(
    path: str | os.PathLike[str], on_progress: Callable[[int], None] = lambda read: None
) -> Iterator[str | tuple[str, str] | tuple[str, int] | dict[str, str]]:
    """Read a text file line by line, or a ``.jsonl`` file record by record, for `diagnose`.

    A record is a JSON string or an object with ``"prompt"`` and ``"answer"``, ``"text"`` and a
    ``"label"`` (an integer or a text), or ``"text"`` alone. A text file without line breaks is
    read in chunks of 65 536 bytes, at whose ends a word may be cut.

    Args:
        path: The file, in UTF-8, with or without a byte order mark.
        on_progress: Called with the bytes read so far, about once a megabyte.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not UTF-8, or not such a record, or a record is longer than 16 MB; the
            message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    is_json = path.suffix.lower() in (".jsonl", ".ndjson")
    limit = _LONGEST_LINE if is_json else _CHUNK
    decoder = getincrementaldecoder("utf-8-sig")()  # a chunk may end within a character
    number, read, told = 1, 0, 0
    with path.open("rb") as file:
        for chunk in iter(partial(file.readline, limit), b""):
            text = _decode(decoder, chunk, f"{path}, line {number}")
            if is_json and len(chunk) == limit and not chunk.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: is longer than {limit >> 20} MB.")
            read += len(chunk)
            if read >= told + _TELL_EVERY:
                on_progress(told := read)
            if text.strip():
                yield _record(text, f"{path}, line {number}") if is_json else text
            number += chunk.endswith(b"\n")
    on_progress(read)
    _decode(decoder, b"", f"{path}, line {number}")


def _decode(decoder: IncrementalDecoder, chunk: bytes, place: str) -> str:
    try:
        return decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{place}: must be UTF-8, but has the byte 0x{byte:02x}.") from None


def _record(text: str, place: str) -> str | tuple[str, str] | tuple[str, int] | dict[str, str]:
    try:
        value = json.loads(text)
        if "\\u" in text:  # may be half of a surrogate pair, which is no character
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: must be JSON, but {error}.") from None
    if isinstance(value, str):
        return value
    fields = _fields(value) if isinstance(value, Mapping) else None
    if fields is None:
        raise ValueError(
            f"{place}: must be a JSON string or an object with texts 'prompt' and 'answer', or "
            "'text' and, if it has a class, a 'label' that is an integer or a text."
        )
    first, answer, label = fields
    if answer is not None:
        return first, answer
    if isinstance(label, str):  # beside its text it would be an answer
        return {"text": first, "label": label}
    return first if label is None else (first, label)
