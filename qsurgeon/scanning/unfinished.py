"""What a scan that was interrupted has found already, beside its output, so that the same scan goes on from there.

``scan.json.partial`` is a folder with run.json, which says what is scanned (see checkpoint.writing.journal), and a line
of JSON for each unit of work that is done. Numbers are written exactly, and units are added in the same order however
often a scan was interrupted: it ends in the same bytes.
"""

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qsurgeon.checkpoint.reading.files import flush
from qsurgeon.checkpoint.writing import journal
from qsurgeon.errors import CheckpointError
from qsurgeon.places import PARTIAL

UNITS = "units.jsonl"


class Unfinished:
    """The units of work that are done, by name; kept in a folder while there is an ``output`` to be written.

    lock: held by whichever thread adds a unit, or tells events of it.
    """

    def __init__(self, output: Path | None, run: Mapping[str, Any]) -> None:
        """Begin, or go on with what an earlier process began.

        Raises: CheckpointError if ``output`` exists, or if what was begun is of another run.
        """
        self.lock = threading.Lock()
        self._done: dict[str, Any] = {}
        self._handle: int | None = None
        self.output, self.resumed = output, False
        if output is None:
            return
        if output.exists() or output.is_symlink():
            raise CheckpointError(f"{output} exists; name another file or remove it first")
        if not output.parent.is_dir():
            raise CheckpointError(f"{output.parent}: no such folder, where {output.name} is to be written")
        self.folder.mkdir(exist_ok=True)
        self.resumed = journal.begin(self.folder, run)
        if (self.folder / UNITS).exists():
            self._done = _read(self.folder / UNITS)
        self._handle = os.open(self.folder / UNITS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(self._handle, b"\n")  # a line that a crash cut off ends here, and spoils no other

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        assert self.output is not None
        return self.output.with_name(self.output.name + PARTIAL)

    @property
    def count(self) -> int:
        """How many units are done."""
        return len(self._done)

    @property
    def kept(self) -> str:
        """Say what an interruption leaves, as the end of a message."""
        if self.output is None:
            return "; nothing was written"
        return f"; finished work is kept in {self.folder}, and the same command resumes it"

    def found(self, unit: str) -> Any:
        """Return what was found by a unit; None for one that is not done."""
        return self._done.get(unit)

    def add(self, unit: str, found: Any) -> None:
        """Write down what a unit found, from any thread."""
        with self.lock:
            self._done[unit] = found
            if self._handle is not None:
                os.write(self._handle, f"{json.dumps({'unit': unit, 'found': found})}\n".encode())

    def finish(self, text: str) -> None:
        """Write the output, which appears when it is whole, and remove what was kept."""
        self.close()
        if self.output is None:
            return
        whole = self.folder / self.output.name
        whole.write_text(text, "utf-8")
        flush(whole)
        whole.replace(self.output)
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Close the file of units; what is done stays."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _read(file: Path) -> dict[str, Any]:
    """Return the units in a file. Lines that a crash cut off are none."""
    found = {}
    for line in file.read_bytes().split(b"\n"):
        try:
            data = json.loads(line)
            found[str(data["unit"])] = data["found"]
        except (ValueError, KeyError, TypeError):
            continue
    return found
