"""All that a run consists of, kept on disk, and the position in its data.

Public is what ``__all__`` lists. It may import ``cl_optim.importance``, for files and their
checksums, and ``cl_optim.ops``; and it knows no guard and no buffer.
"""

from cl_optim.retention.checkpoint.checkpoints import Checkpoints
from cl_optim.retention.checkpoint.errors import CheckpointError, CheckpointWarning
from cl_optim.retention.checkpoint.parts import Stateful
from cl_optim.retention.checkpoint.stream import DataStream

__all__ = ["CheckpointError", "CheckpointWarning", "Checkpoints", "DataStream", "Stateful"]
