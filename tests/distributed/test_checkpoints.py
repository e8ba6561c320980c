"""State of DTensors through torch.distributed.checkpoint, on another number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import in_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cl_optim import EWCAdamW
from cl_optim.distributed import here, like, whole

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {"amsgrad": True},
    "codes": {"importance_dtype": "log8", "state_dtype": "8bit"},
    "bfloat16": {"importance_dtype": "bfloat16", "anchor_dtype": "bfloat16"},
}
LAYOUTS = {"nested": False, "flattened": True}  # of a state dict
pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:anchor_dtype rounds the anchors"),
]


def network() -> nn.Module:
    """Make a network with a matrix that is large enough for moments of 8 bits."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 66), nn.Tanh(), nn.Linear(66, 3))


def spread(count: int, is_whole: bool = False) -> nn.Module:
    model = network()
    if not is_whole:
        shape, names = ((2, 2), ("replicate", "shard")) if count == 4 else ((count,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def draw(model: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    for name, param in model.named_parameters():
        param.grad = like(param, here(draw(model, seed)[name], param).clone())
    optimizer.step()


def trained(model: nn.Module, options: dict[str, Any]) -> EWCAdamW:
    optimizer = EWCAdamW(model.named_parameters(), lr=0.01, ewc_lambda=2.0, **options)
    step(model, optimizer, 0)
    optimizer.consolidate({name: value.square() for name, value in draw(model, 10).items()})
    step(model, optimizer, 1)
    optimizer.freeze(0.1)
    return optimizer


def told(model: nn.Module, optimizer: EWCAdamW) -> dict[str, Any]:
    """Go on for two steps, and tell what came of it."""
    before = optimizer.penalty().item()
    for seed in (2, 3):
        step(model, optimizer, seed)
    kept = [whole(one.frozen) for one in optimizer.protected()]
    return {
        "penalty": before,
        "frozen": sum(int(mask.sum()) for mask in kept),
        "weights": [whole(param.detach()) for param in model.parameters()],
    }


def save(rank: int, folder: str) -> None:
    for name, options in FORMATS.items():
        model = spread(4)
        optimizer = trained(model, options)
        for layout, flattens in LAYOUTS.items():
            options_ = StateDictOptions(flatten_optimizer_state_dict=flattens)
            state = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options_),
            }
            dcp.save(state, checkpoint_id=f"{folder}/{layout}-{name}")


def load(rank: int, folder: str, count: int) -> None:
    found = {}
    for layout, flattens in LAYOUTS.items():
        options = StateDictOptions(flatten_optimizer_state_dict=flattens)
        for name, of_format in FORMATS.items():
            # One process can have whole tensors, but codes of these are saved as such.
            model = spread(count, is_whole=count == 1 and name != "codes")
            optimizer = EWCAdamW(model.named_parameters(), **of_format)
            get_optimizer_state_dict(model, optimizer)  # begins the moments
            optimizer.consolidate(None)
            state = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            }
            dcp.load(state, checkpoint_id=f"{folder}/{layout}-{name}")
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
            found[layout, name] = told(model, optimizer)
    torch.save(found, f"{folder}/{count}-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("dcp")
    in_processes(save, 4, str(where))
    for count in (3, 2, 1):
        in_processes(load, count, str(where), count)
    return where


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("layout", ["nested", "flattened"])
@pytest.mark.parametrize("count", [3, 2, 1])
def test_a_run_goes_on_with_fewer_processes(folder, count, layout, name):
    model = network()
    alone = told(model, trained(model, FORMATS[name]))
    for rank in range(count):
        found = torch.load(folder / f"{count}-{rank}.pt")[layout, name]
        assert found["frozen"] == alone["frozen"] > 0
        # Codes are rounded in other places, and blocks are other neighbours.
        tolerance = 3e-2 if name == "codes" else 5e-3 if name == "bfloat16" else 0.0
        assert found["penalty"] == pytest.approx(alone["penalty"], rel=max(tolerance, 1e-12))
        for a, b in zip(found["weights"], alone["weights"], strict=True):
            assert (a - b).square().mean().sqrt() <= 0.02 * tolerance


def test_codes_survive_another_spread():
    """A block's codes are levels of one grid: a state dict reads them all, in any blocks."""
    model = network()
    options = FORMATS["codes"]
    optimizer = trained(model, options)
    optimizer.unfreeze()
    first_row = torch.arange(3)[:, None].expand(3, 66) == 0  # of which one of two ranks has nothing
    optimizer.freeze(masks={"2.weight": first_row})
    whole_state = optimizer.state_dict()
    in_processes(_exchange, 2, whole_state, options)


def _exchange(rank: int, saved: dict[str, Any], options: dict[str, Any]) -> None:
    """Load a whole state dict into parts, and what they save into a whole optimizer again."""
    alone = network()
    reference = EWCAdamW(alone.named_parameters(), **options)
    reference.load_state_dict(saved)
    model = spread(2)
    optimizer = EWCAdamW(model.named_parameters(), **options)
    optimizer.load_state_dict(saved)
    back = EWCAdamW(network().named_parameters(), **options)
    back.load_state_dict(
        {**optimizer.state_dict(), "state": {
            index: {key: whole(value) for key, value in state.items()}
            for index, state in optimizer.state_dict()["state"].items()
        }}
    )  # fmt: skip
    parts = zip(reference.protected(), optimizer.protected(), back.protected(), strict=True)
    for one, part, again in parts:
        for key in ("importance", "frozen", "anchor"):
            value = whole(getattr(part, key))
            assert torch.equal(getattr(one, key), value), key
            assert torch.equal(value, getattr(again, key)), key
    has_codes = "frozen_codes" in optimizer.state[model[2].weight]
    assert has_codes == (rank == 0)
    for each in (reference, optimizer, back):
        assert each.freeze(0.1) > 66
        each.unfreeze()
    for one, part, again in zip(
        reference.protected(), optimizer.protected(), back.protected(), strict=True
    ):
        assert torch.equal(one.importance, whole(part.importance))
        assert torch.equal(one.importance, again.importance)
        assert not whole(part.frozen).any()
    assert back.state[next(iter(back.state))]["importance"].dtype == torch.uint8
    assert back.state[next(iter(back.state))]["exp_avg"].dtype == torch.uint8


def _kronecker(rank: int, saved: dict[str, Any]) -> None:
    model = spread(2)
    optimizer = EWCAdamW(model.named_parameters(), penalty="proximal")
    with pytest.raises(ValueError, match=r"has Kronecker importance for parameter 0\.weight"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_kronecker_state_is_refused():
    import cl_optim

    model = network()
    optimizer = EWCAdamW(model.named_parameters(), penalty="proximal")
    batch = torch.randn(8, 70), torch.arange(8) % 3
    optimizer.consolidate(
        cl_optim.estimate_fisher(model, [batch], loss="cross_entropy", structure="kronecker")
    )
    in_processes(_kronecker, 2, optimizer.state_dict())
