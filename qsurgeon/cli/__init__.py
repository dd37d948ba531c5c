"""The command line: parse, call one function, print. Results on stdout, messages and progress on stderr.

Exit codes: 0 done, 1 found something wrong or the environment failed, 2 the user's mistake, 130 stopped by Ctrl-C.
"""

import os
import sys

from typer.main import get_command

from qsurgeon.cli.commands import app
from qsurgeon.cli.lines import check
from qsurgeon.errors import OtherRankError, QSurgeonError, in_words

COMPLETION = "_QSURGEON_COMPLETE"  # set by a shell that asks how a line may go on


def main() -> None:
    """Run the command line."""
    try:
        command = get_command(app)
        if COMPLETION not in os.environ:
            check(sys.argv[1:], command)
        command(prog_name="qsurgeon")
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
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return code
