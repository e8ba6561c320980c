"""Every example in a docstring, and every block of a page, runs for the reader of it."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from typing import Any

import avalanche_cases  # noqa: F401  # what stands in for Avalanche, where that is not installed
import pytest
from example_cases import (
    avalanche,
    classification,
    huggingface,
    language,
    lightning,
    page_scene,
)
from paths import ROOT

import cl_optim

pytestmark = [
    # peft and Lightning call what transformers and torch have renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec."),
]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMPILED = ("cl_optim._C", "cl_optim._C_cuda")
MODULES = ["cl_optim"]
for info in pkgutil.walk_packages(cl_optim.__path__, "cl_optim."):
    if info.name not in COMPILED:
        MODULES.append(info.name)
BLOCK = re.compile(r"^( *)(?:\.\. code-block:: python|.*\w::)\n\n((?:\1    .*\n|\n)+)", re.M)


def documented() -> dict[str, doctest.DocTest]:
    """Everything of the package that has a docstring, by its full name."""
    finder = doctest.DocTestFinder(exclude_empty=False)
    found = {}
    for name in MODULES:
        found.update({t.name: t for t in finder.find(importlib.import_module(name), name)})
    return {name: test for name, test in found.items() if test.docstring}


def blocks(docstring: str) -> list[str]:
    text = inspect.cleandoc(docstring) + "\n"
    return [textwrap.dedent(match[2]) for match in BLOCK.finditer(text)]


def page_blocks() -> dict[str, str]:
    found = {}
    for page in PAGES:
        for i, block in enumerate(
            re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        ):
            found[f"{page.stem}[{i}]"] = block
    return found


def quickstart() -> str:
    """The page's blocks, one after another: it says that they are a script."""
    return "".join(block for name, block in PAGE_BLOCKS.items() if name.startswith("quickstart["))


PAGE_BLOCKS = page_blocks()
DOCUMENTED = documented()
DOCTESTS = {name: test for name, test in DOCUMENTED.items() if test.examples}
BLOCKS = {
    f"{name}[{i}]": block
    for name, test in DOCUMENTED.items()
    for i, block in enumerate(blocks(test.docstring))
}


def scene(name: str, folder: Path) -> dict[str, Any]:
    """What the reader of an example has; the names of its own module, first of all."""
    if "huggingface" in name:
        names = huggingface(folder)
    elif "lightning" in name:
        names = lightning(folder)
    elif "avalanche" in name:
        names = avalanche()
    elif "LoRAPenalty" in name:
        names = language()
    else:
        names = classification()
    module = max((module for module in MODULES if name.startswith(module)), key=len)
    return {**vars(importlib.import_module(module)), **names}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", DOCTESTS)
def test_docstrings_show_what_is_printed(name, tmp_path):
    test = DOCTESTS[name]
    test.globs = scene(name, tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    assert runner.tries == len(test.examples), "an example was skipped"


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_docstrings_run(name, tmp_path):
    exec(compile(BLOCKS[name], name, "exec"), scene(name, tmp_path))


@pytest.mark.parametrize("name", [name for name in PAGE_BLOCKS if "quickstart" not in name])
def test_blocks_of_pages_run(name, tmp_path):
    block = PAGE_BLOCKS[name]
    exec(compile(block, name, "exec"), page_scene(block, tmp_path))


def test_quickstart_is_a_script():
    names: dict[str, Any] = {}
    exec(compile(quickstart(), "quickstart", "exec"), names)
    assert names["accuracy"](names["model"], names["old_loader"]) > 0.95
    assert names["accuracy"](names["model"], names["new_loader"]) > 0.95


def test_quickstart_forgets_without_consolidate():
    script, names = quickstart().replace("opt.consolidate(importance)", ""), dict[str, Any]()
    script = script[: script.index("from cl_optim import retention")]
    exec(compile(script, "quickstart", "exec"), names)
    assert names["accuracy"](names["model"], names["old_loader"]) < 0.5


def test_all_are_found():
    """None is missed since it is written another way."""
    sources = Path(cl_optim.__file__).parent.rglob("*.py")
    text = "\n".join(path.read_text() for path in sources)
    assert sum(len(test.examples) for test in DOCTESTS.values()) == text.count(">>> ")
    assert len(BLOCKS) == len(re.findall(r"^.*(?:code-block:: python|\w::)$", text, re.M))
    assert "doctest: +SKIP" not in text
    pages = "".join(page.read_text() for page in PAGES)
    assert len(PAGE_BLOCKS) == pages.count("```python") > 10
