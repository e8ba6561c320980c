"""All experiments, by data: the demo's, and those beyond it, with the settings that sweeps chose.

``python -m bench.retention sweep SCENARIO --data DATA`` finds every lr and λ below; sweep.py has
the rule, grids.py the candidates.
"""

from __future__ import annotations

from dataclasses import replace

from bench.retention.methods import PlainSGD, Progressive, ProtectedReplaying, Replaying
from cl_optim.demo.experiments import (
    A_GEM_10,
    ADAMW,
    ADAMW_SLOW,
    EWC_EXACT,
    EWC_GRADIENT,
    GEM_10,
    JOINT,
    L2_SP,
    PERMUTED_DIGITS,
    SPLIT_DIGITS,
    Experiment,
)
from cl_optim.demo.methods import Remembering
from cl_optim.demo.scenarios import permuted, split
from cl_optim.demo.train import Config

SGD = PlainSGD("sgd", "SGD", lr=0.1)
GEM_1 = Remembering("gem-1", "GEM each step", lr=1e-3, refresh_every=1)
GEM_ONCE = Remembering("gem-once", "GEM once", lr=1e-3, refresh_every=None)
SGD_GEM_1, SGD_GEM_10, SGD_A_GEM_10, SGD_GEM_ONCE = (
    replace(gem, key=f"sgd-{gem.key}", label=f"SGD, {gem.label}", lr=0.1, base="sgd")
    for gem in (GEM_1, GEM_10, A_GEM_10, GEM_ONCE)
)
# What is kept of a task of two classes, in all forms of memory that are compared there.
_FEW = 16
REPLAY = Replaying("replay", "Replay", lr=1e-3, samples=_FEW)
EWC_REPLAY = ProtectedReplaying("ewc-replay", "EWC + replay", lr=1e-3, samples=_FEW)
PROGRESSIVE = Progressive("progressive", "Progressive", lr=1e-3)
GEM_FEW, A_GEM_FEW = (replace(gem, samples=_FEW) for gem in (GEM_10, A_GEM_10))

_FASHION = Config(epochs=1, batch_size=256, hidden=256)

PERMUTED_FASHION = Experiment(
    name="Permuted-Fashion-MNIST",
    build=permuted,
    config=_FASHION,
    seeds=5,
    methods=(
        replace(ADAMW, lr=1e-3),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=10.0),
        replace(EWC_EXACT, lr=3.2e-3, ewc_lambda=10.0),
        replace(JOINT, lr=3.2e-3),
    ),
)

SPLIT_FASHION = replace(
    PERMUTED_FASHION,
    name="Split-Fashion-MNIST",
    build=split,
    seeds=10,
    methods=(
        replace(ADAMW, lr=3.2e-4),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=3200.0),
        replace(EWC_EXACT, lr=3.2e-3, ewc_lambda=3200.0),
        replace(JOINT, lr=1e-3),
    ),
    learning_loss=0.02,
)

GEM_DIGITS = replace(
    PERMUTED_DIGITS,
    name="GEM-Permuted-Digits",
    methods=(
        replace(ADAMW, lr=3.2e-4),
        replace(ADAMW_SLOW, lr=3.2e-5),
        replace(EWC_GRADIENT, lr=1e-2, ewc_lambda=32.0),
        replace(GEM_1, lr=1e-2),
        replace(GEM_10, lr=3.2e-3),
        replace(A_GEM_10, lr=3.2e-3),
        replace(GEM_ONCE, lr=3.2e-4),
        replace(SGD, lr=3.2e-2),
        replace(SGD_GEM_1, lr=0.32),
        replace(SGD_GEM_10, lr=0.32),
        replace(SGD_A_GEM_10, lr=0.32),
        replace(SGD_GEM_ONCE, lr=3.2e-2),
        replace(JOINT, lr=1e-3),
    ),
)

# The same settings whatever the format: it is the formats that are compared.
_EWC = replace(EWC_GRADIENT, lr=1e-2, ewc_lambda=32.0)
_LOG8 = replace(_EWC, key="ewc-log8", label="EWC, log8", importance_dtype="log8")
FORMATS_DIGITS = replace(
    PERMUTED_DIGITS,
    name="Formats-Permuted-Digits",
    seeds=20,
    methods=(
        replace(ADAMW, lr=3.2e-4),
        _EWC,
        replace(_EWC, key="ewc-bf16", label="EWC, bfloat16", importance_dtype="bfloat16"),
        _LOG8,
        replace(_LOG8, key="ewc-log8-anchor", label="… bf16 anchors", anchor_dtype="bfloat16"),
        replace(_LOG8, key="ewc-log8-bf16", label="… bf16 moments", state_dtype="bfloat16"),
        replace(_LOG8, key="ewc-log8-8bit", label="… 8-bit moments", state_dtype="8bit"),
    ),
)

RETENTION_DIGITS = replace(
    SPLIT_DIGITS,
    name="Retention-Split-Digits",
    methods=(
        replace(ADAMW, lr=1e-3),
        replace(L2_SP, lr=3.2e-3, ewc_lambda=0.0032),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=32.0),
        replace(GEM_FEW, lr=3.2e-3),
        replace(A_GEM_FEW, lr=3.2e-3),
        replace(REPLAY, lr=3.2e-3),
        replace(EWC_REPLAY, lr=3.2e-3, ewc_lambda=1.0),
        replace(PROGRESSIVE, lr=1e-1),
        replace(JOINT, lr=3.2e-2),
    ),
    seeds=10,
    headline=(EWC_GRADIENT.key, REPLAY.key, EWC_REPLAY.key),
)

RETENTION_FASHION = replace(
    SPLIT_FASHION,
    name="Retention-Split-Fashion-MNIST",
    methods=(
        replace(ADAMW, lr=3.2e-4),
        replace(L2_SP, lr=3.2e-3, ewc_lambda=0.032),
        replace(EWC_GRADIENT, lr=3.2e-3, ewc_lambda=1000.0),
        replace(GEM_FEW, lr=1e-3),
        replace(A_GEM_FEW, lr=1e-3),
        replace(REPLAY, lr=3.2e-3),
        replace(EWC_REPLAY, lr=3.2e-3, ewc_lambda=100.0),
        replace(PROGRESSIVE, lr=3.2e-3),
        replace(JOINT, lr=1e-3),
    ),
    seeds=10,
    headline=(EWC_GRADIENT.key, REPLAY.key, EWC_REPLAY.key),
)

EXPERIMENTS = {
    "digits": (PERMUTED_DIGITS, SPLIT_DIGITS, GEM_DIGITS, FORMATS_DIGITS, RETENTION_DIGITS),
    "fashion-mnist": (PERMUTED_FASHION, SPLIT_FASHION, RETENTION_FASHION),
}
