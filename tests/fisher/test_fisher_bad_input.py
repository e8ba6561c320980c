"""What each function and class of cl_optim.fisher refuses: a table of bad input for each.

A row has the error, what its message must match, and what is given.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bad_input import refused
from fisher_cases import Uses, mean_loss, mlp, randn
from torch import Tensor, nn

from cl_optim import EWC, GEM, EWCAdamW, register_fisher_rule
from cl_optim.fisher import (
    FisherEstimator,
    convert_lambda,
    estimate_fisher,
    importance_from_adam,
    published_fisher,
)

X, Y = torch.zeros(4, 7), torch.zeros(4, dtype=torch.long)
NAN_BATCH = torch.full((4, 7), math.nan)


class TokensFirst(nn.Module):
    """Sums over a wrong axis come out the same."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.transpose(0, 1)).transpose(0, 1)


# --- estimate_fisher ------------------------------------------------------------------------------


def outputs(use, labels: str = "exact") -> dict[str, object]:
    """A model that returns what ``use`` makes of logits [4, 4]."""
    return {"model": Uses(use), "batches": [torch.randn(4, 4)], "labels": labels}


def own_losses(loss) -> dict[str, object]:
    return {"labels": "empirical", "batches": [(X, Y)], "per_sample_loss": loss}


ESTIMATE_FISHER = {
    # arguments
    "labels": (ValueError, "^labels must be one of .*'auto', 'exact'.* not 'mc'", {"labels": "mc"}),
    "max_samples": (ValueError, "^max_samples must be at least 1, or None, not 0",
        {"max_samples": 0}),
    "max_samples no integer": (TypeError, "^max_samples must be an integer or None",
        {"max_samples": 1.5}),
    "loss": (ValueError, r"^loss must be one of \('auto', 'cross_entropy', 'causal_lm'\)",
        {"loss": "mse"}),
    "unsupported": (ValueError, r"^unsupported must be one of \('error', 'sign', 'skip'\)",
        {"unsupported": "ignore"}),
    "sign_draws": (ValueError, "^sign_draws must be at least 1", {"sign_draws": 0}),
    "verify": (ValueError, "^verify must be 'first', True or False", {"verify": "last"}),
    "kind": (ValueError, r"^kind must be one of \('fisher', 'mas', 'log", {"kind": "si"}),
    "adam is no kind": (ValueError, r"needs an optimizer: importance_from_adam\(optimizer",
        {"kind": "adam"}),
    "signs of magnitudes": (ValueError, "^unsupported='sign' estimates sums of sq",
        {"kind": "mas", "unsupported": "sign"}),
    "labels of mas": (ValueError, "^kind='mas' takes neither labels nor",
        {"kind": "mas", "labels": "exact"}),
    "exact labels of reversed logits": (ValueError, "needs labels='empirical' or 'pre",
        {"kind": "logits_reversal", "labels": "exact"}),
    "per_sample_loss without labels": (ValueError, "^per_sample_loss needs labels='empirical'",
        {"per_sample_loss": mean_loss}),
    # Kronecker factors
    "structure": (ValueError, "^structure must be 'diagonal' or 'kronecker', not 'full'",
        {"structure": "full"}),
    "scale": (ValueError, "^scale must be 'product' or 'exact', not 'kfac'",
        {"structure": "kronecker", "scale": "kfac"}),
    "scale of a diagonal": (ValueError, "^scale='exact' is of Kronecker .* structure='kronecker'",
        {"scale": "exact"}),
    "block of a diagonal": (ValueError, "^block=64 is of Kronecker", {"block": 64}),
    "energy of a diagonal": (ValueError, "^energy=0.5 is of Kronecker", {"energy": 0.5}),
    "block": (ValueError, "^block must be at least 1, not 0",
        {"structure": "kronecker", "block": 0}),
    "block no integer": (TypeError, "^block must be an integer, not float",
        {"structure": "kronecker", "block": 64.0}),
    "max_rank of a diagonal": (ValueError, "^max_rank=3 is of Kronecker", {"max_rank": 3}),
    "max_rank": (ValueError, "^max_rank must be at least 1, or None, not 0",
        {"structure": "kronecker", "max_rank": 0}),
    "max_rank no integer": (TypeError, "^max_rank must be an integer or None, not float",
        {"structure": "kronecker", "max_rank": 2.0}),
    "energy": (ValueError, r"^energy must be in \(0, 1\], not 0.0",
        {"structure": "kronecker", "energy": 0.0}),
    "energy NaN": (ValueError, r"^energy must be in \(0, 1\], not nan",
        {"structure": "kronecker", "energy": math.nan}),
    "energy no number": (TypeError, "^energy must be a number, not str",
        {"structure": "kronecker", "energy": "most"}),
    "factors of magnitudes": (ValueError, "^kind='mas' sums magnitudes.* structure='diagonal'",
        {"structure": "kronecker", "kind": "mas"}),
    "batches for one pass": (ValueError,
        "^scale='exact' goes through batches twice, and a list_iterator.* list or a DataLoader",
        {"structure": "kronecker", "scale": "exact", "batches": iter([X])}),
    # batches
    "one tensor for batches": (TypeError,
        "^batches must be an iterable of batches, not a float32 tensor", {"batches": X}),
    "an integer for batches": (TypeError, "^batches must be an iterable of batches, not a int",
        {"batches": 3}),
    "no batches": (ValueError, "^batches has no samples", {"batches": []}),
    "empty batches": (ValueError, "^batches has no samples", {"batches": [X[:0], (X[:0], Y[:0])]}),
    "three parts": (ValueError, "^batch 0 must be .inputs, targets., but has 3 parts",
        {"batches": [(X, Y, Y)]}),
    "text": (ValueError, "^batch 0 must have a tensor", {"batches": [("text", Y)]}),
    "no targets": (ValueError, r"^labels='empirical' needs \(inputs, targets\)",
        {"labels": "empirical"}),
    "targets out of range": (ValueError,
        r"^targets must be in \[0, 5\) or -100, but there is 5 in batch 1",
        {"labels": "empirical", "batches": [(X, Y), (X, Y + 5)]}),
    "shape of targets": (ValueError,
        r"^targets must have shape \[4\].* not a int64 tensor of shape \[4, 1\], in batch 0",
        {"labels": "empirical", "batches": [(X, Y.unsqueeze(1))]}),
    "not finite": (ValueError, "^the loss is not finite in batch 1", {"batches": [X, NAN_BATCH]}),
    # what the model returns
    "no classes": (ValueError, r"must return floating-point logits \[4, C\] or .* shape",
        outputs(lambda m, x: x.sum(1))),
    "a dict": (ValueError, "must return .* but returned a dict in batch 0",
        outputs(lambda m, x: {"logits": x})),
    "exact labels of sequences": (ValueError, "^labels='exact' is for .* use labels='sample'",
        outputs(lambda m, x: x.unsqueeze(1))),
    "exact labels of many classes": (ValueError,
        r"at most 100 classes, not \[4, 104\]; use labels=", outputs(lambda m, x: x.repeat(1, 26))),
    "constants": (ValueError, "does not depend on any trained parameter",
        outputs(lambda m, x: torch.zeros(4, 3))),
    "gradients that overflow": (ValueError, r"^the gradient of parameter 'first.* in batch 0",
        outputs(lambda m, x: x + (x - x.detach()) * 1e30)),
    "one loss for all": (ValueError, r"one loss per sample, shape \[4\], but returned a float32",
        own_losses(lambda m, batch: m(batch[0]).sum())),
    "losses not finite": (ValueError, "not finite in batch 0",
        own_losses(lambda m, batch: m(batch[0]).sum(1) / 0)),
    # samples that depend on one another
    "a wrong axis": (ValueError,
        r"^the self-check failed in batch 0: .*parameter '0\.body\.(weight|bias)' differs",
        {"model": nn.Sequential(TokensFirst(), nn.Linear(4, 3)), "labels": "sample",
         "batches": [torch.randn(5, 5, 4)]}),
    "a mean over samples": (ValueError, r"batch 0: .*'first\..* samples are not independent",
        outputs(lambda m, x: x - x.mean(0), "auto")),
}  # fmt: skip


@pytest.mark.parametrize("given", ESTIMATE_FISHER)
def test_estimate_fisher_refuses(given):
    """In a sentence, and leaves the model as it was."""
    error, message, arguments = ESTIMATE_FISHER[given]
    arguments = {"model": mlp(), "batches": [X], **arguments}
    model = arguments["model"]
    with refused(error, message) as caught:
        estimate_fisher(**arguments)
    assert str(caught.value).endswith(".")
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


# --- FisherEstimator ------------------------------------------------------------------------------

FISHER_ESTIMATOR = {
    "no module": (TypeError, r"^model must be a torch\.nn\.Module", {"model": 3}),
    "frozen": (ValueError, "model has no parameters that require gradients",
        {"model": nn.Linear(2, 2).requires_grad_(False)}),
    "complex": (ValueError, "parameter 'weight' must be of a real float",
        {"model": nn.Linear(2, 2, dtype=torch.cfloat)}),
    "decay": (ValueError, r"^decay must be in \(0, 1\], not 0", {"decay": 0.0}),
    "verify": (ValueError, "^verify must be 'first', True or False, not 'always'",
        {"verify": "always"}),
    "reduce dtype": (ValueError, r"^reduce_dtype must be torch\.float32 or torch\.bfloat16, not",
        {"reduce_dtype": torch.float16}),
    "random signs": (ValueError, r"use estimate_fisher\(..., unsupported='sign'\)",
        {"unsupported": "sign"}),
    "unsupported": (ValueError, "^unsupported must be 'error' or 'skip'",
        {"unsupported": "ignore"}),
    "structure": (ValueError, "^structure must be 'diagonal' or 'kronecker'",
        {"structure": "full"}),
    "block": (ValueError, "^block must be at least 1", {"structure": "kronecker", "block": 0}),
    "an exact scale": (ValueError, r"^scale='exact' needs a second pass.* use estimate_fisher\(",
        {"structure": "kronecker", "scale": "exact"}),
}  # fmt: skip


@pytest.mark.parametrize("given", FISHER_ESTIMATOR)
def test_fisher_estimator_refuses(given):
    error, message, arguments = FISHER_ESTIMATOR[given]
    with refused(error, message):
        FisherEstimator(**{"model": mlp(), **arguments})


PACKED = {"cu_seqlens": [0, 2, 5]}
OBSERVE = {
    "batch_size": (ValueError, "^batch_size must be at least 1, not 0", {"batch_size": 0}),
    "batch_size no integer": (TypeError, "^batch_size must be an integer, not float",
        {"batch_size": 2.0}),
    "neither samples nor offsets": (TypeError, "needs batch_size, or cu_seqlens", {}),
    "loss_terms": (ValueError, "^loss_terms must be positive and finite, not 0",
        {"batch_size": 4, "loss_terms": 0}),
    "loss_terms no number": (TypeError, "^loss_terms must be a number, not str",
        {"batch_size": 4, "loss_terms": "mean"}),
    "loss_scale": (ValueError, "^loss_scale must be positive and finite, not nan",
        {"batch_size": 4, "loss_scale": math.nan}),
    "tokens": (ValueError, "^tokens must be at least 0", {"batch_size": 4, "tokens": -1}),
    "offsets that fall": (ValueError, r"^cu_seqlens must be increasing offsets from 0",
        {"cu_seqlens": [0, 5, 3]}),
    "offsets from 1": (ValueError, r"^cu_seqlens must be increasing offsets from 0",
        {"cu_seqlens": [1, 5]}),
    "loss_terms of several elements": (ValueError,
        r"^loss_terms must be a number or a tensor of one element, not a tensor of shape \[2\]",
        {"batch_size": 4, "loss_terms": torch.ones(2)}),
    "offsets in two dimensions": (ValueError, "^cu_seqlens must have one dimension, not 2",
        {"cu_seqlens": torch.tensor([[0, 2], [2, 5]])}),
    "offsets of others": (ValueError, r"^batch_size is 3, but cu_seqlens has offsets of 2",
        {"batch_size": 3, "cu_seqlens": [0, 1, 5]}),
}  # fmt: skip


@pytest.mark.parametrize("given", OBSERVE)
def test_observe_refuses(given):
    error, message, arguments = OBSERVE[given]
    fisher = FisherEstimator(mlp())
    with refused(error, message), fisher.observe(**arguments):
        pass
    with fisher.observe(4):  # nothing is left of the other
        fisher._model(X).square().mean().backward()
    assert fisher.finalize().samples == 4


OBSERVED = {
    "fewer samples": (ValueError,
        r"^parameter '0\.weight' met an input of shape \[5, 7\].* is 5, but batch_size is 4",
        mlp(), (5, 7), {"batch_size": 4}),
    "no samples": (ValueError,
        r"^parameter '0\.weight' met an input of shape \[7\], which has no dim", mlp(), (7,),
        {"batch_size": 7}),
    "tokens in front": (ValueError, "whose leading dimension is 3, but batch_size is 5",
        TokensFirst(), (5, 3, 4), {"batch_size": 5}),
    "as many tokens in front": (ValueError,
        r"parameters 'body\.weight', 'body\.bias' met inputs whose rows are as many", TokensFirst(),
        (5, 5, 4), {"batch_size": 5}),
    "flattened tokens": (ValueError,
        r"'weight' met an input of shape \[15, 4\], whose leading dimension is 15,",
        nn.Linear(4, 3), (15, 4), {"batch_size": 3}),
    "unknown rows": (ValueError, r"'p\.0' met rows of shape \[3, 5, 4\].* not known",
        Uses(lambda m, x: torch.einsum("eti,eio->eto", x, m.p[0]), randn(3, 4, 7)), (3, 5, 4),
        {"batch_size": 3}),
    "too many packed tokens": (ValueError,
        r"does not begin with the 5 tokens that cu_seqlens counts", nn.Linear(4, 3), (6, 4),
        PACKED),
    "packed channels": (ValueError, r"does not begin with the 5 tokens", nn.Conv1d(4, 4, 3),
        (1, 4, 5), PACKED),
    "packed groups": (NotImplementedError, "group_norm cannot tell the samples of a packed",
        nn.GroupNorm(2, 4), (5, 4), PACKED),
}  # fmt: skip


@pytest.mark.parametrize("given", OBSERVED)
def test_observe_refuses_inputs(given):
    error, message, model, shape, arguments = OBSERVED[given]
    fisher = FisherEstimator(model)
    with refused(error, message) as caught, fisher.observe(**arguments):
        model(torch.randn(shape)).square().sum().backward()
    assert str(caught.value).endswith(".")
    with pytest.raises(RuntimeError, match="nothing was observed"):
        fisher.finalize()


ATTACH = {
    "not during training": (r"FisherEstimator\(model, during_training=True\)", {}, False),
    "accumulation_steps": ("accumulation_steps must be at least 1",
        {"accumulation_steps": 0}, True),
    "every": ("every must be at least 1", {"every": 0}, True),
    "loss_terms of a name": ("loss_terms must be 'samples', 'tokens', a number or a function",
        {"loss_terms": "batch"}, True),
    "loss_terms": ("loss_terms must be positive and finite", {"loss_terms": -1.0}, True),
}  # fmt: skip


@pytest.mark.parametrize("given", ATTACH)
def test_attach_refuses(given):
    message, arguments, during_training = ATTACH[given]
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fisher = FisherEstimator(model, during_training=during_training)
    with refused(ValueError, message):
        fisher.attach(optimizer, **arguments)
    optimizer.step()  # an attached estimator would refuse it: there was no batch


# --- other functions ------------------------------------------------------------------------------


def stepped(make, *changes):
    """An optimizer that has taken a step, and what was then done with it."""

    def made(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = make(model.parameters())
        F.cross_entropy(model(torch.randn(6, 64)), torch.arange(6)).backward()
        optimizer.step()
        for change in changes:
            change(optimizer)
        return optimizer

    return made


def stores(moment: Tensor):
    def change(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            state["exp_avg_sq"] = moment

    return change


FORMAT = r"'weight' must be .* its shape \(64, 64\).*use est"
ONE = nn.Linear(7, 1)
SEQUENCES = nn.Conv1d(3, 5, 1)  # [N, 5, T], where classes are to be last
MISFITS = {
    **{
        f"one class, {labels}": (
            "logits of two classes at least, .* pass per_sample_loss", ONE, (X, Y), labels
        ) for labels in ("exact", "sample", "predicted")
    },
    **{
        f"classes in the middle, {labels}": (
            r"targets must have shape \[4, 5\].*not a int64 tensor of shape \[4, 20\]",
            SEQUENCES, (torch.randn(4, 3, 20), torch.zeros(4, 20, dtype=torch.long)), labels
        ) for labels in ("auto", "sample", "predicted")
    },
    "many labels": (
        "neither classes nor their probabilities.*per_sample_loss", nn.Linear(7, 3),
        (X, torch.tensor([[1.0, 1.0, 0.0]]).repeat(4, 1)), "auto"
    ),
    "numbers": (
        "neither classes nor their probabilities", nn.Linear(7, 3), (X, torch.randn(4)), "auto"
    ),
    "classes in floating point": (
        r"classes are integers: give targets\.long\(\)", nn.Linear(7, 3),
        (X, torch.tensor([0.0, 2.0, 1.0, 1.0])), "auto"
    ),
}  # fmt: skip


@pytest.mark.parametrize("given", MISFITS)
def test_targets_of_another_loss_are_refused(given):
    message, model, batch, labels = MISFITS[given]
    with refused(ValueError, message):
        estimate_fisher(model, [batch], labels)


@pytest.mark.parametrize(
    "targets",
    [
        torch.rand(4, 3).softmax(1),
        torch.cat([torch.rand(3, 3).softmax(1), torch.zeros(1, 3)]),  # one without a target
        torch.tensor([0, 7, -1, 2]),  # of classes that this head does not have
    ],
)
def test_targets_that_do_not_matter_are_not_refused(targets):
    model = nn.Linear(7, 3)
    x = torch.randn(4, 7)
    found, expected = estimate_fisher(model, [(x, targets)]), estimate_fisher(model, [x])
    assert torch.equal(found["weight"], expected["weight"])
    estimate_fisher(model, [(x, torch.zeros(4, 9))], kind="mas")
    estimate_fisher(nn.Linear(7, 1), [(x, torch.zeros(4, 9, dtype=torch.long))], kind="mas")
    soft = torch.rand(4, 5, 3).softmax(-1)
    estimate_fisher(model, [(torch.randn(4, 5, 7), soft)], "sample")


IMPORTANCE_FROM_ADAM = {
    "no step": ("has taken no step on a parameter of the model",
        lambda model: EWCAdamW(model.parameters())),
    "protected": (r"parameter 'weight' is protected: after consolidate.* includes the penalty's",
        stepped(EWCAdamW, lambda each: each.consolidate(None))),
    "no second moment": ("SGD keeps no exp_avg_sq for parameter 'weight'",
        stepped(partial(torch.optim.SGD, lr=0.1, momentum=0.9))),
    "projected": ("under GEM, Adam's second moment is that of projected",
        stepped(lambda params: GEM(torch.optim.Adam(params)))),
    "projected inside": ("under GEM, Adam's second moment is that of projected",
        stepped(lambda params: EWC(GEM(torch.optim.Adam(params))))),
    "pulled": (r"with penalty='gradient', Adam's second moment includes the penalty's",
        stepped(lambda params: EWC(torch.optim.Adam(params), penalty="gradient"),
                lambda each: each.consolidate(None))),
    "bytes": (FORMAT, stepped(torch.optim.Adam, stores(torch.zeros(16, 260, dtype=torch.uint8)))),
    "another shape": (FORMAT, stepped(torch.optim.Adam, stores(torch.zeros(64)))),
}  # fmt: skip


@pytest.mark.parametrize("given", IMPORTANCE_FROM_ADAM)
def test_importance_from_adam_refuses(given):
    message, make = IMPORTANCE_FROM_ADAM[given]
    model = nn.Linear(64, 64)
    optimizer = make(model)
    with refused(ValueError, message):
        importance_from_adam(optimizer, model)


PUBLISHED_FISHER = {
    "convention": (r"^convention must be one of .* not 'facil'", [(X, Y)], "facil"),
    "avalanche of no batches": ("batches has no samples", [], "avalanche"),
    "mammoth of no batches": ("batches has no samples", [], "mammoth"),
}


@pytest.mark.parametrize("given", PUBLISHED_FISHER)
def test_published_fisher_refuses(given):
    message, batches, convention = PUBLISHED_FISHER[given]
    with refused(ValueError, message):
        published_fisher(mlp(), batches, convention)


CONVERT_LAMBDA = {
    "source": ("^source must be one of", {"source": "ewc"}),
    "target": ("^target must be one of", {"target": "ewc"}),
    "ewc_lambda": ("^ewc_lambda must be at least 0", {"ewc_lambda": -1.0}),
    "batch_size": (r"^batch_size must be at least 1", {"batch_size": 0}),
}


@pytest.mark.parametrize("given", CONVERT_LAMBDA)
def test_convert_lambda_refuses(given):
    message, arguments = CONVERT_LAMBDA[given]
    with refused(ValueError, message):
        convert_lambda(**{"ewc_lambda": 1.0, "source": "gem", **arguments})


@pytest.mark.parametrize(("function", "rule"), [(3, torch.add), (torch.add, None)])
def test_register_fisher_rule_refuses(function, rule):
    with refused(TypeError, "must be callable, not"):
        register_fisher_rule(function, rule)
