"""Every warning names the line that a user wrote, through decorators, hooks and trainers."""

from __future__ import annotations

import ast
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from projection_cases import importance
from safetensors.torch import save_file
from torch import nn

import cl_optim
from cl_optim import EWC, GEM, EWCAdamW, Importance, ImportanceLog, InputProjection, functional
from cl_optim.importance import watch
from cl_optim.importance.importance import _UNSEALED_FORMAT
from cl_optim.importance.manifest import FILE
from cl_optim.ops import library, squared_grad
from cl_optim.ops.warn import warn
from cl_optim.optim import cuda_graphs
from cl_optim.retention import Checkpoints, Evaluation, RetentionGuard, interpolate

PACKAGE = Path(cl_optim.__file__).parent


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(3, 2)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    absent = {name: library.Backend(name, False, "There are none.") for name in ("cpu", "cuda")}
    monkeypatch.setattr(library, "backends", lambda: absent)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    caches = (library.warn_once, library.why_not_triton)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 3)).square().sum().backward()


def warned(match: str, action: Callable[[], object]) -> None:
    """Of a line in this file; all of them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    assert [str(w.message) for w in caught if match in str(w.message)], [*map(str, caught)]
    assert {warning.filename for warning in caught} == {__file__}


class TestTheReferences:
    pytestmark = pytest.mark.usefixtures("without_kernels")

    def test_ewc_adamw_made(self, model):
        warned("EWC-AdamW runs", lambda: EWCAdamW(model.named_parameters()))

    def test_ewc_adamw_stepped(self, model):
        optimizer = EWCAdamW(model.named_parameters(), foreach=True)
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it wraps the step
        optimizer.param_groups[0]["foreach"] = None
        backward(model)
        warned("EWC-AdamW runs", optimizer.step)

    def test_ewc_adamw_stepped_inside_gem(self, model):
        optimizer = GEM(EWCAdamW(model.named_parameters(), foreach=True))
        optimizer.param_groups[0]["foreach"] = None
        backward(model)
        warned("EWC-AdamW runs", optimizer.step)

    def test_ewc_stepped(self, model):
        optimizer = EWC(torch.optim.SGD(model.named_parameters()))
        optimizer.consolidate(None)
        backward(model)
        warned("EWC's pull runs", optimizer.step)

    def test_gem(self, model):
        optimizer = GEM(torch.optim.SGD(model.parameters()))
        optimizer.remember("a", lambda: backward(model))
        backward(model)
        warned("The Gram products run", optimizer.step)
        library.warn_once.cache_clear()
        warned("Quadratic programs run", optimizer.step)

    def test_functions(self):
        memory, grad = torch.ones(1, 2), torch.ones(2)
        warned("Gram products", lambda: functional.gram(memory, grad))
        warned("Quadratic programs", lambda: functional.nnqp(memory[:, :1, None], grad[None, :1]))
        out = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
        warned("Squared gradients", lambda: squared_grad.choose(out, torch.zeros(3, 2, 5)))


def test_rounded_anchors(model):
    optimizer = EWCAdamW(model.named_parameters(), anchor_dtype="bfloat16")
    warned("rounds the anchors", lambda: optimizer.consolidate(None))
    warned("rounds the anchors", lambda: GEM(optimizer).consolidate(None))


@pytest.mark.parametrize("through", ["plain", "accelerate"])
def test_forgotten_memories(model, through):
    optimizer = GEM(torch.optim.SGD(model.parameters()))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.remember("a", lambda: backward(model))
    target = optimizer
    if through == "accelerate":
        from accelerate import Accelerator

        target = Accelerator(cpu=True).prepare(optimizer)
    warned("are forgotten: a.", lambda: target.load_state_dict(saved))


def test_weights_that_are_written_between_projections(model):
    given = importance(model, {"weight": torch.ones(4, 4)})
    optimizer = InputProjection(torch.optim.SGD(model.named_parameters()), given, every=3)
    backward(model)
    optimizer.step()
    model.load_state_dict({name: torch.ones_like(v) for name, v in model.state_dict().items()})
    warned("were written between the steps", optimizer.step)


def test_retention(model, tmp_path):
    values = iter([1.0, 0.5])
    evaluation = Evaluation("old", lambda model: next(values))
    optimizer = torch.optim.SGD(model.parameters())
    guard = RetentionGuard(model, optimizer, [evaluation], every=1, on_breach="warn")
    guard.start()
    warned("old lost 50.0%", guard.step)


def test_a_guard_in_a_trainer(tmp_path):
    """The line is the one that trains."""
    from trainer_cases import huggingface_trainer, protected, tiny_gpt2, watched

    from cl_optim.integrations.huggingface import RetentionCallback

    model = tiny_gpt2()
    callback = RetentionCallback(watched(stop_below=1), every=2, on_breach="warn")
    trainer = huggingface_trainer(tmp_path, model, protected(model), callback, steps=2)
    warned("old lost 90.0%", trainer.train)


def test_checkpoints(model, tmp_path):
    checkpoints = Checkpoints(tmp_path, {"model": model})
    checkpoints.save(1)
    checkpoints.save(2).write_bytes(b"")
    warned("cannot be read", checkpoints.restore)


def test_the_log(model, tmp_path):
    importance = Importance({"weight": torch.ones(2, 3)}, samples=1)
    log = ImportanceLog(tmp_path)
    for task in "ab":
        log.record(task, importance)
    (tmp_path / "records" / "00009-x.partial").mkdir()
    warned("an unfinished record", lambda: ImportanceLog(tmp_path))
    (tmp_path / "records" / "00009-x.partial").mkdir()
    warned("an unfinished record", lambda: ImportanceLog(tmp_path, mode="r"))
    lines = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(lines[0] + b"#" + b"".join(lines[1:]))
    warned("is damaged", lambda: ImportanceLog(tmp_path))


def test_what_moves_unprotected(model):
    model.bias.requires_grad_(False)
    optimizer = EWCAdamW(model.named_parameters())
    optimizer.consolidate({"weight": torch.ones(2, 3)})
    model.bias.requires_grad_(True)
    backward(model)
    warned("is trained now without protection", optimizer.step)


def test_steps_in_a_cuda_graph(model, monkeypatch):
    optimizer = EWCAdamW(model.named_parameters())
    optimizer.param_groups[0]["initial_lr"] = 1e-3  # a scheduler's
    monkeypatch.setattr(cuda_graphs, "_check_param", lambda *of: None)  # it is on the host
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backward(model)
    warned("learning rate of group 0 is on the host", optimizer.step)
    monkeypatch.undo()
    warned("captured in a CUDA graph before", lambda: optimizer.consolidate(None))


def test_importance_without_checksums(tmp_path):
    header = {"format": _UNSEALED_FORMAT, "samples": "1", "tokens": "null", "metadata": "{}"}
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "old", header)
    warned("has no checksums", lambda: Importance.load(tmp_path / "old"))


def test_watching(model, tmp_path):
    optimizer = EWCAdamW(model.named_parameters())
    optimizer.consolidate(None)
    with ImportanceLog(tmp_path).watch(optimizer, every=1) as watching:
        watching._file.close()
        watching._file = open("/dev/full", "ab")  # noqa: SIM115
        backward(model)
        warned("watching ends at step 1", optimizer.step)


def test_a_damaged_line_of_a_watch(tmp_path):
    (tmp_path / "1.jsonl").write_text("damaged\n")
    warned("line 1 of", lambda: watch.read(tmp_path))


def test_a_strength_without_a_lambda(model):
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    optimizer = EWCAdamW(model.named_parameters(), strength=0.1)
    ones = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    warned("strength makes λ 0", lambda: optimizer.consolidate(ones))


def test_options_of_an_ewc_before(model):
    params = [{"params": [p], "ewc_lambda": float(i)} for i, p in enumerate(model.parameters())]
    inner = torch.optim.SGD(params, lr=0.1)
    EWC(inner)
    warned("has been in an EWC before", lambda: EWC(inner))


def test_batch_norms_between_two_models():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    old = {name: value.clone() for name, value in model.state_dict().items()}
    warned("running statistics of 1 batch norms", lambda: interpolate(model, old, 0.5))


def test_a_budget_that_nothing_fits():
    model = torch.nn.Linear(1, 1)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    one = Evaluation("old", lambda model: 2.0, higher_is_better=False)
    given = {"evaluate": one, "budget": 0.1, "baselines": {"old": 1.0}}
    warned("Nothing that was tried fits", lambda: interpolate(model, old, **given))


def test_a_program_that_is_nothing_but_the_package():
    """Where no line is a user's it is the outermost."""
    code = compile("warn('x')", "outermost", "exec")
    with pytest.warns(UserWarning, match="x") as caught:
        exec(code, {"__name__": "cl_optim.x", "warn": warn})
    assert caught[0].filename == __file__


def test_no_warning_is_missing_here():
    """By file, how often the package warns: what is added is to be tried above."""
    found: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            warns = name == "library.choose" and len(node.args) == 3
            if warns or name in ("warn", "warnings.warn", "warnings.warn_explicit"):
                place = path.relative_to(PACKAGE).as_posix()
                found[place] = found.get(place, 0) + 1
    assert found == {
        "importance/importance.py": 1,
        "importance/log.py": 1,
        "importance/manifest.py": 1,
        "importance/watch.py": 2,
        "ops/ewc_adamw.py": 1,
        "ops/gram.py": 1,
        "ops/library.py": 1,
        "ops/nnqp.py": 1,
        "ops/squared_grad.py": 1,
        "ops/warn.py": 1,
        "optim/cuda_graphs.py": 2,
        "optim/displacements.py": 1,
        "optim/ewc_options.py": 1,
        "optim/gem.py": 1,
        "optim/matching.py": 1,
        "optim/protection.py": 2,
        "optim/pulling.py": 1,
        "retention/checkpoint/checkpoints.py": 1,
        "retention/guard/guard.py": 1,
        "retention/interpolation/between.py": 2,
    }
