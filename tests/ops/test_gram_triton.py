"""The Triton kernels without a GPU: interpreted on the CPU, and compiled for three GPUs.

Both in processes of their own: a process interprets either everything or nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from paths import HELPERS, KERNELS, ROOT

pytest.importorskip("triton")
import triton

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)])}

SPILLS = 128  # bytes of registers that any kernel may keep in local memory
# Earlier ones take a few more registers, and no tensor cores for float64 on sm_100.
IS_RECENT = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_interpreted():
    # Triton 3.6 uses what NumPy warns of, and from 2.4 on refuses.
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-W", "ignore:Conversion of an array"]
    result = run(
        "-m", "pytest", *options, str(KERNELS / "gram_interpreted.py"), TRITON_INTERPRET="1"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict[str, dict[str, int]]]:
    environment = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    result = run(str(KERNELS / "gram_compiled.py"), "80", "90", "100", **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(params=[80, 90, 100])
def capability(request) -> int:
    return request.param


@pytest.fixture
def of_one(compiled, capability) -> dict[str, dict[str, Any]]:
    """What was compiled for one capability, widths of accesses as numbers."""
    return {
        name: kernel | {key: {int(n) for n in kernel[key]} for key in ("loads", "stores", "copies")}
        for name, kernel in compiled[str(capability)].items()
    }


def test_compiled_within_the_spill_budget(of_one):
    for name, kernel in of_one.items():
        assert kernel["spills"] <= SPILLS, (name, kernel)
    # Three blocks of 128 threads share the 65 536 registers of a multiprocessor.
    registers = of_one["pairs, 10 float32"]["registers"]
    assert registers <= (168 if IS_RECENT else 184), registers


def test_products_of_many_rows_are_of_the_tensor_cores(of_one, capability):
    has_them = IS_RECENT or capability < 100
    for name, kernel in of_one.items():
        expected = has_them and name.startswith("tiles")
        assert (kernel["float64_tensor_core"] > 0) == expected, (name, kernel)


def test_aligned_arrays_are_accessed_in_16_bytes(of_one):
    """Or in all that a thread has of a row. Loads are ahead of the products, by copies."""
    for name, kernel in of_one.items():
        loads, stores, copies = (kernel[key] for key in ("loads", "stores", "copies"))
        kind = name.split(",")[0]
        if "odd" in name or kind == "total":
            continue
        if kind == "pairs":
            assert copies == set(kernel["parts"]), (name, kernel)
        elif kind == "tiles" and "16" not in name:
            assert copies == {16}, (name, kernel)
        else:
            assert 16 in loads, (name, kernel)
        if kind != "dots":  # it has few elements of the gradient for each thread
            assert min(loads) >= 8, (name, kernel)  # entries of the table
        if kind == "combine":
            assert stores == {16}, (name, kernel)


def test_odd_arrays_are_loaded_ahead_too(of_one):
    for name, kernel in of_one.items():
        if name.startswith(("pairs", "tiles")) and "odd" in name and "16" not in name:
            assert kernel["copies"], (name, kernel)
