"""Around training: diagnosis, replay, networks that grow, a guard that goes back."""

from cl_optim.retention import adapters
from cl_optim.retention.checkpoint import CheckpointError, Checkpoints, CheckpointWarning, Stateful
from cl_optim.retention.controller import LambdaController
from cl_optim.retention.corpora import read_corpus
from cl_optim.retention.diagnosis import Conflict, Diagnosis, LabelDrift
from cl_optim.retention.diagnostics import diagnose
from cl_optim.retention.evaluation import Check, Evaluation, Measured
from cl_optim.retention.guard import RetentionGuard, RetentionWarning
from cl_optim.retention.loggers import CSVLogger, Logger, RichLogger, TensorBoardLogger
from cl_optim.retention.progressive import Growth, ProgressiveNetwork
from cl_optim.retention.quantized import quantized
from cl_optim.retention.replay import MixedLoader, ReplayBuffer
from cl_optim.retention.report import Report
from cl_optim.retention.stream import DataStream

__all__ = [
    "CSVLogger",
    "Check",
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "Conflict",
    "DataStream",
    "Diagnosis",
    "Evaluation",
    "Growth",
    "LabelDrift",
    "LambdaController",
    "Logger",
    "Measured",
    "MixedLoader",
    "ProgressiveNetwork",
    "ReplayBuffer",
    "Report",
    "RetentionGuard",
    "RetentionWarning",
    "RichLogger",
    "Stateful",
    "TensorBoardLogger",
    "adapters",
    "diagnose",
    "quantized",
    "read_corpus",
]
