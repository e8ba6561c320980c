"""Around training: replay of what was learned before, diagnosis, networks that grow."""

from cl_optim.retention.corpora import read_corpus
from cl_optim.retention.diagnosis import Conflict, Diagnosis, LabelDrift
from cl_optim.retention.diagnostics import diagnose
from cl_optim.retention.progressive import Growth, ProgressiveNetwork
from cl_optim.retention.replay import MixedLoader, ReplayBuffer

__all__ = [
    "Conflict",
    "Diagnosis",
    "Growth",
    "LabelDrift",
    "MixedLoader",
    "ProgressiveNetwork",
    "ReplayBuffer",
    "diagnose",
    "read_corpus",
]
