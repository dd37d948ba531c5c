"""Start a program that does not import qsurgeon, so that every Python process that it starts does.

Python imports a module called ``sitecustomize`` when it starts. ``run`` puts the folder of ours first in PYTHONPATH,
which every child inherits, and sets a variable without which ours does nothing. No torch is imported here:
``qsurgeon run`` should not cost the program it starts the seconds that takes.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from qsurgeon.errors import UsageError

# Set below `qsurgeon run`: loaded models are announced on stderr. sitecustomize.py spells it out once more, because it
# must read it before it knows whether qsurgeon can be imported.
VARIABLE = "QSURGEON_RUN"
STARTUP = Path(__file__).with_name("startup")


def run(command: Sequence[str]) -> NoReturn:
    """Become ``command``: signals, the terminal and the exit code are its own from here on.

    Raises: UsageError if there is no command, or none by that name.
    """
    if not command:
        raise UsageError("no command to run: say qsurgeon run -- COMMAND ARGS...")
    program = shutil.which(command[0])
    if program is None:
        raise UsageError(
            f"no command '{command[0]}': it is not in PATH, and not an executable file "
            "(a script is run with: qsurgeon run -- python SCRIPT)"
        )
    # The first word stays as the user wrote it: programs tell by it what they were called as.
    os.execve(program, list(command), environment(os.environ))


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return ``given`` with what makes Python processes register qsurgeon."""
    before = given.get("PYTHONPATH", "").split(os.pathsep) if given.get("PYTHONPATH") else []
    paths = [str(STARTUP), *(path for path in before if path != str(STARTUP))]
    return {**given, VARIABLE: "1", "PYTHONPATH": os.pathsep.join(paths)}
