"""Asks each file's ``QUESTION``: of every problem, in every turn, of every contender."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
from suite import Kind, NotHereError, Question, Work, peak_bytes

from cl_optim.demo.machine import machine

# Of what takes part, by the name of its distribution.
PEERS = (
    "asdfghjkl", "avalanche-lib", "backpack-for-pytorch", "bitsandbytes", "curvlinops-for-pytorch",
    "numpy", "opacus", "qpth", "quadprog", "safetensors", "schedulefree", "torch-optimi", "torchjd",
)  # fmt: skip
# What summary.py is told beside the times: by problem, its base and its contenders.
told: dict[str, dict[str, Any]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    question = getattr(metafunc.module, "QUESTION", None)
    if question is not None and "ask" in metafunc.fixturenames:
        problems = [(question, name) for name in question.problems]
        ids = list(question.problems)
        metafunc.parametrize("ready", problems, ids=ids, indirect=True, scope="module")
        metafunc.parametrize("turn", range(question.turns))
        metafunc.parametrize("contender", question.contenders)


@pytest.fixture(scope="module")
def ready(request: pytest.FixtureRequest) -> tuple[Question, str, dict[str, Work | NotHereError]]:
    question, name = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packages of others warn of, on import and first use
        works = question.ready(name)
    about: dict[str, dict[str, Any]] = {}
    for label, work in works.items():
        kind: Kind = question.contenders[label].kind
        if isinstance(work, NotHereError):
            about[label] = {"kind": kind, "not here": str(work)}
        else:
            with _quiet(question, label):
                about[label] = {"kind": kind, "peak bytes": peak_bytes(work)}
    told[name] = {"base": question.base, "contenders": about}
    return question, name, works


@pytest.fixture
def ask(benchmark: Any, ready: Any, turn: int, contender: str) -> Callable[[], None]:
    question, name, works = ready

    def measure() -> None:
        work = works[contender]
        if isinstance(work, NotHereError):
            pytest.skip(str(work))
        benchmark.group = name
        benchmark.extra_info.update(turn=turn, contender=contender)
        rounds = question.contenders[contender].rounds or question.problems[name][1]
        before = question.before.get(name)
        with _quiet(question, contender):
            benchmark.pedantic(work, setup=before, rounds=rounds, warmup_rounds=1)

    return measure


@contextmanager
def _quiet(question: Question, contender: str) -> Iterator[None]:
    """Let packages of others warn."""
    with warnings.catch_warnings():
        if question.contenders[contender].package:
            warnings.simplefilter("ignore")
        yield


def _versions() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the contender says so
            continue
    return found


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """What the figures depend on."""
    machine_info.clear()
    machine_info.update(machine(), peers=_versions())


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["told"] = told
