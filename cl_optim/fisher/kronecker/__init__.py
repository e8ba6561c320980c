"""Kronecker factors of matrices, summed over batches in place of squares.

``used`` says of each use of a parameter by which rows it is used; ``padding``, which of those are
padding; ``structure``, which parameters have factors; ``sums`` adds Σ ããᵀ and Σ bbᵀ up, from which
``terms`` makes the factors; ``scales`` adds the squares in their bases, in a second pass.

May import: ``fisher.per_sample``, ``fisher.language`` and ``importance.kronecker``.
"""
