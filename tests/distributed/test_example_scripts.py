"""The scripts in examples/, each in two processes, at their smallest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = ("ddp", "fsdp2", "accelerate_fsdp2", "trainer", "lightning_fsdp2")


def run(name: str, folder: Path) -> str:
    launcher = [] if name.startswith("lightning") else (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    )  # fmt: skip
    command = [
        sys.executable, *launcher, str(EXAMPLES / f"{name}.py"),
        "--steps", "6", "--folder", str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_each_script_is_tried():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, "language_model"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script(name, tmp_path):
    said = run(name, tmp_path)
    assert re.search(r"old +old +\d.*\d%", said), said
    assert re.search(r"new +new +\d.*\d%", said), said
    if not name.startswith("lightning"):
        assert float(re.search(r"penalty: (\S+)", said)[1]) > 0.0
    if name in ("ddp", "fsdp2"):
        assert (tmp_path / "importance" / "records").is_dir()
    if name == "fsdp2":
        files = [path.name for path in next((tmp_path / "guard").glob("step-*")).iterdir()]
        assert sorted(files) == ["rank-0-of-2.pt", "rank-1-of-2.pt"]
