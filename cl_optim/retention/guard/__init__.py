"""During training: old tasks are evaluated, and something is done where one is forgotten.

Public is what ``__all__`` lists. It may import ``cl_optim.optim`` (GEM, whose closures a roll-back
gives back), ``cl_optim.retention.checkpoint``, ``cl_optim.importance`` and ``cl_optim.ops``. rich
is loaded where its console draws.
"""

from cl_optim.retention.guard.controller import LambdaController
from cl_optim.retention.guard.evaluation import Check, Evaluation, Measured
from cl_optim.retention.guard.guard import RetentionGuard, RetentionWarning
from cl_optim.retention.guard.loggers import CSVLogger, Logger, RichLogger, TensorBoardLogger
from cl_optim.retention.guard.quantize import quantized
from cl_optim.retention.guard.report import Report

__all__ = [
    "CSVLogger",
    "Check",
    "Evaluation",
    "LambdaController",
    "Logger",
    "Measured",
    "Report",
    "RetentionGuard",
    "RetentionWarning",
    "RichLogger",
    "TensorBoardLogger",
    "quantized",
]
