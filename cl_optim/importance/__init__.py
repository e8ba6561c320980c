"""How much each weight matters: the values, on disk and in memory."""

from cl_optim.importance.importance import Importance

__all__ = ["Importance"]
