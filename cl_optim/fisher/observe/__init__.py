"""One batch, from the forward pass that uses parameters to the squares that are summed.

In the order of the way: ``observation`` meets a call of a function (``calls``) and asks its rule;
``watched``, ``lookups`` and ``gathered`` say what its tensors are; ``taps`` leaves a tap in the
graph, which in the backward pass hands the output gradient to ``squares``; these add up in the ops,
or, of matrices with Kronecker factors, in ``fisher.kronecker``.

May import: ``fisher.rules``, ``fisher.kronecker``, ``fisher.per_sample``, ``fisher.samples`` and
``fisher.nested``.
"""
