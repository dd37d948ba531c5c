"""The standard streams: whatever is connected to them, a command ends with its result or with a one-line reason.

What a stream's encoding cannot write is written by what looks like it, so that no output depends on the encoding. A
stream that is closed, or whose disk is full, is named.
"""

import codecs
import contextlib
import io
import os
import sys
from pathlib import Path

from qsurgeon.errors import in_words

_LIKENESS = "qsurgeon.likeness"
_LIKE = {
    "×": "x", "…": "...", "–": "-", "—": "-", "Δ": "d", "→": "->", "·": "*", "•": "*", "≤": "<=", "≥": ">=",
    "─": "-", "━": "-", "═": "-", "│": "|", "┃": "|", "║": "|", "‘": "'", "’": "'", "“": '"', "”": '"', "\xa0": " ",
}  # fmt: skip
_BOXES = range(0x2500, 0x2580)  # the lines and corners of boxes


def prepare() -> None:
    """Make the standard streams safe to write to, once, before anything is written.

    A number that is closed (``>&-``) would go to the next file that is opened, which could be one of weights: it is
    taken by the null device.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error(_LIKENESS, likeness)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for as long as the program runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_LIKENESS)


def likeness(error: UnicodeError) -> tuple[str, int]:
    """Return what stands for the characters that an encoding lacks, as a handler of ``codecs`` does."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_like(one) for one in error.object[error.start : error.end]), error.end


def _like(character: str) -> str:
    if character in _LIKE:
        return _LIKE[character]
    if ord(character) in _BOXES:
        return "+"
    return character.encode("ascii", "backslashreplace").decode("ascii")


def write(text: str, *, err: bool = False) -> None:
    """Write ``text`` at once. Raises: OSError, which names the stream, if it cannot be written."""
    stream = sys.stderr if err else sys.stdout
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "standard error" if err else "standard output"
        raise OSError(error.errno, f"{name}: {in_words(error)}") from error


def complain(message: str) -> None:
    """Write an error on stderr; where that is not possible there is nowhere left to say so."""
    with contextlib.suppress(OSError):
        write(message, err=True)


def give_up(stream_number: int = 1) -> None:
    """Let what is left of a stream's output go nowhere: the interpreter would complain of it while it shuts down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream_number)
