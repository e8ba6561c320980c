"""The diagonal Fisher information, exactly per sample, in one pass and O(parameters) memory."""

from cl_optim.fisher.adam import importance_from_adam
from cl_optim.fisher.conventions import convert_lambda, published_fisher
from cl_optim.fisher.estimate import estimate_fisher
from cl_optim.fisher.estimator import FisherEstimator
from cl_optim.fisher.rules.registry import UnsupportedUseError, Use, register_fisher_rule

__all__ = [
    "FisherEstimator",
    "UnsupportedUseError",
    "Use",
    "convert_lambda",
    "estimate_fisher",
    "importance_from_adam",
    "published_fisher",
    "register_fisher_rule",
]
