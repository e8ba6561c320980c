"""Around training: diagnosis, replay, networks that grow, a guard that goes back.

Public are the names that ``__all__`` lists, as names of this package; the folders are its rooms,
and what else is in them is internal. It may import ``cl_optim.optim``, ``cl_optim.importance`` and
``cl_optim.ops``, but no kernel. It loads neither rich, matplotlib nor a trainer.
"""

from cl_optim.retention import adapters
from cl_optim.retention.checkpoint.checkpoints import Checkpoints, CheckpointWarning
from cl_optim.retention.checkpoint.parts import CheckpointError, Stateful
from cl_optim.retention.checkpoint.stream import DataStream
from cl_optim.retention.diagnosis.compare import diagnose
from cl_optim.retention.diagnosis.corpora import read_corpus
from cl_optim.retention.diagnosis.findings import Conflict, Diagnosis, LabelDrift
from cl_optim.retention.distillation.divergence import divergence, old_outputs
from cl_optim.retention.distillation.loss import Hidden, distillation_loss
from cl_optim.retention.distillation.old_model import OldModel
from cl_optim.retention.distillation.stored import TopK, top_k
from cl_optim.retention.forgetting.compare import Comparison, Forgotten, compare_models
from cl_optim.retention.guard.controller import LambdaController
from cl_optim.retention.guard.evaluation import Check, Evaluation, Measured
from cl_optim.retention.guard.guard import RetentionGuard, RetentionWarning
from cl_optim.retention.guard.loggers import CSVLogger, Logger, RichLogger, TensorBoardLogger
from cl_optim.retention.guard.quantize import quantized
from cl_optim.retention.guard.report import Report
from cl_optim.retention.interpolation.between import (
    InterpolationWarning,
    interpolate,
    interpolation_curve,
)
from cl_optim.retention.interpolation.curve import Curve, Point
from cl_optim.retention.progressive import Growth, ProgressiveNetwork
from cl_optim.retention.replay.buffer import MixedLoader, ReplayBuffer
from cl_optim.retention.replay.self_written import self_written

__all__ = [
    "CSVLogger",
    "Check",
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "Comparison",
    "Conflict",
    "Curve",
    "DataStream",
    "Diagnosis",
    "Evaluation",
    "Forgotten",
    "Growth",
    "Hidden",
    "InterpolationWarning",
    "LabelDrift",
    "LambdaController",
    "Logger",
    "Measured",
    "MixedLoader",
    "OldModel",
    "Point",
    "ProgressiveNetwork",
    "ReplayBuffer",
    "Report",
    "RetentionGuard",
    "RetentionWarning",
    "RichLogger",
    "Stateful",
    "TensorBoardLogger",
    "TopK",
    "adapters",
    "compare_models",
    "diagnose",
    "distillation_loss",
    "divergence",
    "interpolate",
    "interpolation_curve",
    "old_outputs",
    "quantized",
    "read_corpus",
    "self_written",
    "top_k",
]
