"""Every sentence that docs/errors.md quotes is one that the package raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

import cl_optim

PAGE = (ROOT / "docs/errors.md").read_text()
ROW = re.compile(r"^\| (?!it says|---)(.+?) \| .* \| .* \|$", re.M)
SENTENCES = ROW.findall(PAGE)


def texts(tree: ast.AST) -> Iterator[str]:
    """Each string of a module, with … for what is filled in, by f-strings and by format()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.replace("{}", "…")


SOURCES = "\n".join(
    text
    for path in sorted(Path(cl_optim.__file__).parent.rglob("*.py"))
    for text in texts(ast.parse(path.read_text()))
)


def test_each_table_is_read():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    assert len(SENTENCES) == len(rows) - PAGE.count("| it says |") > 30


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_is_raised(sentence):
    assert sentence in SOURCES
