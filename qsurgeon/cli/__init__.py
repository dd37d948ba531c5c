"""The command line: parse, call one function, print. Results on stdout, messages and progress on stderr.

Exit codes: 0 done, 1 found something wrong or the environment failed, 2 the user's mistake, 130 stopped by Ctrl-C.
"""

import os
import sys

from qsurgeon.cli.commands import app
from qsurgeon.cli.printing import echo, tame_messages
from qsurgeon.errors import OtherRankError, QSurgeonError, in_words


def main() -> None:
    """Run the command line."""
    tame_messages()
    try:
        app(prog_name="qsurgeon")
    except OtherRankError:
        sys.exit(1)
    except QSurgeonError as error:
        sys.exit(_complain(str(error), 2))
    except BrokenPipeError:
        # Whoever read our output has enough; without this the interpreter complains while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        sys.exit(_complain(in_words(error), 1))


def _complain(message: str, code: int) -> int:
    echo(f"error: {message}", err=True)
    return code
