"""The Triton kernels without a GPU: interpreted on the CPU, and compiled for three GPUs.

Both in processes of their own: a process interprets either everything or nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}

SPILLS = 128  # bytes of registers that any kernel may keep in local memory
# Earlier ones take a few more registers, and tensor cores for float64 on sm_80 only.
IS_RECENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=TESTS.parent, env={**ENVIRONMENT, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_interpreted():
    # Triton 3.6 uses what NumPy warns of, and from 2.4 on refuses.
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore:Conversion of an array"]
    result = run("-m", "pytest", *options, "tests/gram_interpreted.py", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, int]]]:
    result = run(str(TESTS / "gram_compiled.py"), "80", "90", "100", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_compiled_within_the_spill_budget(compiled, capability):
    kernels = compiled[str(capability)]
    for name, kernel in kernels.items():
        assert kernel["spills"] <= SPILLS, (name, kernel)
    # Three blocks of 128 threads share the 65 536 registers of a multiprocessor.
    assert kernels["pairs, 11"]["registers"] <= (168 if IS_RECENT else 184), kernels["pairs, 11"]
    # Loads of the next elements are under way while these are multiplied.
    for name in ("pairs, 2 odd", "pairs, 11", "pairs, 11 bfloat16", "tiles, 21", "tiles, 129"):
        assert kernels[name]["copies"] > 0, (name, kernels[name])
    for name in ("tiles, 21", "tiles, 129", "tiles, 129 odd", "tiles, 129 float64"):
        if IS_RECENT or capability == 80:
            assert kernels[name]["float64_tensor_core"] > 0, (name, kernels[name])
    for name in ("dots, 11", "combine, 11"):
        assert kernels[name]["wide_loads"] > 0, (name, kernels[name])
