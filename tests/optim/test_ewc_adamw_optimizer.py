"""EWCAdamW as a torch.optim.Optimizer: consolidation, state, groups."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from ewc_adamw_cases import (
    OFF_DEFAULT,
    Problem,
    Setting,
    importance_like,
    make_optimizer,
    make_params,
    network,
    train,
)
from optimizer_cases import snapshot
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cl_optim import EWCAdamW
from cl_optim.ops import library


@pytest.fixture
def model() -> nn.Module:
    return network()


class TestConsolidate:
    def test_online_ewc(self, model):
        optimizer = EWCAdamW(model.named_parameters())
        first, second = importance_like(model, 1), importance_like(model, 2)
        optimizer.consolidate(first)
        train(model, optimizer, 3)
        optimizer.consolidate(second, decay=0.9)
        for name, p in model.named_parameters():
            state = optimizer.state[p]
            torch.testing.assert_close(state["importance"], 0.9 * first[name] + second[name])
            assert torch.equal(state["anchor"], p)
            assert state["anchor"] is not p

    def test_none_is_l2_sp_and_needs_no_names(self, model):
        optimizer = EWCAdamW(model.parameters())
        optimizer.consolidate(None)
        for p in model.parameters():
            assert torch.equal(optimizer.state[p]["importance"], torch.ones_like(p))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5)
        count = sum(p.numel() for p in model.parameters())
        torch.testing.assert_close(optimizer.penalty(), torch.tensor(0.25 * count).double())

    def test_what_cannot_move_needs_no_importance(self, model, caplog):
        """And has no state for it, unless an importance names it."""
        fixed = model[0].requires_grad_(False)
        importance = importance_like(model)
        optimizer = EWCAdamW(model.named_parameters())
        optimizer.consolidate({name: importance[name] for name in ("2.weight", "2.bias")})
        assert [one.name for one in optimizer.protected()] == ["2.weight", "2.bias"]
        optimizer.consolidate(None)
        assert [one.name for one in optimizer.protected()] == ["2.weight", "2.bias"]
        with pytest.raises(ValueError, match=r"importance has nothing for parameter '2.bias'"):
            optimizer.consolidate({"2.weight": importance["2.weight"]})
        optimizer.consolidate({"2.weight": importance["2.weight"]}, strict=False)
        assert "1 parameters match; 1 are new: '2.bias'." in caplog.text
        optimizer.consolidate(importance, decay=0.0)
        assert torch.equal(optimizer.state[fixed.bias]["importance"], importance["0.bias"])
        # Fixed for one task, it keeps what protects it from an earlier one.
        optimizer.consolidate(
            {name: importance[name] for name in ("2.weight", "2.bias")}, decay=0.5
        )
        torch.testing.assert_close(
            optimizer.state[fixed.bias]["importance"], 0.5 * importance["0.bias"]
        )

    def test_weights_whose_gradients_are_set_by_hand_can_move(self, model):
        """Such as a float32 copy of the weights: none requires a gradient."""
        optimizer = EWCAdamW(model.requires_grad_(False).named_parameters())
        with pytest.raises(ValueError, match=r"importance has nothing for parameter '0.weight'"):
            optimizer.consolidate({})
        optimizer.consolidate(None)
        assert len(list(optimizer.protected())) == 4

    @pytest.mark.parametrize("way", ["as it is", "state dict", "pickle"])
    @pytest.mark.parametrize("implementation", [{"fused": True}, {"foreach": True}])
    def test_what_moves_unprotected_is_said_once(self, model, way, implementation):
        fixed = model[0].requires_grad_(False)
        optimizer = EWCAdamW(model.named_parameters(), **implementation)
        optimizer.consolidate(None)
        train(model, optimizer, 4)  # with a launch plan from the second step on
        if way == "state dict":
            state, optimizer = optimizer.state_dict(), EWCAdamW(model.named_parameters())
            optimizer.load_state_dict(state)
        elif way == "pickle":
            model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
            fixed = model[0]
        fixed.weight.requires_grad_()
        message = r"^parameter '0.weight' did not require a gradient at the last consolidate\(\)"
        with pytest.warns(UserWarning, match=message):
            train(model, optimizer, 1)
        train(model, optimizer, 3)
        fixed.bias.requires_grad_()
        optimizer.consolidate(None)
        train(model, optimizer, 3)
        assert len(list(optimizer.protected())) == 4

    def test_model_names_the_parameters(self, model):
        optimizer = EWCAdamW(model.parameters())
        importance = importance_like(model)
        optimizer.consolidate(importance, model=model)
        for name, p in model.named_parameters():
            assert torch.equal(optimizer.state[p]["importance"], importance[name])

    def test_not_strict(self, model):
        optimizer = EWCAdamW(model.named_parameters())
        importance = importance_like(model)
        optimizer.consolidate(
            {"other": torch.ones(2), "0.bias": importance["0.bias"]}, strict=False
        )
        assert [n for n, p in model.named_parameters() if optimizer.state.get(p)] == ["0.bias"]
        optimizer.consolidate({"2.bias": importance["2.bias"]}, decay=0.5, strict=False)
        state = optimizer.state[model[0].bias]
        torch.testing.assert_close(state["importance"], 0.5 * importance["0.bias"])
        train(model, optimizer, 2)  # protected and unprotected parameters in one group
        assert optimizer.backend == "cpu"

    def test_reset_state(self, model):
        optimizer = EWCAdamW(model.named_parameters(), amsgrad=True)
        train(model, optimizer, 3)
        optimizer.consolidate(importance_like(model), reset_state=True)
        for p in model.parameters():
            assert set(optimizer.state[p]) == {"importance", "anchor"}
        train(model, optimizer, 1)
        assert optimizer.state[model[0].weight]["step"] == 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes(self, model, dtype):
        model.to(dtype)
        optimizer = EWCAdamW(model.named_parameters())
        optimizer.consolidate(importance_like(model))
        train(model, optimizer, 1)
        state = optimizer.state[model[0].weight]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert state["anchor"].dtype == dtype
        for key in ("importance", "exp_avg", "exp_avg_sq"):
            assert state[key].dtype == wide

    def test_the_gradient_form_is_the_gradient_of_the_penalty(self, model):
        """SGD-like check through Adam's first moment: beta1 = 0 leaves g itself in it."""
        model.double()
        groups = [
            {"params": [("0.weight", model[0].weight)], "ewc_lambda": 3.0},
            {"params": [("2.weight", model[2].weight)]},
        ]
        optimizer = EWCAdamW(groups, lr=0.0, betas=(0.0, 0.9), ewc_lambda=0.5)
        optimizer.consolidate({n: f for n, f in importance_like(model).items() if "weight" in n})
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        weights = [model[0].weight, model[2].weight]
        loss = sum(
            lambda_
            * (optimizer.state[p]["importance"] * (p - optimizer.state[p]["anchor"]) ** 2).sum()
            for lambda_, p in zip((3.0, 0.5), weights, strict=True)
        )
        torch.testing.assert_close(optimizer.penalty(), loss.detach(), check_dtype=False)
        assert not optimizer.penalty().requires_grad
        expected = torch.autograd.grad(loss, weights)
        for p in weights:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, g in zip(weights, expected, strict=True):
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], g)

    @pytest.mark.parametrize("decay", [1.0, 0.8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_exact_anchors_are_the_sum_of_all_penalties(self, dtype, decay):
        """Within 16 u · 2λF̄ (|θ| + max_k |θ*_k|), u the unit roundoff of the state's dtype."""
        weight = nn.Parameter(torch.randn(20_000).to(dtype))
        optimizer = EWCAdamW([("w", weight)], lr=0.0, betas=(0.0, 0.9), ewc_lambda=0.7)
        tasks = []
        for _ in range(3):
            fisher = 10 ** (torch.randn(weight.shape) * 3)
            fisher[torch.rand(weight.shape) < 0.2] = 0.0
            with torch.no_grad():
                weight.add_(torch.randn(weight.shape).to(dtype))
            optimizer.consolidate({"w": fisher}, decay=decay, anchors="exact")
            tasks = [(decay * f, anchor) for f, anchor in tasks]
            tasks.append((fisher.double(), weight.detach().double().clone()))
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape).to(dtype))
        theta = weight.detach().double()
        state = optimizer.state[weight]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert state["anchor"].dtype == state["importance"].dtype == wide

        expected = sum(2 * 0.7 * fisher * (theta - anchor) for fisher, anchor in tasks)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert optimizer.backend == "cpu"
        total = sum(fisher for fisher, _ in tasks)
        size = theta.abs() + torch.stack([anchor.abs() for _, anchor in tasks]).amax(0)
        bound = 16 * torch.finfo(wide).eps / 2 * 2 * 0.7 * total * size
        assert ((state["exp_avg"].double() - expected).abs() <= bound).all()

    def test_exact_anchors_without_importance_follow_the_weights(self):
        weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        optimizer = EWCAdamW([("w", weight)])
        optimizer.consolidate({"w": torch.tensor([0.0, 1.0])}, anchors="exact")
        with torch.no_grad():
            weight.add_(1.0)
        optimizer.consolidate({"w": torch.tensor([0.0, 3.0])}, anchors="exact")
        assert optimizer.state[weight]["anchor"].tolist() == [2.0, 2.75]
        optimizer.consolidate({}, decay=0.5, anchors="exact", strict=False)
        assert optimizer.state[weight]["importance"].tolist() == [0.0, 2.0]
        assert optimizer.state[weight]["anchor"].tolist() == [2.0, 2.75]

    @pytest.mark.parametrize(
        "wrapped",
        [
            "module.{}",
            "_orig_mod.{}",
            "module._orig_mod.{}",
            "_fsdp_wrapped_module.{}",
            "base_model.model.{}",
            "module.base_model.model.{}",
        ],
    )
    def test_names_match_through_wrappers(self, model, wrapped):
        importance = importance_like(model)
        outside = {wrapped.format(name): f for name, f in importance.items()}
        named = [(wrapped.format(name), p) for name, p in model.named_parameters()]
        for optimizer, given in (
            (EWCAdamW(model.named_parameters()), outside),
            (EWCAdamW(named), importance),
        ):
            optimizer.consolidate(given)
            for name, p in model.named_parameters():
                assert torch.equal(optimizer.state[p]["importance"], importance[name])

    def test_real_wrappers(self, model):
        """torch.compile's and DataParallel's own names, and groups without names as Trainers do."""
        importance = importance_like(model)
        wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
        decay = [p for p in wrapped.parameters() if p.dim() > 1]
        rest = [p for p in wrapped.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        optimizer = EWCAdamW(groups)
        optimizer.consolidate(importance, model=wrapped)
        for name, p in model.named_parameters():
            assert torch.equal(optimizer.state[p]["importance"], importance[name])

    def test_model_tells_two_parameters_of_a_name_apart(self):
        layers = [nn.Linear(2, 1, bias=False) for _ in range(2)]
        optimizer = EWCAdamW([{"params": list(layer.named_parameters())} for layer in layers])
        model = nn.Sequential(*layers)
        optimizer.consolidate(
            {"0.weight": torch.ones(1, 2), "1.weight": torch.ones(1, 2)}, model=model
        )

    def test_sums_saturate(self):
        weight = nn.Parameter(torch.ones(2))
        optimizer = EWCAdamW([("w", weight)])
        for anchors in ("latest", "exact"):
            optimizer.consolidate({"w": torch.tensor([3e38, 0.0])}, anchors=anchors)
        assert optimizer.state[weight]["importance"].tolist() == [torch.finfo().max, 0.0]
        assert optimizer.penalty() == 0

    def test_eight_bit_floats(self, model):
        optimizer = EWCAdamW(model.named_parameters())
        importance = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        optimizer.consolidate({n: f.to(torch.float8_e4m3fn) for n, f in importance.items()})
        assert all(torch.equal(p.importance, importance[p.name]) for p in optimizer.protected())

    def test_no_penalty_before(self, model):
        assert EWCAdamW(model.parameters()).penalty() == 0


class TestState:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_resume_is_bit_for_bit(self, model, dtype):
        model.to(dtype)
        optimizer = EWCAdamW(model.named_parameters(), amsgrad=True, **OFF_DEFAULT)
        train(model, optimizer, 5)
        optimizer.consolidate(importance_like(model))
        train(model, optimizer, 5, seed=1)

        other = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        resumed = EWCAdamW(other.named_parameters())
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            for key, value in optimizer.state[p].items():
                assert resumed.state[q][key].dtype == value.dtype, key
                assert torch.equal(resumed.state[q][key], value)
        train(model, optimizer, 5, seed=2)
        train(other, resumed, 5, seed=2)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)

    def test_parameters_in_another_order_and_renamed(self):
        class Two(nn.Module):
            def __init__(self, names):
                super().__init__()
                for name in names:
                    setattr(self, name, nn.Linear(3, 3, bias=False))

        one, other = Two("ab"), Two("ba")
        optimizer = EWCAdamW(one.named_parameters())
        train_on = torch.randn(4, 3)
        one.b(one.a(train_on)).square().sum().backward()
        optimizer.step()
        optimizer.consolidate({"a.weight": torch.ones(3, 3), "b.weight": torch.full((3, 3), 2.0)})
        saved = copy.deepcopy(optimizer.state_dict())
        again = EWCAdamW(other.named_parameters())
        again.load_state_dict(saved)
        assert again.param_groups[0]["param_names"] == ["b.weight", "a.weight"]
        for mine, theirs in ((other.a, one.a), (other.b, one.b)):
            state, expected = again.state[mine.weight], optimizer.state[theirs.weight]
            assert all(torch.equal(state[key], value) for key, value in expected.items())
        renamed = nn.Sequential(one.a, one.b)  # by place, as in torch; under its own names
        third = EWCAdamW(renamed.named_parameters())
        third.load_state_dict(saved)
        third.consolidate({"0.weight": torch.ones(3, 3), "1.weight": torch.ones(3, 3)})
        assert [p.importance.mean().item() for p in third.protected()] == [2.0, 3.0]

    def test_wrapped_names(self):
        def make(names, prefix=""):
            return EWCAdamW([(prefix + name, nn.Parameter(torch.zeros(2))) for name in names])

        optimizer = make("ab", "module.")
        optimizer.consolidate({"a": torch.ones(2), "b": torch.full((2,), 2.0)})
        again = make("ba")
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [p.name for p in again.protected()] == ["b", "a"]
        assert [p.importance[0].item() for p in again.protected()] == [2.0, 1.0]

    def test_amsgrad_switched_on_beside_an_idle_parameter(self):
        weight, idle = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        optimizer = EWCAdamW([weight, idle])
        for param in (weight, idle):
            param.grad = torch.ones(3)
        optimizer.step()
        idle.grad = None
        optimizer.param_groups[0]["amsgrad"] = True
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        idle.grad = torch.ones(3)
        optimizer.step()
        assert "max_exp_avg_sq" in optimizer.state[idle]

    def test_hooks_see_the_restored_state(self, model):
        model.bfloat16()
        optimizer = EWCAdamW(model.named_parameters())
        train(model, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        seen = []
        optimizer.register_load_state_dict_pre_hook(lambda o, s: {**s, "extra": 1})
        optimizer.register_load_state_dict_post_hook(
            lambda o: seen.append(o.state[model[0].weight]["exp_avg"].dtype)
        )
        optimizer.load_state_dict(saved)
        assert seen == [torch.float32]

    def test_pickle_and_deepcopy(self, model):
        optimizer = EWCAdamW(model.named_parameters())
        train(model, optimizer, 2)
        optimizer.consolidate(importance_like(model))
        optimizer.zero_grad()  # a copy has none
        for duplicate in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert snapshot(duplicate) == snapshot(optimizer)
            duplicate.load_state_dict(optimizer.state_dict())
            before = snapshot(optimizer)
            for p in duplicate.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            duplicate.step()
            assert duplicate.backend == "cpu"
            assert snapshot(optimizer) == before


class TestTorchOptimContract:
    def test_missing_gradients_are_skipped(self, model):
        optimizer = EWCAdamW(model.named_parameters())
        optimizer.consolidate(importance_like(model))
        with torch.no_grad():
            model[0].weight.add_(1.0)
        before = model[0].weight.clone()
        model[2].weight.grad = torch.ones_like(model[2].weight)
        optimizer.step()
        assert torch.equal(model[0].weight, before)
        assert "step" not in optimizer.state[model[0].weight]
        assert optimizer.state[model[2].weight]["step"] == 1

    def test_closure_runs_with_gradients_and_returns_its_loss(self, model):
        optimizer = EWCAdamW(model.parameters())

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 5)).square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) > optimizer.step(closure)

    def test_groups_have_their_own_hyperparameters(self):
        weights = [nn.Parameter(torch.tensor([1.0])) for _ in range(3)]
        optimizer = EWCAdamW(
            [
                {"params": weights[:1], "ewc_lambda": 0.0},
                {"params": weights[1:2], "penalty": "decoupled"},
            ],
            lr=0.1,
            weight_decay=0.0,
            ewc_lambda=2.0,
        )
        optimizer.add_param_group({"params": weights[2:], "penalty": "proximal"})
        optimizer.consolidate(None)
        with torch.no_grad():
            for w in weights:
                w.add_(1.0)
                w.grad = torch.zeros(1)
        optimizer.step()
        assert [w.item() for w in weights] == pytest.approx([2.0, 2 - 0.1 * 4.0, 1 + 1 / 1.4])

    def test_schedulers_act_at_the_next_step(self):
        weight = nn.Parameter(torch.tensor([1.0]))
        optimizer = EWCAdamW([weight], lr=0.1, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0**epoch)
        for _ in range(2):
            weight.grad = torch.ones(1)
            optimizer.step()
            scheduler.step()
        assert weight.item() == pytest.approx(0.9)

    def test_versions_advance(self):
        """A weight saved for backward and then stepped is an error, as with torch's optimizers."""
        weight = nn.Parameter(torch.ones(3))
        loss = (weight * weight).sum()
        weight.grad = torch.ones(3)
        optimizer = EWCAdamW([weight])
        optimizer.step()
        assert optimizer.backend == "cpu"
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_every_step_reads_the_tensors_again(self):
        """p.data, p.grad and the state may be other memory in every step."""
        start = Problem.of(make_params([(50, 3)], torch.float32))
        setting = Setting("gradient")
        still, moving = start.copy(torch.float32), start.copy(torch.float32)
        optimizers = [make_optimizer(side, setting, fused=True) for side in (still, moving)]
        for step in range(6):
            for side, optimizer in zip((still, moving), optimizers, strict=True):
                side.set_gradients(step, torch.float32)
                if side is moving and step != 2:
                    (p,) = side.params
                    p.data = p.data.clone().t().contiguous().t()
                    for value in optimizer.state[p].values():
                        value.data = value.data.clone()
                optimizer.step()
        assert torch.equal(still.params[0], moving.params[0])

    def test_amsgrad_may_be_switched_on(self):
        weight = nn.Parameter(torch.ones(3))
        optimizer = EWCAdamW([weight])
        weight.grad = torch.ones(3)
        optimizer.step()
        optimizer.param_groups[0]["amsgrad"] = True
        optimizer.step()
        assert optimizer.state[weight]["step"] == 2
        assert "max_exp_avg_sq" in optimizer.state[weight]

    def test_gradient_scaler(self):
        weight = nn.Parameter(torch.ones(3))
        optimizer = EWCAdamW([weight], lr=0.1, weight_decay=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for value in (1.0, float("inf")):
            optimizer.zero_grad()
            scaler.scale((weight * value).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
        assert optimizer.state[weight]["step"] == 1


class TestBadInput:
    def test_a_hyperparameter_set_in_mid_training(self, model):
        optimizer = EWCAdamW([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
        train(model, optimizer, 1)
        optimizer.param_groups[1]["ewc_lambda"] = -1.0
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="ewc_lambda"):
            optimizer.step()
        assert snapshot(optimizer) == before

    def test_sparse_gradient(self):
        embedding = nn.Embedding(4, 2, sparse=True)
        linear = nn.Linear(2, 2)
        named = [*linear.named_parameters(), ("tokens.weight", embedding.weight)]
        optimizer = EWCAdamW(named)
        linear(embedding(torch.tensor([1]))).sum().backward()
        weight = linear.weight.clone()
        with pytest.raises(
            RuntimeError, match=r"gradient of parameter tokens\.weight must be dense"
        ):
            optimizer.step()
        assert torch.equal(linear.weight, weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.10's own
class TestDistributedCheckpoint:
    """It loads what the optimizer has before: moments by a step that it takes, and no more."""

    def saved(self, folder, model):
        optimizer = EWCAdamW(model.named_parameters(), lr=0.01, ewc_lambda=2.0)
        train(model, optimizer, 2)
        optimizer.consolidate({n: torch.rand_like(p) for n, p in model.named_parameters()})
        train(model, optimizer, 2)
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        return optimizer

    def load(self, folder, model, optimizer):
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])

    def test_importance_that_finds_no_room_is_not_lost_in_silence(self, model, tmp_path):
        self.saved(tmp_path, model)
        other = copy.deepcopy(model)
        optimizer = EWCAdamW(other.named_parameters())
        with pytest.raises(ValueError, match=r"no 'importance'.* call consolidate\(None"):
            self.load(tmp_path, other, optimizer)
        assert list(optimizer.protected()) == []

    def test_with_room_for_it_the_run_goes_on(self, model, tmp_path):
        optimizer = self.saved(tmp_path, model)
        other = copy.deepcopy(model)
        resumed = EWCAdamW(other.named_parameters())
        get_optimizer_state_dict(other, resumed)  # begins the moments
        resumed.consolidate(None)
        self.load(tmp_path, other, resumed)
        for side, each in ((model, optimizer), (other, resumed)):
            train(side, each, 3)
        assert resumed.penalty() == optimizer.penalty() > 0
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
    def test_a_state_that_begins_leaves_the_weights(self, model, rounding):
        model.bfloat16()
        before = copy.deepcopy(model.state_dict())
        optimizer = EWCAdamW(model.parameters(), weight_decay=0.1, rounding=rounding)
        get_optimizer_state_dict(model, optimizer)
        assert "exp_avg" in optimizer.state[next(model.parameters())]
        assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


class TestWithoutTheExtension:
    @pytest.fixture(autouse=True)
    def hide(self, monkeypatch):
        reason = "The extension cl_optim._C was not built: no compiler."
        absent = {name: library.Backend(name, False, reason) for name in ("cpu", "cuda")}
        monkeypatch.setattr(library, "backends", lambda: absent)
        library.warn_once.cache_clear()
        yield
        library.warn_once.cache_clear()

    def test_falls_back_with_one_warning(self, model):
        with pytest.warns(UserWarning, match="was not built: no compiler") as caught:
            optimizer = EWCAdamW(model.named_parameters())
        train(model, optimizer, 2)  # a second warning would be an error
        assert len(caught) == 1
        assert optimizer.backend == "foreach"

    def test_steps_without_any_gradient(self, model, monkeypatch):
        def missing(device_type: str) -> None:
            raise ModuleNotFoundError("No module named 'cl_optim._C'")

        monkeypatch.setattr(library, "extension", missing)
        optimizer = EWCAdamW(model.named_parameters(), foreach=True)
        for _ in range(3):
            optimizer.step()
        train(model, optimizer, 3)
        assert optimizer.backend == "foreach"

    def test_an_explicit_choice_is_kept(self, model):
        with pytest.raises(RuntimeError, match=r"fused=True is not possible: .* no compiler"):
            EWCAdamW(model.parameters(), fused=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, EWCAdamW(model.parameters(), foreach=True), 1)
            train(model, EWCAdamW(model.parameters(), fused=False), 1)


class TestDenormals:
    """Moments of units that get no gradient any more decay to them, and cost much on Intel."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("threads", [1, 2])
    def test_moments_become_zeros_and_others_stay(self, dtype, threads):
        tiny = torch.finfo(dtype).tiny
        params = [nn.Parameter(torch.linspace(-1, 1, 200_000, dtype=dtype)) for _ in range(2)]
        ours = EWCAdamW(params[:1], lr=0.1, weight_decay=0.0)
        theirs = torch.optim.AdamW(params[1:], lr=0.1, weight_decay=0.0)
        for one, optimizer in zip(params, (ours, theirs), strict=True):
            one.grad = torch.zeros_like(one)
            optimizer.step()
            state = optimizer.state[one]
            state["exp_avg"][::2] = tiny / 8
            state["exp_avg"][1::2] = 0.25
            state["exp_avg_sq"][1::2] = 0.5
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            ours.step()
            theirs.step()
        finally:
            torch.set_num_threads(before)
        mine, other = ours.state[params[0]]["exp_avg"], theirs.state[params[1]]["exp_avg"]
        assert (mine[::2] == 0.0).all()
        assert (other[::2] != 0.0).all(), "torch keeps them: this test would tell nothing"
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=tiny)
        torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("flushes", [False, True])
    def test_the_thread_is_left_as_it_was(self, flushes):
        param = nn.Parameter(torch.ones(4))
        param.grad = torch.ones(4)
        denormal = torch.full((4,), 1e-40)
        try:
            assert torch.set_flush_denormal(flushes)
            EWCAdamW([param]).step()
            assert bool((denormal * 0.5 == 0.0).all()) is flushes
        finally:
            torch.set_flush_denormal(False)
