"""Per-sample gradients of a parameter, held in the factors that make them.

The gradient of sample n is rarely needed itself: what is added up is its square. Each class here
knows how to do that for one way of using a parameter, in O(parameter) memory beside its factors.

May import: ``fisher.samples`` and ``ops``.
"""
