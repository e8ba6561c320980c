"""Around training: replay of what was learned before, diagnosis, networks that grow."""

from cl_optim.retention.replay import MixedLoader, ReplayBuffer

__all__ = ["MixedLoader", "ReplayBuffer"]
