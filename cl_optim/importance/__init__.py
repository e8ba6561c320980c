"""How much each weight matters: the values, in memory, on disk and in reports.

Public are the classes that ``__all__`` lists, ``errors``, ``codecs`` and ``names.compare_names``;
all else is internal. It may import ``cl_optim.ops``.
"""

from cl_optim.importance.importance import Importance
from cl_optim.importance.kronecker.importance import KroneckerImportance
from cl_optim.importance.log import ImportanceLog

__all__ = ["Importance", "ImportanceLog", "KroneckerImportance"]
