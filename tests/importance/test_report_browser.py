"""The report in a real browser: no error, no request, every control, by keyboard."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kronecker_cases import importance_of
from playwright.sync_api import Browser, Page, sync_playwright

from cl_optim import EWCAdamW, ImportanceLog

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
]
LAYERS, TASKS = 200, 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 200 layers × 12 tasks, one layer unknown to the first task."""
    folder = tmp_path_factory.mktemp("report")
    log = ImportanceLog(folder / "log")
    generator = torch.Generator().manual_seed(0)
    names = [f"transformer.h.{number}.mlp.weight" for number in range(LAYERS)]
    for task in range(TASKS):
        values = {
            name: torch.rand(20, generator=generator) ** (2 + number / 50)
            for number, name in enumerate(names)
            if (task, number) != (0, 1)
        }
        log.record(f"task number {task}", values)
    (log.path / "training").mkdir()
    log.report(folder / "report.html")
    return folder / "report.html"


class Opened:
    """A page and what went wrong in it."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.on("console", lambda message: self.wrong.append(message.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", lambda request: self.wrong.append(request.url))
        page.goto(path.as_uri())
        assert self.wrong == [path.as_uri()]

    def active(self) -> str:
        return self.page.evaluate("document.activeElement.getAttribute('aria-label')")


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Opened]:
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    opened = Opened(page, report)
    yield opened
    assert len(opened.wrong) == 1  # only the page itself
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_opens_in_every_light_and_width(browser, report, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened = Opened(page, report)
    assert page.locator("#heat tbody tr").count() == LAYERS
    assert page.locator("#heat td").count() == LAYERS * TASKS
    # Nothing but the tables' own frames scrolls sideways.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert len(opened.wrong) == 1
    low = page.evaluate(LEAST_CONTRAST)
    assert low >= 4.5
    page.close()


def test_effective_ranks_can_be_shown(browser, report, tmp_path):
    """Of matrices with Kronecker factors; where no record has any, there is no such choice."""
    importance = importance_of(0)
    log = ImportanceLog(tmp_path / "log")
    log.record("factors", importance)
    log.record("diagonal", importance.diagonal())
    log.report(tmp_path / "report.html")
    page = browser.new_page()
    opened = Opened(page, tmp_path / "report.html")
    layers = page.locator("#heat tbody th").all_text_contents()
    for side, rank in zip(
        ("output", "input"), importance.effective_ranks()["fc.weight"], strict=True
    ):
        page.select_option("#measure", side)
        cells = page.locator("#heat tbody tr").nth(layers.index("fc")).locator("td")
        assert float(cells.nth(0).text_content()) == pytest.approx(rank, rel=1e-2)
        assert cells.nth(1).text_content() == ""
    page.locator("#heat td").nth(2 * layers.index("fc")).click()
    assert "of inputs: fc.weight" in page.locator("#tip").text_content()
    assert len(opened.wrong) == 1
    page.close()
    page = browser.new_page()
    Opened(page, report)
    assert page.locator("#measure option").count() == 3
    page.close()


# The least contrast between a cell's number and its colour, as WCAG 2 computes it.
LEAST_CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((byte) => {
      const part = byte / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Math.min(...[...document.querySelectorAll("#heat td:not(.absent) span")].map((cell) => {
    const style = getComputedStyle(cell);
    const [text, ground] = [luminance(style.color), luminance(style.backgroundColor)];
    return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
  }));
}"""


def test_the_heat_map_by_keyboard(opened):
    page = opened.page
    page.locator("#filter").focus()
    page.keyboard.press("Tab")
    assert opened.active().startswith("transformer.h.0.mlp, task number 0: ")
    tip = page.locator("#tip")
    assert tip.is_visible()
    assert tip.locator("b").inner_text() == "transformer.h.0.mlp · task number 0"
    moves = [
        ("ArrowRight", 0, 1), ("ArrowDown", 1, 1), ("ArrowLeft", 1, 0), ("ArrowLeft", 1, 0),
        ("End", 1, 11), ("PageDown", 11, 11), ("Control+End", 199, 11), ("ArrowDown", 199, 11),
        ("PageUp", 189, 11), ("Home", 189, 0), ("Control+Home", 0, 0), ("ArrowUp", 0, 0),
    ]  # fmt: skip
    for key, layer, task in moves:
        page.keyboard.press(key)
        assert opened.active().startswith(f"transformer.h.{layer}.mlp, task number {task}: ")
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        title = f"transformer.h.{layer}.mlp · task number {task}"
        assert tip.locator("b").inner_text() == title
        # The cell is in sight: below and beside the headers that stay in place.
        assert page.evaluate(
            """() => {
              const box = document.activeElement.getBoundingClientRect();
              const at = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
              return document.activeElement.contains(at);
            }"""
        )
    assert tip.is_visible()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    page.keyboard.press("Tab")  # one tab stop for all cells
    assert page.evaluate("document.activeElement.closest('#heat')") is None


def test_an_absent_layer_says_so(opened):
    cell = opened.page.locator("#heat tr:nth-child(2) td").first
    assert cell.get_attribute("class") == "absent"
    label = cell.get_attribute("aria-label")
    assert label == "transformer.h.1.mlp, task number 0: not in this task’s record"


def test_the_controls(opened):
    page = opened.page
    page.locator("#filter").fill("h.19")
    names = page.locator("#heat tbody th").all_inner_texts()
    assert names == [f"transformer.h.{number}.mlp" for number in (19, *range(190, 200))]
    assert page.locator("#count").inner_text() == "11 of 200 layers."
    page.locator("#filter").fill("")
    page.locator("#measure").select_option("share")
    page.locator("#order").select_option("value")
    values = page.evaluate(
        """[...document.querySelectorAll("#heat tbody tr")].map((row) => Math.max(
             ...[...row.querySelectorAll("span")].map((cell) => cell.style.getPropertyValue("--v"))
           ))"""
    )
    assert values == sorted(values, reverse=True)
    assert values[0] == 1
    before = page.locator("#overlap td").nth(1).inner_text()
    page.locator("#likeness").select_option("cosine")
    assert page.locator("#overlap td").nth(1).inner_text() != before


def test_hovering_shows_the_details(opened):
    opened.page.locator("#heat td").nth(5).hover()
    assert opened.page.locator("#tip b").inner_text() == "transformer.h.0.mlp · task number 5"
    opened.page.locator("h1").hover()
    assert not opened.page.locator("#tip").is_visible()


def test_curves_have_gaps_where_training_diverged(browser, tmp_path):
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = EWCAdamW([(f"{name}.weight", w) for name, w in zip("ab", weights, strict=True)])
    optimizer.consolidate(None)
    log = ImportanceLog(tmp_path / "log")
    log.record("task", {"a.weight": torch.rand(3), "b.weight": torch.rand(3)})
    with log.watch(optimizer, every=1):
        for grad in (1.0, -1.0, float("inf")):
            weights[0].grad = torch.full((3,), grad)
            weights[1].grad = torch.ones(3)
            optimizer.step()
    log.report(tmp_path / "report.html")
    page = browser.new_page()
    opened = Opened(page, tmp_path / "report.html")
    charts = page.locator("#charts svg")
    assert charts.count() == 2
    names = [charts.nth(number).get_attribute("aria-label") for number in range(2)]
    assert all(name.endswith(" to not finite at step 3") for name in names)
    paths = page.locator("#charts path").evaluate_all("all => all.map(p => p.getAttribute('d'))")
    assert sorted(path.count("L") for path in paths) == [1, 1, 1, 2]  # b's is whole
    assert not any("NaN" in path for path in paths)
    charts.nth(1).focus()
    assert "drift not finite" in page.locator("#tip").inner_text()
    assert len(opened.wrong) == 1
    page.close()
