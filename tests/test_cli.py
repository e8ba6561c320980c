"""The command line: what it prints, and how it says no."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paths import ROOT

import cl_optim
from bench.retention import __main__ as retention
from cl_optim import cli
from cl_optim.demo import commands
from cl_optim.demo.train import DivergedError
from cl_optim.ops import library
from cl_optim.ops.library import Backend

COMMANDS = [
    ("", "required: COMMAND"),
    ("dmeo", "'dmeo'"),
    ("demo --seeds 0", "--seeds: must be a whole number from 1 to 1000, not '0'"),
    ("demo --seeds five", "--seeds: must be a whole number from 1 to 1000, not 'five'"),
    ("demo --seeds 1001", "not '1001'"),
    ("demo --tasks 1", "--tasks: must be a whole number from 2 to 50, not '1'"),
    ("demo --epochs -3", "--epochs: must be a whole number from 1 to 1000, not '-3'"),
    ("demo --epochs 2.5", "not '2.5'"),
    ("demo --scenario class", "'class'"),
    ("demo --scenario split --tasks 3", "cannot be split into 3 equal tasks"),
    ("demo --lambda=1", "unrecognized arguments: --lambda=1"),
    ("demo --out file", "cannot write into --out file: "),
    ("demo --out file/below", "cannot write into --out file/below: "),
    ("demo text", "unrecognized arguments: text"),
    ("info --seeds 1", "unrecognized arguments: --seeds 1"),
]
EXPERIMENTS = [
    ("", "required: COMMAND"),
    ("run", "required: SCENARIO"),
    ("run class", "'class'"),
    ("run gem --data fashion-mnist", "there is no scenario gem for --data fashion-mnist"),
    ("run split --data mnist", "'mnist'"),
    ("run split --data-dir x", "--data-dir goes with --data fashion-mnist"),
    ("run split --data fashion-mnist --data-dir x", "does not exist"),
    ("sweep formats", "scenario formats has no sweep"),
    ("published --seeds 1", "--seeds: must be a whole number from 2 to 1000, not '1'"),
    ("text --seeds 0", "--seeds: must be a whole number from 1 to 1000"),
    ("text --width 6", "--width must be a multiple of 4, not 6"),
    ("text old.txt", "give both texts, OLD and NEW, or none"),
    ("text old.txt new.txt", "cannot read text old.txt: No such file"),
    ("text /dev/null /dev/null", "must have at least 81,920 bytes"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS)
def test_a_wrong_argument_is_one_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert refused(arguments.split(), capsys).count(message) == 1


@pytest.mark.parametrize(("arguments", "message"), EXPERIMENTS)
def test_so_it_is_of_experiments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(arguments.split(), capsys, retention.main, "python -m bench.retention")
    assert error.count(message) == 1


def refused(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    main: Callable[[list[str]], int] = cli.main,
    program: str = "cl-optim",
) -> str:
    """The one line on stderr of a command that must not run."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.startswith(program)
    assert err.count("\n") == 1
    return err


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name in ("sklearn", "matplotlib") else find_spec(name),
    )
    error = refused(["demo", "--out", str(tmp_path / "out")], capsys)
    assert "the demo needs matplotlib, sklearn: pip install 'cl-optim[demo]'" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["report", "log"], ["diagnose", "old.txt", "new.txt"]], ids=lambda a: a[0]
)
def test_tables_need_rich(arguments, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert refused(arguments, capsys).endswith(' needs rich: pip install "cl-optim[cli]"\n')


def test_what_is_no_table_needs_no_rich(tmp_path):
    cl_optim.ImportanceLog(tmp_path / "log").record("a", {"w": torch.rand(4)})
    (tmp_path / "text").write_text("the cat sat")
    program = (
        "import sys; sys.modules['rich'] = None\n"
        "from cl_optim.cli import main\n"
        "assert main(['report', 'log', '-o', 'page.html']) == 0\n"
        "assert main(['diagnose', 'text', 'text', '--json']) == 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "page.html").exists()


def test_failed_training_is_one_sentence(tmp_path, capsys, monkeypatch):
    def diverge(*args: object) -> None:
        raise DivergedError("L2-SP diverged while learning task 2.")

    monkeypatch.setattr(commands, "run_demo", diverge)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "cl-optim demo: L2-SP diverged while learning task 2.\n"


def test_info(capsys, monkeypatch):
    backends = {
        "cpu": Backend("cpu", True, info={"compiler": "c++ 99", "simd": "avx2"}),
        "cuda": Backend("cuda", False, "No kernels here."),
    }
    monkeypatch.setattr(library, "backends", lambda: backends)
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"cl-optim {cl_optim.__version__}"
    assert lines[1].startswith(f"torch {torch.__version__}, ")
    assert lines[3:] == [
        "cpu kernels: yes",
        "  compiler: c++ 99",
        "  simd: avx2",
        "cuda kernels: no. No kernels here.",
    ]


def test_as_a_module_info_needs_nothing_heavy():
    heavy = ["matplotlib", "sklearn", "scipy", "rich"]
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        "from cl_optim.cli import main\n"
        "assert main(['info']) == 0\n"
        f"print(sorted((set(sys.modules) - before) & set({heavy})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
    module = [sys.executable, "-m", "cl_optim.cli", "--version"]
    result = subprocess.run(module, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == f"cl-optim {cl_optim.__version__}\n"
