"""Texts that a pretrained model knows, and one that it does not: documents, cut from files."""

from __future__ import annotations

import gzip
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cl_optim.demo.scenarios import DataError

Part = Literal["train", "validation", "test"]
Tokenize = Callable[[str], Sequence[int]]

_LEAST = 400  # characters of a document; what follows a shorter one belongs to it
_TOGETHER = 5  # neighbours are of one subject
_EVERY = 10  # of so many files one is tested on, and one validated on
_BLANK = re.compile(r"\n\s*\n")
_TOP_LEVEL = re.compile(r"\n\n+(?=(?:def|class|@|async def)\b)")
_HEADING = re.compile(r"(?m)^\.S[HS] +")
# Of manual pages; held-out text would be known by heart from those of others.
_ALIKE = ("ÜBERSETZUNG", "COPYRIGHT", "SIEHE AUCH", "AUTOR", "FEHLER MELDEN", "KOLOPHON")


@dataclass(frozen=True)
class Domain:
    """A kind of text.

    Attributes:
        name: In tables.
        documents: Of each part; no file is in two of them.
    """

    name: str
    documents: dict[Part, list[str]]

    @classmethod
    def of(cls, name: str, files: Iterable[Sequence[str]]) -> Domain:
        """Take every tenth file for the test and every tenth for validation.

        Raises:
            DataError: A part has no document.
        """
        documents: dict[Part, list[str]] = {"train": [], "validation": [], "test": []}
        held_out: dict[int, Part] = {_EVERY - 1: "test", _EVERY - 2: "validation"}
        for number, found in enumerate(files):
            documents[held_out.get(number % _EVERY, "train")].extend(found)
        for part, found in documents.items():
            if not found:
                raise DataError(f"{name} has too little text for its {part} part.")
        return cls(name, documents)

    def windows(
        self,
        part: Part,
        count: int,
        length: int,
        tokenize: Tokenize,
        start: int,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return windows that begin with a document, [count, length] int64.

        Before each document is the token ``start``; where one ends, the next one follows.

        Args:
            part: Of the documents.
            count: How many windows.
            length: Tokens of each.
            tokenize: Turns a text into tokens.
            start: The token before a document.
            generator: Draws the documents; None: evenly spread.
        """
        documents = self.documents[part]
        if generator is None:
            first = torch.linspace(0, len(documents) - 1, count).long()
        else:
            first = torch.randint(len(documents), (count,), generator=generator)
        return torch.tensor([self._window(part, int(i), length, tokenize, start) for i in first])

    def _window(
        self, part: Part, number: int, length: int, tokenize: Tokenize, start: int
    ) -> list[int]:
        documents, tokens = self.documents[part], list[int]()
        while len(tokens) < length:
            tokens += [start, *tokenize(documents[number % len(documents)])]
            number += 1
        return tokens[:length]


def pieces(text: str, boundary: re.Pattern[str] = _BLANK) -> list[str]:
    """Cut a text where the boundary matches, in pieces that are not short but for the last."""
    found, begin = list[str](), 0
    for match in boundary.finditer(text):
        if match.start() - begin >= _LEAST:
            found.append(text[begin : match.start()])
            begin = match.end()
    found.append(text[begin:])
    return [piece for piece in found if piece.strip()]


def _unpacked(folder: Path, pattern: str, what: str, package: str) -> list[Path]:
    files = sorted(folder.rglob(pattern))
    if not files:
        raise DataError(f"{folder} has no {what}: unpack Debian's {package} there.")
    return files


def german(folder: Path) -> Domain:
    """Read the pages of Debian's ``manpages-de``, section by section, without their trailers.

    Raises:
        DataError: There are none in the folder.
    """
    files = _unpacked(folder, "share/man/de/man[1578]/*.gz", "German manual pages", "manpages-de")
    pages = (gzip.decompress(file.read_bytes()).decode() for file in files)
    return Domain.of("German manual", map(manual, pages))


def manual(page: str) -> list[str]:
    """Turn a page's roff into the plain paragraphs of its sections."""
    sections = _HEADING.split(page)[1:]
    plain = ("\n\n".join(_paragraphs(section)) for section in sections)
    return [
        piece
        for section, text in zip(sections, plain, strict=True)
        if not section.lstrip('"').startswith(_ALIKE)
        for piece in pieces(text)
        if len(piece) >= _LEAST
    ]


def _paragraphs(section: str) -> list[str]:
    section = re.sub(r"(?ms)^\.TS.*?^\.TE", "", section)
    section = re.sub(r'(?m)^\.\\".*\n', "", section)
    section = re.sub(r"(?m)^\.[BIR]{1,2} +", "", section)  # fonts; all other requests divide
    found = re.split(r"(?m)^[.'].*$", section)
    return [line for text in found if (line := " ".join(_plain(text).split()))]


def _plain(text: str) -> str:
    text = re.sub(r"\\f(\[\w*\]|\(..|.)", "", text)
    for escape, plain in (("\\-", "-"), ("\\(aq", "'"), ("\\(co", "©"), ("\\e", "\\")):
        text = text.replace(escape, plain)
    return re.sub(r"\\(\[\w*\]|\(..|[&,/:|^~ %c])", "", text)


def prose(folder: Path) -> Domain:
    """Read Debian's FAQ, from the package ``debian-faq``, without its table of contents.

    Raises:
        DataError: It is not in the folder.
    """
    files = _unpacked(folder, "share/doc/debian/FAQ/debian-faq.en.txt.gz", "FAQ", "debian-faq")
    text = gzip.decompress(files[0].read_bytes()).decode().replace("\xa0", " ")
    text = re.sub(r"(?m)^ +", "", text[text.rindex("\nChapter 1.") :])
    found = pieces(text)
    groups = range(0, len(found), _TOGETHER)
    return Domain.of("English prose", (found[first : first + _TOGETHER] for first in groups))


def code() -> Domain:
    """Read the standard library's modules, cut before definitions.

    Raises:
        DataError: Its source is not there.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    return Domain.of("Python", (pieces(text, _TOP_LEVEL) for text in texts))


def sayings(folder: Path) -> Domain:
    """Read the sayings of Debian's ``fortunes``.

    Raises:
        DataError: There are none in the folder.
    """
    files = _unpacked(folder, "share/games/fortunes/*.u8", "sayings", "fortunes")
    texts = (file.with_suffix("").read_text(encoding="utf-8") for file in files)
    return Domain.of("sayings", (text.strip().split("\n%\n") for text in texts))
