"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, and move what was written to ``path`` at the end.

    After an error there is no new file, and an old one is as it was. What is no file, such as
    /dev/stdout, is written to itself, and so is what a link points to.

    Raises:
        OSError: It cannot be written; the sentence names ``path``.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"{str(path)!r} cannot be written: it is a folder")
    is_stream = str(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))  # links to what is open
    if is_stream or (path.exists() and not path.is_file()):
        yield path
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(error.errno, f"{str(path)!r} cannot be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file.

    Raises:
        OSError: It cannot be written: the disk is full, say.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # which has the reason in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(errno.EIO, str(error)) from None
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
