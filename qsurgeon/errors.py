"""What can go wrong, from the outside in.

QSurgeonError             the command line prints it without a trace and exits 2
├── FormatError           a number format that cannot be: an unknown name, fields that do not combine
├── ShapeError            a tensor that a format cannot take
├── GradientError         a quantizer asked to be part of an autograd graph
├── RecipeError           the recipe's text: syntax, keys, values, each with file, line and column
├── PlanError             recipe and model do not fit
├── SurgeryError          a model that cannot be operated on: wrapped already, or wrapped in something else
├── ExportError           a wrapped layer asked for in a kind of program that loses what it computes
├── CodesError            packed codes that something would compute with as if they were numbers
├── CalibrationError      examples that do not say what a static scale should be
├── CheckpointError       files: missing, of the wrong kind, or in the way
├── ExchangeError         what another tool's files cannot hold, or what they hold and we cannot
├── OtherRankError        a process that was launched with this one has failed, and says why itself
├── UsageError            a command that lacks something, or names a program that is not there
├── CallError             a function that was called with something else than it takes
└── NothingWrappedError   a model that should compute in another format and does not
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from qsurgeon.visible import one_line, visible


class QSurgeonError(Exception):
    """Base of all: a mistake of the user's or of the input's; anything else is our bug and keeps its trace.

    Its message is one line, whatever the names in it: they come from files that somebody else wrote.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class FormatError(QSurgeonError, ValueError):
    """A number format that cannot be: an unknown name, or fields that do not combine.

    It is a ValueError so that pydantic, which validates recipes, can locate it.
    """


class ShapeError(QSurgeonError):
    """A tensor that a format cannot take."""


class GradientError(QSurgeonError):
    """A quantizer was asked to be part of an autograd graph, where its own gradient is zero everywhere."""


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong, where it is, and the line it is on.

    ``where`` is ``file:line:column`` (or a path such as ``rules[0].target[1]`` for a recipe made in Python).
    ``excerpt`` is the source line with a caret under the column, or empty.
    """

    where: str
    message: str
    excerpt: str = ""

    def __str__(self) -> str:
        head = one_line(f"{self.where}: {self.message}" if self.where else self.message)
        return f"{head}\n{visible(self.excerpt)}" if self.excerpt else head


MOST_SHOWN = 100


class MistakesError(QSurgeonError):
    """Every mistake found in one run, in the order of the file. Its text shows the first hundred."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        self.mistakes = tuple(mistakes)
        lines = [str(one) for one in self.mistakes[:MOST_SHOWN]]
        if len(self.mistakes) > MOST_SHOWN:
            lines.append(f"… and {len(self.mistakes) - MOST_SHOWN:,} more mistakes")
        Exception.__init__(self, "\n".join(lines))  # past what would make one line of these

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[Mistake, ...]], dict[str, Any]]:
        """Pickle and copy by the mistakes: an exception would pass its text to ``__init__``."""
        return type(self), (self.mistakes,), vars(self)


class RecipeError(MistakesError):
    """A recipe whose text is wrong: syntax, keys, values."""


class PlanError(MistakesError):
    """A recipe that does not fit the model: a pattern without a module, a tied weight."""


class SurgeryError(QSurgeonError):
    """A model that cannot be operated on: wrapped already, or its forward replaced by something else."""


class ExportError(QSurgeonError):
    """A wrapped layer was to become part of a program that cannot hold what it computes (TorchScript, ONNX)."""


class CodesError(QSurgeonError):
    """Something would compute with packed codes as if they were numbers, or train them."""


class CalibrationError(QSurgeonError):
    """The examples do not say what a static scale should be: a module was not reached, a value is not finite."""


class CheckpointError(QSurgeonError):
    """A checkpoint's files are missing, of the wrong kind, or in the way."""


class ExchangeError(QSurgeonError):
    """A checkpoint cannot go to another tool, or come from it, without becoming another model."""


class OtherRankError(QSurgeonError):
    """A process that was launched together with this one has failed; it says why itself."""


class UsageError(QSurgeonError):
    """A command that lacks something that neither its options nor its recipe say, or a program that is not there."""


class CallError(QSurgeonError, TypeError):
    """A function was called with something else than it takes: arguments in another order, a tokenizer for a model."""


class NothingWrappedError(QSurgeonError):
    """A model that should compute in another format does not: the run would silently be full precision."""


MOST_COMPARED = 100  # characters of a word: to compare takes the square of them


def guess(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that ``word`` probably means, or None. For messages: it is never taken for that word."""
    names = sorted(known)
    wanted = _bare(word)
    same = [name for name in names if _bare(name) == wanted]
    near = same or difflib.get_close_matches(word[:MOST_COMPARED], names, n=1)
    if not near:
        folded = {name.casefold(): name for name in names}
        near = [folded[one] for one in difflib.get_close_matches(wanted, folded, n=1)]
    return near[0] if near else None


def _bare(word: str) -> str:
    """Return a word without what people write differently: case, the kind of dash, quotes and blanks around it."""
    return re.sub(r"[-_ ]+", "-", word[:MOST_COMPARED].strip(" \t\"'`“”‘’").casefold())


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: a guess, or all that would have been right."""
    names = sorted(known)
    near = guess(word, names)
    return f"did you mean '{near}'?" if near else f"expected one of: {', '.join(names)}"


def in_words(error: OSError) -> str:
    """Return what an error of the machine says, in one line and without its number."""
    what = error.strerror or str(error)
    return one_line(what if error.filename is None else f"{error.filename}: {what}")
