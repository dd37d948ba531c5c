"""The events by which a long run reports to its caller."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """What a run will take, known before its first byte.

    read, written: bytes of weights. files: how many are written. memory: bytes held at once beyond what the process
    holds anyhow. Of processes that share an output each has its own.
    """

    read: int
    written: int
    files: int
    memory: int


class Events:
    """A listener that ignores everything; override what is of interest. No two methods run at the same time."""

    def ready(self) -> None:
        """Hear that recipe and model fit each other; nothing was downloaded but the config, and nothing written.

        What this raises ends the run. Of processes that share an output each hears it.
        """

    def begin(self, estimate: Estimate) -> None:
        """Hear what the run will take."""

    def advance(self, count: int) -> None:
        """Hear that ``count`` more bytes of the source have been dealt with."""

    def note(self, text: str) -> None:
        """Hear what the user should know, and what no result depends on."""
