"""What can be wrong with a log."""


class LogError(ValueError):
    """A folder is no log, or a request does not fit what the log holds."""


class DamagedError(LogError):
    """What is on disk is not what was written; the message names the thing. It is not returned."""


class LockedError(LogError):
    """Another writer is at work."""
