"""Kronecker factors of a matrix's Fisher information.

Public is :class:`~cl_optim.importance.kronecker.importance.KroneckerImportance`. Imports what the
room above it, ``importance``, does.
"""
