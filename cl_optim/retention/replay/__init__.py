"""Samples of earlier tasks, in memory or on disk, mixed into what is learned now.

Public is what ``__all__`` lists. It may import ``cl_optim.importance``, for files and their
checksums, and ``cl_optim.ops``; and it knows no guard and no checkpoint.
"""

from cl_optim.retention.replay.buffer import MixedLoader, ReplayBuffer

__all__ = ["MixedLoader", "ReplayBuffer"]
