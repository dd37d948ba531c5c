"""Reads files from other sources so that none can hang the process, fill its memory or crash its parser."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from qsurgeon.errors import CheckpointError

# Three times the largest index known, 150,000 tensors of a mixture of 384 experts. Python needs up to thirty bytes for
# one of JSON, if that is nothing but empty lists.
MOST_JSON = 32 * 2**20


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read bytes. Raises: OSError also for a pipe, which would wait, and a device, which may not end."""
    _check_regular(path.stat())  # a device may do something when it is opened
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(handle))  # what is there may have changed in between
        return os.fdopen(handle, "rb")
    except OSError:
        os.close(handle)
        raise


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def read_regular(path: Path, most: int) -> bytes:
    """Return the bytes of a file. Raises: OSError as ``open_regular``, and if there are more than ``most`` bytes."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises: CheckpointError if it is missing or not that, or too large."""
    try:
        data = read_regular(path, MOST_JSON)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return parse_json(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object that ``data`` is in UTF-8.

    Raises: ValueError if it is not that, or if a key appears twice: readers differ in which of the two they take.
    """
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("is nested too deep") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"expected a JSON object, got {type(parsed).__name__}")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key '{key}' appears twice")
        if not (_is_text(key) and _is_text(value)):
            raise ValueError(f"{key!a} has half a character")
        found[key] = value
    return found


def _is_text(value: Any) -> bool:
    """Say whether ``value`` can be written as UTF-8, if it is a string: JSON can spell one half of a pair."""
    if not isinstance(value, str) or value.isascii():
        return True
    return not any("\ud800" <= one <= "\udfff" for one in value)


def _integer(digits: str) -> int | float:
    """Return a number as other parsers see it: -0 is none of their integers, and neither are thousands of digits."""
    return float(digits) if digits == "-0" or len(digits) > 40 else int(digits)
