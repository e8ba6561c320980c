"""Captures of CUDA graphs: what Python does then is done once, and not replayed."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Return whether what the current stream is given now goes into a CUDA graph."""
    # Where CUDA has not begun, no graph can have, and to ask would begin it.
    begun: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return begun and torch.cuda.is_current_stream_capturing()
