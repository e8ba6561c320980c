"""Docstrings are written for `help()`, with a few marks of reStructuredText; here as Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(class|meth|func|attr|mod|math|exc|data|obj):`([^`]*)`")
BLOCK = re.compile(r"^( *)(?:\.\. code-block:: python|(.*\w):(:))\n\n((?:\1    .*\n|\n)+)", re.M)
DOCTEST = re.compile(r"^( *)>>> .*\n(?:\1\S.*\n)*(?:\n?\1>>> .*\n(?:\1\S.*\n)*)*", re.M)
TERM = re.compile(r"(?:(?<=\n\n)|(?<=\n))( *)(``[^\n]*``)\n((?:\1    [^\n]*\n)+)")


class AsMarkdown(griffe.Extension):
    """Rewrites each docstring before it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, obj)


def as_markdown(text: str, obj: griffe.Object) -> str:
    """Return a docstring with its roles, code and definitions as Markdown has them."""
    text = BLOCK.sub(_fenced, text + "\n")
    text = DOCTEST.sub(_session, text)
    text = TERM.sub(_definition, text)
    return ROLE.sub(lambda match: _role(match, obj), text).rstrip()


def _fenced(match: re.Match[str]) -> str:
    indent, said, _, code = match.groups()
    said = f"{indent}{said}:\n\n" if said else ""
    code = textwrap.indent(textwrap.dedent(code).strip("\n"), indent)
    return f"{said}{indent}```python\n{code}\n{indent}```\n\n"


def _session(match: re.Match[str]) -> str:
    indent, code = match[1], match[0].rstrip("\n")
    return f"{indent}```pycon\n{code}\n{indent}```\n"


def _definition(match: re.Match[str]) -> str:
    indent, term, text = match.groups()
    return f"{indent}{term}\n{indent}:   {text.lstrip()}\n"


def _role(match: re.Match[str], obj: griffe.Object) -> str:
    role, target = match.groups()
    if role == "math":
        return target.replace("_i", "ᵢ").replace("^*", r"\*").replace("^2", "²")
    shown = target.removeprefix("~")
    path = _path(role, shown, obj)
    if target.startswith("~"):
        shown = shown.split(".")[-1]
    # Optional: what has no place in the reference is shown without a link.
    return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'


def _path(role: str, target: str, obj: griffe.Object) -> str:
    """Return the full name of what a role names from within an object."""
    if target.startswith(("cl_optim.", "torch.")):
        return target
    scope: griffe.Object | None = obj
    while scope is not None and not scope.is_module:
        if scope.is_class and role in ("meth", "attr") and "." not in target:
            return f"{scope.path}.{target}"
        scope = scope.parent
    first, _, rest = target.partition(".")
    try:
        found = obj.resolve(first)
    except griffe.NameResolutionError:
        return target
    return f"{found}.{rest}" if rest else found
