"""Before training: how far new data are from what a model knows, and what that implies.

Public is what ``__all__`` lists; the function's name is not the package's, which it would hide.
It knows neither models nor optimizers, and imports no other room. rich is loaded where its console
draws a :class:`Diagnosis`.
"""

from cl_optim.retention.diagnosis.compare import diagnose
from cl_optim.retention.diagnosis.corpora import read_corpus
from cl_optim.retention.diagnosis.findings import Conflict, Diagnosis, LabelDrift

__all__ = ["Conflict", "Diagnosis", "LabelDrift", "diagnose", "read_corpus"]
