"""What EWCAdamW does for matrices whose importance is Kronecker-factored.

``consolidation`` brings factors into the state, as :mod:`~cl_optim.optim.kronecker.matrices` says
how; ``ledger`` counts what is due; ``pull`` takes it, in ``stacks`` of equal matrices, by the
arithmetic of :mod:`cl_optim.ops.kronecker_shrink`. Imports what the room above it, ``optim``, does.
"""
