"""The progress bar of a long run, on stderr."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from qsurgeon.checkpoint import Estimate, Events
from qsurgeon.checkpoint.writing.ranks import leads, together
from qsurgeon.telling import say


class Bar(Events):
    """A bar of bytes, with their rate and the time that is left. Of several processes one alone shows it.

    first: what that one does as soon as the run has found nothing wrong, and before it downloads and writes.
    """

    def __init__(self, what: str, first: Callable[[], None] = lambda: None) -> None:
        self.leads, self._first = leads(), first
        console = Console(stderr=True)
        shown = self.leads and console.is_terminal
        self._progress = Progress(
            what, BarColumn(), *self._numbers(), console=console, transient=True, disable=not shown
        )
        self._task = self._progress.add_task("", total=None)

    def _numbers(self) -> tuple[ProgressColumn, ...]:
        """Return what stands behind the bar."""
        return DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def ready(self) -> None:
        """Do what is to be done first."""
        if self.leads:
            self._first()

    def begin(self, estimate: Estimate) -> None:
        """Say what it will take."""
        if self.leads:
            files = "1 file" if estimate.files == 1 else f"{estimate.files} files"
            processes = together()
            who = f"rank 0 of {processes} " if processes > 1 else ""
            say(
                f"{who}reads {_size(estimate.read)}, writes {_size(estimate.written)} in {files}, "
                f"in about {_size(estimate.memory)} of memory"
            )
        self._progress.update(self._task, total=estimate.read)

    def advance(self, count: int) -> None:
        """Move the bar."""
        self._progress.advance(self._task, count)

    def note(self, text: str) -> None:
        """Say it above the bar."""
        say(text)


class Share(Bar):
    """A bar of work that writes nothing, and is no bytes alone: the share that is done, and the time that is left."""

    def _numbers(self) -> tuple[ProgressColumn, ...]:
        return TaskProgressColumn(), TimeRemainingColumn()

    def begin(self, estimate: Estimate) -> None:
        """Hear how much work there is."""
        self._progress.update(self._task, total=estimate.read)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
