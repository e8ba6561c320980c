"""Places in pages that say what the files in bench/results hold."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_optim.demo.machine import sentence

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
sys.path.insert(0, str(ROOT))  # bench.retention is not installed


@dataclass(frozen=True)
class Table:
    """A table of a page, but for its head.

    Attributes:
        page: The file, from the root on.
        head: Its first line; of several such tables the one after ``after`` is meant.
        rows: Makes the lines under the head and its rule.
        after: A line that comes before it.
    """

    page: str
    head: str
    rows: Callable[[], Iterable[str]]
    after: str = ""

    def fill(self, text: str) -> str:
        """Return the page's text with these rows."""
        begin = text.index(self.after + "\n") if self.after else 0
        head = re.compile(re.escape(self.head) + r"\n\|[-:|]+\|\n").search(text, begin)
        if head is None:
            raise SystemExit(f"{self.page} has no table that begins with {self.head!r}.")
        end = head.end()
        while text[end:].startswith("|"):
            end = text.index("\n", end) + 1
        return text[: head.end()] + "".join(f"{row}\n" for row in self.rows()) + text[end:]


@dataclass(frozen=True)
class Sentence:
    """Numbers in a sentence.

    Attributes:
        page: The file, from the root on.
        text: The sentence, with ``{name}`` for each number; lines may break anywhere.
        numbers: Makes what stands there, by name.
    """

    page: str
    text: str
    numbers: Callable[[], dict[str, str]]

    def fill(self, text: str) -> str:
        """Return the page's text with these numbers."""
        parts = re.split(r"\{(\w+)\}", self.text)
        pattern = ""
        for i, part in enumerate(parts):
            words = r"\s+".join(map(re.escape, part.split(" ")))
            pattern += words if i % 2 == 0 else rf"(?P<{part}>[^ \n()|*]+)"
        found = re.search(pattern, text)
        if found is None:
            raise SystemExit(f"{self.page} does not say {self.text!r}.")
        numbers = self.numbers()
        for name in sorted(found.groupdict(), key=found.start, reverse=True):
            text = text[: found.start(name)] + numbers[name] + text[found.end(name) :]
        return text


@dataclass(frozen=True)
class Hardware:
    """The line that says what a file's figures were measured on.

    Attributes:
        page: The file, from the root on.
        name: The file of results, JSON or Markdown.
        after: The heading that comes before it.
    """

    page: str
    name: str
    after: str

    def fill(self, text: str) -> str:
        """Return the page's text with this line."""
        begin = text.index(f"{self.after}\n")
        found = re.compile(r"^On a machine with.*$", re.MULTILINE).search(text, begin)
        if found is None or "\n## " in text[begin + 1 : found.start()]:
            raise SystemExit(f"{self.page} does not say on what machine, after {self.after!r}.")
        return text[: found.start()] + self.line() + text[found.end() :]

    def line(self) -> str:
        """Return what the file says: its figures have the machine, or its last line is that."""
        if self.name.endswith(".json"):
            return sentence(load(self.name)["machine"])
        line = (RESULTS / self.name).read_text().splitlines()[-1]
        if not line.startswith("On a machine with"):
            raise SystemExit(f"{self.name} does not say on what machine it was made.")
        return line


def load(name: str) -> Any:
    """Read one of the result files."""
    return json.loads((RESULTS / name).read_text())


def in_rows(cells: Iterable[Sequence[str]]) -> list[str]:
    """Return lines of a table."""
    return ["| " + " | ".join(row) + " |" for row in cells]


def with_minus(shown: str) -> str:
    """Return a number with a minus sign in place of a hyphen."""
    return shown.replace("-", "\N{MINUS SIGN}")


def three(number: float) -> str:
    """Return a number with three digits."""
    return f"{number:#.3g}".rstrip(".")
