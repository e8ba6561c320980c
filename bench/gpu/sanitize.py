"""Do the kernels read and write only what is theirs, without races? By compute-sanitizer.

`python -m gpu.sanitize OUTPUT memcheck|racecheck|synccheck [CASE…]`: cases of smoke.py; a rehearsal
runs them without it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from gpu import report

FIGURES = {
    "memcheck": "memcheck errors",
    "racecheck": "racecheck errors of the quadratic program",
    "synccheck": "synccheck errors of the quadratic program",
}


def errors(output: str, tool: str) -> int | None:
    """How many the tool's summary counts; None where it has none."""
    summary = "RACECHECK SUMMARY" if tool == "racecheck" else "ERROR SUMMARY"
    found = re.findall(rf"{summary}: (\d+) ", output)
    return int(found[-1]) if found else None


def main() -> None:
    output, tool, *names = sys.argv[1:]
    sanitizer = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
    script = [*report.python(), "-m", "gpu.smoke", *names]
    real = os.environ.get("DEVICE", "cuda") == "cuda"
    if not real:
        print("Not here:", *sanitizer)
    # Every tensor in memory of its own, so that what lies beside it is not allocated.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*sanitizer, *script] if real else script
    with Path(output).open("a") as file:
        print(*command, file=file, flush=True)
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:  # as they come: the time limit may end this
            file.write(line)
            file.flush()
            lines.append(line)
    status = process.wait()
    print("".join(lines[-30:]))
    count = errors("".join(lines), tool)
    if count is not None:  # of a script that went through to its end
        report.figure(FIGURES[tool], count, check=report.Check(float(status != 0), 0.0))
    sys.exit(status)


if __name__ == "__main__":
    main()
