"""The CUDA kernels of the step without a GPU: the very source file, by a host compiler.

cuda_shim/ stands in for CUDA: the threads of a block take turns and meet at shuffles and barriers.
That says what the kernels compute, not how fast, nor that a compiler for GPUs agrees.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import subprocess
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ewc_adamw_cases import OFF_DEFAULT, PENALTIES, Problem, make_params
from format_cases import IMPORTANCE, MOMENTS, ROUNDING, SHAPES, assert_close, make
from paths import CSRC, KERNELS
from torch import Tensor

from cl_optim import EWCAdamW
from cl_optim.ops import ewc_pull, formats
from cl_optim.optim.launch import gather

DTYPES_OF_PULLS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\(", re.DOTALL)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    folder = tmp_path_factory.mktemp("kernels")
    source, launches = LAUNCH.subn(
        r"shim::launch(\1, \2)(", (CSRC / "ewc_adamw_cuda.cu").read_text()
    )
    assert launches == 3
    (folder / "kernels.h").write_text(source)
    target = folder / f"emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [
        KERNELS / "cuda_shim",
        CSRC,
        sysconfig.get_path("include"),
        Path(torch.__file__).parent / "include",
    ]
    command = os.environ.get("CXX", "c++").split()
    command += ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    command += ["-fvisibility=hidden", f'-DKERNELS="{folder / "kernels.h"}"']
    command += [f"-I{include}" for include in includes]
    command += [str(KERNELS / "cuda_shim" / "module.cpp"), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spec = importlib.util.spec_from_file_location("emulated", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_word_about_rounded_anchors():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="anchor_dtype rounds")
        yield


@torch.no_grad()
def emulated_step(kernels: ModuleType, optimizer: EWCAdamW) -> None:
    step = optimizer._next_step()
    for batch in gather(step):
        params = batch.group["params"]
        plan = kernels.Plan(params, batch.members, [], batch.states, batch.is_protected, False)
        assert plan.possible
        inputs = optimizer._launch.inputs(step, batch)
        rows = list(inputs.memories), list(inputs.coefficients)
        size = plan.workspace(inputs.sums is not None)
        workspace = torch.full((size,), 0xA5, dtype=torch.uint8)
        call = (params, *rows, workspace, *inputs[2:], vars(step.hypers[batch.number]))
        assert kernels.take_step([plan], [call])


class Pair:
    """The same optimizer twice: the CPU's kernels, and the GPU's."""

    def __init__(self, start: Problem, dtype: torch.dtype, penalty: str, **options: Any) -> None:
        self.problems = [start.copy(dtype), start.copy(dtype)]
        self.ours, self.emulated = (
            make(problem, penalty, {}, fused=True, **options) for problem in self.problems
        )

    def step(self, kernels: ModuleType, number: int, share: float = 5e-3) -> None:
        for problem in self.problems:
            problem.set_gradients(number, torch.float32)
        self.ours.step()
        emulated_step(kernels, self.emulated)
        assert_close(self.ours, self.emulated, share)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_format(kernels, dtype, penalty):
    start = Problem.of(make_params(SHAPES, torch.float32))
    roundings = ROUNDING if dtype == torch.bfloat16 else ROUNDING[:1]
    for number, (importance, anchor, moments, rounding) in enumerate(
        itertools.product(IMPORTANCE, (None, "float32", "bfloat16"), MOMENTS, roundings)
    ):
        pair = Pair(
            start,
            dtype,
            penalty,
            importance_dtype=importance,
            anchor_dtype=anchor,
            state_dtype=moments,
            rounding=rounding,
            importance_damping=0.4,
            amsgrad=number % 2 == 1,
            maximize=number % 3 == 1,
        )
        frozen = [optimizer.freeze(0.1) for optimizer in (pair.ours, pair.emulated)]
        assert frozen[0] == frozen[1] > 0
        before = [p.detach().clone() for p in pair.problems[1].params]
        pair.step(kernels, 0)
        for protected, old in zip(pair.emulated.protected(), before, strict=True):
            assert torch.equal(protected.param[protected.frozen], old[protected.frozen])


@pytest.mark.parametrize("penalty", PENALTIES)
def test_float64(kernels, penalty):
    pair = Pair(Problem.of(make_params(SHAPES, torch.float64)), torch.float64, penalty)
    for number in range(3):
        pair.step(kernels, number, share=0.0)


def test_without_protection(kernels):
    start = Problem.of(make_params(SHAPES, torch.float32))
    sides = []
    for emulate in (False, True):
        problem = start.copy(torch.float32)
        optimizer = EWCAdamW(problem.params, **OFF_DEFAULT, state_dtype="8bit", fused=True)
        for number in range(3):
            problem.set_gradients(number, torch.float32)
            if emulate:
                emulated_step(kernels, optimizer)
            else:
                optimizer.step()
        sides.append(optimizer)
    assert_close(*sides, share=5e-3)


@pytest.mark.parametrize("moved", ["param", "grad", "exp_avg", "importance", "anchor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_memory_that_is_not_aligned(kernels, dtype, moved):
    """One array begins one element into its memory: no vector accesses of it."""
    start = Problem.of(make_params([(700,), (256,)], dtype))
    pair = Pair(start, dtype, "gradient")
    for number in range(2):
        for problem in pair.problems:
            problem.set_gradients(number, dtype)
        pair.ours.step()
        (optimizer, problem) = pair.emulated, pair.problems[1]
        for param in problem.params:
            state = optimizer.state[param]
            if moved == "param":
                param.data = off_alignment(param.data)
            elif moved == "grad":
                param.grad = off_alignment(param.grad)
            elif moved in state:  # moments begin with the first step
                state[moved] = off_alignment(state[moved])
        emulated_step(kernels, optimizer)
        assert_close(pair.ours, optimizer, share=0.0 if dtype == torch.float64 else 5e-3)


def off_alignment(tensor: Tensor) -> Tensor:
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor).copy_(tensor)
    assert moved.data_ptr() % 16 != 0
    return moved


@pytest.mark.parametrize("projected", [False, True])
def test_more_tensors_than_a_launch_takes(kernels, projected):
    start = Problem.of(make_params([(3,)] * 800 + [(70_000,)], torch.float32))
    pair = Pair(start, torch.float32, "gradient", track_penalty=True)
    if projected:
        for problem, optimizer in zip(pair.problems, (pair.ours, pair.emulated), strict=True):
            optimizer._projection = rows_for(problem.params, torch.float32)
    with torch.no_grad():
        for problem in pair.problems:
            for param in problem.params:
                param.add_(0.1)
    pair.step(kernels, 0)
    assert pair.ours.last_penalty > 0
    torch.testing.assert_close(pair.ours.last_penalty, pair.emulated.last_penalty)
    torch.testing.assert_close(pair.ours.last_drift, pair.emulated.last_drift)


def rows_for(params: list[Tensor], dtype: torch.dtype) -> tuple[dict, dict]:
    """Five rows: pairs with both, with one and with a half; one that must not be read."""
    generator = torch.Generator().manual_seed(3)
    rows = {p: torch.randn(5, *p.shape, generator=generator).to(dtype) for p in params}
    for array in rows.values():
        array[3] = torch.nan
    coefficients = torch.tensor([0.3, -0.2, 0.7, 0.0, 0.4], dtype=torch.float64)
    return rows, dict.fromkeys(params, coefficients)


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_projected_gradients(kernels, dtype, rows):
    start = Problem.of(make_params(SHAPES, torch.float32))
    pair = Pair(start, dtype, "gradient", importance_dtype="log8", state_dtype="bfloat16")
    for problem, optimizer in zip(pair.problems, (pair.ours, pair.emulated), strict=True):
        optimizer._projection = rows_for(problem.params, rows)
    pair.step(kernels, 0)


@pytest.mark.parametrize("rows", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_projected_float64(kernels, rows):
    pair = Pair(Problem.of(make_params(SHAPES, torch.float64)), torch.float64, "proximal")
    for problem, optimizer in zip(pair.problems, (pair.ours, pair.emulated), strict=True):
        optimizer._projection = rows_for(problem.params, rows)
    pair.step(kernels, 0, share=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("importance_dtype", IMPORTANCE)
def test_tracked_sums(kernels, importance_dtype, dtype):
    start = Problem.of(make_params(SHAPES, torch.float32))
    options = {"importance_dtype": importance_dtype, "track_penalty": True}
    pair = Pair(start, dtype, "gradient", **options)
    for optimizer in (pair.ours, pair.emulated):
        optimizer.freeze(0.05)
    pair.step(kernels, 0)
    assert pair.ours.last_penalty > 0
    torch.testing.assert_close(pair.ours.last_penalty, pair.emulated.last_penalty)
    torch.testing.assert_close(pair.ours.last_drift, pair.emulated.last_drift)


def test_numbers_that_only_the_device_knows(kernels):
    start = Problem.of(make_params(SHAPES, torch.float32))
    pair = Pair(start, torch.float32, "proximal", track_penalty=True)
    pair.step(kernels, 0)
    for optimizer in (pair.ours, pair.emulated):
        optimizer.grad_scale = torch.tensor(128.0)
        optimizer.found_inf = torch.tensor(0.0)
    pair.step(kernels, 1)
    for optimizer in (pair.ours, pair.emulated):
        optimizer.found_inf = torch.tensor(1.0)
    tracked = pair.emulated.last_penalty.item()
    before = [p.detach().clone() for p in pair.problems[1].params]
    pair.step(kernels, 2)
    for param, old in zip(pair.problems[1].params, before, strict=True):
        assert torch.equal(param, old)
        assert pair.emulated.state[param]["step"] == 2
    assert pair.emulated.last_penalty.item() == tracked


def test_what_is_not_a_number_shows(kernels):
    start = Problem.of(make_params([(8192,)], torch.float32))
    pair = Pair(start, torch.float32, "gradient", state_dtype="8bit")
    for problem in pair.problems:
        problem.set_gradients(0, torch.float32)
        problem.params[0].grad[5000] = torch.nan
    pair.ours.step()
    emulated_step(kernels, pair.emulated)
    for problem, optimizer in zip(pair.problems, (pair.ours, pair.emulated), strict=True):
        (param,) = problem.params
        assert param.isnan().sum() == 1
        scales = optimizer.state[param]["exp_avg_sq"][:, :4].contiguous().view(torch.float32)
        assert scales.isnan().flatten().nonzero().tolist() == [[5000 // 256]]


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("penalty", ["gradient", "proximal"])
@pytest.mark.parametrize("dtype", DTYPES_OF_PULLS, ids=str)
def test_the_pull_alone(kernels, dtype, penalty, stochastic):
    draw = torch.Generator().manual_seed(0)
    for importance, anchor in itertools.product(IMPORTANCE, (None, "bfloat16")):
        if dtype == torch.float64 and (importance != "float32" or anchor):
            continue
        params = [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]
        states = []
        for param in params:
            param.grad = torch.randn(param.shape, generator=draw).to(dtype)
            f = formats.like(param).copy_(torch.rand(param.shape, generator=draw)) * 100
            stored = formats.store_importance(f, param, importance)
            formats.mark_frozen_(stored, torch.rand(param.shape, generator=draw) < 0.2)
            star = (param.float() + 0.1).to(formats.anchor_dtype(param, anchor))
            states.append({"importance": stored, "anchor": star, "step": torch.zeros(())})
        options = ewc_pull.Options(0.01, 0.5, penalty, stochastic=stochastic)
        into_gradient = penalty == "gradient"
        targets = [(param.grad if into_gradient else param).clone() for param in params]
        of = {key: [state[key] for state in states] for key in ("importance", "anchor")}
        steps = [torch.zeros(()) for _ in states] if stochastic else []
        beside = params if into_gradient else []
        ewc_pull.fused(ewc_pull.Pulled(targets, beside, *of.values(), steps), options)

        plan = kernels.Plan(params, list(range(len(params))), [], states, True, True)
        assert plan.possible
        workspace = torch.full((plan.workspace(False),), 0xA5, dtype=torch.uint8)
        call = (params, [], [], workspace, None, None, None, None, vars(options.hyper()))
        assert kernels.take_step([plan], [call])
        for param, expected in zip(params, targets, strict=True):
            found = param.grad if into_gradient else param
            ulps = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(found, expected, rtol=ulps, atol=1e-6)
