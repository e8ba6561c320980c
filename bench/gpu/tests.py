"""Do all tests pass that need a GPU?

`python -m gpu.tests SECONDS OUTPUT CACHE [pytest's arguments…]` runs those marked `gpu`, in several
processes, and with `--lf` those that failed before. After SECONDS it interrupts pytest, which then
says what it knows. The rehearsal takes a few tests that need none.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import IO

from gpu import report

NO_TESTS = 5  # pytest's exit status
GRACE = 10.0  # seconds for what pytest says last
ROOT = Path(__file__).parents[2]
PROCESSES = {"cuda": "8", "cpu": "0"}
REHEARSED = "test_nnqp.py", "one_row or only_violated"  # a file, and a part of its tests' names


def files(folder: Path) -> list[str]:
    """The test files with tests marked `gpu`, themselves or by a module that they import."""
    sources = {path: path.read_text() for path in sorted(folder.rglob("*.py"))}
    marked = {path for path, text in sources.items() if "mark.gpu" in text}
    while True:
        names = "|".join(sorted(path.stem for path in marked)) or "$."
        imports = re.compile(rf"^\s*(?:from|import) (?:\S+\.)?(?:{names})\b", re.MULTILINE)
        more = {path for path, text in sources.items() if imports.search(text)} - marked
        if not more:
            break
        marked |= more
    return [str(path) for path in sorted(marked) if path.name.startswith("test_")]


def outcome(junit: Path) -> dict[str, int]:
    """How many tests passed, and how many did not."""
    with contextlib.suppress(FileNotFoundError):
        suites = list(xml.etree.ElementTree.parse(junit).getroot().iter("testsuite"))
        count = {
            key: sum(int(suite.get(key, 0)) for suite in suites)
            for key in ("tests", "failures", "errors", "skipped")
        }
        failed = count["failures"] + count["errors"]
        return {"pass": count["tests"] - failed - count["skipped"], "fail": failed}
    return {"pass": 0, "fail": 0}


def run(command: list[str], seconds: float, output: IO[str]) -> int:
    """Run pytest, and interrupt it when the time is over; its exit status."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # a process for each core, or so
        stdout=output,
        stderr=subprocess.STDOUT,
        # A shell may have started us to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> None:
    seconds, output, cache, *more = sys.argv[1:]
    device = os.environ.get("DEVICE", "cuda")
    junit = Path(cache) / "tests.xml"
    junit.unlink(missing_ok=True)
    command = [*report.python(), "-m", "pytest", "-q", "-n", PROCESSES[device]]
    # One file that cannot be imported there, for a package that is missing, keeps no other back.
    command += [
        "--continue-on-collection-errors",
        "-o",
        f"cache_dir={cache}",
        f"--junitxml={junit}",
    ]
    if device == "cuda":
        command += ["-m", "gpu", *more, *files(ROOT / "tests")]
    else:
        name, part = REHEARSED
        command += ["-m", "not gpu", "-k", part, *more, *map(str, ROOT.glob(f"tests/**/{name}"))]
    with Path(output).open("a") as file:
        print(*command, file=file, flush=True)
        status = run(command, float(seconds), file)
    print("".join(Path(output).read_text().splitlines(keepends=True)[-40:]))
    if "--lf" in more:
        sys.exit(0 if status == NO_TESTS else status)
    found = outcome(junit)
    report.figure("tests that pass", found["pass"])
    report.figure("tests that fail", found["fail"])
    report.figure("runs of the tests that did not finish", int(status not in (0, 1)))
    sys.exit(status)


if __name__ == "__main__":
    main()
