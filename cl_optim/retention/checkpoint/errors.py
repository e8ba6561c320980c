"""What can be wrong with a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read; the message says why."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be read, and an older one was taken."""
