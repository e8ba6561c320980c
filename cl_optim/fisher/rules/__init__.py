"""How torch functions use parameters: a rule for each, in the file of its family.

A new rule goes into one of these files, above it ``@rule(torch.function)``; a new file is imported
here. What a rule is, and what rules share, is in ``registry``. ``attention``, ``recurrent`` and
``einsum`` take functions apart into others that have rules; ``families`` lists functions that are
treated alike without one. Users teach functions of their own by ``register_fisher_rule``.

May import: ``fisher.per_sample`` and ``fisher.samples``.
"""

from cl_optim.fisher.rules import (  # noqa: F401  (they register their rules)
    attention,
    convolutions,
    elementwise,
    matrices,
    normalisation,
    recurrent,
    tables,
)
