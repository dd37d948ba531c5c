"""Folders and files that nobody but this user can have put there: what is loaded from them runs in this process.

A file's name, and a checksum beside it, prove nothing: whoever can write to a folder can write both. So each folder on
the way down is looked at, from the root on. Where all of them can be changed by this user and by root alone, nobody can
change one between the look and the use.
"""

import errno
import os
import stat
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class NotPrivateError(Exception):
    """A folder that somebody else can write to, or somebody else's; its text says why."""


def private_folder(path: Path) -> Path:
    """Return ``path`` without links in it, made if it is not there, as a folder that this user alone can write to.

    Every folder around it belongs to this user or to root, and lets nobody else write, unless it lets them do so to
    files of their own only, as /tmp does. The folder itself belongs to this user, and is closed to others.

    Raises: NotPrivateError with what is not so; OSError if it cannot be made.
    """
    if not hasattr(os, "geteuid"):
        raise NotPrivateError("this system does not say who can write to a folder")
    if not path.is_absolute():
        raise NotPrivateError(f"'{path}' is not an absolute path")
    whole = Path(os.path.realpath(path))
    for folder in (*reversed(whole.parents), whole):
        try:
            found = folder.lstat()
        except FileNotFoundError:
            folder.mkdir(mode=0o700, exist_ok=True)  # what another process makes meanwhile is looked at too
            found = folder.lstat()
        _check_folder(folder, found, is_last=folder == whole)
    if found.st_mode & 0o077:
        whole.chmod(0o700)
    return whole


def _check_folder(folder: Path, found: os.stat_result, *, is_last: bool) -> None:
    if not stat.S_ISDIR(found.st_mode):  # nor a link, which is none of the path any more
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    owners = {os.geteuid()} if is_last else {os.geteuid(), 0}
    if found.st_uid not in owners:
        raise NotPrivateError(f"{folder} belongs to user {found.st_uid}, and this is user {os.geteuid()}")
    shared = not is_last and found.st_mode & stat.S_ISVTX
    if found.st_mode & _OTHERS and not shared:
        mode = stat.S_IMODE(found.st_mode)
        raise NotPrivateError(f"others than its owner can write to {folder} (mode {mode:04o})")


def read_private(file: Path) -> bytes | None:
    """Return the bytes of a file in a private folder; None if it is not there, or might be from somebody else.

    A folder that is private now may have been open once.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
            return None
        with os.fdopen(handle, "rb", closefd=False) as opened:
            return opened.read()
    finally:
        os.close(handle)
