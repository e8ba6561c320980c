"""Around training: diagnosis, replay, networks that grow, a guard that goes back.

Public are the names that ``__all__`` lists, as names of this package; the folders are its rooms,
and what else is in them is internal. It may import ``cl_optim.optim``, ``cl_optim.importance`` and
``cl_optim.ops``, but no kernel. It loads neither rich, matplotlib nor a trainer.
"""

from cl_optim.retention import adapters
from cl_optim.retention.checkpoint import (
    CheckpointError,
    Checkpoints,
    CheckpointWarning,
    DataStream,
    Stateful,
)
from cl_optim.retention.diagnosis import Conflict, Diagnosis, LabelDrift, diagnose, read_corpus
from cl_optim.retention.guard import (
    Check,
    CSVLogger,
    Evaluation,
    LambdaController,
    Logger,
    Measured,
    Report,
    RetentionGuard,
    RetentionWarning,
    RichLogger,
    TensorBoardLogger,
    quantized,
)
from cl_optim.retention.progressive import Growth, ProgressiveNetwork
from cl_optim.retention.replay import MixedLoader, ReplayBuffer

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
