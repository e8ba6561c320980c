"""Tables of bad input: a row is a name, what is given, the error and a part of its sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

Row = tuple[str, Any, type[BaseException], str]


def each_of(rows: Sequence[Row]) -> pytest.MarkDecorator:
    """Run a test for each row; it takes what is given, the error and the part of its sentence."""
    return pytest.mark.parametrize(
        ("given", "error", "message"), [pytest.param(*row, id=name) for name, *row in rows]
    )


@contextmanager
def refused(
    error: type[BaseException], message: str
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Expect this error itself, in one line with what matches the regular expression in it."""
    with pytest.raises(error) as caught:
        yield caught
    assert caught.type is error
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
