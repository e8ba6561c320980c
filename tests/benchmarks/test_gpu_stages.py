"""A rehearsal of bench/gpu.sh on the CPU: on a GPU, a typo would cost minutes of a few."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gpu import device, report, sanitize, smoke, tests
from gpu.goals import BY_NAME, GOALS, Goal
from paths import HELPERS, ROOT

SCRIPT = ROOT / "bench" / "gpu.sh"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """For the script's PYTHON; importing torch a dozen times would take a minute."""
    warm, path = HELPERS / "warm_python.py", tmp_path_factory.mktemp("python") / "socket"
    server = subprocess.Popen([sys.executable, warm, "--serve", path])
    while not path.exists():
        assert server.poll() is None
        time.sleep(0.02)
    yield f"{sys.executable} -S {warm} {path}"
    server.terminate()
    server.wait()


def start(python: str, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [SCRIPT, "--dry", folder / "out", *arguments],
        env={**os.environ, "PYTHON": python, "STATE": str(folder / "state"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def results(output: str) -> dict[str, str]:
    """By goal: pass, fail or missing."""
    lines = [line for line in output.splitlines() if line.startswith("RESULT")]
    return {re.split(r"\s{2,}", line)[1]: line.split()[-1] for line in lines}


@pytest.fixture
def figures(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "figures.jsonl"
    monkeypatch.setenv("FIGURES", str(path))
    return path


def stages(output: str) -> dict[str, str]:
    return dict(re.findall(r"^STAGE (\w+): (.*), \d+ s$", output, re.MULTILINE))


@pytest.fixture(scope="module")
def rehearsal(python, tmp_path_factory) -> tuple[Path, list[str]]:
    """Both calls' folder, and what they print."""
    folder = tmp_path_factory.mktemp("gpu")
    outputs = []
    for call in "12":
        process = start(python, folder, call)
        outputs.append(process.communicate()[0])
        assert process.returncode == 0, outputs[-1]
    return folder / "out", outputs


class TestRehearsal:
    def test_every_stage_runs(self, rehearsal):
        listed = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True)
        names = re.findall(r"^(\w+) \d+$", listed.stdout, re.MULTILINE)
        assert stages(rehearsal[1][-1]) == dict.fromkeys(names, "ok"), rehearsal[1]

    def test_every_goal_has_a_result(self, rehearsal):
        found = results(rehearsal[1][-1])
        assert list(found) == [goal.name for goal in GOALS]
        missing = {name for name, result in found.items() if result == "missing"}
        assert missing == {goal.name for goal in GOALS if goal.only_on_gpu}

    def test_what_is_no_speed_is_as_it_should_be(self, rehearsal):
        found = results(rehearsal[1][-1])
        right = [n for n in found if re.search("tests that|did not finish|differ|syncs", n)]
        assert len(right) == 7
        assert [found[name] for name in right] == ["pass"] * 7

    def test_figures_are_lines_of_json_and_right(self, rehearsal):
        lines = (rehearsal[0] / "figures.jsonl").read_text().splitlines()
        header, *figures = map(json.loads, lines)
        assert header["header"]["packages"]["torch"]
        assert len(figures) > 100
        checked = [figure for figure in figures if figure["error"] is not None]
        assert len(checked) > 50
        for figure in checked:
            assert figure["error"] <= figure["allowed_error"], figure
            assert figure["result"] == "pass" or figure["name"] in BY_NAME

    def test_few_files(self, rehearsal):
        files = [path for path in rehearsal[0].rglob("*") if path.is_file()]
        assert len(files) <= 8
        assert all(path.parent == rehearsal[0] for path in files)

    def test_the_second_call_says_what_the_first_one_knew(self, rehearsal):
        text = (rehearsal[0] / "results.txt").read_text()
        assert len(stages(text)) == len(stages(rehearsal[1][0])) + 7
        assert text in rehearsal[1][1]


def test_stages_go_on_after_one_that_fails_and_one_that_hangs(python, tmp_path):
    process = start(python, tmp_path, "ceilings", "gram", "ncu", BREAK="ceilings=fail gram=hang")
    output, _ = process.communicate()
    assert process.returncode == 0
    assert stages(output) == {"ceilings": "1", "gram": "over its time", "ncu": "ok"}
    assert set(results(output).values()) == {"missing"}


def test_a_stage_that_there_is_not_is_refused(tmp_path):
    shown = subprocess.run(
        [SCRIPT, "--dry", tmp_path / "out", "gram", "stpe"], capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert shown.stderr == "There is no stage stpe: bench/gpu.sh --list names them.\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("call", "most"), [("1", 400), ("2", 330)])
def test_the_time_limits_fit(call, most):
    listed = subprocess.run([SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout
    part = listed.split("call ")[int(call)]
    budget, *limits = (int(line.split()[1]) for line in part.splitlines())
    assert sum(limits) <= budget <= most


# --- tests on a GPU -------------------------------------------------------------------------------

SEEN = """
import sys, pytest
class Seen:
    @pytest.hookimpl(tryfirst=True)  # before those that need a GPU are left out
    def pytest_collection_modifyitems(self, items):
        for item in items:
            if item.get_closest_marker("gpu"):
                print("GPU", item.path)
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *FILES], [Seen()]))
"""


def test_each_file_that_marks_tests_has_some_that_run(python):
    files = tests.files(ROOT / "tests")
    shown = subprocess.run(
        [*python.split(), "-"],
        input=f"FILES = {files}\n{SEEN}",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    found = set(re.findall(r"^GPU (.*)$", shown.stdout, re.MULTILINE))
    marked = {path for path in files if "mark.gpu" in Path(path).read_text()} - {__file__}
    assert len(marked) > 5
    assert marked <= found, shown.stdout + shown.stderr


def test_files_that_import_what_is_marked_are_found(tmp_path):
    (tmp_path / "devices.py").write_text("import pytest\nGPU = pytest.mark.gpu\n")
    (tmp_path / "cases.py").write_text("from devices import GPU\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "test_a.py").write_text("def test():\n    from cases import CASES\n")
    (tmp_path / "test_b.py").write_text("import cases_of_others\n")
    assert tests.files(tmp_path) == [str(tmp_path / "sub" / "test_a.py")]


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("import time, sys\ntry: time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(2)", 2),
        ("import time\nwhile True:\n try: time.sleep(60)\n except KeyboardInterrupt: pass", -9),
        ("raise SystemExit(5)", 5),
    ],
    ids=["ends when interrupted", "does not end", "ends by itself"],
)
def test_pytest_is_interrupted_in_time(monkeypatch, tmp_path, program, status):
    monkeypatch.setattr(tests, "GRACE", 0.5)
    with (tmp_path / "output").open("w") as file:
        assert tests.run([sys.executable, "-S", "-c", program], 1.0, file) == status


@pytest.mark.parametrize(
    ("tool", "output", "count"),
    [
        ("memcheck", "ok\n========= ERROR SUMMARY: 0 errors\n", 0),
        ("synccheck", "========= ERROR SUMMARY: 12 errors\n", 12),
        (
            "racecheck",
            "=== RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n",
            3,
        ),
        ("memcheck", "killed before its end", None),
    ],
)
def test_what_a_sanitizer_counts(tool, output, count):
    assert sanitize.errors(output, tool) == count


# --- what is measured, and by which objects -------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "right"), [(1.0, True), (1.1, False), (float("nan"), False), (None, False)]
)
def test_a_kernel_that_differs_or_raises_is_seen(figures, found, right):
    def run() -> None:
        if found is None:
            raise RuntimeError("no kernel image is available")

    def results() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [torch.ones(3), torch.tensor([found or 0.0])], [torch.ones(3), torch.ones(1)]

    case = smoke.Case(run, lambda: None, results, 1e-3)
    assert smoke.try_case("a case", lambda: case, device.Rehearsal(), graphs=True) == right
    assert [line.get("differs") for line in report.read([figures])][:1] == ["a case"] * (not right)


def test_the_queue_is_kept_full_while_time_is_taken(monkeypatch):
    """The GPU sleeps before the first mark, for longer than the host takes for all that follows."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("mark")
            self.place = len(log)

        def elapsed_time(self, end: Event) -> float:
            return end.place - self.place

    def sleep(cycles: int) -> None:
        assert cycles > 3 * 1.5 * 2 * 2e6  # three calls of 2 ms, with something to spare
        log.append("sleep")

    def call() -> None:
        time.sleep(0.002)
        log.append("call")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert device.Cuda().milliseconds(call, 3) == [2, 2, 2]
    before = ["wait", "call", "wait"]  # how long the host takes
    assert log == [*before, "sleep", "mark", *["call", "mark"] * 3, "wait"]


def test_objects_are_not_made_again_of_the_same_sources(tmp_path):
    for folder in ("bench/gpu", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "prebuilt").mkdir()

    def prebuild() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "GPU_PYTHON": "no-python", "GPU_TORCH": "torch==1"}
        command = [tmp_path / "bench" / "gpu" / "prebuild.sh"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    hashed = subprocess.run(
        [tmp_path / "bench" / "gpu" / "sources.sh"], capture_output=True, text=True, check=True
    )
    made_of = f"{hashed.stdout.strip()} no-python torch==1 90\n"
    (tmp_path / "prebuilt" / "made-of.txt").write_text(made_of)
    assert prebuild().stdout == "prebuilt/ is of these sources.\n"
    with (tmp_path / "csrc" / "nnqp.h").open("a") as file:
        file.write("\n")
    again = prebuild()
    assert again.returncode == 1
    assert again.stderr.startswith("There is no no-python: say where it is")


# --- the report -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "result"),
    [
        (1.14, 1e-3, "pass"),
        (1.16, 1e-3, "fail"),
        (0.5, 3e-2, "fail"),  # fast and wrong
        (0.5, float("nan"), "fail"),
        (float("nan"), 1e-3, "fail"),
    ],
)
def test_a_figure_passes_if_it_is_right_and_meets_its_goal(figures, value, error, result):
    name = "projection / floor"
    report.figure(name, value, "x", check=report.Check(error, 1e-2))
    (line,) = report.read([figures])
    assert line["result"] == result
    (row,) = [row for row in report.table([line]) if name in row]
    assert row.split()[-1] == result


def test_the_table_has_wrong_results_without_a_goal(figures):
    report.figure("whatever", 1.0, "ms", check=report.Check(1.0, 0.1))
    report.figure("all is well", 1.0, "ms", check=report.Check(0.0, 0.1))
    rows = report.table(report.read([figures]))
    assert [row.split()[1] for row in rows if row.startswith("RESULT")].count("whatever") == 1
    assert not any("all is well" in row for row in rows)


def test_a_line_cut_off_is_left_out(figures, capsys):
    report.figure("one", 1.0)
    figures.write_text(figures.read_text() + '{"name": "tw')
    assert [line["name"] for line in report.read([figures])] == ["one"]
    assert "no JSON" in capsys.readouterr().out


def test_goals():
    assert len(BY_NAME) == len(GOALS)
    least, most = Goal("a", ">=", 0.95, ""), Goal("b", "<=", 0.0, "")
    assert (least.met(0.95), least.met(0.94), least.met(float("nan"))) == (True, False, False)
    assert (most.met(0), most.met(1), most.met(float("nan"))) == (True, False, False)
