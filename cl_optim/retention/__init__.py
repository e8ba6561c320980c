"""Around training: watching what is retained, and going back when it is lost."""

from cl_optim.retention import adapters
from cl_optim.retention.checkpoint import CheckpointError, Checkpoints, CheckpointWarning, Stateful
from cl_optim.retention.controller import LambdaController
from cl_optim.retention.evaluation import Check, Evaluation, Measured
from cl_optim.retention.guard import RetentionGuard, RetentionWarning
from cl_optim.retention.loggers import CSVLogger, Logger, RichLogger, TensorBoardLogger
from cl_optim.retention.quantized import quantized
from cl_optim.retention.report import Report
from cl_optim.retention.stream import DataStream

__all__ = [
    "CSVLogger",
    "Check",
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "DataStream",
    "Evaluation",
    "LambdaController",
    "Logger",
    "Measured",
    "Report",
    "RetentionGuard",
    "RetentionWarning",
    "RichLogger",
    "Stateful",
    "TensorBoardLogger",
    "adapters",
    "quantized",
]
