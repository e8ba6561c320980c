"""Importance, anchors, moments and weights in fewer bytes: fused and reference, resuming."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ewc_adamw_cases import Problem, Setting, make_optimizer, make_params
from format_cases import IMPORTANCE, MOMENTS, ROUNDING, SHAPES, assert_close, make, step, values
from torch import Tensor, nn

from cl_optim import _C, EWCAdamW
from cl_optim.ops import importance_codec as codec


@pytest.fixture(autouse=True)
def no_word_about_rounded_anchors():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="anchor_dtype rounds")
        yield


@pytest.mark.parametrize("penalty", ["gradient", "decoupled", "proximal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fused_is_the_reference_in_every_format(dtype, penalty, device):
    """From equal state, each step; no hyperparameter at its default."""
    start = Problem.of(make_params(SHAPES, torch.float32))
    anchors = (None, "float32", "bfloat16")
    roundings = ROUNDING if dtype == torch.bfloat16 else ROUNDING[:1]
    for number, (importance, anchor, moments, rounding) in enumerate(
        itertools.product(IMPORTANCE, anchors, MOMENTS, roundings)
    ):
        formats = {
            "importance_dtype": importance,
            "anchor_dtype": anchor,
            "state_dtype": moments,
            "rounding": rounding,
            "importance_damping": 0.4,
            "amsgrad": number % 2 == 1,
            "maximize": number % 3 == 1,
        }
        one, other = start.copy(dtype, device), start.copy(dtype)
        fused = make(one, penalty, formats, fused=True)
        reference = make(other, penalty, formats, foreach=True)
        fused.freeze(0.1)
        reference.freeze(0.1)
        for count in range(3):
            reference.load_state_dict(copy.deepcopy(fused.state_dict()))
            reference.param_groups[0].update(fused=False, foreach=True)
            with torch.no_grad():
                for p, q in zip(one.params, other.params, strict=True):
                    q.copy_(p)
            step(one, fused, count)
            step(other, reference, count)
            assert (fused.backend, reference.backend) == (device, "foreach")
            assert_close(fused, reference, share=5e-3)


@pytest.mark.parametrize(
    ("dtype", "formats"),
    [
        (torch.float32, {}),
        (torch.float32, {"importance_dtype": "log8", "state_dtype": "8bit"}),
        (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "bfloat16"}),
        (torch.bfloat16, {"rounding": "kahan", "importance_dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_the_same_bits_with_any_number_of_threads(dtype, formats):
    start = Problem.of(make_params([(300, 700), (999,)], torch.float32))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            problem = start.copy(dtype)
            optimizer = make(problem, "gradient", formats, fused=True)
            for count in range(3):
                step(problem, optimizer, count)
            states = [s for p in problem.params for s in optimizer.state[p].values()]
            results.append([*problem.params, *states])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_kernel_decodes_what_the_reference_decodes():
    for scale in (1.0, 1.5, 2.0**127, math.nan):
        packed = torch.cat(
            [torch.tensor([scale]).view(torch.uint8), torch.arange(256, dtype=torch.uint8)]
        )[None]
        shape = torch.Size([256])
        importance, second, first = map(torch.tensor, _C.decoded(scale))
        assert importance[codec.FROZEN].signbit()
        for found, expected in (
            (importance.abs(), codec.decode_log8(packed, shape)),
            (second, codec.decode_moment(packed, shape, signed=False)),
            (first, codec.decode_moment(packed, shape, signed=True)),
        ):
            torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("formats", [{}, {"importance_dtype": "log8", "state_dtype": "8bit"}])
@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
def test_other_memory_orders(formats, implementation):
    """Codes are in row-major order; channels-last and transposed weights and gaps are not."""

    def build(change) -> tuple[Problem, EWCAdamW]:
        problem = Problem.of(make_params([(8, 16, 6, 6), (80, 70), (90, 50)], torch.float32))
        problem.params = [torch.nn.Parameter(change(p.detach())) for p in problem.params]
        return problem, make(problem, "gradient", formats, **implementation)

    def strange(p: Tensor) -> Tensor:
        if p.dim() == 4:
            return p.to(memory_format=torch.channels_last)
        if p.shape[0] == 80:
            return p.t().contiguous().t()
        return torch.empty(*p.shape, 2)[..., 0].copy_(p)

    plain, odd = build(torch.clone), build(strange)
    assert not any(p.is_contiguous() for p in odd[0].params)
    for number in range(4):
        step(*plain, number)
        step(*odd, number)
    for p, q in zip(plain[0].params, odd[0].params, strict=True):
        if formats:  # else the moments are in other places, and nothing is rounded
            assert torch.equal(p, q)
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
def test_projected_steps_in_other_memory_orders(implementation):
    results = []
    for transposed in (False, True):
        problem = Problem.of(make_params([(80, 70)], torch.float32, transposed=transposed))
        if transposed:
            values = results[0][1]
            with torch.no_grad():
                problem.params[0].copy_(values)
            first = results[0][2]
            problem.importances, problem.anchors = first.importances, first.anchors
        start = problem.params[0].detach().clone()
        formats = {"importance_dtype": "log8", "state_dtype": "8bit"}
        optimizer = make(problem, "gradient", formats, **implementation)
        weight = problem.params[0]
        problem.set_gradients(0, torch.float32)
        rows = torch.stack([torch.ones(80, 70), torch.arange(5600.0).view(80, 70) / 5600])
        if transposed:
            assert not weight.is_contiguous()
            rows = rows.mT.contiguous().mT
        optimizer.step_projected(
            {weight: rows}, {weight: torch.tensor([0.3, 0.7], dtype=torch.float64)}
        )
        results.append((weight.detach().clone(), start, problem))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)


def test_the_penalty_survives_log8():
    start = Problem.of(make_params([(300, 100)], torch.float32))
    start.importances = [10 ** (torch.randn(300, 100) - 3)]
    exact, coded = (
        make(start.copy(torch.float32), "gradient", {"importance_dtype": name}).penalty()
        for name in ("float32", "log8")
    )
    assert abs(coded / exact - 1) <= 0.01


class TestMerging:
    """Twenty tasks, each of 3 % of the first one's importance."""

    @pytest.mark.parametrize("importance_dtype", ["bfloat16", "log8"])
    @pytest.mark.parametrize("increment", [0.03, 0.001])
    def test_small_increments_are_not_lost(self, importance_dtype, increment):
        weight = torch.nn.Parameter(torch.zeros(20_000))
        optimizer = EWCAdamW([("w", weight)], importance_dtype=importance_dtype)
        first = torch.rand(20_000) + 0.5
        optimizer.consolidate({"w": first})
        for _ in range(20):
            optimizer.consolidate({"w": increment * first})
        (protected,) = optimizer.protected()
        expected = 1 + 20 * increment
        assert abs((protected.importance / first).mean() / expected - 1) < 3e-3
        # What increments the state of one replica increments another's.
        again = EWCAdamW([("w", weight)], importance_dtype=importance_dtype)
        again.consolidate({"w": first})
        for _ in range(20):
            again.consolidate({"w": increment * first})
        assert torch.equal(again.state[weight]["importance"], optimizer.state[weight]["importance"])

    @pytest.mark.parametrize("importance_dtype", ["bfloat16", "log8"])
    def test_what_replaces_the_old_is_rounded_to_the_nearest(self, importance_dtype):
        weight, importance = nn.Parameter(torch.zeros(512)), torch.rand(512) + 0.1
        optimizer = EWCAdamW([("w", weight)], importance_dtype=importance_dtype)
        optimizer.consolidate({"w": importance})
        once = optimizer.state[weight]["importance"].clone()
        optimizer.consolidate({"w": importance}, decay=0.0)
        assert torch.equal(optimizer.state[weight]["importance"], once)

    @pytest.mark.parametrize("importance_dtype", ["bfloat16", "log8"])
    def test_decay_and_zeros(self, importance_dtype):
        weight = torch.nn.Parameter(torch.zeros(5000))
        optimizer = EWCAdamW([("w", weight)], importance_dtype=importance_dtype)
        optimizer.consolidate({"w": torch.cat([torch.zeros(2500), torch.rand(2500)])})
        optimizer.consolidate({"w": torch.zeros(5000)}, decay=0.5)
        (protected,) = optimizer.protected()
        assert (protected.importance[:2500] == 0).all()
        assert abs(protected.importance[2500:].mean() - 0.25) < 0.02
        optimizer.consolidate({"w": torch.zeros(5000)}, decay=0.0)
        assert next(optimizer.protected()).importance.abs().max() == 0

    @pytest.mark.parametrize("importance_dtype", ["float32", "bfloat16", "log8"])
    def test_the_largest_number_stays_finite(self, importance_dtype):
        """Rounded up or merged with more it would be infinite; log8 ends at 2^127 at most."""
        weight = nn.Parameter(torch.zeros(600))
        optimizer = EWCAdamW([("w", weight)], importance_dtype=importance_dtype)
        largest = torch.finfo(torch.float32).max
        for _ in range(3):
            optimizer.consolidate({"w": torch.full((600,), largest)})
            (found,) = optimizer.protected()
            assert (found.importance >= 0.49 * largest).all()
            assert found.importance.isfinite().all()


class TestAnchors:
    def test_a_word_where_bfloat16_cannot_hold_the_weights(self):
        weight = torch.nn.Parameter(torch.randn(50))
        optimizer = EWCAdamW([("w", weight)], anchor_dtype="bfloat16")
        with pytest.warns(UserWarning, match="anchor_dtype rounds the anchors of 1 parameter"):
            optimizer.consolidate({"w": torch.ones(50)})
        assert optimizer.state[weight]["anchor"].dtype == torch.bfloat16

    def test_none_where_it_can(self):
        weight = torch.nn.Parameter(torch.randn(50).bfloat16())
        other = torch.nn.Parameter(torch.randn(50).bfloat16().float())
        optimizer = EWCAdamW([("w", weight), ("o", other)], anchor_dtype="bfloat16")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.consolidate({"w": torch.ones(50), "o": torch.ones(50)})
        assert optimizer.penalty() == 0

    def test_exact_anchors_are_wide(self):
        weight = torch.nn.Parameter(torch.randn(50).bfloat16())
        optimizer = EWCAdamW([("w", weight)], anchor_dtype="bfloat16", importance_dtype="log8")
        optimizer.consolidate({"w": torch.ones(50)}, anchors="exact")
        assert optimizer.state[weight]["anchor"].dtype == torch.float32

    def test_float32_anchors_have_what_kahan_keeps(self):
        weight = torch.nn.Parameter(torch.ones(50).bfloat16())
        optimizer = EWCAdamW([("w", weight)], lr=1e-4, rounding="kahan", anchor_dtype="float32")
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.consolidate({"w": torch.ones(50)})
        anchor = optimizer.state[weight]["anchor"]
        assert ((anchor < 1) & (anchor > 0.999)).all()
        assert (weight == 1).all()
        assert optimizer.penalty() == 0


class TestRounding:
    """Steps of 1e-4 at weights of 1: far below half a unit of bfloat16's last place, 2⁻⁹."""

    def run(self, dtype: torch.dtype, implementation: dict[str, bool], **options: Any) -> Tensor:
        weight = torch.nn.Parameter(torch.linspace(1.0, 1.9, 4000).to(dtype))
        optimizer = EWCAdamW([weight], lr=1e-4, weight_decay=0.0, **options, **implementation)
        for number in range(300):
            weight.grad = torch.full_like(weight, 1 + 0.1 * (number % 3))
            optimizer.step()
        kept = optimizer.state[weight].get("compensation", torch.zeros(()))
        begun = torch.linspace(1.0, 1.9, 4000).to(dtype)
        return weight.detach().float() + kept.float() - begun.float()

    @pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
    def test_bfloat16_follows_float32_where_it_would_stall(self, implementation):
        moved = self.run(torch.float32, implementation).mean()
        assert abs(moved + 0.03) < 2e-3
        assert self.run(torch.bfloat16, implementation).abs().max() == 0
        stochastic = self.run(torch.bfloat16, implementation, rounding="stochastic")
        assert abs(stochastic.mean() / moved - 1) < 0.02
        kahan = self.run(torch.bfloat16, implementation, rounding="kahan")
        torch.testing.assert_close(kahan, moved.expand(4000), rtol=0.03, atol=0.0)
        assert abs(kahan.mean() / moved - 1) < 2e-3

    def test_other_dtypes_are_not_concerned(self):
        moved = self.run(torch.float32, {})
        assert torch.equal(self.run(torch.float32, {}, rounding="kahan"), moved)
        assert torch.equal(self.run(torch.float32, {}, rounding="stochastic"), moved)


class TestMoments:
    @pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
    @pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
    def test_the_second_moment_decays_as_it_should(self, state_dtype, implementation):
        """It loses 0.1 % a step, which rounding to the nearest value would never do."""
        weight = torch.nn.Parameter(torch.zeros(8192))
        optimizer = EWCAdamW([weight], state_dtype=state_dtype, **implementation)
        weight.grad = 1 + torch.rand(8192)
        optimizer.step()
        before = values(optimizer.state[weight], "exp_avg_sq", weight).double()
        weight.grad.zero_()
        for _ in range(300):
            optimizer.step()
        after = values(optimizer.state[weight], "exp_avg_sq", weight).double()
        assert abs((after / before).mean() / 0.999**300 - 1) < 0.02

    @pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
    def test_training_goes_as_with_float32(self, state_dtype):
        def loss_after(state_dtype: str) -> float:
            torch.manual_seed(0)
            model = torch.nn.Sequential(
                torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)
            )
            x = torch.randn(512, 64)
            y = torch.tanh(x @ torch.randn(64, 64) / 8)
            optimizer = EWCAdamW(model.parameters(), lr=3e-3, state_dtype=state_dtype)
            for _ in range(150):
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                optimizer.step()
            return loss.item()

        exact = loss_after("float32")
        assert loss_after(state_dtype) < 1.15 * exact

    @pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
    def test_a_gradient_that_is_not_a_number_shows(self, implementation):
        weight = torch.nn.Parameter(torch.ones(8192))
        optimizer = EWCAdamW([weight], state_dtype="8bit", **implementation)
        weight.grad = torch.ones(8192)
        weight.grad[5000] = torch.nan
        optimizer.step()
        assert weight[5000].isnan()
        assert weight.isnan().sum() == 1
        moment = values(optimizer.state[weight], "exp_avg_sq", weight)
        assert moment[5000 // 256 * 256 : 5000 // 256 * 256 + 256].isnan().all()
        assert moment[:4864].isfinite().all()


BYTES = [
    # parameter, options, bytes of state per element without protection, and with
    (torch.float32, {}, 8, 16),
    (torch.float32, {"importance_dtype": "bfloat16"}, 8, 14),
    (torch.float32, {"importance_dtype": "log8"}, 8, 13 + 4 / 256),
    (torch.float32, {"importance_dtype": "log8", "anchor_dtype": "bfloat16"}, 8, 11 + 4 / 256),
    (torch.float32, {"importance_dtype": "log8", "state_dtype": "8bit"}, 2 + 8 / 256, 7 + 12 / 256),
    (torch.bfloat16, {}, 8, 14),
    (torch.bfloat16, {"importance_dtype": "log8"}, 8, 11 + 4 / 256),
    (torch.bfloat16, {"importance_dtype": "log8", "state_dtype": "bfloat16"}, 4, 7 + 4 / 256),
    (torch.bfloat16, {"importance_dtype": "log8", "state_dtype": "8bit", "rounding": "kahan"},
     4 + 8 / 256, 7 + 12 / 256),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "options", "plain", "protected"), BYTES)
def test_bytes_of_state_per_weight(dtype, options, plain, protected):
    """The table in docs/ewc-adamw.md."""
    weight = torch.nn.Parameter(torch.randn(256 * 400).to(dtype))
    optimizer = EWCAdamW([("w", weight)], **options)

    def measured() -> float:
        tensors = [t for t in optimizer.state[weight].values() if t.dim()]
        return sum(t.nbytes for t in tensors) / weight.numel()

    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert measured() == plain
    optimizer.consolidate({"w": torch.rand(weight.shape)})
    optimizer.step()
    assert measured() == protected


RESUME = """
    import itertools, sys, warnings, torch
    from cl_optim import EWCAdamW
    warnings.simplefilter("ignore")
    begin, end, source, target = sys.argv[1:]
    saved = torch.load(source, weights_only=True) if source != "-" else {}

    def run(implementation, dtype, before):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(80, 70), torch.nn.Tanh(), torch.nn.Linear(70, 60)
        ).to(dtype)
        optimizer = EWCAdamW(
            model.named_parameters(), lr=1e-2, ewc_lambda=3.0, importance_dtype="log8",
            anchor_dtype="bfloat16", state_dtype="8bit", importance_damping=0.5,
            track_penalty=True, rounding="kahan" if dtype == torch.bfloat16 else "nearest",
            **{implementation: True},
        )
        if before:
            model.load_state_dict(before["model"])
            optimizer.load_state_dict(before["optimizer"])
        for step in range(int(begin), int(end)):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(16, 80, generator=generator).to(dtype)
            optimizer.zero_grad()
            (model(x) - x[:, :60]).square().mean().backward()
            optimizer.step()
            if step in (20, 30):
                fisher = {n: p.grad.float() ** 2 for n, p in model.named_parameters()}
                optimizer.consolidate(fisher)
                optimizer.freeze(0.05)
        return {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "penalty": optimizer.last_penalty,
        }

    torch.save({
        f"{implementation} {dtype}": run(
            implementation, dtype, saved.get(f"{implementation} {dtype}")
        )
        for implementation in ("fused", "foreach")
        for dtype in (torch.float32, torch.bfloat16)
    }, target)
"""


def test_a_fresh_process_resumes_bit_for_bit(tmp_path):
    def run(begin: int, end: int, source: str, target: str) -> Any:
        path = tmp_path / target
        source = "-" if source == "-" else str(tmp_path / source)
        command = [sys.executable, "-c", textwrap.dedent(RESUME), str(begin), str(end), source]
        subprocess.run([*command, str(path)], check=True)
        return torch.load(path, weights_only=True)

    whole = run(0, 100, "-", "whole")
    run(0, 50, "-", "half")
    resumed = run(50, 100, "half", "resumed")
    assert len(whole) == 4
    assert all(run["penalty"] > 0 for run in whole.values())

    def compare(a: Any, b: Any) -> None:
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, (list, tuple)):
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        else:
            assert a == b

    compare(whole, resumed)


class TestStateDicts:
    def test_adamw_moments_take_the_format_that_was_asked_for(self):
        weight = torch.nn.Parameter(torch.randn(5000))
        adamw = torch.optim.AdamW([weight])
        for number in range(3):
            weight.grad = torch.randn(5000, generator=torch.Generator().manual_seed(number))
            adamw.step()
        optimizer = EWCAdamW([weight], state_dtype="8bit", importance_dtype="log8")
        optimizer.load_state_dict(adamw.state_dict())
        state = optimizer.state[weight]
        assert state["exp_avg"].dtype == torch.uint8
        expected = adamw.state[weight]["exp_avg"]
        torch.testing.assert_close(
            values(state, "exp_avg", weight), expected, rtol=0.0625, atol=1e-5
        )
        assert optimizer.param_groups[0]["importance_dtype"] == "log8"
        optimizer.step()

    @pytest.mark.parametrize("key", ["importance", "exp_avg", "exp_avg_sq"])
    def test_codes_of_an_earlier_version_are_refused(self, key):
        weight = torch.nn.Parameter(torch.randn(5000))
        optimizer = EWCAdamW([("w", weight)], state_dtype="8bit", importance_dtype="log8")
        optimizer.consolidate({"w": torch.rand(5000)})
        weight.grad = torch.randn(5000)
        optimizer.step()
        saved = optimizer.state_dict()
        scales = saved["state"][0][key][:, :4].contiguous().view(torch.float32) * 1.001
        saved["state"][0][key][:, :4] = scales.view(torch.uint8)
        message = (
            f"^'{key}' of parameter w has codes .* an earlier version's. Save .*, and load that"
        )
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)

    def test_16_bit_adamw_moments_are_widened(self):
        weight = torch.nn.Parameter(torch.randn(5000).bfloat16())
        adamw = torch.optim.AdamW([weight])
        weight.grad = torch.randn(5000).bfloat16()
        adamw.step()
        optimizer = EWCAdamW([weight])
        optimizer.load_state_dict(adamw.state_dict())
        assert optimizer.state[weight]["exp_avg"].dtype == torch.float32

    def test_frozen_weights_are_in_it(self):
        weight = torch.nn.Parameter(torch.randn(5000))
        for name in IMPORTANCE:
            optimizer = EWCAdamW([("w", weight)], importance_dtype=name)
            optimizer.consolidate({"w": torch.rand(5000)})
            optimizer.freeze(0.1)
            other = EWCAdamW([("w", weight)], importance_dtype=name)
            other.load_state_dict(optimizer.state_dict())
            (ours,), (theirs,) = optimizer.protected(), other.protected()
            assert torch.equal(ours.frozen, theirs.frozen)
            assert torch.equal(ours.importance, theirs.importance)
            other.unfreeze()
            assert torch.equal(next(other.protected()).importance, ours.importance)

    DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    @pytest.mark.parametrize("after", DTYPES)
    @pytest.mark.parametrize("before", DTYPES)
    @pytest.mark.parametrize("importance_dtype", ["float32", "log8"])
    @pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
    def test_another_dtype_of_the_parameters(self, before, after, importance_dtype, implementation):
        """Loaded, or cast where it is: the run goes on, protected as it was."""
        rounding = "kahan" if before == torch.bfloat16 and after != torch.float16 else "nearest"
        weight = nn.Parameter(torch.randn(5000).to(before))
        options = {"importance_dtype": importance_dtype, "state_dtype": "8bit", **implementation}
        optimizer = EWCAdamW([("w", weight)], rounding=rounding, **options)
        weight.grad = torch.randn(5000).to(before)
        optimizer.step()
        optimizer.consolidate({"w": torch.rand(5000)})
        optimizer.freeze(0.1)
        (expected,) = optimizer.protected()
        saved = copy.deepcopy(optimizer.state_dict())

        other = nn.Parameter(weight.detach().to(after))
        loaded = EWCAdamW([("w", other)], **options)
        loaded.load_state_dict(saved)
        weight.data = weight.data.to(after)  # as Module.to() does
        weight.grad = None
        optimizer.load_state_dict(optimizer.state_dict())
        for param, each in ((other, loaded), (weight, optimizer)):
            (found,) = each.protected()
            assert torch.equal(found.frozen, expected.frozen)
            tolerance = {"rtol": 1e-6, "atol": 0.0, "check_dtype": False}
            torch.testing.assert_close(found.importance, expected.importance, **tolerance)
            torch.testing.assert_close(found.anchor, expected.anchor, **tolerance)
            kept = param.detach().clone()
            param.grad = torch.randn(5000).to(after)
            each.step()
            assert torch.equal(param[found.frozen], kept[found.frozen])
            assert not torch.equal(param, kept)
            assert each.penalty().isfinite()

    @pytest.mark.parametrize(
        ("before", "after", "key"),
        [
            (torch.float16, torch.float32, "anchor"),
            (torch.float32, torch.float64, "exp_avg"),
            (torch.bfloat16, torch.float32, "compensation"),
        ],
    )
    @pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}], ids=str)
    def test_a_cast_parameter_is_a_sentence_and_nothing_is_stepped(
        self, before, after, key, implementation
    ):
        first, cast = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=before))
        rounding = "kahan" if before == torch.bfloat16 else "nearest"
        groups = [{"params": [("a", first)]}, {"params": [("b", cast)], "rounding": rounding}]
        optimizer = EWCAdamW(groups, **implementation)
        optimizer.consolidate(None)
        for param in (first, cast):
            param.grad = torch.ones_like(param)
        optimizer.step()
        cast.data = cast.data.to(after)
        cast.grad = torch.ones_like(cast)
        weights = first.detach().clone()
        with pytest.raises(RuntimeError, match=rf"parameter b was cast to {after} after .*'{key}'"):
            optimizer.step()
        assert torch.equal(first, weights)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert not torch.equal(first, weights)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"importance_dtype": torch.bfloat16}, {"importance_dtype": "bfloat16"}),
        ({"importance_dtype": torch.float32}, {"importance_dtype": "float32"}),
        ({"anchor_dtype": torch.bfloat16}, {"anchor_dtype": "bfloat16"}),
        ({"anchor_dtype": torch.float32}, {"anchor_dtype": "float32"}),
        ({"state_dtype": torch.bfloat16}, {"state_dtype": "bfloat16"}),
    ],
)
def test_a_dtype_is_as_good_as_its_name(options, names):
    """Given for all groups, for one, or set later; groups and checkpoints have the name."""

    def trained(change: Callable[[EWCAdamW], None], group: dict[str, Any], **of_all: Any) -> Any:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(300))
        optimizer = EWCAdamW([{"params": [("w", weight)], **group}], **of_all)
        change(optimizer)
        optimizer.consolidate({"w": torch.rand(300)})
        for _ in range(2):
            weight.grad = torch.randn(300)
            optimizer.step()
        return optimizer.state_dict()

    expected = trained(lambda optimizer: None, {}, **names)
    for found in (
        trained(lambda optimizer: None, {}, **options),
        trained(lambda optimizer: None, dict(options)),
        trained(lambda optimizer: optimizer.param_groups[0].update(options), {}),
    ):
        assert found["param_groups"] == expected["param_groups"]
        for key, value in expected["state"][0].items():
            assert found["state"][0][key].dtype == value.dtype
            assert torch.equal(found["state"][0][key], value)


def test_float64_keeps_everything_in_float64():
    start = Problem.of(make_params([(5000,)], torch.float64))
    narrow = {"importance_dtype": "log8", "anchor_dtype": "bfloat16", "state_dtype": "8bit"}
    sides = []
    for formats in ({}, narrow):
        problem = start.copy(torch.float64)
        optimizer = make(problem, "proximal", formats, rounding="kahan")
        for number in range(3):
            problem.set_gradients(number, torch.float64)
            optimizer.step()
        sides.append(problem.params[0])
        state = optimizer.state[problem.params[0]]
        assert all(t.dtype == torch.float64 for key, t in state.items() if key != "step")
    assert torch.equal(*sides)


def test_settings_of_the_matrix_are_used():
    """A guard for the tests above: each format gives another result."""
    start = Problem.of(make_params([(5000,)], torch.float32))
    results = []
    for formats in ({}, {"importance_dtype": "log8"}, {"state_dtype": "8bit"}):
        problem = start.copy(torch.float32)
        optimizer = make(problem, "gradient", formats)
        for number in range(2):
            step(problem, optimizer, number)
        results.append(problem.params[0].detach())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert make_optimizer(start.copy(torch.float32), Setting("gradient")).backend == ""
