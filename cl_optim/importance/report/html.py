"""The report as one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any

from cl_optim.importance.files import whole


def render_html(data: dict[str, Any]) -> str:
    """Return the page: template, style, script and figures in one."""
    page = resources.files("cl_optim.importance.report") / "page"
    template, style, script = (
        (page / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    figures = json.dumps(data, allow_nan=False, separators=(",", ":"))
    # Within a script element, "<" could end it.
    parts = {
        "title": html.escape(f"Importance log: {data['name']}"),
        "style": style,
        "script": script,
        "figures": figures.replace("<", "\\u003c"),
    }
    pieces = template.split("\N{LEFT DOUBLE ANGLE BRACKET}")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("\N{RIGHT DOUBLE ANGLE BRACKET}")
        filled += [parts[name], rest]
    return "".join(filled)


def write_html(data: dict[str, Any], path: Path) -> None:
    """Write the page."""
    with whole(path) as file:
        file.write_text(render_html(data), encoding="utf-8")
