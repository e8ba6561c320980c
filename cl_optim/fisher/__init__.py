"""The Fisher information: its diagonal, exactly per sample in O(parameters), or Kronecker factors.

- ``rules/``: how each torch function uses parameters. **A new Fisher rule goes here**, in the file
  of its family of functions.
- ``per_sample/``: gradients of single samples in the factors that make them, and their squares.
- ``observe/``: one batch, from the forward pass that meets parameters to the squares.
- ``kronecker/``: sums of matrices' Kronecker factors, which take the place of squares.
- ``estimate``, ``own_pass``, ``objective``, ``batches``, ``language``: :func:`estimate_fisher`.
- ``estimator``, ``observer``, ``attachment``, ``alignment``, ``loss_scale``:
  :class:`FisherEstimator`; ``totals`` is what both sum in.
- ``adam``, ``conventions``: other sources of importance, and other libraries' F and λ.

May import: ``importance`` and ``ops``. Public is what is listed in ``__all__``.
"""

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
