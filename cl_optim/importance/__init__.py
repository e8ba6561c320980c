"""How much each weight matters: the values, on disk and in memory."""

from cl_optim.importance.importance import Importance
from cl_optim.importance.log import ImportanceLog

__all__ = ["Importance", "ImportanceLog"]
