"""The diagonal Fisher information, exactly per sample, in one pass and O(parameters) memory."""

from cl_optim.fisher.estimate import estimate_fisher
from cl_optim.fisher.estimator import FisherEstimator

__all__ = ["FisherEstimator", "estimate_fisher"]
