"""``cl-optim demo``: forgetting, and what prevents it, on real data.

May import everything below the command line; ``bench.retention``, in a checkout of the source, has
further experiments made of these parts.
"""
