"""EWCAdamW in the loops that people have: what torch's own optimizers can do, it can."""

from __future__ import annotations

import copy

import pytest
import torch
from ewc_adamw_cases import OFF_DEFAULT, PENALTIES, Problem, Setting, make_optimizer, make_params
from processes import in_processes
from torch import Tensor, nn

from cl_optim import EWCAdamW


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 6, generator=generator).to(next(model.parameters()))
        model(x).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestTensorLearningRate:
    @pytest.mark.parametrize("penalty", PENALTIES)
    @pytest.mark.parametrize("place", ["host", "device"])
    def test_is_the_number_in_it(self, penalty, place, implementation, device):
        start = Problem.of(make_params([(50,), (3, 4)], torch.float32))
        results = []
        for make_lr in (
            float,
            lambda lr: torch.tensor(lr, device="cpu" if place == "host" else device),
        ):
            problem = start.copy(torch.float32, device)
            optimizer = make_optimizer(problem, Setting(penalty), **implementation)
            for step in range(4):
                optimizer.param_groups[0]["lr"] = make_lr(0.01 / (step + 1))
                problem.set_gradients(step, torch.float32)
                optimizer.step()
            results.append(problem.params)
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)

    def test_the_kernel_reads_it_where_it_is(self):
        """What a GPU does, on the CPU: the number is in the inputs and not in the options."""
        from cl_optim.ops import ewc_adamw as ops
        from cl_optim.ops import ewc_adamw_arguments as arguments

        start = Problem.of(make_params([(50,)], torch.float32))
        for step in (ops.fused, ops.foreach):
            results = []
            for lr, inputs in (
                (0.25, arguments.NO_INPUTS),
                (0.0, arguments.Inputs(lr=torch.tensor(0.25))),
            ):
                side = start.copy(torch.float32)
                side.set_gradients(0, torch.float32)
                zeros = [[torch.zeros(50)] for _ in range(2)]
                hyper = arguments.Hyperparameters(lr, 0.9, 0.99, 1e-8, 0.1, 0.5, penalty="proximal")
                grads = [p.grad for p in side.params]
                steps = [torch.tensor(0.0)]
                state = arguments.State(*zeros, [], side.importances, side.anchors, [], steps)
                with torch.no_grad():
                    step(side.params, grads, state, hyper, inputs)
                results.append(side.params[0])
            torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)

    def test_schedulers_write_into_it(self, implementation):
        results = []
        for lr in (0.1, torch.tensor(0.1)):
            model = make_model()
            optimizer = EWCAdamW(model.parameters(), lr=lr, **implementation)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            for _ in range(3):
                train(model, optimizer, 1)
                scheduler.step()
            assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.0125)
            results.append(weights(model))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


class TestDifferentiable:
    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize("penalty", PENALTIES)
    def test_gradients_through_three_steps(self, penalty, amsgrad):
        start = Problem.of(make_params([(5,)], torch.float64))
        (importance,), (anchor,) = start.importances, start.anchors

        def run(weight: Tensor, grads: Tensor) -> Tensor:
            param = weight.clone()
            options = {**OFF_DEFAULT, "penalty": penalty, "amsgrad": amsgrad}
            optimizer = EWCAdamW([param], differentiable=True, **options)
            optimizer.state[param].update(importance=importance.double(), anchor=anchor.clone())
            optimizer.param_groups[0]["consolidations"] = 1
            for grad in grads:
                param.grad = grad
                optimizer.step()
            assert optimizer.backend == "foreach"
            return param

        weight = start.params[0].detach().clone().requires_grad_()
        grads = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(run, (weight, grads))

    @pytest.mark.parametrize("penalty", ["gradient", "decoupled", "proximal"])
    def test_gradient_of_the_learning_rate(self, penalty):
        start, grad = torch.randn(2, 5, dtype=torch.float64)

        def result(lr):
            param = start.clone()
            optimizer = EWCAdamW([param], lr=lr, penalty=penalty, differentiable=True)
            optimizer.consolidate(None)
            for _ in range(2):
                param.grad = grad
                optimizer.step()
            return param

        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(result, lr)


class TestSwitchFromAdamW:
    @pytest.mark.parametrize("amsgrad", [False, True])
    @pytest.mark.parametrize("theirs", [{"fused": True}, {"foreach": True}, {}], ids=str)
    def test_the_run_goes_on(self, theirs, amsgrad, implementation):
        options = {"lr": 3e-3, "weight_decay": 0.05, "betas": (0.8, 0.95), "amsgrad": amsgrad}
        model, expected = make_model(), make_model()
        before = torch.optim.AdamW(model.parameters(), **options, **theirs)
        train(model, before, 10)
        optimizer = EWCAdamW(model.named_parameters(), ewc_lambda=7.0, penalty="proximal")
        optimizer.load_state_dict(before.state_dict())
        group = optimizer.param_groups[0]
        assert (group["ewc_lambda"], group["penalty"]) == (7.0, "proximal")
        assert (group["lr"], group["betas"]) == (3e-3, (0.8, 0.95))
        group.update(foreach=None, fused=None)
        group.update(implementation)
        train(model, optimizer, 10, seed=1)
        other = torch.optim.AdamW(expected.parameters(), **options, **theirs)
        train(expected, other, 10)
        train(expected, other, 10, seed=1)
        torch.testing.assert_close(weights(model), weights(expected), rtol=1e-5, atol=1e-6)
        optimizer.consolidate(None)
        train(model, optimizer, 1)
        assert optimizer.penalty() >= 0
        # And from there on it is a state dict of its own.
        again = EWCAdamW(model.named_parameters())
        again.load_state_dict(optimizer.state_dict())
        assert again.param_groups[0]["ewc_lambda"] == 7.0

    def test_from_older_versions_and_other_backends(self, implementation):
        """Without the keys that came later, with step counts as numbers."""
        model = make_model()
        theirs = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=True)
        train(model, theirs, 2)
        saved = copy.deepcopy(theirs.state_dict())
        for group in saved["param_groups"]:
            for key in ("decoupled_weight_decay", "maximize", "foreach", "fused", "capturable"):
                del group[key]
        for state in saved["state"].values():
            state["step"] = int(state["step"])
        other = copy.deepcopy(model)
        ours = EWCAdamW(other.parameters(), lr=1.0, **implementation)
        ours.load_state_dict(saved)
        train(model, theirs, 2, seed=1)
        train(other, ours, 2, seed=1)
        torch.testing.assert_close(weights(other), weights(model), rtol=1e-6, atol=1e-7)
        ours.load_state_dict(theirs.state_dict())
        for key, value in implementation.items():
            assert ours.param_groups[0][key] is value
        assert ours.param_groups[0]["fused"] is implementation.get("fused")

    def test_16_bit_moments_are_widened(self):
        model = make_model().bfloat16()
        before = torch.optim.AdamW(model.parameters())
        train(model, before, 3)
        optimizer = EWCAdamW(model.parameters())
        optimizer.load_state_dict(before.state_dict())
        for p in model.parameters():
            assert optimizer.state[p]["exp_avg"].dtype == torch.float32
            assert torch.equal(optimizer.state[p]["exp_avg"], before.state[p]["exp_avg"].float())
        train(model, optimizer, 1)


class TestLoops:
    def test_hooks_surround_the_step(self):
        model, calls = make_model(), []
        optimizer = EWCAdamW(model.parameters())
        optimizer.register_step_pre_hook(lambda *_: calls.append(weights(model)))
        optimizer.register_step_post_hook(lambda *_: calls.append(weights(model)))
        train(model, optimizer, 1)
        assert len(calls) == 2
        assert not torch.equal(*calls)

    def test_a_group_joins_in_mid_training(self, implementation):
        model, more = make_model(), nn.Parameter(torch.ones(3))
        optimizer = EWCAdamW(model.parameters(), **implementation)
        train(model, optimizer, 3)
        optimizer.consolidate(None)
        optimizer.add_param_group({"params": [more], "lr": 0.5, "ewc_lambda": 3.0})
        more.grad = torch.ones(3)
        train_more = weights(model)
        optimizer.step()
        assert optimizer.state[more]["step"] == 1
        assert "importance" not in optimizer.state[more]
        assert not torch.equal(weights(model), train_more)
        assert more[0] < 0.6

    def test_several_dtypes_in_one_optimizer(self, implementation):
        dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
        start = Problem.of(make_params([(40,)] * 4, torch.float32))
        together = [
            nn.Parameter(p.detach().to(d)) for p, d in zip(start.params, dtypes, strict=True)
        ]
        alone = [nn.Parameter(p.detach().clone()) for p in together]
        optimizer = EWCAdamW(together, **implementation)
        optimizers = [EWCAdamW([p], **implementation) for p in alone]
        for step in range(3):
            for params in (together, alone):
                Problem(params, [], []).set_gradients(step, torch.bfloat16)
            for each in (optimizer, *optimizers):
                each.step()
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_the_training_step_may_be_compiled(self):
        """Around the optimizer's step, which stays as it is; aot_eager needs no compiler."""
        results = []
        for decorate in (lambda f: f, torch.compile(backend="aot_eager")):
            model = make_model()
            optimizer = EWCAdamW(model.named_parameters(), lr=0.01)
            optimizer.consolidate(None)

            @decorate
            def step(x: Tensor, model=model, optimizer=optimizer) -> Tensor:
                loss = model(x).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                return loss

            torch.manual_seed(3)
            for _ in range(4):
                step(torch.randn(16, 6))
            assert optimizer.backend == "cpu"
            results.append(weights(model))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
        torch.compiler.reset()


# --- processes ------------------------------------------------------------------------------------


def _train_in_parallel(rank: int, path: str) -> None:
    model = make_model()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = EWCAdamW(wrapped.named_parameters(), lr=0.01, ewc_lambda=0.5)
    generator = torch.Generator().manual_seed(5)
    for step in range(8):
        if step == 4:  # importance by the bare model's names
            optimizer.consolidate({n: torch.full_like(p, 2.0) for n, p in model.named_parameters()})
        x = torch.randn(2, 16, 6, generator=generator)[rank]
        optimizer.zero_grad()
        wrapped(x).square().mean().backward()
        optimizer.step()
    torch.save(weights(model), f"{path}/{rank}.pt")


def test_data_parallel_training(tmp_path):
    """Two processes with half of the batch each do what one does with all of it."""
    in_processes(_train_in_parallel, 2, str(tmp_path))
    model = make_model()
    optimizer = EWCAdamW(model.named_parameters(), lr=0.01, ewc_lambda=0.5)
    generator = torch.Generator().manual_seed(5)
    for step in range(8):
        if step == 4:
            optimizer.consolidate({n: torch.full_like(p, 2.0) for n, p in model.named_parameters()})
        optimizer.zero_grad()
        model(torch.randn(2, 16, 6, generator=generator).flatten(0, 1)).square().mean().backward()
        optimizer.step()
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
class TestExchanged:
    """What a wrapper has exchanged behind the optimizer's back, before a plan is made and after."""

    def test_parameters(self, foreach, steps):
        optimizer, weights = self.stepped(foreach, steps)
        others = [nn.Parameter(weight.detach().clone()) for weight in weights]
        optimizer.param_groups[0]["params"] = others
        for other in others:
            other.grad = torch.ones_like(other)
        with pytest.raises(RuntimeError, match=r"^parameter a is not protected, .* load the state"):
            optimizer.step()
        assert all((other == weight).all() for other, weight in zip(others, weights, strict=True))

    def test_options(self, foreach, steps):
        optimizer, weights = self.stepped(foreach, steps)
        optimizer.param_groups[0]["consolidations"] = 0
        before = [weight.detach().clone() for weight in weights]
        with pytest.raises(
            RuntimeError, match=r"'consolidations' is 0, .* parameter a is protected"
        ):
            optimizer.step()
        assert all(torch.equal(old, new) for old, new in zip(before, weights, strict=True))

    def test_a_group_may_be_taken_out(self, foreach, steps):
        optimizer, _ = self.stepped(foreach, steps)
        optimizer.param_groups[0]["params"].pop()
        optimizer.param_groups[0]["param_names"].pop()
        optimizer.step()

    @staticmethod
    def stepped(foreach: bool, steps: int) -> tuple[EWCAdamW, list[nn.Parameter]]:
        weights = [nn.Parameter(torch.randn(5)) for _ in "ab"]
        optimizer = EWCAdamW(zip("ab", weights, strict=True), foreach=foreach)
        optimizer.consolidate(None)
        for weight in weights:
            weight.grad = torch.ones(5)
        for _ in range(steps):
            optimizer.step()
        return optimizer, weights


# --- CUDA graphs ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("penalty", PENALTIES)
def test_steps_in_a_cuda_graph(penalty, implementation):
    start = Problem.of(make_params([(500,), (31, 5)], torch.float32))
    captured, eager = (start.copy(torch.float32, "cuda") for _ in range(2))
    options = {**implementation}
    optimizers = [make_optimizer(side, Setting(penalty), **options) for side in (captured, eager)]
    lr = torch.tensor(0.01, device="cuda")
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = lr
    stream = torch.cuda.Stream()
    captured.set_gradients(0, torch.float32)
    grads = [p.grad for p in captured.params]
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizers[0].step()
    torch.cuda.synchronize()
    eager.set_gradients(0, torch.float32)
    for _ in range(3):
        optimizers[1].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizers[0].step()
    for step in range(1, 5):
        lr.fill_(0.01 / step)
        captured.set_gradients(step, torch.float32)
        for grad, p in zip(grads, captured.params, strict=True):
            grad.copy_(p.grad)
        graph.replay()
        eager.set_gradients(step, torch.float32)
        optimizers[1].step()
    for a, b in zip(captured.params, eager.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
