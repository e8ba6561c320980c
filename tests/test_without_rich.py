"""What works where rich is not installed, and what refuses in a sentence."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETUP = """
import sys
sys.modules["rich"] = None  # an import of it fails
import torch, cl_optim, cl_optim.integrations
from cl_optim.importance.report.data import report_data
from cl_optim.importance.report.figures import write_csv
from cl_optim.importance.report.text import render_text
from cl_optim.retention import CSVLogger, Evaluation, RetentionGuard, RichLogger, diagnose
"""
REMEDY = 'needs rich: pip install "cl-optim[cli]"'


def run(program: str, folder: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SETUP + program], cwd=folder, capture_output=True, text=True
    )


def test_training_and_its_reports_need_none(tmp_path):
    result = run(
        """
model = torch.nn.Linear(2, 2)
optimizer = cl_optim.EWCAdamW(model.named_parameters())
values = iter([1.0, 0.5])
guard = RetentionGuard(
    model, optimizer, [Evaluation("old", lambda model: next(values))], every=1,
    loggers=[CSVLogger("guard.csv")],
)
guard.start()
guard.step()
report = guard.report()
print(report)
repr(report)
log = cl_optim.ImportanceLog("log")
log.record("a", cl_optim.Importance({"weight": torch.ones(2, 2)}, 1))
log.report("page.html")
write_csv(report_data(log), log.path / "figures.csv")
print(diagnose(["a b"], ["b c"]))
""",
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "old    old        1      0.5      50.0%   forgotten" in result.stdout
    assert "Diagnosis(" in result.stdout


@pytest.mark.parametrize(
    ("program", "purpose"),
    [
        ("RichLogger()", "RichLogger"),
        ("render_text({})", "A report in the terminal"),
    ],
)
def test_what_draws_refuses_in_a_sentence(program, purpose, tmp_path):
    result = run(program, tmp_path)
    assert result.stderr.splitlines()[-1] == f"ModuleNotFoundError: {purpose} {REMEDY}"
