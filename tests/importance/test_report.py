"""The report: its figures against the log, its page's structure, its exports, its command."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import threading
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import flip
from log_cases import importance_of, make_log
from PIL import Image
from rich.console import Console

from cl_optim import Importance, ImportanceLog, cli
from cl_optim.importance.report.data import report_data
from cl_optim.importance.report.figures import csv_cell, write_csv, write_json
from cl_optim.importance.report.html import render_html
from cl_optim.importance.report.pictures import write_png
from cl_optim.importance.report.text import render_text

NASTY = "</script><b>$x_1$ & \u2028 “quoted” 《style》"


@pytest.fixture
def log(tmp_path) -> ImportanceLog:
    """Three tasks, one with a layer of its own, one forgotten; two watches."""
    log = make_log(tmp_path / "log", 2)
    other = {**importance_of(2).sums, "new.weight": torch.rand(5, 5)}
    del other["b/c.weight"]
    log.record(NASTY, Importance(other, samples=4))
    log.record("gone", importance_of(3))
    log.forget("gone")
    (log.path / "training").mkdir()
    watch(log)
    return log


def watch(log: ImportanceLog) -> None:
    from cl_optim import EWCAdamW

    params = {name: torch.nn.Parameter(torch.zeros(4)) for name in ("a.weight", "b.weight")}
    opt = EWCAdamW(params.items(), lr=0.1)
    opt.consolidate(None)
    with log.watch(opt, every=2):
        for _ in range(10):
            for param in params.values():
                param.grad = torch.ones(4)
            opt.step()


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag not in ("meta", "link", "input"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.scripts[-1] += data


def test_the_figures_are_the_logs(log):
    data = report_data(log)
    assert data["name"] == "log"
    assert [task["name"] for task in data["tasks"]] == ["task 0", "task 1", NASTY]
    assert data["forgotten"] == ["gone"]
    layers = [layer["name"] for layer in data["layers"]]
    assert layers == ["a", "b/c", "empty", "new"]
    for column, task in enumerate(log.tasks):
        importance = log.load(task)
        per_layer = importance.per_layer()
        total = sum(value.double().sum().item() for value in importance.values())
        assert data["tasks"][column]["samples"] == importance.samples
        for row, layer in enumerate(layers):
            if layer not in per_layer:
                assert data["mean"][row][column] is None
                assert data["share"][row][column] is None
                continue
            own = [
                v
                for name, v in importance.items()
                if name.rpartition(".")[0] == layer or name == layer
            ]
            own_sum = sum(value.double().sum().item() for value in own)
            assert data["share"][row][column] == pytest.approx(own_sum / total, rel=1e-6)
            weights = max(1, sum(value.numel() for value in own))
            assert data["mean"][row][column] == pytest.approx(own_sum / weights, rel=1e-6)
            assert data["carriers"][row][column] == per_layer[layer].carriers
    for row, one in enumerate(log.tasks):
        for column, two in enumerate(log.tasks):
            if row != column:
                found = {name: table[row][column] for name, table in data["overlap"].items()}
                assert found == pytest.approx(log.load(one).overlap(log.load(two)))


def test_the_frozen_fractions_are_those_of_the_merged_top(log):
    data = report_data(log)
    merged = log.merge()
    every = np.concatenate([value.reshape(-1).numpy() for value in merged.values()])
    for part in data["frozen"]:
        frozen = sum(
            fraction * layer["weights"]
            for fraction, layer in zip(part["layers"], data["layers"], strict=True)
        )
        assert frozen == pytest.approx(round(part["fraction"] * len(every)))
    threshold = np.sort(every)[::-1][round(0.05 * len(every)) - 1]
    new = merged["new.weight"]
    assert data["frozen"][0]["layers"][3] == pytest.approx(
        (new >= threshold).double().mean().item()
    )


def test_what_is_frozen(log, tmp_path):
    assert report_data(log)["pinned"] is None
    frozen = {"new.weight": log.merge().top(0.5)["new.weight"]}
    log.record("frozen", log.load(log.tasks[-1]), frozen=frozen)
    data = report_data(log)
    layer = [layer["name"] for layer in data["layers"]].index("new")
    expected = frozen["new.weight"].double().mean().item()
    assert 0 < expected < 1
    assert data["pinned"] == [expected if row == layer else 0.0 for row in range(4)]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_text(data))
    assert f"{expected:.1%}" in console.export_text()
    write_csv(data, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        found = {line["layer"]: float(line["frozen"]) for line in csv.DictReader(file)}
    assert found["new"] == expected


def test_training_is_in_it(log):
    (run,) = report_data(log)["training"]
    assert run["steps"] == [2, 4, 6, 8, 10]
    assert run["drift"] == sorted(run["drift"])
    for at in range(5):
        parts = [layer["drift"][at] for layer in run["layers"]]
        assert run["drift"][at] == pytest.approx(math.hypot(*parts))
        assert run["penalty"][at] == pytest.approx(run["drift"][at] ** 2, rel=1e-5)  # F = 1, λ = 1


def test_the_page_holds_exactly_these_figures(log):
    data = report_data(log)
    text = render_html(data)
    page = Page(text)
    assert page.stack == []
    figures, script = page.scripts
    assert json.loads(figures) == json.loads(json.dumps(data))
    assert script.count("JSON.parse") == 1


def test_the_page_needs_nothing_else(log):
    text = render_html(report_data(log))
    page = Page(text)
    assert not re.search(r"(?:https?:)?//\w|@import|url\(", re.sub(r"// .*", "", text))
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object", "embed")
        assert "src" not in attributes
        assert not (attributes.get("href") or "#").startswith(("http", "/"))
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';")


def test_the_page_can_be_used_without_a_mouse_or_eyes(log):
    tags = Page(render_html(report_data(log))).tags
    assert ("html", {"lang": "en"}) in tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert attributes.get(name, ids[0]) in ids
        if tag in ("section", "table") and attributes.get("role", "region") != "grid":
            assert tag == "table" or "aria-labelledby" in attributes
    headings = [tag for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1"
    assert set(headings[1:]) == {"h2"}
    # Every control is within a label.
    controls = [tag for tag, _ in tags if tag in ("select", "input", "label")]
    assert all(controls[i] == "label" for i in range(0, len(controls), 2))


def test_report_writes_the_page(log, tmp_path):
    log.report(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    with pytest.raises(FileNotFoundError):
        log.report(tmp_path / "none" / "report.html")


@pytest.mark.filterwarnings("ignore:Glyph")  # the pictures' font has no such brackets
def test_the_command_writes_everything(log, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    files = {"-o": "r.html", "--png": "png", "--json": "r.json", "--csv": "r.csv"}
    arguments = [text for option, name in files.items() for text in (option, str(out / name))]
    assert cli.main(["report", str(log.path), *arguments]) == 0
    assert capsys.readouterr().out.startswith(f"Written: {out / 'r.html'}, ")
    data = json.loads((out / "r.json").read_text())
    assert data["mean"] == report_data(log)["mean"]
    with open(out / "r.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    known = [(r, c) for r in range(4) for c in range(3) if data["mean"][r][c] is not None]
    assert len(rows) == len(known) == 9
    for line, (row, column) in zip(rows, known, strict=True):
        assert line["layer"] == data["layers"][row]["name"]
        assert line["task"] == data["tasks"][column]["name"]
        assert float(line["mean"]) == data["mean"][row][column]
        assert float(line["carries_90"]) == data["carriers"][row][column][1]
        assert float(line["frozen_at_10"]) == data["frozen"][1]["layers"][row]
    pictures = sorted((out / "png").iterdir())
    names = ["carriers", "frozen", "layers", "overlap", "training"]
    assert [path.stem for path in pictures] == names
    for path in pictures:
        colours = np.unique(np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3), axis=0)
        assert len(colours) > 20  # something is drawn


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_cell_of_the_csv_is_no_formula(tmp_path, first):
    log = ImportanceLog(tmp_path / "log")
    log.record(f"{first}1+1", {f"{first}a.weight": torch.rand(4), "b=.weight": torch.rand(4)})
    write_csv(report_data(log), tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert [row[:3] for row in rows[1:]] == [
        [f"'{first}a", f"'{first}1+1", "4"],
        ["b=", f"'{first}1+1", "4"],
    ]
    assert csv_cell(-1.5) == -1.5


def test_the_command_prints_tables(log, capsys):
    assert cli.main(["report", str(log.path)]) == 0
    out = capsys.readouterr().out
    data = report_data(log)
    for task in ("task 0", "task 1"):
        line = next(line for line in out.splitlines() if line.strip().startswith(task))
        part = next(t for t in data["tasks"] if t["name"] == task)["carriers"]
        assert [f"{value:.2%}" in line for value in part] == [True] * 3
    assert f"{data['overlap']['jaccard'][0][1]:.2f}" in out
    assert "Forgotten: gone." in out


def test_names_are_shown_as_they_are(tmp_path, capsys):
    log = ImportanceLog(tmp_path / "log")
    names = ["[/red]", "data:fire:v1", "a\x1b[31mb", "x\udcff"]
    for name in names:
        metadata = {"labels": ["[/]"]}
        log.record(name, Importance({"a.weight": torch.rand(4)}, 1, metadata=metadata))
    assert cli.main(["report", str(log.path)]) == 0
    out = capsys.readouterr().out
    for shown in ("[/red]", "data:fire:v1", "a\ufffd[31mb", "x?", "['[/]']"):
        assert shown in out
    exports = [f"--{kind}={tmp_path / kind}" for kind in ("png", "json", "csv", "out")]
    assert cli.main(["report", str(log.path), *exports]) == 0


def test_long_names_fit_into_the_pictures(tmp_path):
    log = ImportanceLog(tmp_path / "log")
    log.record("t" * 300, {f"{'layer.' * 50}{n}.weight": torch.rand(4) for n in "ab"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_png(report_data(log), tmp_path)


def test_the_command_says_what_it_leaves_out(tmp_path, capsys):
    log = ImportanceLog(tmp_path)
    log.record("a", importance_of(0))
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes().replace(b'"a"', b'"b"'))
    assert cli.main(["report", str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "cl-optim report: warning: line 2 of" in first
    assert "there is nothing to report" in second


def test_exports_go_to_pipes_and_through_links(log, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    got: list[str] = []
    read.start()
    write_json(report_data(log), tmp_path / "pipe")
    read.join()
    assert json.loads(got[0])["tasks"]
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(report_data(log), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").is_file()
    with pytest.raises(IsADirectoryError, match="cannot be written: it is a folder"):
        write_json(report_data(log), tmp_path)


def test_the_command_says_no(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    for path, message in (
        (tmp_path / "none", "is not a folder"),
        (tmp_path, "is not an importance log: it has no manifest.jsonl"),
    ):
        assert cli.main(["report", str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("cl-optim report: ")
        assert message in err
        assert err.count("\n") == 1
    ImportanceLog(tmp_path / "empty")
    assert cli.main(["report", str(tmp_path / "empty")]) == 1
    assert "there is nothing to report" in capsys.readouterr().err


def test_a_damaged_tensor_is_no_figure(log, capsys, tmp_path):
    shard: Path = next((log.path / "records").glob("00002-*/importance-*.safetensors"))
    flip(shard, -1)
    assert cli.main(["report", str(log.path), "-o", str(tmp_path / "r.html")]) == 1
    assert "of task 'task 1' is damaged in" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_layers_are_in_the_models_order(tmp_path):
    log = ImportanceLog(tmp_path)
    for task, names in enumerate([["b", "d"], ["a", "b", "c", "d"], ["d", "e"]]):
        log.record(f"task {task}", {f"{name}.weight": torch.ones(2) for name in names})
    assert [layer["name"] for layer in report_data(log)["layers"]] == ["a", "b", "c", "d", "e"]
