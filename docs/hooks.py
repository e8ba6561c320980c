"""What mkdocs shows: the repository's own pages, under the paths that they have there.

Pages link to each other as on GitHub, from ``docs/`` to ``../bench`` and ``../examples``. So that
these links hold on the site, a page's path is that of the repository, and whatever a page links to
is on the site, too: pages, pictures and data as they are; sources and notebooks as a page that
shows them; folders as a list of what they hold. A link that leads nowhere is mkdocs' to report.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
SOURCES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp"}
SHOWN = (*SOURCES, ".ipynb")
DATA = (".json", ".md", ".png", ".txt", ".css")
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
# Modules and what they offer; of a name that two offer only the first is documented.
REFERENCE = {
    "cl_optim": ["cl_optim"],
    "functional": ["cl_optim.functional"],
    "fisher": ["cl_optim.fisher"],
    "importance": [
        "cl_optim.importance.names.compare_names",
        "cl_optim.importance.errors",
        "cl_optim.importance.codecs",
    ],
    "retention": ["cl_optim.retention", "cl_optim.retention.adapters"],
    "integrations": [
        "cl_optim.integrations.huggingface.RetentionCallback",
        "cl_optim.integrations.lightning.RetentionCallback",
        "cl_optim.integrations.accelerate.retention_guard",
        "cl_optim.integrations.avalanche.EWCPlugin",
        "cl_optim.integrations.avalanche.GEMPlugin",
    ],
}


def on_files(files: Files, config: Any) -> Files:
    """Collect the pages, all that they link to, and the reference."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    found = {file.src_uri: file for file in theme}
    waiting = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "docs/site.css"]
    while waiting:
        path = waiting.pop()
        uri = uri_of(path)
        if uri not in found:
            found[uri] = file_of(path, uri, config)
            for name, picture in pictures(path).items():
                found[name] = File.generated(config, name, content=picture)
            if path.is_dir():
                waiting += members(path)
            elif path.suffix == ".md":
                waiting += linked(path)
    for uri, text in reference_pages().items():
        found[uri] = File.generated(config, uri, content=text)
    return Files(list(found.values()))


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Let links to sources and folders lead to the pages that show them."""
    uri = page.file.src_uri
    if uri.startswith(("bench/results/", "cl_optim/", "csrc/")):
        page.meta["search"] = {"exclude": True}
    if not re.search(r"^# ", markdown, re.M):
        markdown = f"# {uri.removesuffix('.md')}\n\n{markdown}"
    folder = (ROOT / uri).parent

    def towards(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / match[2]))
        if not inside(path) or not (path.is_dir() or path.suffix in SHOWN):
            return match[0]
        return f"{match[1]}{os.path.relpath(ROOT / uri_of(path), folder)}{match[3]}"

    if uri == "docs/api.md":
        markdown = re.sub(r"^\| `(cl_optim[\w.]*)` \|.*", to_reference, markdown, flags=re.M)
    # A figure and its interval stay on one line.
    markdown = re.sub(
        r"^\|.*", lambda row: row[0].replace(" ± ", "\u00a0±\u00a0"), markdown, flags=re.M
    )
    return LINK.sub(towards, markdown)


def to_reference(row: re.Match[str]) -> str:
    """Let the names of a row of docs/api.md lead to the reference, where they are in it."""
    link = rf'<autoref optional identifier="{row[1]}.\1"><code>\1</code></autoref>'
    return re.sub(r"`([A-Za-z]\w*)`", link, row[0])


def linked(page: Path) -> list[Path]:
    """Return what exists of the files and folders that a page links to."""
    text = FENCE.sub("", page.read_text())
    paths = [Path(os.path.normpath(page.parent / match[2])) for match in LINK.finditer(text)]
    return [path for path in paths if inside(path)]


def inside(path: Path) -> bool:
    """Whether it is there, and of the repository."""
    return path.exists() and path.is_relative_to(ROOT)


def members(folder: Path) -> list[Path]:
    """Return the files of a folder that the site shows."""
    return sorted(path for path in folder.iterdir() if path.suffix in (*SHOWN, *DATA))


def uri_of(path: Path) -> str:
    """Return a file's path on the site's side; a folder is its list, a source a page."""
    uri = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"{uri}/index.md"
    return f"{uri}.md" if path.suffix in SHOWN else uri


def file_of(path: Path, uri: str, config: Any) -> File:
    """Make the file of the site: copied, or a page about it."""
    if path.is_dir():
        rows = [f"- [{member.name}]({member.name}){said(member)}" for member in members(path)]
        return File.generated(config, uri, content=f"# {path.name}\n\n" + "\n".join(rows))
    if path.suffix == ".ipynb":
        return File.generated(config, uri, content=notebook(path))
    if path.suffix in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        code = f"# {name}\n\n````{SOURCES[path.suffix]}\n{path.read_text()}````\n"
        return File.generated(config, uri, content=code)
    file = File.generated(config, uri, abs_src_path=str(path))
    if file.is_documentation_page():
        # Addresses without the folder that all pages are in, and the README in front.
        short = {"README.md": "index.html", "bench/RESULTS.md": "performance/index.html"}
        file.dest_uri = short.get(uri, file.dest_uri.removeprefix("docs/").lower())
    return file


def said(path: Path) -> str:
    """Return what a script's first line says of it."""
    if path.suffix != ".py":
        return ""
    return ": " + (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def notebook(path: Path) -> str:
    """Return a notebook's text and code, and the pictures that its cells made."""
    parts = []
    names = iter(pictures(path))
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [f"![]({Path(next(names)).name})" for _ in cell.get("outputs", ())]
    return "\n\n".join(parts)


def pictures(path: Path) -> dict[str, bytes]:
    """Return what a notebook's cells drew, by its name on the site."""
    if path.suffix != ".ipynb":
        return {}
    outputs = [
        output["data"]["image/png"]
        for cell in json.loads(path.read_text())["cells"]
        for output in cell.get("outputs", ())
    ]
    stem = path.relative_to(ROOT).with_suffix("").as_posix()
    return {
        f"{stem}-{number}.png": base64.b64decode("".join(output))
        for number, output in enumerate(outputs, 1)
    }


def reference_pages() -> dict[str, str]:
    """Return the pages of the API reference, made of ``__all__`` without importing anything."""
    pages: dict[str, str] = {}
    documented: set[str] = set()
    for title, modules in REFERENCE.items():
        lines = [f"# {title if title == 'cl_optim' else f'cl_optim.{title}'}\n"]
        for module in modules:
            for name in exported(module):
                if (
                    name.startswith("cl_optim.integrations")
                    or name.split(".")[-1] not in documented
                ):
                    lines.append(f"::: {name}\n")
                documented.add(name.split(".")[-1])
        pages[f"reference/{title}.md"] = "\n".join(lines)
    return pages


def exported(name: str) -> list[str]:
    """Return the full names of what a module's ``__all__`` lists; of anything else, itself.

    In the order in which docs/api.md names them; modules have a page of their own.
    """
    base = ROOT.joinpath(*name.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        tree = ast.parse(path.read_text()) if path.exists() else None
        for node in tree.body if tree else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                listed = [
                    public
                    for public in ast.literal_eval(node.value)
                    if public != "__version__" and not (base / f"{public}.py").exists()
                ]
                order = re.findall(r"`(\w+)`", (ROOT / "docs/api.md").read_text())
                places = {public: order.index(public) for public in listed if public in order}
                listed.sort(key=lambda public: places.get(public, len(order)))
                return [f"{name}.{public}" for public in listed]
    return [name]
