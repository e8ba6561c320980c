"""The suite's own parts: who takes part, whose results are compared, what is told of the times."""

from __future__ import annotations

import json

import bench_factors
import bench_fisher
import bench_gram
import bench_log
import bench_programs
import bench_projection
import bench_squared_grad
import bench_step
import factor_contenders
import fisher_contenders
import pytest
import summary
import torch
from contenders import Problem
from peers import mammoth, van_de_ven
from suite import Contender, NotHereError, Question, peak_bytes
from torch import nn

QUESTIONS = {
    module.__name__: module.QUESTION
    for module in (
        bench_step, bench_projection, bench_programs, bench_fisher, bench_factors, bench_gram,
        bench_squared_grad, bench_log,
    )
}  # fmt: skip
SHAPES: list[tuple[int, ...]] = [(33, 5), (64,)]


def asked(peer: Contender, **options: object) -> Question:
    """Return a question with one peer beside 1 + 1."""
    contenders = {"ours": Contender(lambda p: lambda: p + 1.0, "ours"), "theirs": peer}
    problems = {"one": (lambda: torch.ones(2), 1)}
    return Question(problems, contenders, "ours", "theirs", **options)


# --- who takes part -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_names_its_own_contenders_and_problems(name):
    question = QUESTIONS[name]
    assert question.contenders[question.reference].kind in ("ours", "peer")
    assert question.base in question.contenders
    assert {*question.once, *question.before} <= {*question.problems}
    assert {c.kind for c in question.contenders.values()} >= {"ours", "peer"}


def test_no_two_questions_have_a_problem_of_the_same_name():
    names = [name for question in QUESTIONS.values() for name in question.problems]
    assert len(names) == len({*names})


def test_who_is_not_installed_is_told_with_the_reason():
    ready = asked(Contender(lambda p: p.sum, "peer", "no_such_package")).ready("one")
    assert isinstance(ready["theirs"], NotHereError)
    assert "no_such_package cannot be imported" in str(ready["theirs"])
    assert torch.equal(ready["ours"](), torch.full((2,), 2.0))


def test_who_cannot_do_it_says_why():
    def refuse(problem):
        raise NotHereError("it has no rule")

    assert str(asked(Contender(refuse, "peer")).ready("one")["theirs"]) == "it has no rule"


def test_a_peer_with_another_result_does_not_take_part():
    peer = Contender(lambda p: lambda: p + 1.001, "peer")
    assert str(asked(peer).ready("one")["theirs"]) == "its result is another, by 5.0e-04 of it"
    assert callable(asked(peer, tolerance=1e-2).ready("one")["theirs"])


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_another_result_of_ours_is_an_error(wrong):
    with pytest.raises(AssertionError, match=r"its result is another"):
        asked(Contender(lambda p: lambda: p + wrong, "ours")).ready("one")


def test_another_result_is_allowed_to_those_who_do_something_else():
    other = Contender(lambda p: lambda: p + 5.0, "other")
    assert callable(asked(other).ready("one")["theirs"])


# --- whose results are compared -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [n for n, c in bench_step.QUESTION.contenders.items()
     if c.kind == "peer" and not c.package and "compiled" not in n],
)  # fmt: skip
def test_penalties_of_others_move_weights_as_ours(name):
    moves = []
    for who in (bench_step.OURS, name):
        torch.manual_seed(0)
        problem = Problem(SHAPES)
        work = bench_step.QUESTION.contenders[who].work(problem)
        moves.append(bench_step.three_steps(problem, work))
    for ours, theirs in zip(*moves, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-8)


def test_an_unprotected_step_moves_weights_elsewhere():
    """Else the comparison above would compare nothing."""
    torch.manual_seed(0)
    one, other = Problem(SHAPES), Problem(SHAPES)
    plain = bench_step.three_steps(one, bench_step.QUESTION.contenders["AdamW fused"].work(one))
    penalized = bench_step.three_steps(other, van_de_ven.penalty(other))
    assert (torch.cat([p.flatten() for p in plain]) - mammoth.flat(penalized)).norm() > 1e-3


@pytest.mark.parametrize("batch", [1, 7])
def test_factors_are_sums_over_rows(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    problem = fisher_contenders.Problem(model, torch.randn(batch, 6), torch.randint(3, (batch,)))
    found = bench_factors.outcome(problem, factor_contenders.ours(problem))

    seen: dict[str, torch.Tensor] = {}
    output = problem.inputs
    for name, module in model.named_children():
        seen[f"{name} in"] = output
        output = module(output)
        output.retain_grad()
        seen[f"{name} out"] = output
    nn.functional.cross_entropy(output, problem.targets, reduction="sum").backward()
    expected = {
        name: (seen[f"{name} in"].mT @ seen[f"{name} in"],
               seen[f"{name} out"].grad.mT @ seen[f"{name} out"].grad)
        for name in ("0", "2")
    }  # fmt: skip
    for mine, right in zip(found, factor_contenders.scaled(expected), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("module", "name"), [(bench_squared_grad, "MLP 256, 784 → 256"), (bench_step, bench_step.MLP)]
)
def test_questions_can_be_asked_of_all_who_need_no_package(module, name):
    some = {
        label: contender
        for label, contender in module.QUESTION.contenders.items()
        if not contender.package and "compiled" not in label
    }
    ready = Question(**{**vars(module.QUESTION), "contenders": some}).ready(name)
    assert {*ready} == {*some}
    assert all(map(callable, ready.values()))


# --- what is told ---------------------------------------------------------------------------------


def a_report():
    kinds = {"ours": "ours", "slow": "peer", "quick": "peer", "bytes": "floor"}
    seconds = {"ours": (2.0, 4.0, 6.0), "slow": (8.0, 8.0, 8.0), "quick": (4.0, 4.0, 4.0),
               "bytes": (1.0, 1.0, 1.0)}  # fmt: skip
    contenders = {n: {"kind": k, "peak bytes": 3_000_000} for n, k in kinds.items()}
    contenders["gone"] = {"kind": "peer", "not here": "no wheel"}
    return {
        "machine_info": {"torch": "9"},
        "told": {"a problem": {"base": "slow", "contenders": contenders}},
        "benchmarks": [
            {"group": "a problem", "extra_info": {"turn": turn, "contender": name},
             "stats": {"median": value}}
            for name, values in seconds.items() for turn, value in enumerate(values)
        ],
    }  # fmt: skip


def test_rows_have_ratios_to_the_best_peer_base_and_floor():
    group = summary.record(a_report())["groups"]["a problem"]
    assert [*summary.rows(group)] == [
        ["**ours**", "4000", "1.00", "0.50–1.50", "0.50", "25", "3"],
        ["slow", "8000", "2.00", "2.00–2.00", "1.00", "12", "3"],
        ["quick", "4000", "best peer", "", "0.50", "25", "3"],
        ["bytes", "1000", "", "", "0.12", "100", "3"],
        ["gone: no wheel", "", "", "", "", "", ""],
    ]


def test_turns_are_paired_by_their_number():
    report = a_report()
    expected = summary.record(a_report())
    report["benchmarks"].reverse()
    assert summary.record(report) == expected


@pytest.mark.parametrize("missing", [0, 3, 11], ids=["ours", "base", "floor"])
def test_a_turn_that_is_missing_is_an_error(missing):
    report = a_report()
    del report["benchmarks"][missing]
    with pytest.raises(SystemExit, match=r"was asked in 2 of 3 turns; ask the whole question"):
        summary.record(report)


def test_a_record_is_written_and_read(tmp_path, monkeypatch, capsys):
    report, kept = tmp_path / "report.json", tmp_path / "kept.json"
    report.write_text(json.dumps(a_report()))
    for given, told in ((report, ["--record", str(kept)]), (kept, [])):
        monkeypatch.setattr("sys.argv", ["summary.py", str(given), *told])
        summary.main()
        assert "best peer" in capsys.readouterr().out
    assert json.loads(kept.read_text()) == summary.record(a_report())


def test_peak_memory_is_what_a_work_takes_at_most():
    peak = peak_bytes(lambda: torch.ones(25_000_000).sum())
    assert peak is not None
    assert 80e6 < peak < 200e6
    assert peak_bytes(lambda: None) < 20e6
