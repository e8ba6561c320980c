"""The Triton kernel of squared_grad_sum_: interpreted, compiled, and run where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import HELPERS, KERNELS, ROOT
from squared_grad_cases import CASES, Case, arguments, assert_right

from cl_optim import functional as F
from cl_optim.ops import squared_grad

pytest.importorskip("triton", reason="torch for the CPU alone comes without Triton")

from cl_optim.ops import squared_grad_triton as launch
from cl_optim.ops import squared_grad_triton_tiles as tiles

SPILLS = 128  # bytes of registers that any kernel may keep in local memory
SHARED_MEMORY = {80: 163, 90: 227, 100: 227}  # KiB that one program may take


def python(*arguments: str, **environment: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HELPERS)]),
        **environment,
    }
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_interpreted():
    file = str(KERNELS / "squared_grad_interpreted.py")
    # Triton 3.6 uses what NumPy warns of, and from 2.4 on refuses.
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore:Conversion of an array"]
    printed = python("-m", "pytest", *options, file, TRITON_INTERPRET="1")
    assert " passed" in printed
    assert "skipped" not in printed


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiles_within_the_spill_budget(architecture, tmp_path):
    """All of the table, with rows of any length; the other arguments' choices once each."""
    script = str(KERNELS / "triton_compilation.py")
    cache = str(tmp_path)
    printed = python(script, str(architecture), TRITON_CACHE_DIR=cache, TRITON_INTERPRET="0")
    for name, made in json.loads(printed).items():
        assert made["spilled"] <= SPILLS, (name, made)
        assert not made["serialized"], name
        # Loads that are not pipelined take no more than a block of tokens.
        assert made["pipelined"] <= made["shared"] <= SHARED_MEMORY[architecture] * 1024, name
        assert_wide(name, made, architecture)


def assert_wide(name: str, made: dict[str, Any], architecture: int) -> None:
    """Memory is accessed in 16 bytes, except results in rows that are not multiples of them."""
    loads, stores, copies = ({int(n) for n in made[key]} for key in ("loads", "stores", "copies"))
    if not name.startswith("reduction"):
        by_descriptor = "descriptors" in name
        assert (made["by_descriptor"] > 0) == by_descriptor, name
        # Tensor cores from 9.0 on want TF32 transposed, and only that.
        narrow = {4} if "tf32" in name and architecture >= 90 else {16}
        assert copies == (set() if by_descriptor else narrow), (name, made)
    assert 16 in loads | stores, (name, made)
    if made["even"] and "one feature" not in name:
        # A thread of the reduction has 4 numbers of a row or more.
        assert min(stores) >= (8 if name.startswith("reduction") else 16), (name, made)


FEATURES = st.sampled_from([1, 16, 63, 64, 65, 127, 128, 129, 768, 50257])


@given(
    precision=st.sampled_from(list(tiles.CONFIGS)),
    features=st.tuples(FEATURES, FEATURES),
    tokens=st.none() | st.integers(1, 4096),
    capability=st.integers(8, 12),
    descriptors=st.booleans(),
)
def test_the_choice_is_in_the_table(precision, features, tokens, capability, descriptors):
    config = tiles.choose(
        precision, *features, tokens, capability=capability, descriptors=descriptors
    )
    row = tiles.TABLE[{9: 90, 10: 100, 11: 100}.get(capability, 80), precision]
    assert config in {choice.config for choice in row.values()}
    assert config in tiles.CONFIGS[precision]
    assert not config.descriptors or descriptors


@pytest.mark.parametrize(
    ("sizes", "options", "kind"),
    [
        ((65, 65, 100), {"descriptors": True}, "wide"),
        ((65, 65, 512), {"descriptors": False}, "wide"),
        ((65, 65, 512), {"descriptors": True}, "long"),
        ((65, 65, 32), {"descriptors": True}, "short"),
        ((65, 65, None), {"descriptors": False}, "packed"),
        ((64, 65, None), {"descriptors": False}, "narrow out"),
        ((64, 65, 512), {"descriptors": True}, "narrow out"),
        ((65, 64, 20), {"descriptors": True}, "narrow in"),
        ((64, 64, None), {"descriptors": False}, "narrow"),
    ],
)
def test_each_row_of_the_table_is_reached(sizes, options, kind):
    for capability, architecture in ((8, 80), (9, 90), (10, 100), (12, 80)):
        for precision in tiles.CONFIGS:
            row = tiles.TABLE[architecture, precision]
            # What a row does not tell apart it has under a more general name.
            general = "narrow" if "narrow" in kind and "narrow" in row else "wide"
            expected = row.get(kind, row[general])
            config = tiles.choose(precision, *sizes, capability=capability, **options)
            assert config == expected.config, (architecture, precision)


def test_estimates_are_percentages():
    for row in tiles.TABLE.values():
        for choice in row.values():
            assert 0 < choice.percent[0] < choice.percent[1] < 100


@given(
    count=st.integers(1, 2000),
    samples=st.integers(1, 200),
    blocks_of_each=st.integers(1, 40),
    processors=st.integers(1, 200),
)
def test_schedule(count, samples, blocks_of_each, processors):
    plan = tiles.schedule(count, samples, samples * blocks_of_each, processors)
    assert plan.whole + plan.shared == count
    assert 1 <= plan.shares <= samples
    assert plan.programs >= count
    # Sharing never takes a wave more than there was, and needs no more memory than one wave.
    assert -(-plan.programs // processors) == -(-count // processors)
    assert plan.shared * plan.shares <= processors


def test_schedule_shares_the_last_wave():
    # 768 × 768 has 36 tiles of 128 × 128, 768 × 3072 has 144, and an H100 132 multiprocessors
    assert tiles.schedule(36, 8, 64, 132) == tiles.Schedule(0, 36, 3)
    assert tiles.schedule(144, 8, 64, 132) == tiles.Schedule(132, 12, 8)
    assert tiles.schedule(132, 8, 64, 132) == tiles.Schedule(132, 0, 1)
    assert tiles.schedule(100, 8, 64, 132) == tiles.Schedule(100, 0, 1)
    assert tiles.schedule(36, 1, 512, 132) == tiles.Schedule(36, 0, 1)
    assert tiles.schedule(36, 8, 8, 132) == tiles.Schedule(36, 0, 1)


# Tensor cores cut off where float32 arithmetic rounds.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 3e-5, torch.float16: 3e-5}


@pytest.mark.gpu
class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def _reset_sync_debug_mode(self):
        yield
        torch.cuda.set_sync_debug_mode("default")

    @pytest.fixture
    def float32_products(self):
        matmul = torch.backends.cuda.matmul  # its attributes are not ones that monkeypatch can undo
        before = matmul.fp32_precision
        yield matmul
        matmul.fp32_precision = before

    @staticmethod
    def summed(case: Case) -> tuple:
        """Arguments and results of a call in which any wait of the host is an error."""
        out, a, b, weight_grad, cu_seqlens = arguments(case, "cuda")
        torch.cuda.set_sync_debug_mode("error")
        F.squared_grad_sum_(out, a, b, weight_grad, cu_seqlens)
        torch.cuda.set_sync_debug_mode("default")
        return out, weight_grad, a, b, cu_seqlens

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_cases(self, case):
        out, weight_grad, a, b, cu_seqlens = self.summed(case)
        one_token = case.lengths is None and case.tokens == 1
        assert squared_grad.choose(out, a, cu_seqlens) == ("reference" if one_token else "triton")
        assert_right(out, a, b, weight_grad, cu_seqlens, RTOL[case.dtype])

    @pytest.mark.parametrize("precision", tiles.CONFIGS)
    def test_each_configuration(self, precision, float32_products):
        float32_products.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        dtype = torch.bfloat16 if precision == "half" else torch.float32
        case = Case(9, 600, 136, 264, dtype)
        for config in tiles.CONFIGS[precision]:
            if config.descriptors and torch.cuda.get_device_capability() < (9, 0):
                continue
            out, a, b, weight_grad, _ = arguments(case, "cuda")
            launch.squared_grad_sum_(out, a, b, weight_grad, config=config)
            if precision == "tf32":  # 10 bits of mantissa
                squares = torch.einsum("nto,nti->noi", b.double(), a.double()).square().sum(0)
                torch.testing.assert_close(out.double(), squares + 2, rtol=1e-2, atol=1.0)
            else:
                assert_right(out, a, b, weight_grad, rtol=RTOL[case.dtype])

    def test_many_tiles(self):
        """Several waves, the last one shared."""
        case = Case(8, 128, 768, 3072, torch.bfloat16)
        out, weight_grad, a, b, _ = self.summed(case)
        assert_right(out, a, b, weight_grad, rtol=RTOL[case.dtype])

    def test_more_sequences_than_are_read_at_once(self):
        case = Case(lengths=[1] * 3000 + [40], dtype=torch.bfloat16)
        out, weight_grad, a, b, cu_seqlens = self.summed(case)
        assert_right(out, a, b, weight_grad, cu_seqlens, RTOL[case.dtype])

    def test_the_same_bits_each_time(self):
        case = Case(9, 130, 140, 72, torch.bfloat16)
        (first, *_), (second, *_) = self.summed(case), self.summed(case)
        assert torch.equal(first, second)

    def test_reference_agrees(self):
        out, a, b, weight_grad, cu_seqlens = arguments(Case(lengths=[300, 0, 5]), "cuda")
        squared_grad.squared_grad_sum_reference_(out, a, b, weight_grad, cu_seqlens)
        assert_right(out, a, b, weight_grad, cu_seqlens)

    def test_autograd_is_left_alone(self):
        out, a, b, weight_grad, _ = arguments(Case(), "cuda")
        versions = out._version, weight_grad._version
        F.squared_grad_sum_(out, a.requires_grad_(), b.requires_grad_(), weight_grad)
        assert not out.requires_grad
        assert (out._version, weight_grad._version) == tuple(v + 1 for v in versions)

    def test_the_operator_is_the_function(self):
        out, a, b, weight_grad, cu_seqlens = arguments(Case(lengths=[30, 0, 5]), "cuda")
        torch.ops.cl_optim.squared_grad_sum_(out, a, b, weight_grad, cu_seqlens)
        assert_right(out, a, b, weight_grad, cu_seqlens)

    def test_float64_takes_the_reference(self):
        out = torch.zeros(4, 5, dtype=torch.float64, device="cuda")
        assert squared_grad.choose(out, torch.zeros(3, 2, 5, device="cuda")) == "reference"

    def test_offsets_beyond_31_bits(self):
        rows = 2**31 // 4096 // 64 + 1  # of 64 tokens: the last sample lies past 2³¹ elements
        a = torch.zeros(rows, 64, 4096, dtype=torch.bfloat16, device="cuda")
        b = torch.zeros(rows, 64, 64, dtype=torch.bfloat16, device="cuda")
        a[-1, -1, -1], b[-1, -1, -1] = 2, 3
        out = F.squared_grad_sum_(torch.zeros(64, 4096, device="cuda"), a, b)
        assert out[-1, -1] == 36
        assert out.sum() == 36
