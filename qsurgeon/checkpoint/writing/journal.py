"""The journal of an unfinished output: what is done, and for which run, so that the same run can resume.

Beside the unfinished output lies ``run.json``, which says what is being made of what, and each process adds a line to
a journal of its own for every job that it has written, with a checksum of the bytes. What a crash of the machine tore
or never wrote does not have its checksum, and is written again.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsurgeon.checkpoint.reading.files import flush
from qsurgeon.errors import CheckpointError
from qsurgeon.reading import read_json

RUN = "run.json"
MOST_SHOWN = 40  # letters of what differs: a recipe and a hash tell nothing at a glance


@dataclass(frozen=True)
class Entry:
    """A job that is done: the CRC-32 of each piece, by its name, and whether all of what was read is finite.

    beside: a number that the encoding of a weight wants to be kept beside it, see ``Encoding.beside``.
    """

    crcs: dict[str, int]
    finite: bool
    beside: float | None = None


class Journal:
    """The journal that this process writes into ``folder``."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._handle = os.open(folder / f"journal-{rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.write(self._handle, b"\n")  # a line that a crash cut off ends here, and spoils no other

    def add(self, job: str, entry: Entry) -> None:
        """Write down that ``job`` is done; one line is one write, from any thread."""
        data = {"job": job, "crcs": entry.crcs, "finite": entry.finite}
        line = json.dumps(data if entry.beside is None else {**data, "beside": entry.beside})
        os.write(self._handle, f"{line}\n".encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def begin(folder: Path, run: Mapping[str, Any]) -> bool:
    """Write into ``folder`` to which ``run`` it belongs. Return whether an earlier process already did.

    Raises: CheckpointError, which names the difference, if it belongs to a different run.
    """
    file = folder / RUN
    if file.is_file():
        difference = _difference(read_json(file), json.loads(json.dumps(run)))
        if difference:
            raise CheckpointError(
                f"{folder} was started by a run that this one cannot resume: {difference}. "
                "Delete it to start over, or repeat the original run"
            )
        return True
    whole = file.with_suffix(".new")
    whole.write_text(json.dumps(run), "utf-8")
    flush(whole)  # no checksum would tell that a crash of the machine tore it
    whole.replace(file)
    return False


def entries(folder: Path) -> dict[str, Entry]:
    """Return the jobs that are done, by name, whichever process did them. Lines that a crash cut off are none."""
    found: dict[str, Entry] = {}
    for file in sorted(one for one in folder.glob("journal-*.jsonl") if one.is_file()):
        for line in file.read_bytes().split(b"\n"):
            entry = _entry(line)
            if entry is not None:
                found[entry[0]] = entry[1]
    return found


def _entry(line: bytes) -> tuple[str, Entry] | None:
    try:
        data = json.loads(line)
        beside = data.get("beside")
        return str(data["job"]), Entry(
            dict(data["crcs"]), bool(data["finite"]), None if beside is None else float(beside)
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _difference(before: Mapping[str, Any], now: Mapping[str, Any], path: Sequence[str] = ()) -> str:
    """Return the first difference in words, or nothing."""
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            words = _difference(old, new, (*path, key))
            if words:
                return words
        elif old != new:
            what = " ".join((*path, key))
            if max(len(_shown(old)), len(_shown(new))) > MOST_SHOWN:
                return f"{what} differs"
            return f"{what} was {_shown(old)}, now it is {_shown(new)}"
    return ""


def _shown(value: Any) -> str:
    return "not there" if value is None else str(value)
