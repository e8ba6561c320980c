"""Optimizers for PyTorch that protect what a network already knows."""

from cl_optim import functional
from cl_optim._version import __version__
from cl_optim.fisher import FisherEstimator, estimate_fisher, register_fisher_rule
from cl_optim.importance import Importance, ImportanceLog, KroneckerImportance
from cl_optim.optim.ewc import EWC
from cl_optim.optim.ewc_adamw import EWCAdamW
from cl_optim.optim.gem import GEM
from cl_optim.optim.input_projection import InputProjection

__all__ = [
    "EWC",
    "GEM",
    "EWCAdamW",
    "FisherEstimator",
    "Importance",
    "ImportanceLog",
    "InputProjection",
    "KroneckerImportance",
    "__version__",
    "estimate_fisher",
    "functional",
    "register_fisher_rule",
]
