"""The operator as torch sees it, the chunk table, and what the extension says of itself."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import ROOT

from cl_optim import _C
from cl_optim import functional as F
from cl_optim.ops import ewc_pull, library  # noqa: F401

HYPERPARAMETERS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "ewc_lambda": 0.5,
    "damping": 0.3,
    "penalty": "decoupled",
    "maximize": False,
    "stochastic": True,
}


def arguments(*, amsgrad: bool = True, protected: bool = True, shapes=((3, 2), (5,))) -> list:
    def tensors(count: int = 1) -> list:
        return [torch.rand(shape) for shape in shapes] if count else []

    return [
        tensors(),
        tensors(),
        tensors(),
        tensors(),
        tensors(amsgrad),
        tensors(protected),
        tensors(protected),
        [torch.empty(0) for _ in shapes],
        [torch.tensor(2.0) for _ in shapes],
        [torch.rand(3, *shape) for shape in shapes],
        [torch.rand(3).double() for _ in shapes],
        torch.tensor(0.1),
        torch.tensor(2.0),
        torch.tensor(0.0),
        torch.zeros(2, dtype=torch.float64),
    ]


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("protected", [False, True])
def test_opcheck(amsgrad, protected):
    torch.library.opcheck(
        torch.ops.cl_optim.ewc_adamw_.default,
        arguments(amsgrad=amsgrad, protected=protected),
        {**HYPERPARAMETERS, "amsgrad": amsgrad},
    )


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (1, lambda grads: grads[:1], "grads must hold 2 tensors, not 1"),
        (4, lambda _: [], "max_exp_avg_sqs must hold 2 tensors, not 0"),
        (6, lambda _: [], "anchors must hold 2 tensors, not 0"),
        (2, lambda m: [m[0], m[1].double()], r"exp_avgs\[1\] must be Float, .* not Double"),
        (2, lambda m: [m[0].bfloat16(), m[1]], r"exp_avg_sqs\[0\] must be BFloat16, not Float"),
        (5, lambda f: [f[0].t(), f[1]], r"importances\[0\] must have the shape of params\[0\]"),
        (
            5,
            lambda f: [torch.zeros(2, 260, dtype=torch.uint8), f[1]],
            r"importances\[0\] must be 260 bytes for each 256 elements of params\[0\]",
        ),
        (6, lambda a: [a[0], a[1].half()], r"anchors\[1\] must be Float, not Half"),
        (7, lambda c: c[:1], "compensations must hold 2 tensors, not 1"),
        (7, lambda c: [torch.zeros(3, 2), c[1]], r"compensations\[0\] must be empty"),
        (9, lambda rows: rows[:1], "memories must hold 2 tensors, not 1"),
        (10, lambda _: [], "coefficients must hold 2 tensors, not 0"),
        (11, lambda lr: lr.double(), "lr_tensor must be one float32 number"),
        (12, lambda s: s.double(), "grad_scale must be one float32 number"),
        (13, lambda _: torch.zeros(2), "found_inf must be one float32 number"),
        (14, lambda _: torch.zeros(2), "sums must be two float64 numbers"),
        (8, lambda s: [s[0], torch.tensor(2)], r"steps\[1\] must be one float32 number"),
        (0, lambda p: [p[0], p[1].to(torch.int32)], r"params\[1\] must be float32, float64"),
    ],
)
def test_the_operator_checks_before_it_writes(index, change, message):
    args = arguments()
    before = [[t.clone() for t in tensors] for tensors in args[:9]]
    bad = list(args)
    bad[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cl_optim.ewc_adamw_(*bad, **HYPERPARAMETERS, amsgrad=True)
    for tensors, old in zip(args[:9], before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors, old, strict=True))


FUNCTIONAL = ["params", "grads", "exp_avgs", "exp_avg_sqs", "importances", "anchors", "steps"]


BAD_INPUT = {
    "count of grads": ("grads must hold 2 tensors, not 1", "grads", lambda g: g[:1]),
    "count of exp_avgs": ("exp_avgs must hold 2 tensors, not 1", "exp_avgs", lambda m: m[:1]),
    "no anchors": ("anchors must hold 2 tensors, not 0", "anchors", lambda _: []),
    "count of steps": ("steps must hold 2 tensors, not 1", "steps", lambda s: s[:1]),
    "maxima": ("max_exp_avg_sqs must hold 2 tensors, not 1", "max_exp_avg_sqs", lambda m: m[:1]),
    "integers": (r"params\[1\] must be float32, .* not torch.int32",
                 "params", lambda p: [p[0], p[1].int()]),
    "meta": (r"params\[1\] is on meta, but params\[0\] is",
             "params", lambda p: [p[0], p[1].to("meta")]),
    "shape of a grad": (r"grads\[0\] must have the shape of params\[0\]",
                        "grads", lambda g: [g[0].t(), g[1]]),
    "dtype of a grad": (r"grads\[1\] must be float32, not torch.float16",
                        "grads", lambda g: [g[0], g[1].half()]),
    "sparse grad": (r"grads\[0\] must be a dense tensor",
                    "grads", lambda g: [g[0].to_sparse(), g[1]]),
    "meta grad": (r"grads\[1\] must be on the device of params",
                  "grads", lambda g: [g[0], g[1].to("meta")]),
    "shape of exp_avg": (r"exp_avgs\[1\] must have the shape of",
                         "exp_avgs", lambda m: [m[0], m[1][:4]]),
    "dtype of exp_avg": (r"exp_avgs\[1\] must be float32 or bfloat16",
                         "exp_avgs", lambda m: [m[0], m[1].double()]),
    "dtype of exp_avg_sq": (r"exp_avg_sqs\[0\] must be float32, not",
                            "exp_avg_sqs", lambda m: [m[0].bfloat16(), m[1]]),
    "shape of importance": (r"importances\[0\] must have the shape of",
                            "importances", lambda f: [f[0][:2], f[1]]),
    "codes": (r"importances\[0\] must be 260 bytes for each 256 elements of params\[0\]",
              "importances", lambda f: [torch.zeros(2, 260, dtype=torch.uint8), f[1]]),
    "dtype of anchor": (r"anchors\[1\] must be float32 or bfloat16, not",
                        "anchors", lambda a: [a[0], a[1].half()]),
    "dtype of step": (r"steps\[1\] must be one float32 number",
                      "steps", lambda s: [s[0], torch.tensor(2)]),
    "two steps": (r"steps\[1\] must be one float32 number",
                  "steps", lambda s: [s[0], torch.zeros(2)]),
    "lazy param": (r"params\[0\] is written and must not",
                   "params", lambda p: [torch._neg_view(p[0]), p[1]]),
    "lazy exp_avg": (r"exp_avgs\[1\] is written and must",
                     "exp_avgs", lambda m: [m[0], torch._neg_view(m[1])]),
    "penalty": ("penalty must be one of", "penalty", lambda _: "l1"),
    "lr": ("lr must be", "lr", lambda lr: -lr),
    "betas": (r"betas must be two numbers, not 1\.$", "betas", lambda _: (0.9,)),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("given", BAD_INPUT)
def test_the_functional_step_checks_before_it_writes(given, implementation):
    message, name, change = BAD_INPUT[given]
    args = arguments()
    lists = dict(zip(FUNCTIONAL, [*args[:4], *args[5:7], args[8]], strict=True))
    lists["max_exp_avg_sqs"] = args[4]
    before = {key: [t.clone() for t in tensors] for key, tensors in lists.items()}
    good = {**lists, "lr": 0.1, implementation: True}
    with pytest.raises(ValueError, match=f"^{message}"):
        F.ewc_adamw_(**{**good, name: change(good.get(name))})
    for key, tensors in lists.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, before[key], strict=True))
    F.ewc_adamw_(**good)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("name", ["grads", "importances", "anchors"])
def test_what_is_only_read_may_be_lazily_negated(name, implementation):
    results = []
    for lazy in (False, True):
        torch.manual_seed(0)
        args = arguments()
        lists = dict(zip(FUNCTIONAL, [*args[:4], *args[5:7], args[8]], strict=True))
        if lazy:
            lists[name] = [torch._neg_view(-t) for t in lists[name]]
        F.ewc_adamw_(**lists, lr=0.1, ewc_lambda=0.7, **{implementation: True})
        results.append(lists["params"])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_functional_of_no_tensors():
    F.ewc_adamw_([], [], [], [], [], [], [], lr=0.1)


def test_functional_under_compile():
    """The fakes let torch.compile trace through the operator; aot_eager needs no compiler."""

    def step(args: list) -> None:
        torch.ops.cl_optim.ewc_adamw_(*args, **HYPERPARAMETERS, amsgrad=True)

    torch.manual_seed(1)
    eager = arguments()
    torch.manual_seed(1)
    compiled = arguments()
    step(eager)
    torch.compile(step, backend="aot_eager", fullgraph=True)(compiled)
    for a, b in zip(eager[:9], compiled[:9], strict=True):
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


@given(
    numels=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 5000)), max_size=30),
    cuts=st.lists(st.floats(0, 1), max_size=6),
)
def test_pieces_cover_every_element_once(numels, cuts):
    units = _C.units(numels)
    bounds = sorted({0, units, *(int(cut * units) for cut in cuts)})
    seen = [torch.zeros(n, dtype=torch.int32) for n in numels]
    for first, last in itertools.pairwise(bounds):  # as threads or blocks take them
        pieces = _C.pieces(numels, first, last)
        assert sum(end - begin for _, begin, end in pieces) <= 256 * (last - first)
        for tensor, begin, end in pieces:
            assert begin % 256 == 0
            assert begin < end <= numels[tensor]
            seen[tensor][begin:end] += 1
    assert all((s == 1).all() for s in seen)


@pytest.mark.parametrize("operator", library.OPERATORS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_who_computes_an_operator_has_registered_it(operator, device_type):
    """No GPU needed: kernels are registered when they are loaded."""
    kind = library.OPERATORS[operator][device_type]
    if kind == "compiled" and device_type == "cuda" and not library.available("cuda"):
        pytest.skip(library.explain("cuda"))
    found = torch._C._dispatch_has_kernel_for_dispatch_key(
        f"cl_optim::{operator}", device_type.upper()
    )
    # Its reference is the implementation for a CPU.
    assert found == (bool(kind) or operator == "squared_grad_sum_")
    expected = device_type if kind == "compiled" else kind or "reference"
    if kind == "triton" and importlib.util.find_spec("triton") is None:
        expected = "reference"
    if operator != "squared_grad_sum_" or device_type == "cpu":  # which asks the GPU what it is
        assert library.choose(operator, device_type) == expected


def test_operators_are_there_without_kernels():
    code = """
import sys, warnings
sys.modules |= {"cl_optim._C": None, "cl_optim._C_cuda": None}
import torch, cl_optim
from cl_optim.ops import ewc_pull, library
warnings.simplefilter("ignore")
for operator in library.OPERATORS:
    print(getattr(torch.ops.cl_optim, operator).default._schema)
    assert library.choose(operator, "cpu") == "reference"
try:
    torch.ops.cl_optim.log8_decode_(torch.zeros(3), torch.zeros(1, 260, dtype=torch.uint8))
except NotImplementedError as error:
    assert "with arguments from the 'CPU' backend" in str(error)
else:
    raise SystemExit("an operator ran without a kernel")
print(cl_optim.functional.gram(torch.eye(2), torch.ones(2))[1].tolist())
"""
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    *schemas, product = shown.splitlines()
    assert len(schemas) == len(library.OPERATORS) == 11
    assert all(schema.startswith("cl_optim::") for schema in schemas)
    assert product == "[1.0, 1.0]"


def test_build_info():
    backend = library.backends()["cpu"]
    assert backend.available
    assert backend.reason == ""
    assert backend.info["torch_abi_target"] == "2.10"
    assert backend.info["simd"] in ("avx512", "avx2", "baseline")
    cuda = library.backends()["cuda"]
    assert cuda.available or cuda.reason.endswith(".")


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    environment = {**os.environ, "CL_OPTIM_REQUIRE": "", "CL_OPTIM_CUDA": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


class TestBuild:
    NO_COMPILER = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}  # noqa: RUF012

    def test_without_a_compiler_the_package_is_installed_all_the_same(self, tmp_path):
        result = build(tmp_path, **self.NO_COMPILER)
        assert result.returncode == 0, result.stderr
        assert not list(tmp_path.rglob("*.so"))

    def test_a_required_backend_that_cannot_be_built_fails_the_build(self, tmp_path):
        assert build(tmp_path, **self.NO_COMPILER, CL_OPTIM_REQUIRE="cpu").returncode != 0

    def test_an_unknown_backend_cannot_be_required(self, tmp_path):
        result = build(tmp_path, CL_OPTIM_REQUIRE="cpu,tpu")
        assert result.returncode != 0
        assert "CL_OPTIM_REQUIRE may name cpu and cuda, not tpu." in result.stderr

    def test_cuda_is_0_or_1(self, tmp_path):
        result = build(tmp_path, CL_OPTIM_CUDA="yes")
        assert result.returncode != 0
        assert "CL_OPTIM_CUDA must be 0 or 1, not 'yes'." in result.stderr


class TestArchitectures:
    """What nvcc is asked to compile for: a script in its place notes it, and fails."""

    NVCC = """#!/bin/sh
case "$1" in
--version) echo nvcc 13.0 ;;
--list-gpu-arch) printf 'compute_%s\\n' 75 80 86 90 100 120 ;;
-c) echo "$@" >> "$NOTES"; exit 1 ;;
esac
"""
    GPUS = """
import torch
torch.version.cuda = "13.0"
torch.cuda.device_count = lambda: len({0})
torch.cuda.get_device_capability = lambda device: {0}[device]
"""

    def compiled_for(
        self, tmp_path: Path, gpus: list[tuple[int, int]], code: int = 0, **environment: str
    ) -> list[str]:
        home, site = tmp_path / "cuda", tmp_path / "site"
        for folder in (home / "bin", home / "include", site):
            folder.mkdir(parents=True)
        (home / "include" / "cuda_runtime.h").touch()
        (home / "bin" / "nvcc").write_text(self.NVCC)
        (home / "bin" / "nvcc").chmod(0o755)
        (site / "sitecustomize.py").write_text(self.GPUS.format(gpus))
        notes = tmp_path / "notes"
        notes.touch()
        result = build(
            tmp_path,
            **{"CUDA_HOME": str(home), "PYTHONPATH": str(site), "NOTES": str(notes)},
            **{**TestBuild.NO_COMPILER, "CL_OPTIM_CUDA": "", **environment},
        )
        assert result.returncode == code, result.stderr
        first = notes.read_text().partition("\n")[0]
        return re.findall(r",code=(\w+)", first)

    def test_by_default_for_the_gpus_that_are_there(self, tmp_path):
        found = self.compiled_for(tmp_path, [(9, 0), (8, 6), (9, 0)])
        assert found == ["sm_86", "sm_90", "compute_90"]

    def test_without_a_gpu_for_none(self, tmp_path):
        assert self.compiled_for(tmp_path, []) == []

    def test_a_gpu_newer_than_the_toolkit(self, tmp_path):
        assert self.compiled_for(tmp_path, [(12, 1)]) == ["sm_120", "compute_120"]

    def test_a_gpu_too_old_for_the_toolkit(self, tmp_path):
        assert self.compiled_for(tmp_path, [(7, 0)]) == []

    @pytest.mark.parametrize("ask", [{"CL_OPTIM_CUDA": "1"}, {"CL_OPTIM_REQUIRE": "cuda"}], ids=str)
    def test_for_all_where_asked(self, tmp_path, ask):
        found = self.compiled_for(tmp_path, [], code=1, **ask)
        assert found == ["sm_80", "sm_90", "sm_100", "compute_100"]

    def test_for_what_is_named(self, tmp_path):
        found = self.compiled_for(tmp_path, [(8, 6)], code=1, CL_OPTIM_CUDA_ARCHS="80,90")
        assert found == ["sm_80", "sm_90", "compute_90"]

    def test_left_out_and_asked_for(self, tmp_path):
        result = build(tmp_path, CL_OPTIM_CUDA_ARCHS="90")
        assert result.returncode != 0
        assert "CL_OPTIM_CUDA=0 leaves out the CUDA kernels that" in result.stderr


@pytest.mark.parametrize("module", ["cl_optim", "cl_optim.retention", "cl_optim.integrations"])
def test_importing_loads_nothing_heavy(module):
    code = f"import sys, {module}; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["triton", "matplotlib", "transformers", "sklearn", "rich", "scipy"]
    command = [sys.executable, "-c", code, *heavy]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    alone = subprocess.run(
        [sys.executable, "-c", code.replace(module, "torch"), *heavy],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert loaded == alone
