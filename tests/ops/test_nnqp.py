from __future__ import annotations

import shutil
import struct
import subprocess

import pytest
import torch
from nnqp_cases import by_brute_force, gram_error, random_cases, rows_and_gradient, violation
from paths import CSRC, KERNELS

from cl_optim import functional
from cl_optim.ops import library, nnqp
from cl_optim.ops.nnqp import Status


@pytest.fixture(autouse=True)
def kernels() -> None:
    assert library.available("cpu")


def solve(rows, grad, lower=0.0, solver=nnqp.nnqp_compiled, **options):
    gram, linear = rows @ rows.T, rows @ grad
    options.setdefault("gram_error", gram_error(rows))
    return solver(gram[None], linear[None], lower, **options)


def batch(problems: int, t: int, p: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randn(problems, t, p, dtype=torch.float64)
    grads = torch.randn(problems, p, 1, dtype=torch.float64) - rows.mean(1)[..., None]
    return rows @ rows.mT, (rows @ grads)[..., 0]


# --- the certificate ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_certificate_is_met_in_2500_problems(seed):
    dependent = 0
    for number, (kind, rows, grad) in enumerate(random_cases(2500, 24, seed=seed)):
        lower = 0.5 if number % 3 == 2 and kind != "scales 1e±20" else 0.0
        solution = solve(rows, grad, lower)
        assert violation(rows, grad, solution, lower) <= 1, (number, kind, solution)
        v = solution.v[0]
        w = rows @ (grad + rows.T @ v)
        scale = (v * rows.norm(dim=1)).sum() + grad.norm()
        assert abs(solution.gap[0] - (v - lower) @ w) <= 1e-10 * scale**2
        dependent += int(solution.status[0] == Status.DEPENDENT)
    assert dependent < 25  # an exception, not a way out


@pytest.mark.parametrize("solver", [nnqp.nnqp_compiled, nnqp.nnqp_reference])
def test_projection_equals_brute_force(solver):
    for number, (kind, rows, grad) in enumerate(random_cases(400, 8, seed=10)):
        lower = 0.25 if number % 3 == 2 and kind != "scales 1e±20" else 0.0
        solution = solve(rows, grad, lower, solver)
        projection = grad + rows.T @ solution.v[0]
        expected = by_brute_force(rows, grad, lower)
        error = (projection - expected).norm() / grad.norm().clamp(min=1.0)
        assert error <= (1e-6 if kind == "nearly dependent" else 1e-8), (number, kind, error)


def test_projection_equals_brute_force_for_ten_rows():
    for kind, rows, grad in random_cases(39, 10, seed=11):
        expected = by_brute_force(rows, grad, 0.0)
        projection = grad + rows.T @ solve(rows, grad).v[0]
        assert (projection - expected).norm() <= 1e-6 * grad.norm(), kind


@pytest.mark.parametrize("t", [33, 64, 130, 200])
def test_many_rows(t):
    for kind in ("conflicting", "cosine 0.99", "low rank", "duplicates"):
        rows, grad = rows_and_gradient(kind, t, t // 2 if kind == "conflicting" else 2 * t)
        assert violation(rows, grad, solve(rows, grad), 0.0) <= 1, kind


def test_the_largest_size():
    rows, grad = rows_and_gradient("conflicting", nnqp.MAX_SIZE, 1500)
    assert violation(rows, grad, solve(rows, grad), 0.0) <= 1


# --- properties -----------------------------------------------------------------------------------


def test_one_row_is_the_closed_form():
    gram, linear = torch.tensor([[[4.0]]]), torch.tensor([[-3.0]])
    assert nnqp.nnqp_compiled(gram, linear).v.item() == 0.75
    assert nnqp.nnqp_compiled(gram, -linear).v.item() == 0.0
    assert nnqp.nnqp_compiled(gram, linear, 2.0).v.item() == 2.0


def test_the_opposite_of_a_row_is_projected_to_exactly_nothing():
    for kind, rows, _ in random_cases(300, 10, seed=3):
        grad = -rows[0]
        cosines = torch.nn.functional.cosine_similarity(rows[1:], rows[:1])
        # Another row along g would do as well, with a rounded v.
        if not grad.any() or (cosines > 1 - 1e-9).any() or kind == "scales 1e±20":
            continue
        everything = torch.cat([rows, grad[None]])
        # Sums in one order for all products: those with g are those with its row, negated.
        products = (everything[:, None] * everything).sum(-1)
        solution = nnqp.nnqp_compiled(products[None, :-1, :-1], products[None, :-1, -1])
        assert (grad + rows.T @ solution.v[0]).norm() == 0.0, kind


def test_only_violated_problems_are_changed():
    gram, linear = batch(50, 5, 9)
    linear[::2] = linear[::2].abs()
    linear[0] = 0.0
    for solver in (nnqp.nnqp_compiled, nnqp.nnqp_reference):
        v, status, gap = solver(gram, linear, 0.5, only_violated=True)
        assert (status[::2] == Status.INACTIVE).all()
        assert not v[::2].any()
        assert not gap[::2].any()
        assert (v[1::2] >= 0.5).all()


def test_v_is_at_least_lower_exactly():
    for lower in (0.1, 1 / 3, 1e-30, 7e10):
        gram, linear = batch(20, 6, 8)
        assert (nnqp.nnqp_compiled(gram, linear, lower).v >= lower).all()


@pytest.mark.parametrize("t", [1, 5, 40])
def test_independent_of_the_batch(t):
    gram, linear = batch(33, t, t + 3)
    together = nnqp.nnqp_compiled(gram, linear)
    for i in range(33):
        alone = nnqp.nnqp_compiled(gram[i : i + 1], linear[i : i + 1])
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


def test_the_order_of_rows_makes_no_difference():
    for kind, rows, grad in random_cases(200, 12, seed=4):
        order = torch.randperm(len(rows))
        a = grad + rows.T @ solve(rows, grad).v[0]
        b = grad + rows[order].T @ solve(rows[order], grad).v[0]
        assert (a - b).norm() <= (1e-6 if kind == "nearly dependent" else 1e-9) * grad.norm(), kind


def test_a_rows_scale_makes_no_difference():
    rows, grad = rows_and_gradient("conflicting", 6, 10)
    expected = grad + rows.T @ solve(rows, grad).v[0]
    for scale in (2.0**-120, 2.0**-3, 2.0**100):
        scaled = rows.clone()
        scaled[2] *= scale
        assert torch.equal(grad + scaled.T @ solve(scaled, grad).v[0], expected)
    tiny = grad * 1e-150 + rows.T @ solve(rows, grad * 1e-150).v[0]
    assert (tiny * 1e150 - expected).norm() <= 1e-12 * grad.norm()


# --- the ways of the method -----------------------------------------------------------------------


def test_the_fallback_finds_the_same_projection():
    for kind, rows, grad in random_cases(260, 16, seed=5):
        usual, fallback = solve(rows, grad), solve(rows, grad, max_pivots=1)
        assert violation(rows, grad, fallback, 0.0) <= 1, kind
        error = (rows.T @ (usual.v[0] - fallback.v[0])).norm()
        assert error <= (1e-6 if kind == "nearly dependent" else 1e-8) * grad.norm(), kind


@pytest.mark.parametrize("kind", ["conflicting", "low rank", "duplicates", "cosine 0.99"])
def test_a_state_carries_over(kind):
    rows, grad = rows_and_gradient(kind, 12, 20)
    state = nnqp.new_state(1, 12)
    for step in range(30):
        grad = grad + 0.3 * torch.randn(20, dtype=torch.float64)
        if step == 20:
            grad = -grad
        warm = solve(rows, grad, state=state)
        cold = solve(rows, grad)
        assert violation(rows, grad, warm, 0.0) <= 1
        assert (rows.T @ (warm.v[0] - cold.v[0])).norm() <= 1e-9 * grad.norm()
    assert state.any()


def test_a_state_survives_problems_without_a_solution():
    rows, grad = rows_and_gradient("conflicting", 6, 12)
    state = nnqp.new_state(1, 6)
    solve(rows, grad, state=state)
    before = state.clone()
    assert solve(rows, grad * torch.nan, state=state).status == Status.INVALID
    assert torch.equal(state, before)


def test_teams_of_threads_agree_and_do_not_race(tmp_path):
    """What a warp and a block do, with threads, under ThreadSanitizer."""
    problems = [(0.5 if n % 4 == 3 else 0.0, *c) for n, c in enumerate(random_cases(13, 9, seed=6))]
    with open(tmp_path / "problems", "wb") as file:
        file.write(struct.pack("i", len(problems)))
        for lower, _, rows, grad in problems:
            file.write(struct.pack("=id", len(rows), lower))
            file.write((rows @ rows.T).numpy().tobytes() + (rows @ grad).numpy().tobytes())
    compiler = shutil.which("c++")
    assert compiler is not None
    command = [compiler, "-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread"]
    command += ["-I", str(CSRC), str(KERNELS / "nnqp_team.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "team")], check=True)
    command = [str(tmp_path / "team"), str(tmp_path / "problems")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[:2000]
    assert result.stdout == "13 problems\n"


# --- what is no problem ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [nnqp.nnqp_compiled, nnqp.nnqp_reference])
def test_nan_and_inf_flag_their_problem_only(solver):
    gram, linear = batch(6, 4, 7)
    expected = solver(gram, linear)
    gram, linear = gram.clone(), linear.clone()
    gram[1, 2, 3] = torch.nan
    linear[3, 0] = -torch.inf
    gram[4, 1, 1] = -1.0
    v, status, gap = solver(gram, linear)
    assert status.tolist() == [0, Status.INVALID, 0, Status.INVALID, Status.INVALID, 0]
    good = torch.tensor([0, 2, 5])
    assert torch.equal(v[good], expected.v[good])
    assert torch.equal(gap[good], expected.gap[good])
    assert v[1].isnan().all()
    assert gap[1].isnan()


@pytest.mark.parametrize("solver", [nnqp.nnqp_compiled, nnqp.nnqp_reference])
@pytest.mark.parametrize("size", [1, 3])
def test_a_certificate_beyond_float64_certifies_nothing(solver, size):
    """Q is small and c is not, so that x, its products with w, or v itself overflow."""
    gram = torch.eye(size, dtype=torch.float64).repeat(4, 1, 1)
    linear = -torch.ones(4, size, dtype=torch.float64)
    gram[1] *= 1e-300
    linear[1] *= 1e300  # v = 1e600
    gram[2] += 0.3
    linear[2] *= 1e300
    gram[2, 0] *= 1e-3
    gram[2, :, 0] *= 1e-3
    gram[3] *= 1e300
    linear[3] *= 1e300  # v = 1
    v, status, gap = solver(gram, linear)
    assert status[[0, 3]].tolist() == [Status.SOLVED] * 2
    torch.testing.assert_close(v[[0, 3]], torch.ones(2, size, dtype=torch.float64))
    assert status[1] == Status.UNCONVERGED
    for k in range(4):
        assert status[k] < 0 or (v[k].isfinite().all() and gap[k].isfinite())


def test_a_zero_row_with_a_product_is_invalid():
    gram, linear = torch.zeros(2, 1, 1), torch.tensor([[-1.0], [0.0]])
    for solver in (nnqp.nnqp_compiled, nnqp.nnqp_reference):
        assert solver(gram, linear).status.tolist() == [Status.INVALID, Status.SOLVED]


@pytest.mark.parametrize(("problems", "t"), [(0, 3), (2, 0), (0, 0)])
def test_empty(problems, t):
    for solver in (nnqp.nnqp_compiled, nnqp.nnqp_reference):
        v, status, gap = solver(torch.ones(problems, t, t), torch.ones(problems, t))
        assert v.shape == (problems, t)
        assert status.tolist() == [0] * problems
        assert gap.tolist() == [0] * problems
    state = nnqp.new_state(problems, t)
    assert nnqp.nnqp_compiled(torch.ones(problems, t, t), torch.ones(problems, t), state=state)


GRAM, LINEAR = torch.ones(2, 3, 3), torch.ones(2, 3)
BAD_INPUT = {
    "one gram": (r"gram must be \[B, t, t\], not \[3, 3\]", (GRAM[0], LINEAR), {}),
    "no square": (r"gram must be \[B, t, t\], not \[2, 2, 3\]", (GRAM[:, :2], LINEAR), {}),
    "shape": (r"linear must be \[2, 3\], not \[1, 3\]", (GRAM, LINEAR[:1]), {}),
    "integers": ("gram must be float32 or float64, not torch.int32", (GRAM.int(), LINEAR), {}),
    "half": ("linear must be float32 or float64, not torch.float16", (GRAM, LINEAR.half()), {}),
    "sparse": ("gram must be a dense tensor, not torch.sparse_coo", (GRAM.to_sparse(), LINEAR), {}),
    "lower": ("lower must be finite and at least 0, not -1.0", (GRAM, LINEAR, -1.0), {}),
    "inf lower": ("lower must be finite and at least 0, not inf", (GRAM, LINEAR, torch.inf), {}),
    "rows": ("1024 rows at most, not 1025", (torch.ones(1, 1025, 1025), torch.ones(1, 1025)), {}),
    "device": ("linear is on meta, but gram is on cpu", (GRAM, LINEAR.to("meta")), {}),
    "error": (r"gram_error must be in \[0, 1\), not 1.0", (GRAM, LINEAR), {"gram_error": 1.0}),
    "state": (
        r"state must be contiguous float64 \[B, t, t \+ 1\]",
        (GRAM, LINEAR), {"state": torch.zeros(2, 3, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", BAD_INPUT)
def test_bad_input_is_refused(given):
    message, arguments, options = BAD_INPUT[given]
    with pytest.raises(ValueError, match=message):
        functional.nnqp(*arguments, **options)


# --- the operator ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state[:, :, :-1],
        lambda state: state.float(),
        lambda state: state.to("meta"),
        lambda state: state.mT.contiguous().mT,
        torch._neg_view,
    ],
)
def test_a_state_that_does_not_fit_is_refused(change):
    gram, linear = torch.eye(3).double()[None], -torch.ones(1, 3).double()
    state = nnqp.new_state(1, 3)
    with pytest.raises(
        ValueError, match=r"^state must be contiguous float64 .*: \[1, 3, 4\] on cpu"
    ):
        nnqp.nnqp(gram, linear, state=change(state))
    assert not state.any()
    lazy = torch._neg_view(-gram), torch._neg_view(-linear)
    assert torch.equal(nnqp.nnqp(*lazy, state=state).v, nnqp.nnqp(gram, linear).v)


def test_opcheck():
    gram, linear = batch(3, 4, 6)
    options = {"lower": 0.0, "tolerance": 1e-15, "threshold": 1e-14}
    options |= {"only_violated": False, "max_pivots": 0}
    for state in (None, nnqp.new_state(3, 4)):
        torch.library.opcheck(torch.ops.cl_optim.nnqp.default, (gram, linear, state), options)


def test_the_kernels_run_where_they_are(monkeypatch):
    monkeypatch.setattr(nnqp, "nnqp_reference", None)
    gram, linear = batch(3, 4, 6)
    assert (functional.nnqp(gram.float(), linear.float()).status == Status.SOLVED).all()


def test_without_kernels_the_reference_runs_with_a_warning(monkeypatch):
    gram, linear = batch(3, 4, 6)
    expected = nnqp.nnqp_compiled(gram, linear)
    monkeypatch.setattr(library, "available", lambda device: False)
    monkeypatch.setattr(library, "explain", lambda device: "There are none.")
    library.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="slower reference: There are none"):
        solution = functional.nnqp(gram, linear)
    assert (solution.v - expected.v).abs().max() <= 1e-10


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("t", [1, 7, 32, 33, 128, 160, 300])
def test_gpu_meets_the_certificate(t):
    assert library.available("cuda"), library.explain("cuda")
    for kind in ("conflicting", "cosine 0.99", "low rank", "duplicates", "scales 1e±20"):
        problems = [rows_and_gradient(kind, t, max(2, int(1.5 * t))) for _ in range(4)]
        gram = torch.stack([rows @ rows.T for rows, _ in problems])
        linear = torch.stack([rows @ grad for rows, grad in problems])
        error = gram_error(problems[0][0])
        for max_pivots in (0, 1):
            solution = nnqp.nnqp_compiled(
                gram.cuda(), linear.cuda(), gram_error=error, max_pivots=max_pivots
            )
            solution = nnqp.Solution(*(part.cpu() for part in solution))
            for i, (rows, grad) in enumerate(problems):
                single = nnqp.Solution(*(part[i : i + 1] for part in solution))
                assert violation(rows, grad, single, 0.0) <= 1, (kind, i)


@pytest.mark.gpu
@pytest.mark.parametrize("t", [8, 64, 300])
def test_gpu_neither_waits_nor_depends_on_the_batch(t):
    gram, linear = (part.cuda() for part in batch(9, t, t + 4))
    state = nnqp.new_state(9, t, "cuda")
    alone = [nnqp.nnqp_compiled(gram[i : i + 1], linear[i : i + 1]).v for i in range(9)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        together = nnqp.nnqp_compiled(gram, linear, state=state)
        again = nnqp.nnqp_compiled(gram, linear, state=state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(together.v, torch.cat(alone))
    assert (again.v - together.v).abs().max() <= 1e-9 * together.v.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("t", [8, 64, 300])
def test_gpu_in_a_graph(t):
    gram, linear = (part.cuda() for part in batch(5, t, t + 4))
    expected = nnqp.nnqp_compiled(gram, linear)
    given = torch.zeros_like(linear)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = nnqp.nnqp_compiled(gram, given)
    given.copy_(linear)
    graph.replay()
    assert torch.equal(captured.v, expected.v)
