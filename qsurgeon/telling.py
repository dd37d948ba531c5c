"""What the user is told on stderr, and no result depends on."""

import contextlib
import sys

from qsurgeon.visible import one_line


def say(message: str) -> None:
    """Tell the user something on stderr that no result depends on, in one line."""
    if sys.stderr is None:  # a program without one; print would write to stdout
        return
    with contextlib.suppress(OSError):  # a pipe that nobody reads any more, a disk that is full
        print(f"qsurgeon: {one_line(message)}", file=sys.stderr, flush=True)  # noqa: T201  # progress belongs on stderr
